package xds

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// text returns requests in the notation of the table below.
func text(requests []request) string {
	var lines []string
	for _, r := range requests {
		line := r.typ.String()
		add := func(label string, names []string) {
			if len(names) > 0 {
				line += " " + label + strings.Join(names, ",")
			}
		}
		if r.node != nil {
			line += " node"
		}
		add("names=", r.names)
		add("+", r.subscribe)
		add("-", r.unsubscribe)
		add("held=", r.held)
		if r.version != "" {
			line += " version=" + r.version
		}
		if r.nonce != "" {
			line += " nonce=" + r.nonce
		}
		if r.err != "" {
			line += " error=" + r.err
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func resources(names ...string) []Resource {
	var list []Resource
	for _, name := range names {
		list = append(list, Resource{Name: name})
	}
	return list
}

// step is one event of a conversation, and the requests that follow it.
type step struct {
	do   func(*session) []request
	want string
}

func open() func(*session) []request { return (*session).open }

func ask(t Type, names ...string) func(*session) []request {
	return func(s *session) []request { return s.subscribe(t, names) }
}

func served(r response, rejected ...Rejected) func(*session) []request {
	return func(s *session) []request {
		s.receive(&r)
		return []request{s.answer(&r, rejected)}
	}
}

func TestTheConversationOfADeltaStream(t *testing.T) {
	run(t, true, []step{
		{open(), "CDS node"},
		{served(response{typ: Clusters, nonce: "1", resources: resources("c1", "c2")}), "CDS nonce=1"},
		{ask(Endpoints, "c2", "c1"), "EDS +c1,c2"},
		{ask(Listeners), "LDS"},
		{ask(Listeners), ""},
		{ask(Names), "NDS"},
		{ask(Endpoints, "c1", "c2"), ""},
		{served(response{typ: Endpoints, nonce: "2", resources: resources("c1", "c2")}), "EDS nonce=2"},
		{served(response{typ: Listeners, nonce: "3", resources: resources("l1", "l2")}, Rejected{"l2", "bad chain"}), "LDS nonce=3 error=l2: bad chain"},
		{served(response{typ: Names, nonce: "4", resources: resources("")}), "NDS nonce=4"},
		{ask(Routes, "80"), "RDS +80"},
		// A subscription changes in a request of its own.
		{served(response{typ: Clusters, nonce: "5", resources: resources("c3"), removed: []string{"c1"}}), "CDS nonce=5"},
		{ask(Endpoints, "c2", "c3"), "EDS +c3 -c1"},
		{served(response{typ: Endpoints, nonce: "6", resources: resources("c3")}), "EDS nonce=6"},
		// The last name goes, and comes back. An empty first request would have asked for everything.
		{ask(Routes), "RDS -80"},
		{ask(Routes, "80"), "RDS +80"},
		{ask(Secrets), ""},
		// A new stream names what is held, so that the control plane can report what has gone meanwhile.
		{open(), "CDS node held=c2,c3\nEDS +c2,c3 held=c2,c3\nLDS held=l1,l2\nRDS +80\nNDS"},
		{served(response{typ: Listeners, nonce: "7", removed: []string{"l2"}}), "LDS nonce=7"},
		{ask(Secrets, "default"), "SDS +default"},
		{open(), "CDS node held=c2,c3\nEDS +c2,c3 held=c2,c3\nLDS held=l1\nRDS +80\nSDS +default\nNDS"},
	})
}

func TestTheConversationOfAStateOfTheWorldStream(t *testing.T) {
	run(t, false, []step{
		{open(), "CDS node"},
		{served(response{typ: Clusters, version: "v1", nonce: "1", resources: resources("c1", "c2")}), "CDS version=v1 nonce=1"},
		{ask(Endpoints, "c1", "c2"), "EDS names=c1,c2"},
		{ask(Listeners), "LDS"},
		{served(response{typ: Endpoints, version: "v1", nonce: "2", resources: resources("c1")}), "EDS names=c1,c2 version=v1 nonce=2"},
		// A rejection repeats the version that stays in force.
		{served(response{typ: Clusters, version: "v2", nonce: "3", resources: resources("c2")}, Rejected{"c2", "bad"}), "CDS version=v1 nonce=3 error=c2: bad"},
		{ask(Endpoints, "c2"), "EDS names=c2 version=v1 nonce=2"},
		{ask(Endpoints), "EDS version=v1 nonce=2"},
		{ask(Endpoints, "c2"), "EDS names=c2 version=v1 nonce=2"},
		// Nonces belong to a stream, versions do not.
		{open(), "CDS node version=v1\nEDS names=c2 version=v1\nLDS"},
	})
}

func run(t *testing.T, delta bool, steps []step) {
	t.Helper()
	s := newSession(delta, []byte("node"))
	for i, step := range steps {
		if got := text(step.do(s)); got != step.want {
			t.Fatalf("step %d: got\n%s\nwant\n%s", i+1, got, step.want)
		}
	}
}

func TestAStateOfTheWorldResponseRemovesTheWildcardResourcesThatItLeavesOut(t *testing.T) {
	for _, test := range []struct {
		typ    Type
		second []string
		want   []string
	}{
		{Clusters, []string{"b"}, []string{"a", "c"}},
		{Listeners, nil, []string{"a", "b", "c"}},
		{Endpoints, []string{"b"}, nil},
		{Routes, []string{"b"}, nil},
		{Names, nil, nil},
	} {
		s := newSession(false, nil)
		s.subscribe(test.typ, []string{"a", "b", "c"})
		s.receive(&response{typ: test.typ, resources: resources("a", "b", "c")})
		second := &response{typ: test.typ, resources: resources(test.second...)}
		s.receive(second)
		if !slices.Equal(second.removed, test.want) {
			t.Errorf("%v: removed %q, want %q", test.typ, second.removed, test.want)
		}
	}
}

func TestAResourceThatIsNoLongerAskedForIsDropped(t *testing.T) {
	s := newSession(true, nil)
	s.subscribe(Routes, []string{"80", "90"})
	s.subscribe(Routes, []string{"90"})
	late := &response{typ: Routes, resources: resources("80", "90")}
	s.receive(late)
	if len(late.resources) != 1 || late.resources[0].Name != "90" {
		t.Errorf("resources %v, want 90 only", late.resources)
	}
	if held := sorted(s.types[Routes].held); !slices.Equal(held, []string{"90"}) {
		t.Errorf("held %q, want 90 only", held)
	}
}

func TestARejectionNamesItsResourcesWithinABound(t *testing.T) {
	if got, want := describe([]Rejected{{"a", "x"}, {"", "y"}}), "a: x; y"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	var many []Rejected
	for i := range 1000 {
		many = append(many, Rejected{fmt.Sprint(i), strings.Repeat("r", 100)})
	}
	got := describe(many)
	if len(got) > maxReasons+20 || !strings.HasSuffix(got, "; and more") || !strings.HasPrefix(got, "0: rrr") {
		t.Errorf("%d bytes, ending in %q", len(got), got[len(got)-20:])
	}
	long := describe([]Rejected{{strings.Repeat("ä", maxReasons), "x"}, {"b", "y"}})
	if len(long) > maxReasons+20 || !strings.HasPrefix(long, "äää") || !utf8.ValidString(long) {
		t.Errorf("%d bytes, beginning with %q", len(long), long[:20])
	}
}

// FuzzConversation plays any sequence of events and holds the invariants that istiod relies on.
func FuzzConversation(f *testing.F) {
	f.Add(true, []byte{0, 1, 2, 3, 40, 50, 61, 7, 8, 90, 255})
	f.Add(false, []byte{0, 0, 33, 64, 129, 12, 200, 7, 8, 90, 255})
	f.Fuzz(func(t *testing.T, delta bool, events []byte) {
		s := newSession(delta, []byte("node"))
		nodeSent, asked := false, map[Type]map[string]bool{}
		check := func(requests []request, nonce string) {
			for _, r := range requests {
				if (r.node != nil) == nodeSent {
					t.Fatalf("node in the request %q: %v", text([]request{r}), r.node != nil)
				}
				nodeSent = true
				first := asked[r.typ] == nil
				if first {
					asked[r.typ] = map[string]bool{}
				}
				if delta && r.nonce != "" && len(r.subscribe)+len(r.unsubscribe)+len(r.held) > 0 {
					t.Fatalf("an acknowledgement changes a subscription: %s", text([]request{r}))
				}
				if first && !r.typ.Wildcard() && len(r.subscribe)+len(r.names) == 0 && r.nonce == "" {
					t.Fatalf("a first request without names asks for everything: %s", text([]request{r}))
				}
				for _, name := range r.subscribe {
					if asked[r.typ][name] {
						t.Fatalf("%s is asked for twice: %s", name, text([]request{r}))
					}
					asked[r.typ][name] = true
				}
				for _, name := range r.unsubscribe {
					if !asked[r.typ][name] {
						t.Fatalf("%s was not asked for: %s", name, text([]request{r}))
					}
					delete(asked[r.typ], name)
				}
			}
		}
		check(s.open(), "")
		for i, event := range events {
			typ := Type(event % Types)
			var names []string
			for bit, name := range []string{"a", "b", "c"} {
				if event>>(3+bit)&1 == 1 {
					names = append(names, name)
				}
			}
			switch event >> 6 {
			case 0:
				check(s.subscribe(typ, names), "")
			case 1:
				nodeSent, asked = false, map[Type]map[string]bool{}
				check(s.open(), "")
			default:
				if asked[typ] == nil {
					continue // a server answers only what it is asked
				}
				r := &response{typ: typ, nonce: fmt.Sprint(i), resources: resources(names...)}
				if event>>6 == 3 && delta {
					r.resources, r.removed = nil, names
				}
				s.receive(r)
				answer := s.answer(r, nil)
				if answer.nonce != r.nonce {
					t.Fatalf("nonce %q answered by %q", r.nonce, answer.nonce)
				}
				check([]request{answer}, r.nonce)
			}
		}
		if delta {
			for typ := range Type(Types) {
				if got := sorted(s.types[typ].wanted); asked[typ] != nil && len(got) != len(asked[typ]) {
					t.Fatalf("%v: %q is wanted and %v was asked for", typ, got, asked[typ])
				}
			}
		}
	})
}
