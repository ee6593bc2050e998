package rulestest

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
)

// Golden compares got with testdata/name, or writes the file with -update.
func Golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s changed; if that is meant, run the test with -update\ngot:\n%s\nwant:\n%s", file, got, want)
	}
}

var update = flag.Bool("update", false, "write the golden files anew")
