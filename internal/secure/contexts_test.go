package secure

import (
	"crypto/tls"
	"slices"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// A server agrees on the protocol that begins with metadata only if its filter chain exchanges it: otherwise the workload
// would receive it.
func TestServersAgreeOnAnExchangeOfMetadataAsConfigured(t *testing.T) {
	c := NewContexts(without{}, nil)
	tcp := &mesh.DownstreamTLS{ALPN: []string{"istio-peer-exchange", "istio", "h2", "http/1.1"}, Certificates: []string{"default"}}
	for _, test := range []struct {
		exchanges       bool
		offered, agreed []string
	}{
		{false, []string{"istio-peer-exchange", "istio"}, nil},
		{false, []string{"istio-peer-exchange", "http/1.1"}, []string{"http/1.1"}},
		{false, []string{"http/1.1", "h2"}, []string{"h2"}},
		{true, []string{"istio", "istio-peer-exchange"}, []string{"istio-peer-exchange"}},
		{true, []string{"istio"}, nil},
		{true, []string{"http/1.1"}, []string{"http/1.1"}},
	} {
		server, err := c.Server(tcp, test.exchanges)
		if err != nil {
			t.Fatal(err)
		}
		config, err := server.config.GetConfigForClient(&tls.ClientHelloInfo{SupportedProtos: test.offered})
		if err != nil {
			t.Fatal(err)
		}
		if config == nil {
			config = server.config
		}
		if !slices.Equal(config.NextProtos, test.agreed) {
			t.Errorf("exchange %v: offered %q, agreed on %q, want %q", test.exchanges, test.offered, config.NextProtos, test.agreed)
		}
	}
}

// Names or hashes that are compared without roots would be those of any server that claims to have them.
func TestNamesWithoutRootsAreAnError(t *testing.T) {
	for _, server := range []*mesh.UpstreamTLS{
		{Names: []mesh.NameMatcher{{StringMatcher: mesh.StringMatcher{Text: idOfServer}}}}, {Pins: []mesh.Pin{{}}},
	} {
		if client, err := NewContexts(without{}, nil).Client(server, TCP, ""); err == nil {
			t.Errorf("accepted: %+v", client)
		}
	}
}

func TestHostsOfAuthorities(t *testing.T) {
	for authority, want := range map[string]string{
		"web.example": "web.example", "WEB.example:443": "web.example", "192.0.2.1:80": "192.0.2.1", "[2001:db8::1]:80": "2001:db8::1",
		"[2001:db8::1]": "2001:db8::1", "": "", ":80": "", "user@web.example": "", "*.example": "", "[2001:db8::1]-shadow": "", "[2001:db8::1]-shadow:80": "",
	} {
		if got := HostOf([]byte(authority)); got != want {
			t.Errorf("%q: %q, want %q", authority, got, want)
		}
	}
}

// A configuration that needs the host of a request never does without it.
func TestAContextThatNeedsAHostHasOne(t *testing.T) {
	contexts := NewContexts(without{}, nil)
	for inside, fails := range map[Inside]bool{HTTP1: true, HTTP2: true, TCP: false} {
		if _, err := contexts.Client(&mesh.UpstreamTLS{Roots: "ca", HostName: true}, inside, ""); (err != nil) != fails {
			t.Errorf("%v: %v", inside, err)
		}
	}
}
