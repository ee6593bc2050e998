package arch

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
)

// moduleFile is the output of `go mod edit -json` for go.mod.
type moduleFile struct {
	Require []struct {
		Path     string
		Indirect bool
	}
	Replace []any
	Exclude []any
}

func readModuleFile(t *testing.T) moduleFile {
	t.Helper()
	out, err := command("go", "mod", "edit", "-json")
	if err != nil {
		t.Fatal(err)
	}
	var file moduleFile
	if err := json.Unmarshal([]byte(out), &file); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestTheModuleHasNoReplaceOrExclude(t *testing.T) {
	file := readModuleFile(t)
	if len(file.Replace)+len(file.Exclude) > 0 {
		t.Error("go.mod has a replace or an exclude: an importing module would build other code than the tested one")
	}
}

// The golden file has one line for each direct dependency: its path, a space, and its reason. Every new dependency needs a
// line, so that a review sees the reason.
func TestEveryDirectDependencyHasAReason(t *testing.T) {
	const golden = "testdata/direct-dependencies.golden"
	text, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	var explained []string
	for line := range strings.Lines(string(text)) {
		path, why, _ := strings.Cut(strings.TrimSpace(line), " ")
		if len(strings.Fields(why)) < 3 {
			t.Errorf("%s: %s has no reason", golden, path)
		}
		explained = append(explained, path)
	}
	var direct []string
	for _, require := range readModuleFile(t).Require {
		if !require.Indirect {
			direct = append(direct, require.Path)
		}
	}
	slices.Sort(explained)
	slices.Sort(direct)
	for _, path := range direct {
		if !slices.Contains(explained, path) {
			t.Errorf("%s is a new direct dependency: add it to %s with the reason", path, golden)
		}
	}
	for _, path := range explained {
		if !slices.Contains(direct, path) {
			t.Errorf("%s is not a direct dependency any more: remove it from %s", path, golden)
		}
	}
}
