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

func TestEveryPackageHasOneComment(t *testing.T) {
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

func TestRoomsAreNamedForTheirContents(t *testing.T) {
	for _, r := range rooms(t) {
		for _, part := range strings.Split(r.path(), "/") {
			if slices.Contains([]string{"util", "utils", "common", "helper", "helpers", "types", "misc", "shared"}, part) {
				t.Errorf("%s: %q does not describe the contents; name the room for what it provides", r.path(), part)
			}
		}
	}
}

func TestBothDirectionsHaveTheSameFiles(t *testing.T) {
	files := make(map[string][]string)
	for _, r := range rooms(t) {
		if r.path() == "inbound" || r.path() == "outbound" {
			files[r.path()] = r.GoFiles
		}
	}
	if !slices.Equal(files["inbound"], files["outbound"]) {
		t.Errorf("inbound has %v and outbound has %v; keep them alike, so that a reader of one finds the same places in the other",
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

// sleepers are the functions of tests that may let time pass, and why: the interval itself is tested, or the test polls a
// condition without an event.
var sleepers = map[string]string{
	"e2e/bench/figures_test.go": "figures are taken over an interval",
	"e2e/bench/proxy_test.go":   "looks for a condition until a deadline",

	"e2e/bench/contenders_test.go awaitReady":                                            "looks for a condition until a deadline",
	"e2e/bench/controlplane_test.go":                                                     "looks for a condition until a deadline, and takes figures after an interval",
	"e2e/bench/world_test.go await":                                                      "looks for a condition until a deadline",
	"e2e/keepalive_test.go TestGetsDoNotFailAtServersThatCloseIdleConnections":           "requests come around the time of the close",
	"e2e/transparency_test.go TestHalfClosedConnectionSurvivesSeventySecondsOfSilence":   "the silence is tested",
	"e2e/pods/drain_test.go follow":                                                      "endpoints follow readiness with a delay",
	"internal/probe/probe_test.go TestAProbeMayTakeLongerThanOtherAnswersOfThePort":      "the workload's delay is tested",
	"internal/scrape/scrape_test.go TestSlowWorkloadMayTakeLongerThanTheServersTimeouts": "the workload's delay is tested",
	"internal/httpforward/conversation_test.go deeds":                                    "limits of routes that must not fire are tested over their time",
	"internal/relay/random_test.go speak":                                                "peers that pause now and then",
	"internal/tcp/handover_test.go TestEachWaitHasItsOwnDeadline":                        "deadlines are tested",
	"internal/relay/relay_test.go TestIdleTimeoutEndsAnIdleConnection":                   "a time-out of real sockets",
	"internal/relay/relay_test.go TestHalfCloseTimeoutEndsAnIdleHalfClosedConnection":    "a time-out of real sockets",
	"internal/relay/relay_test.go TestHalfCloseTimeoutLeavesOpenConnectionsAlone":        "a time-out of real sockets",
	"internal/relay/relay_test.go TestGraceStartsAtTheReset":                             "a time-out of real sockets",
}

// guards are the durations that only bound a wait for an event. A passing test does not wait that long.
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
		place := "" // of a call outside of functions: the variable, which may have functions
		if function, ok := declaration.(*ast.FuncDecl); ok {
			place = function.Name.Name
		}
		ast.Inspect(declaration, func(node ast.Node) bool {
			if value, ok := node.(*ast.ValueSpec); ok && place == "" {
				place = value.Names[0].Name
			}
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
				found = append(found, pause{place, "time." + name})
			}
			return true
		})
	}
	return found
}

// judges are the functions of tests that may fail because of a long duration, and why.
var judges = map[string]string{
	"internal/dns/serve_test.go TestShutdownDoesNotWaitForADownstreamThatReadsNothing": "Shutdown must not wait for the write deadline of 5s",
	"internal/istiod/silence_test.go lostAfter":                                        "its callers are in synctest bubbles",
}

// Only `make bench` judges durations, as ratios: a test with an upper bound on a duration fails on a slow machine. A lower
// bound is fine, because a timer does not fire early.
func TestNoTestFailsBecauseTheMachineIsSlow(t *testing.T) {
	for _, r := range rooms(t) {
		if r.path() == "e2e/bench" {
			continue
		}
		_, tests := r.files()
		for _, name := range tests {
			for _, function := range upperBounds(parse(t, name)) {
				place := r.path() + "/" + filepath.Base(name) + " " + function
				if judges[place] == "" {
					t.Errorf("%s compares an elapsed time with an upper bound: show the order of events, or use testing/synctest", place)
				}
			}
		}
	}
}

// upperBounds returns the functions that compare an elapsed time with an upper bound. An elapsed time is a call of
// time.Since, or a variable that was assigned from one. Comparisons in a synctest bubble do not count.
func upperBounds(file *ast.File) (functions []string) {
	for _, declaration := range file.Decls {
		function, ok := declaration.(*ast.FuncDecl)
		if !ok {
			continue
		}
		elapsed := make(map[string]bool)
		found := false
		ast.Inspect(function, func(node ast.Node) bool {
			switch n := node.(type) {
			case *ast.CallExpr:
				pkg, name := qualified(n.Fun)
				return pkg != "synctest" || name != "Test"
			case *ast.AssignStmt:
				for i, value := range n.Rhs {
					if len(n.Lhs) != len(n.Rhs) {
						break
					}
					if name, ok := n.Lhs[i].(*ast.Ident); ok && isSince(value) {
						elapsed[name.Name] = true
					}
				}
			case *ast.IfStmt:
				if n.Init != nil {
					if assign, ok := n.Init.(*ast.AssignStmt); ok && len(assign.Lhs) == 1 && isSince(assign.Rhs[0]) {
						elapsed[assign.Lhs[0].(*ast.Ident).Name] = true
					}
				}
				found = found || isUpperBound(n.Cond, elapsed)
			}
			return true
		})
		if found {
			functions = append(functions, function.Name.Name)
		}
	}
	return functions
}

// isUpperBound reports whether a part of condition compares an elapsed time with something smaller. elapsed names the
// variables that hold one.
func isUpperBound(condition ast.Expr, elapsed map[string]bool) (found bool) {
	is := func(e ast.Expr) bool {
		ident, ok := e.(*ast.Ident)
		return isSince(e) || ok && elapsed[ident.Name]
	}
	ast.Inspect(condition, func(node ast.Node) bool {
		if n, ok := node.(*ast.BinaryExpr); ok {
			more := n.Op == token.GTR || n.Op == token.GEQ
			less := n.Op == token.LSS || n.Op == token.LEQ
			found = found || more && is(n.X) || less && is(n.Y)
		}
		return true
	})
	return found
}

// isSince reports whether e is a call of time.Since.
func isSince(e ast.Expr) bool {
	call, ok := e.(*ast.CallExpr)
	if !ok {
		return false
	}
	pkg, name := qualified(call.Fun)
	return pkg == "time" && name == "Since"
}

func TestUpperBoundsAreFound(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "x_test.go", `package x
func TestA(t *testing.T) { if took := time.Since(began); took < second || took > hour { t.Error(took) } }
func TestB(t *testing.T) { if time.Since(began) >= limit { t.Error() } }
func TestC(t *testing.T) { if limit < time.Since(began) { t.Error() } }
func TestD(t *testing.T) { if time.Since(began) < limit { t.Error("early") } }
func TestE(t *testing.T) { synctest.Test(t, func(t *testing.T) { if time.Since(began) > limit { t.Error() } }) }`, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := upperBounds(file), []string{"TestA", "TestB", "TestC"}; !slices.Equal(got, want) {
		t.Errorf("upperBounds = %v, want %v", got, want)
	}
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
}
var steps = map[string]func(){"pause": func() { time.Sleep(time.Second) }}`, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := []pause{{"TestA", "time.Sleep"}, {"TestA", "time.After"}, {"TestA", "time.After"}, {"TestA", "time.AfterFunc"}, {"steps", "time.Sleep"}}
	if got := pauses(file); !slices.Equal(got, want) {
		t.Errorf("pauses = %v, want %v", got, want)
	}
}

func TestCommentsHaveNoOpenTasks(t *testing.T) {
	for _, r := range rooms(t) {
		own, tests := r.files()
		for _, name := range append(own, tests...) {
			for _, group := range parse(t, name).Comments {
				for _, mark := range []string{"TODO", "FIXME", "XXX"} {
					if strings.Contains(group.Text(), mark) {
						t.Errorf("%s: a comment contains %s; do it, or document the limit", name, mark)
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

// selected returns the names of package pkg that file uses, such as Sleep of time.
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
