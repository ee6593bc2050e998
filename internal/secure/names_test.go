package secure

import (
	"crypto/x509"
	"net"
	"net/url"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

func TestNamesAreMatchedByTheirType(t *testing.T) {
	uri := func(text string) *x509.Certificate {
		return &x509.Certificate{URIs: []*url.URL{securetest.URL(t, text)}}
	}
	host := func(text string) *x509.Certificate { return &x509.Certificate{DNSNames: []string{text}} }
	text := func(kind mesh.MatchKind, text string) mesh.StringMatcher {
		return mesh.StringMatcher{Kind: kind, Text: text}
	}
	for _, c := range []struct {
		of   mesh.NameType
		text mesh.StringMatcher
		leaf *x509.Certificate
		want bool
	}{
		{mesh.AnyName, text(mesh.MatchExact, idOfClient), uri(idOfClient), true},
		{mesh.URIName, text(mesh.MatchExact, idOfClient), uri(idOfClient), true},
		{mesh.DNSName, text(mesh.MatchExact, idOfClient), uri(idOfClient), false},
		{mesh.AnyName, text(mesh.MatchExact, idOfClient), uri(idOfClient + "2"), false},
		{mesh.AnyName, text(mesh.MatchPrefix, "spiffe://cluster.local/"), uri(idOfClient), true},
		{mesh.AnyName, text(mesh.MatchPrefix, "spiffe://cluster.local/"), uri("spiffe://cluster.local.evil/ns/a/sa/b"), false},
		{mesh.AnyName, text(mesh.MatchSuffix, "/sa/client"), uri(idOfClient), true},
		{mesh.AnyName, text(mesh.MatchContains, "/ns/shop/"), uri(idOfClient), true},
		{mesh.AnyName, text(mesh.MatchRegex, "spiffe://.*/sa/client"), uri(idOfClient), true},
		{mesh.AnyName, text(mesh.MatchRegex, "ns/shop"), uri(idOfClient), false},
		{mesh.AnyName, text(mesh.MatchRegex, "a|b"), host("ab"), false},
		{mesh.AnyName, text(mesh.MatchExact, "SPIFFE://cluster.local/ns/shop/sa/client"), uri(idOfClient), false},
		{mesh.DNSName, text(mesh.MatchExact, "Web.Example"), host("web.example"), true},
		{mesh.DNSName, text(mesh.MatchExact, "a.web.example"), host("*.web.example"), true},
		{mesh.DNSName, text(mesh.MatchExact, "a.b.web.example"), host("*.web.example"), false},
		{mesh.DNSName, text(mesh.MatchExact, "web.example"), host("*.web.example"), false},
		{mesh.DNSName, text(mesh.MatchExact, ".web.example"), host("*.web.example"), false},
		{mesh.DNSName, text(mesh.MatchSuffix, ".web.example"), host("*.web.example"), true},
		{mesh.EmailName, text(mesh.MatchExact, "a@b"), &x509.Certificate{EmailAddresses: []string{"a@b"}}, true},
		{mesh.IPName, text(mesh.MatchExact, "192.0.2.1"), &x509.Certificate{IPAddresses: []net.IP{net.IPv4(192, 0, 2, 1)}}, true},
		{mesh.AnyName, mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "WEB", IgnoreCase: true}, host("Web.example"), true},
		{mesh.AnyName, text(mesh.MatchRegex, ".*"), host("a\nb"), false}, // whether it is meant is not known
		{mesh.AnyName, text(mesh.MatchRegex, ".*"), host("a\xff"), false},
		{mesh.AnyName, mesh.StringMatcher{}, &x509.Certificate{}, false},
	} {
		matcher := mesh.NameMatcher{Type: c.of, StringMatcher: c.text}
		if got := names(t, matcher)[0].Match(c.leaf); got != c.want {
			t.Errorf("%+v matches %v %v: %v", matcher, c.leaf.URIs, c.leaf.DNSNames, got)
		}
	}
	for _, pattern := range []string{"(", "a)|(b", "a)|(?:b"} {
		if _, err := Names([]mesh.NameMatcher{{StringMatcher: text(mesh.MatchRegex, pattern)}}); err == nil {
			t.Errorf("the pattern %q, which cannot be compiled, is accepted", pattern)
		}
	}
}
