package secure

import (
	"crypto/tls"
	"slices"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// A server agrees on no protocol of Istio's that begins with metadata, which the workload would receive.
func TestServersDoNotAgreeOnAnExchangeOfMetadata(t *testing.T) {
	c := NewContexts(without{})
	server, err := c.Server(&mesh.DownstreamTLS{ALPN: []string{"istio-peer-exchange", "istio", "h2", "http/1.1"}, Certificates: []string{"default"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ offered, agreed []string }{
		{[]string{"istio-peer-exchange", "istio"}, nil},
		{[]string{"istio-peer-exchange", "http/1.1"}, []string{"http/1.1"}},
		{[]string{"http/1.1", "h2"}, []string{"h2"}},
	} {
		config, err := server.config.GetConfigForClient(&tls.ClientHelloInfo{SupportedProtos: test.offered})
		if err != nil {
			t.Fatal(err)
		}
		if config == nil {
			config = server.config
		}
		if !slices.Equal(config.NextProtos, test.agreed) {
			t.Errorf("offered %q, agreed on %q, want %q", test.offered, config.NextProtos, test.agreed)
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
