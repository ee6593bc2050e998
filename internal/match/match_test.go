package match

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

func TestTexts(t *testing.T) {
	long := strings.Repeat("long", 4000)
	for _, c := range []struct {
		kind mesh.MatchKind
		text string
		fold bool
		is   string
		want Value
	}{
		{mesh.MatchExact, "a", false, "a", Yes},
		{mesh.MatchExact, "a", false, "A", No},
		{mesh.MatchExact, "a", true, "A", Yes},
		{mesh.MatchExact, "\u212a", true, "k", No}, // the sign for Kelvin, which Unicode folds to k
		{mesh.MatchExact, "", false, "", Yes},
		{mesh.MatchExact, "a", false, "ab", No},
		{mesh.MatchPrefix, "a\xff", false, "a\xffb", Yes},
		{mesh.MatchPrefix, "ab", false, "a", No},
		{mesh.MatchSuffix, "LONG", true, long, Yes},
		{mesh.MatchSuffix, "g", false, "", No},
		{mesh.MatchContains, "gl", false, long, Yes},
		{mesh.MatchContains, "", false, "", Yes},
		{mesh.MatchContains, "x", false, long, No},
		{mesh.MatchRegex, "b|a", false, "a", Yes},
		{mesh.MatchRegex, "b|a", false, "ab", No},
		{mesh.MatchRegex, "b|a", false, "ba", No}, // each alternative is that of the whole text
		{mesh.MatchRegex, "a", true, "A", No},     // as in Envoy, case is ignored for other kinds only
		{mesh.MatchRegex, "(?i)a", false, "A", Yes},
		{mesh.MatchRegex, "a.", false, "a\n", Unknown},
		{mesh.MatchRegex, "a.", false, "a\xff", Unknown},
		{mesh.MatchRegex, "a$", false, "a\n", Unknown},
		{mesh.MatchRegex, "(", false, "a", Unknown},
		{mesh.MatchRegex, ".*/ns/a/.*", false, "x/ns/a/y", Yes},
		{mesh.MatchRegex, ".*/ns/a/.*", false, "/ns/a/", Yes},
		{mesh.MatchRegex, ".*/ns/a/.*", false, "/ns/ab/", No},
		{mesh.MatchRegex, ".*/ns/a/.*", false, "/ns/a/\xff", Unknown},
		{mesh.MatchRegex, ".*/ns/a/.*", false, "/ns/a/\n", Unknown},
		{mesh.MatchRegex, ".*a.b.*", false, "axb", Yes},
		{mesh.MatchRegex, ".*", false, "a", Yes},
		{mesh.MatchRegex, ".*.*", false, "", Yes},
		{mesh.MatchRegex, ".+", false, "", No},
		{mesh.MatchRegex, ".+", false, "a", Yes},
		{mesh.MatchRegex, ".+", false, "a\nb", Unknown},
		{mesh.MatchRegex, "a)|(b", false, "b", Unknown}, // not a pattern, although it would be one within a group
	} {
		m := Compile(&mesh.StringMatcher{Kind: c.kind, Text: c.text, IgnoreCase: c.fold})
		if s, b := m.MatchString(c.is), m.Match([]byte(c.is)); s != c.want || b != c.want {
			t.Errorf("kind %d, %q, ignoring case %v, %.20q: %v and %v, want %v", c.kind, c.text, c.fold, c.is, s, b, c.want)
		}
	}
}

func TestValuesHaveNames(t *testing.T) {
	if got := fmt.Sprint(No, Unknown, Yes, Of(true), Of(false)); got != "no unknown yes yes no" {
		t.Error(got)
	}
}

