package yamledit

import (
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func set(path, key string, value any) Change {
	return Change{Path: keys(path), Kind: SetMember, Key: key, Values: []any{value}}
}

func add(where Kind, path string, items ...any) Change {
	return Change{Path: keys(path), Kind: where, Values: items}
}

func remove(what Kind, path, key string) Change {
	return Change{Path: keys(path), Kind: what, Key: key}
}

func keys(path string) []string { return strings.Fields(strings.ReplaceAll(path, "/", " ")) }

func edited(t *testing.T, text string, changes ...Change) (string, error) {
	t.Helper()
	d, err := Parse(text)
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return d.Edit(changes)
}

func TestEdits(t *testing.T) {
	for name, c := range map[string]struct {
		text    string
		changes []Change
		want    string
	}{
		"a new member":                          {"a: 1\n", []Change{set("", "b", "x")}, "a: 1\nb: x\n"},
		"a new member, no final line break":     {"a: 1", []Change{set("", "b", "x")}, "a: 1\nb: x"},
		"a new member before trailing comments": {"a: 1 # one\n# end\n", []Change{set("", "b", "x")}, "a: 1 # one\nb: x\n# end\n"},
		"a replaced member keeps its comment":   {"a: 1 # one\nb: 2\n", []Change{set("", "a", "x")}, "a: x # one\nb: 2\n"},
		"a member in place of another":          {"a: 1\nb: 2\n", []Change{{Kind: SetMember, Key: "c", Old: "a", Values: []any{true}}}, "c: true\nb: 2\n"},
		"a removed member":                      {"a: 1\nb: 2 # two\nc: 3\n", []Change{remove(RemoveMember, "", "b")}, "a: 1\nc: 3\n"},
		"a removed block scalar":                {"a: 1\nb: |\n  x\n\n  y\nc: 3\n", []Change{remove(RemoveMember, "", "b")}, "a: 1\nc: 3\n"},
		"a nested mapping":                      {"a:\n    b: 1\nc: 2\n", []Change{set("a", "d", Object{{"e", 1}})}, "a:\n    b: 1\n    d:\n      e: 1\nc: 2\n"},
		"inner and outer end together":          {"a:\n  b: 1\n", []Change{set("", "d", 2), set("a", "c", 1)}, "a:\n  b: 1\n  c: 1\nd: 2\n"},
		"items at the front":                    {"l:\n# of x\n- x\n", []Change{add(AddFront, "l", "p", "q")}, "l:\n- p\n- q\n# of x\n- x\n"},
		"items at the back":                     {"l:\n  - x # x\nm: 1\n", []Change{add(AddBack, "l", Object{{"k", "v"}, {"l", []string{"w"}}})}, "l:\n  - x # x\n  - k: v\n    l:\n    - w\nm: 1\n"},
		"a removed item":                        {"l:\n- a: 1\n  b: 2\n- c\n", []Change{remove(RemoveItem, "l", "0")}, "l:\n- c\n"},
		"CRLF":                                  {"a: 1\r\nb: 2\r\n", []Change{set("", "c", Object{{"d", 1}})}, "a: 1\r\nb: 2\r\nc:\r\n  d: 1\r\n"},
		"flow style":                            {"{a: 1, b: [x]}\n", []Change{set("", "c", "d"), add(AddFront, "b", "w"), add(AddBack, "b", "y")}, "{a: 1, b: [\"w\", x, \"y\"], \"c\": \"d\"}\n"},
		"flow style, removed":                   {"{a: 1, b: 2, c: 3}\n", []Change{remove(RemoveMember, "", "a"), remove(RemoveMember, "", "c")}, "{b: 2}\n"},
		"flow style, a quoted bracket":          {`{"a": "}\"]", "b": '{''', "c": 1}`, []Change{set("", "d", nil)}, `{"a": "}\"]", "b": '{''', "c": 1, "d": null}`},
		"flow style over lines":                 {"{\n  \"a\": [ # x\n    1\n  ]\n}\n", []Change{add(AddBack, "a", 2)}, "{\n  \"a\": [ # x\n    1, 2\n  ]\n}\n"},
		"wide characters":                       {"{ключ: \"🙂\", l: [\"é\"]}", []Change{add(AddBack, "l", "x")}, "{ключ: \"🙂\", l: [\"é\", \"x\"]}"},
		"a kept block scalar":                   {"a: |+\n  x\n\nb: 1\n", []Change{set("", "a", "y")}, "a: \"y\"\nb: 1\n"},
		"an anchor beside the edit":             {"a: &x {b: 1}\nc: *x\n", []Change{set("", "d", 1)}, "a: &x {b: 1}\nc: *x\nd: 1\n"},
		"a restored member":                     {"a: 1\nb: 2\n", []Change{{Kind: SetMember, Key: "a", Values: []any{"x"}, Was: &Source{"a:   'x' # ours", 0}}}, "a:   'x' # ours\nb: 2\n"},
		"a restored member elsewhere":           {"m:\n  a: 1\n", []Change{{Path: []string{"m"}, Kind: SetMember, Key: "a", Values: []any{"x"}, Was: &Source{"a:   'x'", 0}}}, "m:\n  a: x\n"},
		"a cut item goes with its comment":      {"l:\n- a\n# of b\n- b: 1\n  c: 2\n- d\n", []Change{remove(CutItem, "l", "1")}, "l:\n- a\n- d\n"},
		"a cut first item":                      {"l:\n# of a\n- a\n- d\n", []Change{remove(CutItem, "l", "0")}, "l:\n- d\n"},
		"a cut item in flow style":              {"{l: [a, {b: 1}, d]}", []Change{remove(CutItem, "l", "1")}, "{l: [a, d]}"},
		"an inserted item":                      {"l:\n- a\n- d\n", []Change{{Path: keys("l"), Kind: InsertItem, Key: "1", Old: "0", Values: []any{Object{{"b", 1}}}}}, "l:\n- a\n- b: 1\n- d\n"},
		"an inserted item as it was":            {"l:\n- a\n- d\n", []Change{{Path: keys("l"), Kind: InsertItem, Key: "0", Values: []any{"b"}, Was: &Source{"\n# of b\n- 'b'", 0}}}, "l:\n# of b\n- 'b'\n- a\n- d\n"},
		"an inserted item in flow style":        {"{l: [a, d]}", []Change{{Path: keys("l"), Kind: InsertItem, Key: "2", Old: "1", Values: []any{"b"}}}, "{l: [a, d, \"b\"]}"},
		"a marker and directives' neighbours":   {"--- # first\na: 1\n...\n", []Change{set("", "b", 2)}, "--- # first\na: 1\nb: 2\n...\n"},
	} {
		if got, err := edited(t, c.text, c.changes...); got != c.want || err != nil {
			t.Errorf("%s: %v, got\n%s\nwant\n%s", name, err, got, c.want)
		}
	}
}

func TestStylesThatCannotBeEditedAreErrors(t *testing.T) {
	for name, c := range map[string]struct {
		text   string
		change Change
		want   string
	}{
		"the value of an anchor":    {"a: &x\n  b: 1\nc: *x\n", set("a", "d", 1), "anchors"},
		"through an alias":          {"a: &x\n  b: 1\nc: *x\n", set("c", "d", 1), "anchors"},
		"an explicit key":           {"? a\n: {b: 1}\n? c\n: d\n", remove(RemoveMember, "", "c"), "anchors"},
		"no such place":             {"a: 1\n", set("b", "c", 1), "anchors"},
		"a tag at the end":          {"a: 1\nb: !x", set("", "c", 1), "ends in a tag"},
		"a scalar":                  {"a: 1\n", set("a", "c", 1), "anchors"},
		"the only item":             {"a:\n- b\n", remove(CutItem, "a", "0"), "anchors"},
		"an item behind none":       {"a:\n- b\n", Change{Path: keys("a"), Kind: InsertItem, Key: "1", Old: "1", Values: []any{"x"}}, "anchors"},
		"no such member":            {"a: 1\n", remove(RemoveMember, "", "b"), "anchors"},
		"a block scalar at the end": {"a: |\n  x", set("", "b", 1), "end the text with a line break"},
	} {
		if got, err := edited(t, c.text, c.change); err == nil || !strings.Contains(err.Error(), c.want) || got != "" {
			t.Errorf("%s: %v, %q, want an error with %q", name, err, got, c.want)
		}
	}
}

func TestErrorsHaveTheirLine(t *testing.T) {
	for text, want := range map[string]string{
		"a: 1\nb: [\n":                      "line 2: did not find expected node content",
		"a: 1\nb: 2\n c: 3\n":               "line 3: mapping values",
		"a: 1\nb: \"x\nc: 3\n":              "line 2: found unexpected end",
		"a: 1\n\tb: 2\n":                    "line 2: found a tab",
		"a: 1\nb: *x\nc: 1\n":               "line 2: unknown anchor",
		"a: 1\nb: {c: d\ne: f\n":            "line 2: did not find expected ',' or '}'",
		"a: 1\n- b\n":                       "line 2: did not find expected key",
		"a: \"\\q\"\n":                      "line 1: found unknown escape",
		"{\"a\": 1,\n\"b\": 2,\n\"c\" 3}\n": "line 3: did not find",
		"a: 1\nb: 2\na: 3\n":                "line 3: duplicate key",
		"x: [1,\n 2\n":                      "line 2: did not find expected ',' or ']'",
	} {
		if _, err := Parse(text); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

func TestSourceIsTheTextOfAMember(t *testing.T) {
	text := "a:\n  b: 'x' # note\n  \"c\":\n  - 1\n  - 2\nd: {e: \"f\", g: [1, 2]}\n"
	d, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	for place, want := range map[string]Source{
		"a/b": {"b: 'x'", 2}, "a/c": {"\"c\":\n  - 1\n  - 2", 2}, "d/g": {"g: [1, 2]", -1}, "d/e": {`e: "f"`, -1},
	} {
		path := keys(place)
		got, err := d.Source(path[:1], path[1])
		if got != want || err != nil {
			t.Errorf("%s: %+v, %v, want %+v", place, got, err, want)
		}
		if key, value, err := got.Decode(); key != path[1] || !reflect.DeepEqual(value, Get(d.Tree(), path...)) {
			t.Errorf("%s decodes to %s: %v, %v", place, key, value, err)
		}
	}
	if _, err := d.Source([]string{"a"}, "z"); err == nil || !strings.HasPrefix(err.Error(), "a.z: ") {
		t.Errorf("a member that is missing: %v", err)
	}
	if _, _, err := (Source{"a: 1\nb: 2", 0}).Decode(); err == nil {
		t.Error("two members are taken for one")
	}
}

func TestItemIsTheTextThatCutItemRemoves(t *testing.T) {
	text := "a:\n# first\n- x: 1\n# second\n\n- y: 2\n  z: 3\n- w\nf: [1, {b: 2}, 3]\none:\n- x\n"
	d, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path  string
		index int
		want  Source
		item  string
	}{
		{"a", 0, Source{"\n# first\n- x: 1", 0}, `{"x":1}`}, {"a", 1, Source{"\n# second\n\n- y: 2\n  z: 3", 0}, `{"y":2,"z":3}`}, {"a", 2, Source{"\n- w", 0}, `"w"`},
		{"f", 0, Source{"1, ", -1}, "1"}, {"f", 1, Source{", {b: 2}", -1}, `{"b":2}`}, {"f", 2, Source{", 3", -1}, "3"},
	} {
		got, err := d.Item(keys(c.path), c.index)
		if err != nil || got != c.want {
			t.Errorf("%s[%d]: %+v, %v, want %+v", c.path, c.index, got, err, c.want)
		}
		if item, err := got.DecodeItem(); err != nil || JSON(item) != c.item {
			t.Errorf("%s[%d] decodes to %v, %v, want %s", c.path, c.index, item, err, c.item)
		}
	}
	for _, c := range []struct {
		path  string
		index int
	}{{"one", 0}, {"a", 3}, {"a", -1}, {"none", 0}, {"", 0}} {
		if got, err := d.Item(keys(c.path), c.index); err == nil {
			t.Errorf("%s[%d]: %+v", c.path, c.index, got)
		}
	}
	for text, column := range map[string]int{"- a\n- b": 0, "1, 2": -1, "a: 1": 0, "": 0, "- [": 0} {
		if item, err := (Source{text, column}).DecodeItem(); err == nil {
			t.Errorf("%q is the item %v", text, item)
		}
	}
}

func TestLineIsThatOfTheNode(t *testing.T) {
	d, err := Parse("# comment\na:\n- x: 1\n\n- y: {z: 2}\n")
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{"": 2, "a": 3, "a/0": 3, "a/1": 5, "a/1/y": 5, "b": 1, "a/7": 1} {
		if got := d.Line(keys(path)); got != want {
			t.Errorf("%q is at line %d, want %d", path, got, want)
		}
	}
	if d, err = Parse("# only a comment\n"); err != nil || d.Line(nil) != 1 {
		t.Errorf("without a node: %v", err)
	}
}

// A JSON Patch of changes has the same result as the changes.
func TestItemsInAPatch(t *testing.T) {
	changes := []Change{
		{Path: keys("l"), Kind: CutItem, Key: "1"},
		{Path: keys("l"), Kind: InsertItem, Key: "0", Values: []any{"x"}},
	}
	if got, want := JSON(Patch(changes[:1]))+JSON(Patch(changes[1:])), `[{"op":"remove","path":"/l/1"}][{"op":"add","path":"/l/0","value":"x"}]`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	tree, err := Decode("l: [a, b, c]")
	if err == nil {
		tree, err = Apply(tree, changes)
	}
	if err != nil || JSON(tree) != `{"l":["x","a","c"]}` {
		t.Errorf("%v %v", tree, err)
	}
	for _, key := range []string{"4", "-1", "x"} {
		if tree, err := Apply(map[string]any{"l": []any{"a"}}, []Change{{Path: keys("l"), Kind: InsertItem, Key: key, Values: []any{"x"}}}); err == nil {
			t.Errorf("inserted at %s: %v", key, tree)
		}
	}
}

func TestSplitKeepsEveryByte(t *testing.T) {
	for stream, want := range map[string][]string{
		"":                       nil,
		"a: 1\n":                 {"a: 1\n"},
		"a: 1\n---\nb: 2":        {"a: 1\n", "---\nb: 2"},
		"---\na\n--- # x\nb\n":   {"---\na\n", "--- # x\nb\n"},
		"a\n...\nb\n...\n":       {"a\n...\n", "b\n...\n"},
		"a: ---\n----\n---x\n":   {"a: ---\n----\n---x\n"},
		"a\r\n---\r\nb\r\n":      {"a\r\n", "---\r\nb\r\n"},
		"%YAML 1.1\n---\na: 1\n": {"%YAML 1.1\n", "---\na: 1\n"},
	} {
		got := Split(stream)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q is split into %q, want %q", stream, got, want)
		}
	}
}

func TestAListIsSplitIntoItems(t *testing.T) {
	for document, want := range map[string][]string{
		"kind: List\nitems:\n- a: 1\n- b: 2\nx: y\n":                            {"- a: 1\n", "- b: 2\n"},
		"items: # all\n\n  # one\n  - a: 1\n    b:\n    - c\n  # two\n  - d\n":  {"  - a: 1\n    b:\n    - c\n  # two\n", "  - d\n"},
		"---\nitems:\n-\n  a: 1\n- |\n  - x\n  items:\n...\n":                   {"-\n  a: 1\n", "- |\n  - x\n  items:\n"},
		"items:\r\n- a: 1\r\n- b":                                               {"- a: 1\r\n", "- b"},
		`{"kind":"List","items":[{"items":[1,{}]},{"b":"]},{"} , "x" ,3]}`:      {`{"items":[1,{}]}`, `{"b":"]},{"}`, `"x"`, "3"},
		"{\n \"items\": [\n  {\"a\": 1},\n  [2]\n ],\n \"kind\": \"List\"\n}\n": {`{"a": 1}`, "[2]"},
		// These are parsed as a whole.
		"items: []\n": nil, "items: [a]\n": nil, "items:\n": nil, "kind: List\n": nil, "items:\n  a: 1\n": nil, "items:\n- a\nitems:\n- b\n": nil,
		`{"items":[]}`: nil, `{"items":{"a":[1]}}`: nil, `{"x":{"items":[1]}}`: nil, `{"items":[1],"items":[2]}`: nil, `{"items":[1]`: nil, `{"items": [1,]}`: nil,
		"": nil, "{": nil, "- a\n": nil,
	} {
		parts, rest := SplitList(document, "items")
		var got []string
		joined := ""
		for _, part := range parts {
			if joined += part.Text; part.Item {
				got = append(got, part.Text)
			}
		}
		if !reflect.DeepEqual(got, want) || (rest == nil) != (want == nil) || want != nil && joined != document {
			t.Errorf("%q is split into %v with %v, want %q", document, parts, rest, want)
		}
	}
}

// The items of a document are the items of its parts.
func FuzzSplitList(f *testing.F) {
	for _, text := range []string{
		"kind: List\nitems:\n- a: 1\n  b: \"x\n- y\"\n- c: 'x\n\n- y'\n", "items:\n- {a: [\n- b]}\n- &x c\n- *x\n", "items:\n- a: |\n    x\n- >-\n  y\n# z\nk: v\n",
		"items:\n- - a\n  - b\n-\n- ? k\n  : v\n", "items: &a\n- x\n- y\nb: *a\n", "items:\n- a\n--- x\n- b\n", `{"items":[{"a":"\\"]"},[1,2],null,"x"],"kind":"List"}`,
		"items:\n- x\n# a\n - y\n", "items:\n- a\n\t- b\n", "items:\n- !t a\n- b: c\n  d: e\n", "{\"items\": [1, {\"a\": 2}]} # x", "items:\n- a\n  b\n- c: d\n   e\n",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		parts, rest := SplitList(text, "items")
		if rest == nil {
			return
		}
		var items []any
		joined := ""
		for _, part := range parts {
			joined += part.Text
			if !part.Item {
				continue
			}
			d, err := Parse(part.Text)
			if err != nil {
				return // the caller parses the whole
			}
			item := d.Tree()
			if strings.HasPrefix(strings.TrimLeft(part.Text, " "), "-") && text[0] != '{' {
				list, _ := item.([]any)
				if len(list) != 1 {
					return // likewise
				}
				item = list[0]
			}
			items = append(items, item)
		}
		whole, err := Parse(text)
		if err != nil {
			t.Fatalf("%q: the parts are valid and the whole is not: %v", text, err)
		}
		rest["items"] = items
		if joined != text || !reflect.DeepEqual(whole.Tree(), any(rest)) {
			t.Errorf("%q has\n%v\nand in parts\n%v", text, whole.Tree(), rest)
		}
	})
}

