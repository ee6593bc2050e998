package httpforward

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// A connection that breaks before a request is reported by a record that went to no cluster and by no route, as an
// unreadable HTTP/1 head is.
func TestOnlyAReadableRequestHasTheConnectionsClusterAndRoute(t *testing.T) {
	r := newRig(t, netip.MustParseAddrPort("127.0.0.1:9"), true)
	connection := flow.Open(flow.Inbound, netip.MustParseAddrPort("198.51.100.1:4711"))
	connection.Cluster, connection.Route = "inbound|80||", "default"
	s := takeStream(r.engine, &Connection{Record: connection}, 1, time.Now())
	if s.record.Cluster != "" || s.record.Route != "" {
		t.Errorf("before a request: cluster %q, route %q, want neither", s.record.Cluster, s.record.Route)
	}
	s.recordRequest(&http2.Request{Method: "GET", Path: "/"}, nil)
	if s.record.Cluster != connection.Cluster || s.record.Route != connection.Route {
		t.Errorf("with a request: cluster %q, route %q, want the connection's", s.record.Cluster, s.record.Route)
	}
}
