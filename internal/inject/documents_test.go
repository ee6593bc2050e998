package inject

import (
	"os"
	"strings"
	"testing"
)

// go test ./internal/inject -run Document -update writes the table.
func TestTheDocumentHasEveryAnnotation(t *testing.T) {
	const document, header = "../../docs/inject.md", "| Annotation | Value | Meaning | Flag for a default |\n|---|---|---|---|\n"
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	want := ""
	for _, a := range Annotations {
		flag := ""
		if a.Option != "" {
			flag = "`--sidecar-" + a.Option + "`"
		}
		want += "| `" + a.Name + "` | " + a.Value + " | " + a.Meaning + " | " + flag + " |\n"
	}
	before, rest, found := strings.Cut(string(text), header)
	got, after, _ := strings.Cut(rest, "\n\n")
	if !found {
		t.Fatalf("%s has no table of annotations", document)
	}
	if got += "\n"; got == want {
		return
	}
	if !*update {
		t.Errorf("%s needs the table\n%s", document, want)
	} else if err := os.WriteFile(document, []byte(before+header+want+"\n"+after), 0o644); err != nil {
		t.Error(err)
	}
}

// Every PILLION_ variable that the injection sets must be a flag of the agent, or it has no effect.
func TestTheAgentHasTheFlagsThatAreSet(t *testing.T) {
	text, err := os.ReadFile("../../docs/agent.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range ownVariables {
		flag, ours := strings.CutPrefix(name, "PILLION_")
		flag = "| `--" + strings.ReplaceAll(strings.ToLower(flag), "_", "-") + "` |"
		if ours && !strings.Contains(string(text), flag) {
			t.Errorf("docs/agent.md has no row %s for %s", flag, name)
		}
	}
}
