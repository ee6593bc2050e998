package inject

import (
	"os"
	"strings"
	"testing"
)

func TestTheDocumentHasEveryAnnotation(t *testing.T) {
	text, err := os.ReadFile("../../docs/inject.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	for _, a := range Annotations {
		rows = append(rows, "| `"+a.Name+"` | "+a.Value+" | "+a.Meaning+" |\n")
	}
	want := "| Annotation | Value | Meaning |\n|---|---|---|\n" + strings.Join(rows, "") + "\n"
	if !strings.Contains(string(text), want) {
		t.Errorf("docs/inject.md needs the table\n%s", want)
	}
}

// What the injection sets in the environment of the agent has to be a flag of it, or nobody would heed it.
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