func TestMetadata(t *testing.T) {
	d := Metadata{"payload": map[string]any{"iss": "me", "list": []any{"a", 1.0}, "null": nil, "yes": true, "lines": "a\nb", "raw": []any{"a\xff", "b"}}}
	text := func(kind mesh.MatchKind, s string) mesh.ValueMatcher {
		return mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Kind: kind, Text: s}}
	}
	for _, c := range []struct {
		path  string
		value mesh.ValueMatcher
		want  Value
	}{
		{"payload.iss", text(mesh.MatchExact, "me"), Yes},
		{"payload.iss", text(mesh.MatchRegex, "m."), Yes},
		{"payload.iss", text(mesh.MatchRegex, "("), Unknown},
		{"payload.iss.more", text(mesh.MatchExact, "me"), No},
		{"payload.list", text(mesh.MatchExact, "a"), No},
		{"payload.list", mesh.ValueMatcher{Kind: mesh.ValueList, Any: []mesh.ValueMatcher{text(mesh.MatchExact, "a")}}, Yes},
		{"payload.list", mesh.ValueMatcher{Kind: mesh.ValueList, Any: []mesh.ValueMatcher{text(mesh.MatchExact, "b")}}, No},
		{"payload.iss", mesh.ValueMatcher{Kind: mesh.ValueOr, Any: []mesh.ValueMatcher{text(mesh.MatchExact, "x"), text(mesh.MatchPrefix, "m")}}, Yes},
		{"payload.null", mesh.ValueMatcher{Kind: mesh.ValueNull}, Yes},
		{"payload.none", mesh.ValueMatcher{Kind: mesh.ValueNull}, No},
		{"payload.yes", mesh.ValueMatcher{Kind: mesh.ValueBool, Bool: true}, Yes},
		{"payload.none", mesh.ValueMatcher{Kind: mesh.ValuePresence}, Yes},
		{"payload.none", text(mesh.MatchExact, ""), No},
		{"payload.iss", mesh.ValueMatcher{}, Unknown},
		{"payload.list", mesh.ValueMatcher{Kind: mesh.ValueList}, Unknown},
		{"payload.lines", text(mesh.MatchRegex, ".+"), Unknown},
		{"payload.lines", mesh.ValueMatcher{Kind: mesh.ValueOr, Any: []mesh.ValueMatcher{text(mesh.MatchRegex, ".+"), text(mesh.MatchPrefix, "a")}}, Yes},
		{"payload.lines", mesh.ValueMatcher{Kind: mesh.ValueOr, Any: []mesh.ValueMatcher{text(mesh.MatchRegex, ".+"), text(mesh.MatchPrefix, "b")}}, Unknown},
		{"payload.raw", mesh.ValueMatcher{Kind: mesh.ValueList, Any: []mesh.ValueMatcher{text(mesh.MatchRegex, "a.*")}}, Unknown},
		{"payload.iss", mesh.ValueMatcher{Kind: mesh.ValueOr, Any: []mesh.ValueMatcher{text(mesh.MatchExact, "x"), text(mesh.MatchExact, "y")}}, No},
		{"payload.raw", mesh.ValueMatcher{Kind: mesh.ValueList, Any: []mesh.ValueMatcher{text(mesh.MatchExact, "b")}}, Yes},
	} {
		m := &mesh.MetadataMatcher{Path: strings.Split(c.path, "."), Value: c.value}
		inverted := *m
		inverted.Invert = true
		if got, not := d.Match(m), d.Match(&inverted); got != c.want || not != -c.want {
			t.Errorf("%s, %+v: %v, inverted %v; want %v", c.path, c.value, got, not, c.want)
		}
	}
	prefix := &mesh.MetadataMatcher{Value: text(mesh.MatchPrefix, "istio-ext-authz")}
	if MatchText(prefix, "istio-ext-authz-ns", true) != Yes || MatchText(prefix, "istio-ext-authz-ns", false) != No || MatchText(prefix, "x", true) != No {
		t.Error("a text is not matched by its prefix")
	}
}

// Expressions in matchers of metadata are kept within a bound, and compiled again after that.
func TestKeptPatternsAreBounded(t *testing.T) {
	for i := range maxPatterns + 20 {
		text := strconv.Itoa(i)
		m := &mesh.MetadataMatcher{Path: []string{"k"}, Value: mesh.ValueMatcher{
			Kind: mesh.ValueText, Text: mesh.StringMatcher{Kind: mesh.MatchRegex, Text: text + "y?"},
		}}
		for range 2 {
			if is, more := (Metadata{"k": text}).Match(m), (Metadata{"k": text + "x"}).Match(m); is != Yes || more != No {
				t.Fatalf("%d: %v and %v", i, is, more)
			}
		}
		patterns.Lock()
		kept, first := len(patterns.m), patterns.m[text+"y?"]
		patterns.Unlock()
		if kept > maxPatterns || compiled(&m.Value.Text) != first {
			t.Fatalf("%d patterns are kept; the last one is compiled again: %v", kept, compiled(&m.Value.Text) != first)
		}
	}
}