func TestTreesAreReadAsKubectlReadsThem(t *testing.T) {
	for text, want := range map[string]string{
		"[yes, No, on, y, 'yes', \"off\"]":        `[true,false,true,true,"yes","off"]`,
		"[0x10, 010, 1_000, 1.5, 1e3, -2]":        `[16,8,1000,1.5,1e3,-2]`,
		"[~, null, '', 2001-02-03]":               `[null,null,"","2001-02-03"]`,
		"{a: &a {b: 1, c: 2}, d: {<<: *a, c: 3}}": `{"a":{"b":1,"c":2},"d":{"b":1,"c":3}}`,
		"{<<: [{a: 1}, {a: 2, b: 3}]}":            `{"a":1,"b":3}`,
		"":                                        "null",
	} {
		tree, err := Decode(text)
		if err != nil || JSON(tree) != want {
			t.Errorf("%s is %s, %v, want %s", text, JSON(tree), err, want)
		}
	}
	for text, want := range map[string]string{
		"{a: 1, a: 2}": `duplicate key "a"`, "{[a]: 1}": "not a scalar", "{<<: 1}": "must be a mapping", "a: &a [*a]": "aliases stand for more than",
	} {
		if _, err := Decode(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error with %q", text, err, want)
		}
	}
}

func TestPatchGivesWhatApplyGives(t *testing.T) {
	changes := []Change{
		set("m", "new", 1), {Path: []string{"m"}, Kind: SetMember, Key: "b/~", Old: "a", Values: []any{"x"}},
		remove(RemoveMember, "m", "gone"), add(AddFront, "l", 1, 2), add(AddBack, "l", 8, 9), remove(RemoveItem, "l", "2"),
	}
	want := `[{"op":"add","path":"/m/new","value":1},{"op":"remove","path":"/m/a"},{"op":"add","path":"/m/b~1~0","value":"x"},` +
		`{"op":"remove","path":"/m/gone"},{"op":"add","path":"/l/0","value":2},{"op":"add","path":"/l/0","value":1},` +
		`{"op":"add","path":"/l/-","value":8},{"op":"add","path":"/l/-","value":9},{"op":"remove","path":"/l/2"}]`
	if got := JSON(Patch(changes)); got != want {
		t.Errorf("%s", got)
	}
	tree, _ := Decode("{m: {a: 0, gone: 0}, l: [5]}")
	if tree, err := Apply(tree, changes); err != nil || JSON(tree) != `{"l":[1,2,8,9],"m":{"b/~":"x","new":1}}` {
		t.Errorf("%s, %v", JSON(tree), err)
	}
	if got := ParsePointer(Pointer("a/b", "~1", "c")); !reflect.DeepEqual(got, []string{"a/b", "~1", "c"}) {
		t.Errorf("%q", got)
	}
}

