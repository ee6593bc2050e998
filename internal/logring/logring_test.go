package logring

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"unicode/utf8"
)

func text(t *testing.T, r *Ring) string {
	t.Helper()
	var b strings.Builder
	if n, err := r.WriteTo(&b); err != nil || int(n) != b.Len() {
		t.Fatalf("%d bytes of %d, %v", n, b.Len(), err)
	}
	return b.String()
}

func TestTheLastThousandLinesAreKeptInOrder(t *testing.T) {
	var r Ring
	if got := text(t, &r); got != "" {
		t.Errorf("an empty ring has %q", got)
	}
	want := ""
	for i := range 2500 {
		line := fmt.Sprintf("line %d\n", i)
		if n, err := r.Write([]byte(line)); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
		if i >= 2500-MaxLines {
			want += line
		}
	}
	if got := text(t, &r); got != want {
		t.Errorf("got %d lines, from %.20q", strings.Count(got, "\n"), got)
	}
}

func TestBytesAreBounded(t *testing.T) {
	var r Ring
	for i := range 500 {
		fmt.Fprintf(&r, "%d %s\n", i, strings.Repeat("é", maxLine))
	}
	got := text(t, &r)
	if len(got) > MaxBytes || len(got) < MaxBytes-maxLine {
		t.Errorf("%d bytes are kept, want at most %d and nearly as many", len(got), MaxBytes)
	}
	for line := range strings.Lines(got) {
		if len(line) > maxLine || !strings.HasSuffix(line, "…\n") || !utf8.ValidString(line) {
			t.Fatalf("a line of %d bytes ends in %q", len(line), line[len(line)-8:])
		}
	}
	if !strings.Contains(got, "\n499 ") {
		t.Error("the newest line is missing")
	}
}

func TestALineOfTheMaximumIsWhole(t *testing.T) {
	var r Ring
	line := strings.Repeat("x", maxLine-1) + "\n"
	r.Write([]byte(line))
	if got := text(t, &r); got != line {
		t.Errorf("%d bytes, ending in %q", len(got), got[len(got)-4:])
	}
}

func TestTheHandlerAddsTextWithoutQueriesAndRequestIDs(t *testing.T) {
	var r Ring
	level := new(slog.LevelVar)
	log := slog.New(r.Handler(level))
	log.Debug("below the level")
	level.Set(slog.LevelDebug)
	log.Debug("request", "path", "/login?token=hunter2", "request_id", "an-id", "status", 200)
	got := text(t, &r)
	if strings.Count(got, "\n") != 1 || !strings.HasSuffix(got, " level=DEBUG msg=request path=/login status=200\n") {
		t.Errorf("%q", got)
	}
}
