package main

import (
	"strings"
	"testing"
)

const (
	passes  = `{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.1}` + "\n" + `{"Action":"pass","Package":"p","Elapsed":0.2}`
	skips   = `{"Action":"output","Package":"p","Test":"TestB","Output":"needs root\n"}` + "\n" + `{"Action":"skip","Package":"p","Test":"TestB"}`
	fails   = `{"Action":"output","Package":"p","Test":"TestC","Output":"got 1\n"}` + "\n" + `{"Action":"fail","Package":"p","Test":"TestC"}`
	hangs   = `{"Action":"output","Package":"p","Test":"TestD","Output":"waits\n"}`
	unbuilt = `{"Action":"build-output","ImportPath":"p","Output":"x.go:1: no\n"}` + "\n" + `{"Action":"build-fail","ImportPath":"p"}`
)

func TestTheReportTellsSuccessFromFailure(t *testing.T) {
	for _, c := range []struct {
		name, events string
		ci, want     bool
		says         string
	}{
		{"a pass", passes, true, true, "1 tests passed, 0 failed, 0 skipped"},
		{"a skip on a laptop", passes + "\n" + skips, false, true, "needs root"},
		{"a skip in CI", passes + "\n" + skips, true, false, "no test may skip"},
		{"a failure", passes + "\n" + fails, false, false, "got 1"},
		{"a test that never ends", passes + "\n" + hangs, false, false, "NOT ENDED: TestD"},
		{"a package that does not build", passes + "\n" + unbuilt, false, false, "x.go:1: no"},
		{"nothing at all", "", false, false, "no test ran"},
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
		})
	}
}