// The objects of a list may all be on one line. Twice as many may not cost four times as much.
func TestCostGrowsWithTheLength(t *testing.T) {
	steps := func(objects int) int {
		items := strings.Repeat(`{"name":"é","list":["x"],"map":{"a":{"b":[1,2,3]}}},`, objects)
		d, err := Parse(`{"items":[` + strings.TrimSuffix(items, ",") + `]}`)
		if err != nil {
			t.Fatal(err)
		}
		var changes []Change
		for i := range objects {
			if _, err := d.Source([]string{"items", fmt.Sprint(i)}, "name"); err != nil {
				t.Fatal(err)
			}
			changes = append(changes, add(AddBack, fmt.Sprintf("items/%d/list", i), "y"), set(fmt.Sprintf("items/%d", i), "new", 1))
		}
		if _, err := d.Edit(changes); err != nil {
			t.Fatal(err)
		}
		return d.steps
	}
	if one, two := steps(200), steps(400); two > one*5/2 {
		t.Errorf("200 objects take %d steps and 400 take %d", one, two)
	}
}

// The bytes before and after an edit do not change, and the result equals the tree with the change.
func FuzzEdit(f *testing.F) {
	for _, text := range []string{
		"a: 1\nb:\n  c: |\n    x\n  d: [1, 2]\n", "{a: {b: [x]}, 'c': \"d\"}", "a:\r\n- b: 1\r\n  c: 2\r\n- d # x\r\n", "--- # c\na: &x [1]\nb: *x\n...\n",
		"a: >-\n x\n\n y\nb: 'it''s'\n", "? a\n: b\n", "a: \"é🙂\"\nb:   c   # d\n",
	} {
		f.Add(text, uint8(0), "k")
	}
	f.Fuzz(func(t *testing.T, text string, kind uint8, key string) {
		d, err := Parse(text)
		if err != nil || d.root == nil {
			return
		}
		c := Change{Kind: SetMember, Key: key, Values: []any{Object{{"added", []any{"by", "fuzz"}}}}}
		if m, isMapping := d.tree.(map[string]any); isMapping && len(m) > 0 {
			first := SortedKeys(m)[0]
			if list, isList := m[first].([]any); isList && len(list) > 0 {
				c = Change{Path: []string{first}, Kind: []Kind{AddFront, AddBack, RemoveItem}[kind%3], Key: "0", Values: c.Values}
			} else if kind%2 == 1 && len(m) > 1 {
				c = Change{Kind: RemoveMember, Key: first}
			}
		}
		got, err := d.Edit([]Change{c})
		if err != nil {
			return
		}
		fresh, err := Decode(text)
		if err != nil {
			t.Fatal(err)
		}
		want, err := Apply(fresh, []Change{c})
		if err != nil {
			t.Fatal(err)
		}
		if tree, err := Decode(got); err != nil || !equal(tree, want) {
			t.Errorf("%q became %q: %v", text, got, err)
		}
		if c.Kind == AddFront || c.Kind == AddBack {
			before := commonPrefix(text, got)
			if !strings.HasSuffix(got, text[before:]) {
				t.Errorf("%q became %q: bytes outside the edit changed", text, got)
			}
		}
		if streams := Split(text); strings.Join(streams, "") != text {
			t.Errorf("%q is split into %q", text, streams)
		}
	})
}

func commonPrefix(a, b string) int {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}
