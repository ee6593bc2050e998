// Command testreport reads the output of `go test -json` and prints it for people: one line for each package, the whole
// output of each test that failed or skipped, and the sum as the last line.
//
// It fails when a test failed, when a package did not build, and, with CI set in the environment, when a test was
// skipped: a promise that was not checked is not kept.
//
// With -failed FILE it writes the tests to run again to the file, if nothing but a few tests failed: in each line a package and a
// pattern for -run. Otherwise the file is empty.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// event is what `go test -json` writes for each step of a test or a package; see `go doc test2json`.
type event struct {
	Action     string
	Package    string
	ImportPath string // of a package that is being built
	Test       string
	Elapsed    float64
	Output     string
}

func main() {
	failed := flag.String("failed", "", "write the tests that may run again to this `file`")
	flag.Parse()
	r := newReport(os.Stdout)
	err := r.read(os.Stdin)
	passed := err == nil && r.close(os.Getenv("CI") != "")
	if *failed != "" && err == nil {
		err = os.WriteFile(*failed, []byte(r.again()), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
	}
	if !passed || err != nil {
		os.Exit(1)
	}
}

// report counts results and keeps the output of each test until the test has passed or failed.
type report struct {
	out                     io.Writer
	started                 time.Time
	output                  map[string]*strings.Builder // by package and test
	inPackage               map[string]int              // tests that passed, by package
	passed, failed, skipped int
	packages, broken        int
	failures                map[string]map[string]bool // top-level tests that failed, by package
	other                   bool                       // something but a test failed
}

// maxAgain is the largest number of top-level tests that may run again. More have a common cause.
const maxAgain = 3

func newReport(out io.Writer) *report {
	return &report{
		out: out, started: time.Now(), output: map[string]*strings.Builder{}, inPackage: map[string]int{}, failures: map[string]map[string]bool{},
	}
}

func (r *report) read(from io.Reader) error {
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			// A line that is not an event comes from the toolchain, such as a download's progress.
			fmt.Fprintln(r.out, lines.Text())
			continue
		}
		r.add(e)
	}
	return lines.Err()
}

func (r *report) add(e event) {
	key := e.Package + "\x00" + e.Test
	switch e.Action {
	case "output":
		if strings.HasPrefix(e.Output, "=== ") { // RUN, PAUSE, CONT, NAME
			return
		}
		if r.output[key] == nil {
			r.output[key] = new(strings.Builder)
		}
		r.output[key].WriteString(e.Output)
	case "build-output":
		fmt.Fprint(r.out, e.Output)
	case "build-fail":
		r.broken++
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.endPackage(e, key)
		} else {
			r.endTest(e, key)
		}
		delete(r.output, key)
	}
}

func (r *report) endTest(e event, key string) {
	switch e.Action {
	case "pass":
		r.passed++
		r.inPackage[e.Package]++
		return
	case "fail":
		r.failed++
		top, _, _ := strings.Cut(e.Test, "/")
		if r.failures[e.Package] == nil {
			r.failures[e.Package] = map[string]bool{}
		}
		r.failures[e.Package][top] = true
	case "skip":
		r.skipped++
	}
	fmt.Fprint(r.out, r.outputOf(key))
}

// endPackage prints the package's line. Its own output matters only when it failed: a panic, a timeout, or what
// TestMain found left over.
func (r *report) endPackage(e event, key string) {
	switch e.Action {
	case "fail":
		r.packages++
		r.broken++
		r.other = r.other || r.failures[e.Package] == nil
		fmt.Fprint(r.out, r.outputOf(key))
	case "pass":
		r.packages++
		fmt.Fprintf(r.out, "ok  \t%s\t%d tests\t%.1fs\n", e.Package, r.inPackage[e.Package], e.Elapsed)
	}
}

func (r *report) outputOf(key string) string {
	if r.output[key] == nil {
		return ""
	}
	return r.output[key].String()
}

// again returns the lines for -failed, after close.
func (r *report) again() string {
	var lines strings.Builder
	n := 0
	for _, name := range slices.Sorted(maps.Keys(r.failures)) {
		tests := slices.Sorted(maps.Keys(r.failures[name]))
		n += len(tests)
		fmt.Fprintf(&lines, "%s ^(%s)$\n", name, strings.Join(tests, "|"))
	}
	if r.other || r.skipped > 0 || n > maxAgain {
		return ""
	}
	return lines.String()
}

// close prints the sum and reports whether all is well.
func (r *report) close(ci bool) bool {
	// Tests that never ended, because their package panicked or timed out, have their last output here.
	for key, output := range r.output {
		if _, test, _ := strings.Cut(key, "\x00"); test != "" {
			fmt.Fprintf(r.out, "--- NOT ENDED: %s\n%s", test, output)
			r.failed++
			r.other = true
		}
	}
	fmt.Fprintf(r.out, "\n%d tests passed, %d failed, %d skipped, in %d packages and %.0f s\n",
		r.passed, r.failed, r.skipped, r.packages, time.Since(r.started).Seconds())
	switch {
	case r.failed+r.broken > 0:
		fmt.Fprintln(r.out, "FAIL")
	case r.passed == 0:
		fmt.Fprintln(r.out, "FAIL: no test ran")
	case r.skipped > 0 && ci:
		fmt.Fprintln(r.out, "FAIL: in CI no test may skip")
	default:
		fmt.Fprintln(r.out, "PASS")
		return true
	}
	return false
}
