package serve

import (
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// managed is what the requests that an HTTP manager is for need of it. It is made once and kept with the manager. Snapshots share
// that.
type managed struct {
	edge  *httpforward.Edge       // the treatment of requests from outside of the mesh; nil: they come from inside
	plain *httpforward.PeerFields // the treatment of requests whose client has no certificate
}

func managedOf(h *mesh.HTTPManager) *managed {
	if known, ok := h.Compiled.Load().(*managed); ok {
		return known
	}
	action := httpforward.RemoveClientCert
	if h.ClientCert == mesh.AlwaysForwardClientCert {
		action = httpforward.KeepClientCert
	}
	made := &managed{newEdge(h), treatment(action, h)}
	if h.Compiled.CompareAndSwap(nil, made) {
		return made
	}
	return h.Compiled.Load().(*managed)
}

// edgeOf returns the treatment of requests from outside of the mesh; nil: those of h come from inside. h may be nil.
func edgeOf(h *mesh.HTTPManager) *httpforward.Edge {
	if h == nil {
		return nil
	}
	return managedOf(h).edge
}

func newEdge(h *mesh.HTTPManager) *httpforward.Edge {
	if !h.UseRemoteAddress {
		return nil
	}
	made := &httpforward.Edge{
		TrustedHops: int(min(h.TrustedHops, maxTrustedHops)), Internal: h.Internal, KeepFor: h.SkipXFFAppend, Port: h.AppendPort,
		ID: h.GenerateRequestID, KeepID: h.KeepRequestID, Underscores: h.Underscores,
		MaxHeadBytes: int(min(h.MaxHeaderKiB, maxHeaderKiB)) << 10, MaxHeadFields: int(min(h.MaxHeaders, maxHeaders)),
		HeadTimeout: h.HeadersTimeout, IdleTimeout: h.IdleTimeout, SilenceTimeout: h.StreamIdleTimeout,
		RequestTimeout: h.RequestTimeout, StripDot: h.StripTrailingDot, AlwaysReplyToID: h.RequestIDInReply,
	}
	switch {
	case h.StripPort:
		made.StripPort = httpforward.StripEach
	case h.StripMatchingPort:
		made.StripPort = httpforward.StripOwn
	}
	return made
}

// Bounds of what a configuration may ask for. That of heads is Envoy's.
const (
	maxTrustedHops = 1000
	maxHeaderKiB   = 8192
	maxHeaders     = 10_000
)

// Edge implements httpforward.Edges.
func (r *routing) Edge() *httpforward.Edge {
	r.look()
	return edgeOf(r.manager)
}

// Edge implements httpforward.Edges.
func (r *rejudge) Edge() *httpforward.Edge {
	r.look()
	if r.chain == nil {
		return nil
	}
	return edgeOf(r.chain.HTTP)
}

// Edge implements httpforward.Edges.
func (p *permit) Edge() *httpforward.Edge { return nextEdge(p.next) }

// nextEdge returns the treatment by the Router behind another one.
func nextEdge(next httpforward.Router) *httpforward.Edge {
	if edges, ok := next.(httpforward.Edges); ok {
		return edges.Edge()
	}
	return nil
}
