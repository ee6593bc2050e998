package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	passes    = `{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.1}` + "\n" + `{"Action":"pass","Package":"p","Elapsed":0.2}`
	skips     = `{"Action":"output","Package":"p","Test":"TestB","Output":"needs root\n"}` + "\n" + `{"Action":"skip","Package":"p","Test":"TestB"}`
	fails     = `{"Action":"output","Package":"p","Test":"TestC","Output":"got 1\n"}` + "\n" + `{"Action":"fail","Package":"p","Test":"TestC"}`
	hangs     = `{"Action":"output","Package":"p","Test":"TestD","Output":"waits\n"}`
	partFails = `{"Action":"output","Package":"p","Test":"TestE/x","Output":"got 2\n"}` + "\n" + `{"Action":"fail","Package":"p","Test":"TestE/x"}`
	ends      = `{"Action":"output","Package":"p","Output":"left over\n"}` + "\n" + `{"Action":"fail","Package":"p"}`
	unbuilt   = `{"Action":"build-output","ImportPath":"p","Output":"x.go:1: no\n"}` + "\n" + `{"Action":"build-fail","ImportPath":"p"}`
)

// many are failures of tests.
func many(names ...string) string {
	var events []string
	for _, name := range names {
		events = append(events, strings.ReplaceAll(fails, "TestC", name))
	}
	return strings.Join(events, "\n")
}

func TestTheReportTellsSuccessFromFailure(t *testing.T) {
	for _, c := range []struct {
		name, events string
		ci, want     bool
		says         string
		again        string
	}{
		{"a pass", passes, true, true, "1 tests passed, 0 failed, 0 skipped", ""},
		{"a skip on a laptop", passes + "\n" + skips, false, true, "needs root", ""},
		{"a skip in CI", passes + "\n" + skips, true, false, "no test may skip", ""},
		{"a failure", passes + "\n" + fails, false, false, "got 1", "p ^(TestC)$\n"},
		{"a failure of a part", fails + "\n" + partFails + "\n" + ends, false, false, "got 2", "p ^(TestC|TestE)$\n"},
		{"a failure and a skip", skips + "\n" + fails, false, false, "got 1", ""},
		{"a failure of a package alone", fails + "\n" + strings.ReplaceAll(ends, `"p"`, `"q"`), false, false, "left over", ""},
		{"failures and a test that never ends", fails + "\n" + hangs, false, false, "NOT ENDED: TestD", ""},
		{"many failures", fails + "\n" + many("TestF", "TestG", "TestH"), false, false, "got 1", ""},
		{"a test that never ends", passes + "\n" + hangs, false, false, "NOT ENDED: TestD", ""},
		{"a package that does not build", passes + "\n" + unbuilt, false, false, "x.go:1: no", ""},
		{"nothing at all", "", false, false, "no test ran", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			r := newReport(&out)
			if err := r.read(strings.NewReader(c.events)); err != nil {
				t.Fatal(err)
			}
			if got := r.close(c.ci); got != c.want {
				t.Errorf("success: got %v, want %v", got, c.want)
			}
			if !strings.Contains(out.String(), c.says) {
				t.Errorf("output lacks %q:\n%s", c.says, &out)
			}
			if got := r.again(); got != c.again {
				t.Errorf("to run again: %q, want %q", got, c.again)
			}
		})
	}
}

func TestFailedTestsRunOnceMore(t *testing.T) {
	for _, c := range []struct {
		name, failed, events string
		code                 int
		says                 string
	}{
		{"and pass", "p ^(TestC)$\n", passes, 0, "passed alone:\np ^(TestC)$\n"},
		{"and fail", "p ^(TestC)$\n", fails, 1, "got 1"},
		{"and one of two fails", "p ^(TestC)$\nq ^(TestA)$\n", fails, 1, "got 1"},
		{"unless something else failed", "", passes, 1, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			file, command := filepath.Join(dir, "failed"), filepath.Join(dir, "command")
			events := strings.ReplaceAll(c.events, "TestC", "TestX")
			script := fmt.Sprintf("[ \"$#\" = 3 ] && [ \"$1\" = -run ] || exit 2\ncat <<'E'\n%s\nE\n[ %d = 0 ]\n", events, c.code)
			if err := os.WriteFile(file, []byte(c.failed), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(command, []byte(script), 0o644); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("../again", file, "sh", command).CombinedOutput()
			if code := 0; err != nil || c.code != 0 {
				exit, ok := err.(*exec.ExitError)
				if ok {
					code = exit.ExitCode()
				}
				if !ok || code != c.code {
					t.Errorf("%v, want exit code %d", err, c.code)
				}
			}
			if !strings.Contains(string(out), c.says) {
				t.Errorf("output lacks %q:\n%s", c.says, out)
			}
		})
	}
}
