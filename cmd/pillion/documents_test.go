package main

import (
	"os"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// README is read before the program is run: what it says of flags and reasons has to be what is built.
func TestREADMENamesEveryFlagWithItsDefaultAndEveryReason(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	readme := string(text)
	newAgent().Flags().VisitAll(func(flag *pflag.Flag) {
		normal := strings.TrimSuffix(flag.DefValue, "0s")
		if flag.Name == "help" {
			return
		}
		if normal == "" && flag.DefValue == "" {
			normal = "none"
		}
		if !strings.Contains(readme, "| `--"+flag.Name+"` | "+flag.DefValue+" |") && !strings.Contains(readme, "| `--"+flag.Name+"` | "+normal+" |") {
			t.Errorf("README has no row for --%s with its default %s", flag.Name, flag.DefValue)
		}
	})
	for _, e := range flow.Explanations {
		e.Render(func(setting string) string {
			if flag := settingFlag(setting); newAgent().Flags().Lookup(flag[len("--"):]) == nil {
				t.Errorf("%s names %s, but there is no %s", e.Reason, setting, flag)
			}
			return ""
		})
		if row := "| `" + string(e.Reason) + "` | " + e.Render(settingFlag) + " |"; !strings.Contains(readme, row) {
			t.Errorf("README lacks the row %s", row)
		}
		if e.Flags == "" && e.RequestFlags == "" && e.Details == "" {
			continue
		}
		row := "| `" + string(e.Reason) + "` |"
		for _, cell := range []string{e.Flags, e.RequestFlags, e.Details} {
			if cell != "" {
				cell = "`" + cell + "` "
			}
			row += " " + cell + "|"
		}
		if !strings.Contains(readme, row) {
			t.Errorf("README lacks the row %s", row)
		}
	}
}
