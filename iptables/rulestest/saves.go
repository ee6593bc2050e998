package rulestest

import (
	"os"
	"path/filepath"
	"testing"
)

// Saves returns the files in dir: outputs of real iptables-save, of both flavours and families, with rules of many
// origins.
func Saves(t testing.TB, dir string) map[string]string {
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no saves: %v", err)
	}
	texts := make(map[string]string)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts[filepath.Base(file)] = string(text)
	}
	return texts
}
