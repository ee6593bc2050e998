package main

import (
	"go/parser"
	"go/token"
	"slices"
	"strings"
	"testing"
)

const before = `package x

const two = 1 + 1

func f(a, b int) int {
	if a < b && b != 0 {
		a = b - 1
		g()
		a++
	}
	return a
}

func g() {
	h()
	h()
}
`

func TestEachMutationIsOneChangeThatParses(t *testing.T) {
	all, err := mutations([]byte(before))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range all {
		after := string(m.apply([]byte(before)))
		if _, err := parser.ParseFile(token.NewFileSet(), "", after, 0); err != nil {
			t.Errorf("%s: %v\n%s", m.what, err, after)
		}
		if after == before {
			t.Errorf("%s changes nothing", m.what)
		}
		if want := before[:m.begin]; m.line != strings.Count(want, "\n")+1 {
			t.Errorf("%s is in line %d", m.what, m.line)
		}
		got = append(got, m.what)
	}
	want := []string{
		"negate the condition: a < b && b != 0", "use || for: &&", "use <= for: <", "use == for: !=",
		"drop the assignment: a = b - 1", "use + for: -", "drop the call: g()", "drop the statement: a++",
		"return at once from g: {", "drop the call: h()", "drop the call: h()",
	}
	if !slices.Equal(got, want) {
		t.Errorf("mutations:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestAFileThatIsNotGoIsAnError(t *testing.T) {
	if _, err := mutations([]byte("none")); err == nil {
		t.Error("no error")
	}
}
