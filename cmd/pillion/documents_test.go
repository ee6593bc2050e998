package main

import (
	"os"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
)

func TestAgentDocumentHasEveryFlagWithItsDefault(t *testing.T) {
	const document = "../../docs/agent.md"
	text := read(t, document)
	newAgent().Flags().VisitAll(func(flag *pflag.Flag) {
		normal := strings.TrimSuffix(flag.DefValue, "0s")
		if flag.DefValue == "" {
			normal = "unset"
		}
		_, row, found := strings.Cut(text, "| `--"+flag.Name+"` | ")
		row, _, _ = strings.Cut(row, "\n")
		if !found || !strings.HasPrefix(row, flag.DefValue+" |") && !strings.HasPrefix(row, normal+" |") {
			t.Errorf("%s has no row for --%s with its default %q", document, flag.Name, flag.DefValue)
		}
		if variable := injectedVariables[flag.Name]; variable != "" && !strings.Contains(row, "`"+variable+"`") {
			t.Errorf("%s: the row of --%s lacks the variable %s", document, flag.Name, variable)
		}
	})
}

// The tables of reasons are generated from flow.Explanations: go test ./cmd/pillion -run Reasons -update
func TestReasonsDocumentHasTheTablesOfReasons(t *testing.T) {
	const document = "../../docs/reasons.md"
	meanings, flags := "| Reason | Meaning |\n|---|---|\n", "| Reason | Connection | Request | `response_code_details` |\n|---|---|---|---|\n"
	for _, e := range flow.Explanations {
		meanings += "| `" + string(e.Reason) + "` | " + e.Render(func(setting string) string {
			flag := settingFlag(setting)
			if newAgent().Flags().Lookup(flag[len("--"):]) == nil {
				t.Errorf("%s names %s, but there is no %s", e.Reason, setting, flag)
			}
			return flag
		}) + " |\n"
		if e.Flags == "" && e.RequestFlags == "" && e.Details == "" {
			continue
		}
		flags += "| `" + string(e.Reason) + "` |"
		for _, cell := range []string{e.Flags, e.RequestFlags, e.Details} {
			if cell != "" {
				cell = "`" + cell + "` "
			}
			flags += " " + cell + "|"
		}
		flags += "\n"
	}
	for _, table := range []string{meanings, flags} {
		hasTable(t, document, table)
	}
}

// hasTable compares a table of a document. It finds the table by its head; with -update it writes it.
func hasTable(t *testing.T, document, table string) {
	t.Helper()
	text := read(t, document)
	head, _, _ := strings.Cut(table, "\n")
	before, rest, found := strings.Cut(text, head+"\n")
	rows := strings.SplitAfter(rest, "\n")
	n := 0
	for n < len(rows) && strings.HasPrefix(rows[n], "|") {
		n++
	}
	if found && head+"\n"+strings.Join(rows[:n], "") == table {
		return
	}
	if !*update || !found {
		t.Errorf("%s needs the table\n%s\nthe flag -update writes it", document, table)
		return
	}
	if err := os.WriteFile(document, []byte(before+table+strings.Join(rows[n:], "")), 0o644); err != nil {
		t.Fatal(err)
	}
}

// The tables of rules are generated from the codecs: go test ./cmd/pillion -run Rules -update
func TestHTTPDocumentHasTheTablesOfRules(t *testing.T) {
	http1Rules, http2Rules := "| HTTP/1 rule | Meaning |\n|---|---|\n", "| HTTP/2 rule | Meaning |\n|---|---|\n"
	for _, e := range http1.Errors() {
		http1Rules += "| `" + e.Name() + "` | " + e.Error() + " |\n"
	}
	for _, r := range http2.Rules() {
		http2Rules += "| `" + r.Name() + "` | " + r.Error() + " |\n"
	}
	hasTable(t, "../../docs/http.md", http1Rules)
	hasTable(t, "../../docs/http.md", http2Rules)
}

// An operator who sees a closed gate or a reason finds in the document what to do.
func TestTroubleshootingKnowsEveryReason(t *testing.T) {
	const document = "../../docs/troubleshooting.md"
	text := read(t, document)
	for _, e := range flow.Explanations {
		if !strings.Contains(text, "| `"+string(e.Reason)+"`") && !strings.Contains(text, ", `"+string(e.Reason)+"`") {
			t.Errorf("%s has no row for %s", document, e.Reason)
		}
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
