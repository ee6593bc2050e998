package main

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// The tables of flags are generated from their help: go test ./cmd/pillion -run FlagsInDocuments -update
func TestFlagsInDocumentsHaveTheirHelp(t *testing.T) {
	hasTable(t, "../../docs/agent.md", flagTable(t, newAgent().Flags(), map[string]string{
		"metrics-max-series": "[observability.md](observability.md#metrics)",
		"interception-mode":  "[tproxy.md](tproxy.md)",
		"access-log-filter":  "[observability.md](observability.md#access-log)",
		"dns-capture":        "[dns.md](dns.md)",
		"outbound-policy":    "[policy.md](policy.md)",
	}))
	hasTable(t, "../../docs/run.md", flagTable(t, newRun().Flags(), nil))
	hasTable(t, "../../docs/gateway.md", flagTable(t, newGateway().Flags(), nil))
}

// flagTable is a table of flags. references are links to other documents.
func flagTable(t *testing.T, flags *pflag.FlagSet, references map[string]string) string {
	t.Helper()
	table := "| Flag | Default | Meaning |\n|---|---|---|\n"
	flags.VisitAll(func(flag *pflag.Flag) {
		value := flag.DefValue
		switch {
		case value == "":
			value = "unset"
		case strings.HasSuffix(value, "m0s"):
			value = strings.TrimSuffix(value, "0s")
		}
		meaning, _, _ := strings.Cut(flag.Usage, " [$")
		meaning = codeWords.ReplaceAllString(meaning, "$1`$2`")
		if choices := strings.Split(flag.Value.Type(), "|"); len(choices) > 1 && !slices.Contains([]string{"true|false", "path|off"}, flag.Value.Type()) {
			meaning += ". One of `" + strings.Join(choices, "`, `") + "`"
		}
		if variable := injectedVariables[flag.Name]; variable != "" {
			meaning += ". Also `" + variable + "`"
		}
		if to := references[flag.Name]; to != "" {
			meaning += ". See " + to
		}
		table += "| `--" + flag.Name + "` | " + value + " | " + strings.ReplaceAll(meaning, "|", "\\|") + " |\n"
		delete(references, flag.Name)
	})
	if len(references) > 0 {
		t.Errorf("there are references for unknown flags: %v", references)
	}
	return table
}

// codeWords matches flags, paths and examples in a help text, after a word boundary.
var codeWords = regexp.MustCompile(`(^|[ (])(--[a-z-]+[a-z]|/[a-z/.-]+[a-z/]|[0-9]+,[0-9:]+|"[^"]+"|\*)`)

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
		http2Rules += "| `" + r.Name() + "` | " + r.Text() + " |\n"
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
