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
	c := NewContexts(without{})
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

// Names that no roots verify would be a claim of the server.
func TestNamesWithoutRootsAreAnError(t *testing.T) {
	names := []mesh.NameMatcher{{StringMatcher: mesh.StringMatcher{Text: idOfServer}}}
	if client, err := NewContexts(without{}).Client(&mesh.UpstreamTLS{Names: names}, TCP); err == nil {
		t.Errorf("accepted: %+v", client)
	}
}
