package prestart

import "testing"

// Other commands start no process.
func TestOnlyRunHasAHelper(t *testing.T) {
	for _, args := range [][]string{nil, {"pillion"}, {"pillion", "agent", "run"}, {"pillion", "--help"}, {Marker, "8"}, {Marker, "run"}} {
		if runs(args) {
			t.Errorf("runs(%q)", args)
		}
	}
	if !runs([]string{"pillion", "run", "--", "true"}) {
		t.Error("`pillion run` is not recognised")
	}
	if early != nil {
		t.Error("this process has a helper")
	}
}

// A helper serves one sandbox.
func TestAnEarlyHelperIsReturnedOnce(t *testing.T) {
	want := &Process{ID: 7}
	early = want
	if got := Start(); got != want || early != nil {
		t.Errorf("Start = %v, and %v is left", got, early)
	}
}
