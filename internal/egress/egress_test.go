package egress

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// resolver has addresses by name, and counts lookups.
type resolver struct {
	addresses map[string]string
	lookups   int
}

func (r *resolver) LookupNetIP(_ context.Context, network, host string) (list []netip.Addr, err error) {
	r.lookups++
	if network != "ip" || !strings.HasSuffix(host, ".") {
		return nil, errors.New("an absolute name is required, so that no search list applies")
	}
	for word := range strings.FieldsSeq(r.addresses[strings.TrimSuffix(host, ".")]) {
		list = append(list, netip.MustParseAddr(word))
	}
	return list, nil
}

func rules(t testing.TB, text string) Rules {
	t.Helper()
	r, err := Parse(strings.NewReader(strings.ReplaceAll(text, ";", "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRulesAreParsed(t *testing.T) {
	for text, want := range map[string]string{
		"example.com": "example.com", "Example.COM.": "example.com", "*.example.com:443": "*.example.com:443", "*": "*", "*:80": "*:80",
		"203.0.113.7": "203.0.113.7", "203.0.113.0/24": "203.0.113.0/24", "203.0.113.0/24:5432": "203.0.113.0/24:5432", "203.0.113.7:1": "203.0.113.7:1",
		"2001:db8::7": "2001:db8::7", "2001:db8::/32": "2001:db8::/32", "[2001:db8::7]:443": "[2001:db8::7]:443", "[2001:db8::/32]:443": "[2001:db8::/32]:443",
		" _srv.example ": "_srv.example", "localhost": "localhost", "::ffff:203.0.113.7": "203.0.113.7",
	} {
		r, err := ParseRule(text)
		if err != nil || r.String() != want {
			t.Errorf("ParseRule(%q) = %v, %v, want %s", text, r, err, want)
		}
		if again, err := ParseRule(r.String()); err != nil || again != r {
			t.Errorf("ParseRule(%q) = %v, %v, want %v", r, again, err, r)
		}
	}
	for _, text := range []string{
		"", ":443", "example.com:", "example.com:0", "example.com:70000", "exa mple.com", "a..b", "*.", "a.*.b", "203.0.113", "10.0.0.300",
		"203.0.113.7/24", "2001:db8::7/32", "http://example.com", "example.com/path", "füß.example", strings.Repeat("a", 64) + ".example", "fe80::1%eth0",
	} {
		if r, err := ParseRule(text); err == nil {
			t.Errorf("ParseRule(%q) = %v", text, r)
		}
	}
}

func TestRulesOfAFileHaveErrorsWithLines(t *testing.T) {
	r := rules(t, "# comment; default deny; allow a.example # why; deny b.example:80; ; allow *.c.example")
	if len(r.Allow) != 2 || len(r.Deny) != 1 || !r.DenyOthers {
		t.Errorf("the rules are %+v", r)
	}
	for text, want := range map[string]string{
		"allow a.example\nalow b.example": "line 2: ", "allow": "line 1: 1 words", "default maybe": "line 1: ", "allow a b": "line 1: 3 words",
		"deny a..b": "line 1: ",
	} {
		if _, err := Parse(strings.NewReader(text)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("Parse(%q): %v, want %s…", text, err, want)
		}
	}
}

// verdicts are judgements by rules: of a connection, or of a request if proxied is set.
func TestVerdicts(t *testing.T) {
	const hosts = "good.example=203.0.113.1 2001:db8::1,cdn.example=203.0.113.1,evil.example=203.0.113.6,sub.wild.example=203.0.113.9"
	for _, test := range []struct {
		rules, to, name string
		proxied         bool
		allowed         bool
	}{
		{"", "203.0.113.6:80", "whatever", false, true},
		{"default deny", "203.0.113.1:80", "good.example", false, false},
		{"default deny; allow good.example", "203.0.113.1:80", "good.example", false, true},
		{"default deny; allow good.example", "203.0.113.1:80", "GOOD.example.", false, true},
		{"default deny; allow good.example", "[::ffff:203.0.113.1]:80", "good.example:80", false, true},
		{"default deny; allow good.example", "[2001:db8::1]:80", "good.example", false, true},
		{"default deny; allow good.example", "203.0.113.1:80", "", false, true},
		{"default deny; allow good.example", "203.0.113.1:80", "203.0.113.1", false, true},
		{"default deny; allow good.example", "[2001:db8::1]:80", "[2001:db8::1]:80", false, true},
		{"default deny; allow good.example", "203.0.113.1:80", "203.0.113.6", false, false},
		{"default deny; allow good.example", "203.0.113.1:80", "cdn.example", false, false},
		{"default deny; allow good.example", "203.0.113.6:80", "good.example", false, false},
		{"default deny; allow good.example", "203.0.113.6:80", "", false, false},
		{"default deny; allow good.example", "203.0.113.1:80", "xgood.example", false, false},
		{"default deny; allow good.example", "203.0.113.1:80", "?", false, false},
		{"default deny; allow good.example:443", "203.0.113.1:80", "good.example", false, false},
		{"default deny; allow good.example:443", "203.0.113.1:443", "good.example", false, true},
		{"default deny; allow *.wild.example", "203.0.113.9:80", "sub.wild.example", false, true},
		{"default deny; allow *.wild.example", "203.0.113.9:80", "wild.example", false, false},
		{"default deny; allow *.wild.example", "203.0.113.9:80", "", false, false}, // not known to be below it
		{"default deny; allow *.wild.example", "203.0.113.9:80", "xwild.example", false, false},
		{"default deny; allow 203.0.113.0/29", "203.0.113.6:80", "anything.example", false, true},
		{"default deny; allow 203.0.113.0/29", "203.0.113.9:80", "", false, false},
		{"default deny; allow 203.0.113.0/29:81", "203.0.113.6:80", "", false, false},
		{"default deny; allow 203.0.113.0/24; deny evil.example", "203.0.113.6:80", "evil.example", false, false},
		{"default deny; allow 203.0.113.0/24; deny evil.example", "203.0.113.6:80", "", false, false},
		{"default deny; allow *; deny 203.0.113.6", "203.0.113.6:80", "evil.example", false, false},
		{"default deny; allow *; deny 203.0.113.6:81", "203.0.113.6:80", "evil.example", false, true},
		{"default deny; allow *", "203.0.113.6:80", "good.example", false, false}, // a name must be true
		{"default deny; allow *", "203.0.113.6:80", "", false, true},
		{"deny evil.example", "203.0.113.6:80", "evil.example", false, false},
		{"deny evil.example", "203.0.113.6:80", "", false, false},
		{"deny evil.example", "203.0.113.6:80", "good.example", false, false}, // forged
		{"deny evil.example", "203.0.113.6:80", "?", false, false},
		{"deny evil.example", "203.0.113.1:80", "evil.example", false, false},
		{"deny evil.example", "203.0.113.1:80", "good.example", false, true},
		{"deny evil.example:81", "203.0.113.6:80", "evil.example", false, true},
		{"deny cdn.example", "203.0.113.1:80", "good.example", false, true}, // of the same address
		{"deny cdn.example", "203.0.113.1:80", "", false, false},

		{"", "203.0.113.1:80", "evil.example:443", true, true},
		{"deny evil.example", "203.0.113.1:80", "evil.example:443", true, false},
		{"deny evil.example:81", "203.0.113.1:80", "evil.example:443", true, false}, // the proxy chooses the port
		{"deny 203.0.113.6", "203.0.113.1:80", "203.0.113.6:443", true, false},
		{"default deny; allow good.example", "203.0.113.1:80", "evil.example:443", true, false},
		{"default deny; allow good.example; allow evil.example", "203.0.113.1:80", "evil.example:443", true, true},
		{"default deny; allow evil.example", "203.0.113.1:80", "evil.example:443", true, false},
		{"default deny; allow 203.0.113.1", "203.0.113.1:80", "evil.example:443", true, false},
		{"default deny; allow 203.0.113.0/24", "203.0.113.1:80", "203.0.113.6:443", true, true},
	} {
		r := &resolver{addresses: make(map[string]string)}
		for pair := range strings.SplitSeq(hosts, ",") {
			name, list, _ := strings.Cut(pair, "=")
			r.addresses[name] = list
		}
		p := New(rules(t, test.rules), r)
		to := netip.MustParseAddrPort(test.to)
		for range 2 { // the second time names are known
			denied := p.Request(to, test.name, test.proxied)
			if (denied == "") != test.allowed {
				t.Errorf("%q: %s as %q (proxied %v): %q", test.rules, test.to, test.name, test.proxied, denied)
			}
			if !test.proxied && p.Connection(to, test.name) != denied {
				t.Errorf("%q: a connection to %s as %q is judged otherwise", test.rules, test.to, test.name)
			}
		}
		if r.lookups > 2 {
			t.Errorf("%q: %d lookups", test.rules, r.lookups)
		}
	}
}

// Answers to the workload's queries count for a while, also for names below a wildcard.
func TestAnswersAreLearnt(t *testing.T) {
	r := &resolver{}
	p := New(rules(t, "default deny; allow *.wild.example; allow good.example"), r)
	now := time.Unix(1000, 0)
	p.now = func() time.Time { return now }
	to := netip.MustParseAddrPort("203.0.113.9:80")
	judge := func(name string, allowed bool) {
		t.Helper()
		if denied := p.Connection(to, name); (denied == "") != allowed {
			t.Errorf("%q: %q", name, denied)
		}
	}
	judge("sub.wild.example", false)
	p.Learn("SUB.wild.example.", []netip.Addr{to.Addr()})
	p.Learn("evil.example.", []netip.Addr{to.Addr()})
	judge("sub.wild.example", true)
	judge("", true)
	judge("other.wild.example", false)
	judge("evil.example", false)
	if p.known["evil.example"] != nil {
		t.Error("a name without a rule is kept")
	}
	now = now.Add(keepTime)
	judge("sub.wild.example", false)
	judge("", false)
	r.addresses = map[string]string{"sub.wild.example": to.Addr().String()} // it has come back
	now = now.Add(lookAgain)
	judge("sub.wild.example", true)
}

func TestWhatIsKnownIsBounded(t *testing.T) {
	p := New(rules(t, "default deny; allow *"), &resolver{})
	for i := range maxNames + 100 {
		p.Learn("n"+netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}).String()+".example", []netip.Addr{netip.IPv4Unspecified()})
	}
	var many []netip.Addr
	for i := range 2 * maxAddresses {
		many = append(many, netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}))
	}
	p.Learn("many.example", many)
	if len(p.known) != maxNames || len(p.known["many.example"].until) != maxAddresses {
		t.Errorf("%d names, %d addresses", len(p.known), len(p.known["many.example"].until))
	}
}

