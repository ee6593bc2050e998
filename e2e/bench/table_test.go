package bench

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// row is one figure: a sample of every round for each contender.
type row struct {
	title, unit string
	samples     map[string][]float64
	promises    []promise // empty: for information only
}

// promise is an upper bound of a figure: a multiple of another contender's figure, or an absolute value if of is empty.
type promise struct {
	atMost float64
	of     string
}

func (p promise) in(unit string) string {
	if p.of == "" {
		return fmt.Sprintf("≤ %s %s", threeDigits(p.atMost), unit)
	}
	return fmt.Sprintf("≤ %.2f × %s", p.atMost, p.of)
}

func (r *row) add(name string, sample float64) {
	if r.samples == nil {
		r.samples = make(map[string][]float64)
	}
	r.samples[name] = append(r.samples[name], sample)
}

// ratio returns the median over the rounds of pillion's sample divided by the other contender's. It returns false if one of
// them was not measured.
func (r *row) ratio(to string) (float64, bool) {
	ours, theirs := r.samples[namePillion], r.samples[to]
	if len(ours) == 0 || len(ours) != len(theirs) {
		return 0, false
	}
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = ours[i] / theirs[i]
	}
	return median(ratios), true
}

// measured returns the value that a promise bounds, or false if it was not measured.
func (r *row) measured(p promise) (float64, bool) {
	if p.of != "" {
		return r.ratio(p.of)
	}
	if len(r.samples[namePillion]) == 0 {
		return 0, false
	}
	return median(r.samples[namePillion]), true
}

// verdict returns "MISSED" if a promise is broken, "ok" if all are kept, and "" if there is no promise or one was not
// measured.
func (r *row) verdict() string {
	kept := 0
	for _, p := range r.promises {
		measured, ok := r.measured(p)
		if ok && measured > p.atMost {
			return "MISSED"
		}
		if ok {
			kept++
		}
	}
	if kept == 0 || kept < len(r.promises) {
		return ""
	}
	return "ok"
}

func (r *row) target() string {
	var targets []string
	for _, p := range r.promises {
		targets = append(targets, p.in(r.unit))
	}
	return strings.Join(targets, ", ")
}

// writeTable writes the figures and a description of the machine. loadBefore is the machine's load before the first figure.
func writeTable(w io.Writer, rows []*row, loadBefore string) {
	absent := func(name string) bool {
		return !slices.ContainsFunc(rows, func(r *row) bool { return len(r.samples[name]) > 0 })
	}
	columns := slices.DeleteFunc(slices.Clone(columns), absent)
	ratios := slices.DeleteFunc([]string{nameHAProxy, nameReverseProxy, nameSilent, nameUnrouted, nameDirect}, absent)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(table, "figure\tunit\t%s\t", strings.Join(columns, "\t"))
	for _, name := range ratios {
		fmt.Fprintf(table, "÷ %s\t", name)
	}
	fmt.Fprint(table, "target\t\t\n")
	for _, r := range rows {
		fmt.Fprintf(table, "%s\t%s\t", r.title, r.unit)
		for _, name := range columns {
			if samples := r.samples[name]; len(samples) > 0 {
				fmt.Fprint(table, threeDigits(median(samples)))
			}
			fmt.Fprint(table, "\t")
		}
		for _, name := range ratios {
			if ratio, ok := r.ratio(name); ok {
				fmt.Fprintf(table, "%.2f", ratio)
			}
			fmt.Fprint(table, "\t")
		}
		fmt.Fprintf(table, "%s\t%s\t\n", r.target(), r.verdict())
	}
	table.Flush()
	fmt.Fprintf(w, "Medians; a ratio (÷) is pillion's share, the median of the rounds' ratios. %s\n", machine(loadBefore))
}

// machine describes the machine, its load and the versions that the figures depend on.
func machine(loadBefore string) string {
	var name unix.Utsname
	unix.Uname(&name)
	model := "unknown processor"
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	return fmt.Sprintf("Linux %s, %d cores (%s), load %s before and %s after (the benchmark's own is about 2), %s, HAProxy %s.",
		bytes.TrimRight(name.Release[:], "\x00"), runtime.NumCPU(), model, loadBefore, machineLoad(), runtime.Version(), haproxyVersion())
}

// machineLoad returns the load average of the last minute. Other work on the proxy's core also increases the proxy's CPU
// time: caches become cold, and the Go scheduler moves work away from a thread that was interrupted in a system call.
func machineLoad() string {
	averages, _ := os.ReadFile("/proc/loadavg")
	lastMinute, _, _ := strings.Cut(string(averages), " ")
	return lastMinute
}

func median(samples []float64) float64 {
	sorted := slices.Sorted(slices.Values(samples))
	middle := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}

// threeDigits formats a figure with three significant digits.
func threeDigits(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
