package extauthz

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"testing"

	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// everyName matches all names of fields.
var everyName = []mesh.StringMatcher{{Kind: mesh.MatchPrefix}}

func oneName(name string) []mesh.StringMatcher { return []mesh.StringMatcher{{Text: name}} }

// A server that is asked by HTTP sees all values of the fields that are selected, and never those that frame the request in
// question: they would frame the request to the server.
func TestAServerThatIsAskedByHTTPSeesTheSelectedFields(t *testing.T) {
	e := &mesh.ExtAuthz{Headers: everyName, NotHeaders: oneName("x-secret"), HTTP: &mesh.HTTPAuthz{Add: []mesh.NamedValue{{Name: "X-Own", Value: "ours"}}}}
	r := &Request{Method: "GET", Path: "/", Host: "a", Fields: []route.Field{
		{Name: "X-Role", Value: "a"}, {Name: "x-role", Value: "b"}, {Name: "x-secret", Value: "c"}, {Name: "X-Own", Value: "theirs"},
		{Name: "Authorization", Value: "d"},
	}}
	for _, name := range ownFields {
		r.Fields = append(r.Fields, route.Field{Name: name, Value: "1"})
	}
	got := httpRequest(context.Background(), e, r).Header
	want := http.Header{"X-Role": {"a", "b"}, "X-Own": {"ours"}, "Authorization": {"d"}, "User-Agent": nil}
	if !maps.EqualFunc(got, want, slices.Equal) {
		t.Errorf("the server sees %q, want %q", got, want)
	}
	e.Headers = nil
	if got := httpRequest(context.Background(), e, r).Header; len(got) != 3 || got.Get("Authorization") != "d" {
		t.Errorf("without a selection, the server sees %q", got)
	}
}

// Each list of the configuration selects fields of an answer for its own purpose. Fields that frame a message, and values that
// would end their line, are never taken.
func TestFieldsOfAnAnswerByHTTPAreSelected(t *testing.T) {
	header := http.Header{"X-Set": {"1", "2"}, "X-Add": {"3"}, "X-Pass": {"4"}, "X-Other": {"5"}, "X-Split": {"6\r\nx-role: admin"}, "X-Nul": {"\x00"}}
	for _, name := range ownFields {
		header.Set(name, "1")
	}
	answer := &callout.Answer{Status: 200, Header: header}
	a, err := allowedByHTTP(&mesh.HTTPAuthz{Upstream: oneName("x-set"), UpstreamAppend: oneName("x-add"), Allowed: oneName("x-pass")}, answer)
	if err != nil {
		t.Fatal(err)
	}
	edits := []route.Edit{route.SetField("x-set", "1"), route.AddField("x-set", "2"), route.AddField("x-add", "3")}
	if !sameEdits(a.Edits, edits) || !sameEdits(a.ResponseEdits, []route.Edit{route.AddField("x-pass", "4")}) {
		t.Errorf("edits %+v, of the response %+v", a.Edits, a.ResponseEdits)
	}
	for name, h := range map[string]*mesh.HTTPAuthz{"set": {Upstream: everyName}, "added": {UpstreamAppend: everyName}, "passed": {Allowed: everyName}} {
		a, err := allowedByHTTP(h, answer)
		if got := append(a.Edits, a.ResponseEdits...); err != nil || len(got) != 5 {
			t.Errorf("all are %s: %+v, %v", name, got, err)
		}
	}
}

func sameEdits(a, b []route.Edit) bool {
	return slices.EqualFunc(a, b, func(a, b route.Edit) bool { return fmt.Sprint(a) == fmt.Sprint(b) })
}

// An answer has a bounded number of fields. One with more allows nothing.
func TestFieldsOfAnAnswerByHTTPAreBounded(t *testing.T) {
	for n, fails := range map[int]bool{maxEdits: false, maxEdits + 1: true} {
		header := http.Header{}
		for range n {
			header.Add("X-Role", "a")
		}
		if _, err := allowedByHTTP(&mesh.HTTPAuthz{Upstream: everyName}, &callout.Answer{Status: 200, Header: header}); (err != nil) != fails {
			t.Errorf("%d fields: %v", n, err)
		}
	}
}
