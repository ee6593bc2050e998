package mesh

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// The document lists each field whose presence is a finding.
func TestTheDocumentListsTheFindings(t *testing.T) {
	const path = "../../docs/mesh.md"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(text), "<!-- findings -->\n")
	now, after, closed := strings.Cut(rest, "<!-- end -->\n")
	if !found || !closed {
		t.Fatal("docs/mesh.md has no place for the table")
	}
	want := findingsTable()
	if now == want {
		return
	}
	if *update {
		if err := os.WriteFile(path, []byte(before+"<!-- findings -->\n"+want+"<!-- end -->\n"+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("docs/mesh.md has another table; go test ./internal/mesh -update writes it:\n%s", want)
}

func findingsTable() string {
	classes := []string{"security", "traffic", "cosmetic"}
	fields, messages := map[string]map[string][]string{}, []string{}
	for row := range Rows() {
		if row.Treatment == "decoded" || row.Treatment == "ignored" {
			continue
		}
		if fields[row.Message] == nil {
			fields[row.Message] = map[string][]string{}
			messages = append(messages, row.Message)
		}
		list := fields[row.Message][row.Treatment]
		if name := "`" + row.Field + "`"; !slices.Contains(list, name) { // a message of several uses has several tables
			fields[row.Message][row.Treatment] = append(list, name)
		}
	}
	var b strings.Builder
	b.WriteString("| Message | Security | Traffic | Cosmetic |\n|---|---|---|---|\n")
	for _, message := range messages {
		short := strings.TrimPrefix(strings.TrimPrefix(message, "envoy.config."), "envoy.extensions.")
		fmt.Fprintf(&b, "| `%s` |", short)
		for _, class := range classes {
			fmt.Fprintf(&b, " %s |", strings.Join(fields[message][class], ", "))
		}
		b.WriteByte('\n')
	}
	return b.String()
}
