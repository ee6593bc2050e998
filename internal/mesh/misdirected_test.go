package mesh

import "testing"

func TestAHostBelongsToTheMostSpecificServer(t *testing.T) {
	all := []string{"shop.example", "*.example", "*.eu.example", "*"}
	for _, test := range []struct {
		own  string
		host string
		want bool
	}{
		{"shop.example", "shop.example", false},
		{"shop.example", "blog.example", true},
		{"shop.example", "other.test", true}, // of the server for all hosts
		{"*.example", "shop.example", true},
		{"*.example", "blog.example", false},
		{"*.example", "a.eu.example", true},
		{"*.eu.example", "a.eu.example", false},
		{"*.eu.example", "blog.example", true},
		{"*.example", "example", true},
		{"*", "example", false},
		{"*", "shop.example", true},
		{"*", "", false},
	} {
		m := &Misdirected{Own: []string{test.own}, All: all}
		if got := m.Match(test.host); got != test.want {
			t.Errorf("%s at the server for %s: %v, want %v", test.host, test.own, got, test.want)
		}
	}
	known := &Misdirected{Own: []string{"a.example"}, All: []string{"a.example", "b.example"}}
	if known.Match("unknown.example") {
		t.Error("a host without a server is misdirected")
	}
}

// A client that has shown a certificate may go on where less is asked, and no client where more is.
func TestAClientIsAdmittedByWhatItsHandshakeHasFollowed(t *testing.T) {
	simple, optional, mutual := &DownstreamTLS{}, &DownstreamTLS{Roots: "ca"}, &DownstreamTLS{Roots: "ca", RequireClient: true}
	named := &DownstreamTLS{Roots: "ca", RequireClient: true, Names: []NameMatcher{{StringMatcher: StringMatcher{Text: "a"}}}}
	pinned := &DownstreamTLS{Roots: "ca", RequireClient: true, Pins: []Pin{{Key: true}}}
	other := &DownstreamTLS{Roots: "other", RequireClient: true}
	renewed := &DownstreamTLS{Roots: "ca", RequireClient: true, Certificates: []string{"next"}, MinVersion: 4}
	for _, test := range []struct {
		name        string
		before, now *DownstreamTLS
		want        bool
	}{
		{"no TLS before and now", nil, nil, true},
		{"TLS that begins", nil, simple, false},
		{"TLS that ends", simple, nil, false},
		{"SIMPLE → OPTIONAL_MUTUAL", simple, optional, false},
		{"SIMPLE → MUTUAL", simple, mutual, false},
		{"OPTIONAL_MUTUAL → MUTUAL", optional, mutual, false},
		{"MUTUAL → OPTIONAL_MUTUAL", mutual, optional, true},
		{"MUTUAL → SIMPLE", mutual, simple, true},
		{"other roots", mutual, other, false},
		{"names that are asked for now", mutual, named, false},
		{"names that are not asked for now", named, mutual, false},
		{"hashes that are asked for now", mutual, pinned, false},
		{"another certificate of ours", mutual, renewed, true},
	} {
		if got := test.now.Admits(test.before); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}
