package serve

import (
	"net/http"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/tracing"
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

// Transport returns what sends the agent's own requests to the endpoints of a cluster. Call it with a control plane only.
func (r *Role) Transport(cluster string, http2 bool) http.RoundTripper {
	return r.callouts.To(cluster, http2)
}