func TestQueries(t *testing.T) {
	p := New(rules(t, "default deny; allow good.example:443; allow *.wild.example; deny bad.wild.example; deny web.wild.example:80; allow 10.0.0.0/8"), &resolver{})
	for name, denied := range map[string]bool{
		"good.example.": false, "GOOD.example.": false, "a.wild.example.": false, "wild.example.": true, "bad.wild.example.": true,
		"web.wild.example.": false, "evil.example.": true, "1.0.0.10.in-addr.arpa.": true, ".": true,
	} {
		if got := p.Query(name); got != denied {
			t.Errorf("Query(%q) = %v", name, got)
		}
	}
	p.Apply(rules(t, "deny evil.example"))
	if p.Query("other.example.") || !p.Query("evil.example.") {
		t.Error("new rules do not apply")
	}
}

// Names come from the network: the reason must not control a terminal, nor be long.
func TestReasonsAreShortAndPrintable(t *testing.T) {
	p := New(rules(t, "default deny"), &resolver{})
	denied := p.Connection(netip.MustParseAddrPort("203.0.113.9:80"), "\x1b[31m"+strings.Repeat("x", 10000))
	if strings.ContainsAny(denied, "\x1b\n") || len(denied) > 300 {
		t.Errorf("%q", denied)
	}
}
