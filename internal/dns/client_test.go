package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func newTestClient(t *testing.T, search []string, upstreams ...netip.AddrPort) *Client {
	t.Helper()
	c, err := NewClient(upstreams, search, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestLookup(t *testing.T) {
	zone := map[string][]string{
		"A a.example.":       {"a.example. 30 IN A 203.0.113.1", "a.example. 20 IN A 203.0.113.2"},
		"AAAA a.example.":    {"a.example. 30 IN AAAA 2001:db8::1"},
		"A alias.example.":   {"alias.example. 5 IN CNAME a.example.", "a.example. 30 IN A 203.0.113.1"},
		"A short.b.example.": {"short.b.example. 30 IN A 203.0.113.3"},
		"A zero.example.":    {"zero.example. 0 IN A 203.0.113.4"},
	}
	at := standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
		q := r.Question[0]
		m := answered(r, zone[dns.TypeToString[q.Qtype]+" "+q.Name]...)
		switch {
		case strings.HasPrefix(q.Name, "broken."):
			m.Rcode = dns.RcodeServerFailure
		case len(m.Answer) == 0:
			m.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(m)
	})
	c := newTestClient(t, []string{"c.example", "b.example"}, at)
	for _, want := range []struct {
		name   string
		ipv6   bool
		result string
	}{
		{"a.example", false, "203.0.113.1 203.0.113.2 for 20s"},
		{"a.example.", false, "203.0.113.1 203.0.113.2 for 20s"},
		{"a.example", true, "2001:db8::1 for 30s"},
		{"alias.example", false, "203.0.113.1 for 5s"},
		{"short", false, "203.0.113.3 for 30s"},
		{"short.", false, " for 0s"},
		{"none.example", false, " for 0s"},
		{"zero.example", false, "203.0.113.4 for 1ns"},
		{"broken.example", false, "fails"},
		{"", false, "fails"},
		{"a..example", false, "fails"},
		{strings.Repeat("a", 64), false, "fails"},
		{strings.Repeat("a.", 127) + "aa", false, "fails"},
	} {
		addresses, ttl, err := c.Lookup(context.Background(), want.name, want.ipv6)
		got := "fails"
		if err == nil {
			var all []string
			for _, address := range addresses {
				all = append(all, address.String())
			}
			got = fmt.Sprintf("%s for %v", strings.Join(all, " "), ttl)
		}
		if got != want.result {
			t.Errorf("%q: %s (%v), want %s", want.name, got, err, want.result)
		}
	}
}

func TestALookupTurnsToTheNextServer(t *testing.T) {
	c := newTestClient(t, nil, refusing(t), standing(t, fixed("a.example. 30 IN A 203.0.113.1")))
	addresses, _, err := c.Lookup(context.Background(), "a.example", false)
	if err != nil || !slices.Equal(addresses, []netip.Addr{netip.MustParseAddr("203.0.113.1")}) {
		t.Errorf("%v, %v", addresses, err)
	}
}

func TestALookupEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	c := newTestClient(t, nil, packets(t, func([]byte) [][]byte { cancel(); return nil }))
	if _, _, err := c.Lookup(ctx, "a.example", false); err == nil {
		t.Error("it succeeded")
	}
}
