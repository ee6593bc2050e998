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

// sleepers are the functions of tests that may let time pass, and why: the interval is itself the thing under test, or
// the pause between two looks at something that announces nothing.
var sleepers = map[string]string{
	"e2e/bench/figures_test.go": "figures are taken over an interval",
	"e2e/bench/proxy_test.go":   "looks for a condition until a deadline",

	"e2e/bench/contenders_test.go awaitReady":                                                       "looks for a condition until a deadline",
	"e2e/bench/world_test.go await":                                                                 "looks for a condition until a deadline",
	"e2e/descriptors_test.go runOutOfDescriptors":                                                   "the shortage has to last",
	"e2e/detection_test.go TestAClientThatIsSilentAtFirstMaySpeakAnything":                          "the silence is tested",
	"e2e/detection_test.go TestAServerOfHTTP2MaySpeakBeforeItsClient":                               "the silence is tested",
	"e2e/keepalive_test.go TestGetsNeverFailAtServersThatCloseIdleConnections":                      "requests come around the time of the close",
	"e2e/loops_test.go assertQuiet":                                                                 "an agent at rest uses no CPU for an interval",
	"e2e/readiness_test.go TestWaitSucceedsOnceTheAgentIsReady":                                     "the absence of an agent has to last",
	"e2e/transparency_test.go TestAHalfClosedConnectionIsAnsweredAfterSeventySecondsOfSilence":      "the silence is tested",
	"e2e/pods/drain_test.go follow":                                                                 "endpoints follow readiness with a delay",
	"internal/probe/probe_test.go TestAProbeMayTakeLongerThanOtherAnswersOfThePort":                 "the workload's delay is tested",
	"internal/scrape/scrape_test.go TestASlowWorkloadIsWaitedForLongerThanTheServersLimits":         "the workload's delay is tested",
	"internal/relay/random_test.go speak":                                                           "peers that pause now and then",
	"internal/relay/relay_test.go TestIdleTimeoutEndsAConnectionInWhichNothingMoves":                "a time-out of real sockets",
	"internal/relay/relay_test.go TestHalfCloseTimeoutEndsAHalfClosedConnectionInWhichNothingMoves": "a time-out of real sockets",
	"internal/relay/relay_test.go TestHalfCloseTimeoutLeavesOpenConnectionsAlone":                   "a time-out of real sockets",
	"internal/relay/relay_test.go TestASideThatStalledForLongHasItsGrace":                           "a time-out of real sockets",
}

// guards are the durations that only bound a wait for an event. A test that passes does not wait that long.
var guards = []string{"Patience", "patience"}

func TestTestsWaitForEventsAndNotForTime(t *testing.T) {
	used := make(map[string]bool)
	for _, r := range rooms(t) {
		_, tests := r.files()
		for _, name := range tests {
			place := r.path() + "/" + filepath.Base(name)
			for _, pause := range pauses(parse(t, name)) {
				for _, allowed := range []string{place, place + " " + pause.function} {
					if sleepers[allowed] != "" {
						used[allowed], pause.call = true, ""
					}
				}
				if pause.call != "" {
					t.Errorf("%s: %s calls %s: wait for an event with a deadline, or use testing/synctest", place, pause.function, pause.call)
				}
			}
		}
	}
	for place := range sleepers {
		if !used[place] {
			t.Errorf("%s may let time pass, and does not: remove it from the list", place)
		}
	}
}

// pause is a call by which a function lets real time pass.
type pause struct{ function, call string }

// pauses returns the calls of time.Sleep, time.After, time.AfterFunc and time.Tick in file, except those in a synctest
// bubble, where time costs nothing, and those whose duration is a guard.
func pauses(file *ast.File) []pause {
	var found []pause
	for _, declaration := range file.Decls {
		function, ok := declaration.(*ast.FuncDecl)
		if !ok {
			continue
		}
		ast.Inspect(function, func(node ast.Node) bool {
			call, ok := node.(*ast.CallExpr)
			if !ok {
				return true
			}
			pkg, name := qualified(call.Fun)
			switch {
			case pkg == "synctest" && name == "Test":
				return false
			case pkg != "time" || !slices.Contains([]string{"Sleep", "After", "AfterFunc", "Tick"}, name):
				return true
			}
			_, guard := qualified(call.Args[0])
			if !slices.Contains(guards, guard) {
				found = append(found, pause{function.Name.Name, "time." + name})
			}
			return true
		})
	}
	return found
}

// qualified returns the two parts of an expression such as time.Sleep; the first is empty for a plain name.
func qualified(expression ast.Expr) (pkg, name string) {
	switch e := expression.(type) {
	case *ast.Ident:
		return "", e.Name
	case *ast.SelectorExpr:
		if ident, ok := e.X.(*ast.Ident); ok {
			return ident.Name, e.Sel.Name
		}
	}
	return "", ""
}

func TestPausesAreFound(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "x_test.go", `package x
func TestA(t *testing.T) {
	time.Sleep(time.Second)
	<-time.After(time.Second)
	select { case <-time.After(nettest.Patience): }
	select { case <-time.After(300*time.Millisecond): }
	synctest.Test(t, func(t *testing.T) { time.Sleep(time.Hour) })
	go func() { time.AfterFunc(blink, f) }()
}`, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := []pause{{"TestA", "time.Sleep"}, {"TestA", "time.After"}, {"TestA", "time.After"}, {"TestA", "time.AfterFunc"}}
	if got := pauses(file); !slices.Equal(got, want) {
		t.Errorf("pauses = %v, want %v", got, want)
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
