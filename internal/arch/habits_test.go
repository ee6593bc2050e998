package arch

import (
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestEveryPackageSaysOnceWhatItIsFor(t *testing.T) {
	for _, r := range rooms(t) {
		own, _ := r.files()
		var in []string
		for _, name := range own {
			file := parse(t, name)
			if file.Doc == nil {
				continue
			}
			in = append(in, filepath.Base(name))
			text := file.Doc.Text()
			start := "Package " + r.Name + " "
			if r.Name == "main" {
				start = "Command " + filepath.Base(r.Dir) + " "
			}
			if !strings.HasPrefix(text, start) {
				t.Errorf("%s: the package comment begins %q, not %q: the first sentence is the package's duty", name, firstLine(text), start)
			}
		}
		if len(own) > 0 && len(in) != 1 {
			t.Errorf("%s has %d package comments (%v), and needs one", r.path(), len(in), in)
		}
	}
}

func TestNoRoomIsAJunkDrawer(t *testing.T) {
	for _, r := range rooms(t) {
		for _, part := range strings.Split(r.path(), "/") {
			if slices.Contains([]string{"util", "utils", "common", "helper", "helpers", "types", "misc", "shared"}, part) {
				t.Errorf("%s: %q names nothing; name the room for what it gives", r.path(), part)
			}
		}
	}
}

func TestBothDirectionsAreBuiltAlike(t *testing.T) {
	files := make(map[string][]string)
	for _, r := range rooms(t) {
		if r.path() == "inbound" || r.path() == "outbound" {
			files[r.path()] = r.GoFiles
		}
	}
	if !slices.Equal(files["inbound"], files["outbound"]) {
		t.Errorf("inbound has %v and outbound has %v: who knows one finds their way in the other",
			files["inbound"], files["outbound"])
	}
}

func TestEveryFileIsFormatted(t *testing.T) {
	for _, r := range rooms(t) {
		own, tests := r.files()
		for _, name := range append(own, tests...) {
			source, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			formatted, err := format.Source(source)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			} else if string(formatted) != string(source) {
				t.Errorf("%s: gofmt would change it", name)
			}
		}
	}
}

// sleepers are the test files that may call time.Sleep, and what for: an interval that is itself the thing under test,
// or the pause between two looks at something that announces nothing.
var sleepers = map[string]string{
	"e2e/bench/figures_test.go":          "figures are taken over an interval",
	"e2e/bench/proxy_test.go":            "looks for a condition until a deadline",
	"agent/agent_test.go":                "a synctest bubble, whose time costs nothing",
	"internal/listener/listener_test.go": "lets back-off try a few times",
	"internal/relay/random_test.go":      "speakers that pause now and then",
	"internal/relay/relay_test.go":       "time-outs of real sockets: the interval is what is tested",
}

func TestTestsWaitForEventsAndNotForTime(t *testing.T) {
	for _, r := range rooms(t) {
		_, tests := r.files()
		for _, name := range tests {
			place := r.path() + "/" + filepath.Base(name)
			if slices.Contains(selected(parse(t, name), "time"), "Sleep") && sleepers[place] == "" {
				t.Errorf("%s calls time.Sleep: wait for an event with a deadline", place)
			}
		}
	}
}

func TestNothingIsLeftOpenInTheCode(t *testing.T) {
	for _, r := range rooms(t) {
		own, tests := r.files()
		for _, name := range append(own, tests...) {
			for _, group := range parse(t, name).Comments {
				for _, mark := range []string{"TODO", "FIXME", "XXX"} {
					if strings.Contains(group.Text(), mark) {
						t.Errorf("%s: a comment says %s; do it, or write the limit into the documents", name, mark)
					}
				}
			}
		}
	}
}

func parse(t *testing.T, name string) *ast.File {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// selected returns the names that file takes from package pkg, such as Sleep from time.
func selected(file *ast.File, pkg string) []string {
	var names []string
	ast.Inspect(file, func(node ast.Node) bool {
		if selector, ok := node.(*ast.SelectorExpr); ok {
			if ident, ok := selector.X.(*ast.Ident); ok && ident.Name == pkg {
				names = append(names, selector.Sel.Name)
			}
		}
		return true
	})
	return names
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}
