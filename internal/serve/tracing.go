package serve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/tracing"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// tracing returns the policy that a listener configures for the traces of its requests; nil: it configures none.
func (r *Role) tracing(h *mesh.HTTPManager) *tracing.Policy {
	if h == nil || h.Tracing == nil || r.exporters == nil {
		return nil
	}
	return r.exporters.Policy(h.Tracing)
}

// onlyOperation returns the name of spans by the one route that istiod gives to an inbound listener. r may be nil.
func onlyOperation(r *mesh.Routes) string {
	if r == nil || len(r.Hosts) != 1 || len(r.Hosts[0].Routes) != 1 {
		return ""
	}
	return r.Hosts[0].Routes[0].Operation
}

// Transport returns what sends the agent's own requests to the endpoints of a cluster, chosen by its load balancing.
// Endpoints that need TLS are not reached.
func (r *Role) Transport(cluster string, http2 bool) http.RoundTripper {
	t := &http.Transport{
		Protocols: new(http.Protocols), DialContext: dialPicked, IdleConnTimeout: time.Minute, MaxIdleConnsPerHost: 1, DisableCompression: true,
	}
	t.Protocols.SetHTTP1(!http2)
	t.Protocols.SetUnencryptedHTTP2(http2)
	return &toCluster{r, cluster, t}
}

// toCluster is a RoundTripper to the endpoints of a cluster.
type toCluster struct {
	role      *Role
	cluster   string
	transport *http.Transport
}

var (
	errNotConfigured = errors.New("the control plane has sent no such cluster")
	errNeedsTLS      = errors.New("its endpoint needs TLS")
)

// RoundTrip implements http.RoundTripper.
func (t *toCluster) RoundTrip(q *http.Request) (*http.Response, error) {
	fail := func(err error) (*http.Response, error) {
		if q.Body != nil {
			q.Body.Close()
		}
		return nil, fmt.Errorf("cluster %s: %w", t.cluster, err)
	}
	s := t.role.mesh.Snapshot()
	if s == nil || s.Cluster(t.cluster) == nil {
		return fail(errNotConfigured)
	}
	var to upstream.Target
	lease, failed := t.role.endpoint(s, s.Cluster(t.cluster), &balance.Request{}, secure.HTTP1, nil, &to)
	if failed != nil {
		return fail(failed.err)
	}
	defer lease.End(balance.Outcome{GRPC: -1})
	if to.Secured() {
		return fail(errNeedsTLS)
	}
	q = q.Clone(q.Context())
	if q.Host == "" {
		q.Host = q.URL.Host
	}
	q.URL.Host = to.Address.String()
	response, err := t.transport.RoundTrip(q)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", t.cluster, err)
	}
	return response, nil
}

// dialPicked dials the address of an endpoint. The rules do not capture the agent's own connections.
func dialPicked(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{Timeout: namesWait}).DialContext(ctx, network, address)
}
