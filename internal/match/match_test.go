package match

import (
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
		{mesh.MatchRegex, "a", true, "A", No}, // as in Envoy, case is ignored for other kinds only
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

func TestMetadata(t *testing.T) {
	d := Metadata{"payload": map[string]any{"iss": "me", "list": []any{"a", 1.0}, "null": nil, "yes": true}}
	text := func(kind mesh.MatchKind, s string) mesh.ValueMatcher {
		return mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Kind: kind, Text: s}}
	}
	for _, c := range []struct {
		path  string
		value mesh.ValueMatcher
		want  bool
	}{
		{"payload.iss", text(mesh.MatchExact, "me"), true},
		{"payload.iss", text(mesh.MatchRegex, "m."), true},
		{"payload.iss", text(mesh.MatchRegex, "("), false},
		{"payload.iss.more", text(mesh.MatchExact, "me"), false},
		{"payload.list", text(mesh.MatchExact, "a"), false},
		{"payload.list", mesh.ValueMatcher{Kind: mesh.ValueList, Any: []mesh.ValueMatcher{text(mesh.MatchExact, "a")}}, true},
		{"payload.list", mesh.ValueMatcher{Kind: mesh.ValueList, Any: []mesh.ValueMatcher{text(mesh.MatchExact, "b")}}, false},
		{"payload.iss", mesh.ValueMatcher{Kind: mesh.ValueOr, Any: []mesh.ValueMatcher{text(mesh.MatchExact, "x"), text(mesh.MatchPrefix, "m")}}, true},
		{"payload.null", mesh.ValueMatcher{Kind: mesh.ValueNull}, true},
		{"payload.none", mesh.ValueMatcher{Kind: mesh.ValueNull}, false},
		{"payload.yes", mesh.ValueMatcher{Kind: mesh.ValueBool, Bool: true}, true},
		{"payload.none", mesh.ValueMatcher{Kind: mesh.ValuePresence}, true},
		{"payload.none", text(mesh.MatchExact, ""), false},
		{"payload.iss", mesh.ValueMatcher{}, false},
	} {
		m := &mesh.MetadataMatcher{Path: strings.Split(c.path, "."), Value: c.value}
		inverted := *m
		inverted.Invert = true
		if got, not := d.Match(m), d.Match(&inverted); got != c.want || not == c.want {
			t.Errorf("%s, %+v: %v, inverted %v; want %v", c.path, c.value, got, not, c.want)
		}
	}
	prefix := &mesh.MetadataMatcher{Value: text(mesh.MatchPrefix, "istio-ext-authz")}
	if !MatchText(prefix, "istio-ext-authz-ns", true) || MatchText(prefix, "istio-ext-authz-ns", false) || MatchText(prefix, "x", true) {
		t.Error("a text is not matched by its prefix")
	}
}
