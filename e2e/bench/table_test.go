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
	// What is promised: pillion's share of HAProxy's figure, or a value of its own, at most. 0 promises nothing; the
	// row informs.
	ratioAtMost, atMost float64
}

func (r *row) add(name string, sample float64) {
	if r.samples == nil {
		r.samples = make(map[string][]float64)
	}
	r.samples[name] = append(r.samples[name], sample)
}

// ratio is the median over the rounds of pillion's sample to HAProxy's, and false when one of them was not measured.
func (r *row) ratio() (float64, bool) {
	ours, theirs := r.samples[namePillion], r.samples[nameHAProxy]
	if len(ours) == 0 || len(ours) != len(theirs) {
		return 0, false
	}
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = ours[i] / theirs[i]
	}
	return median(ratios), true
}

// verdict is "ok" or "MISSED", and empty where nothing is promised or too little was measured to tell.
func (r *row) verdict() string {
	measured, limit := 0.0, 0.0
	switch {
	case r.atMost > 0 && len(r.samples[namePillion]) > 0:
		measured, limit = median(r.samples[namePillion]), r.atMost
	case r.ratioAtMost > 0:
		ratio, ok := r.ratio()
		if !ok {
			return ""
		}
		measured, limit = ratio, r.ratioAtMost
	default:
		return ""
	}
	if measured > limit {
		return "MISSED"
	}
	return "ok"
}

func (r *row) target() string {
	switch {
	case r.atMost > 0:
		return fmt.Sprintf("≤ %s %s", threeDigits(r.atMost), r.unit)
	case r.ratioAtMost > 0:
		return fmt.Sprintf("≤ %.2f × HAProxy", r.ratioAtMost)
	}
	return ""
}

// writeTable writes the figures and the facts about the machine that they were measured on. loadBefore is its load
// before the first of them.
func writeTable(w io.Writer, rows []*row, loadBefore string) {
	columns := []string{namePillion, nameHAProxy, nameHAProxySplice, namePlain}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(table, "figure\tunit\t%s\tpillion/HAProxy\ttarget\t\t\n", strings.Join(columns, "\t"))
	for _, r := range rows {
		fmt.Fprintf(table, "%s\t%s\t", r.title, r.unit)
		for _, column := range columns {
			if samples := r.samples[column]; len(samples) > 0 {
				fmt.Fprint(table, threeDigits(median(samples)))
			}
			fmt.Fprint(table, "\t")
		}
		if ratio, ok := r.ratio(); ok {
			fmt.Fprintf(table, "%.2f", ratio)
		}
		fmt.Fprintf(table, "\t%s\t%s\t\n", r.target(), r.verdict())
	}
	table.Flush()
	fmt.Fprintf(w, "Medians; the ratio is the median of the rounds' ratios. %s\n", machine(loadBefore))
}

// machine says what the figures depend on besides the programs.
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

// machineLoad is the load average of the last minute. Others' work on the proxy's core costs CPU time of the proxy, too:
// caches grow cold, and the Go scheduler moves work away from a thread that was interrupted in a system call.
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

// threeDigits writes a figure with as many decimals as mean something.
func threeDigits(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
