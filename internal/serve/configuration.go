package serve

import (
	"errors"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// governed is the control plane's configuration of a connection. It is an object of its own, because without
// a control plane every connection would keep its fields on its stack.
type governed struct {
	snapshot *mesh.Snapshot          // in force when the connection was opened
	chain    *mesh.FilterChain       // set by Admit, may be nil
	routing  *routing                // of the requests of an outbound connection; may be nil
	chosen   *mesh.Cluster           // of an outbound connection of bytes; may be nil
	lease    balance.Lease           // the place of an outbound connection of bytes at its endpoint; may be nil
	judged   sniff.Protocol          // by the last call of Admit
	admitted bool                    // Admit was called
	secured  bool                    // TLS with downstream is ended here
	ended    *mesh.DownstreamTLS     // what that handshake has followed; nil: it is not ended
	names    []string                // of the client's certificate; see authz.Subject
	peers    *httpforward.PeerFields // of HTTP inside that TLS; nil: the client has shown no certificate
	shown    *mesh.HTTPManager       // by which peers treats the client's certificate; nil: as peers

	asked        *mesh.FilterChain // whose servers have allowed the connection; may be nil
	askedSecured bool              // TLS was ended by then
}

// AwaitConfiguration holds a connection until the control plane has sent the first configuration. It does not read: the
// bytes that downstream sends stay in the kernel. Without a control plane it does nothing.
func (c *Conn) AwaitConfiguration() bool {
	if c.role.mesh == nil {
		return true
	}
	c.governed = &governed{snapshot: c.role.mesh.Snapshot()}
	return c.governed.snapshot != nil || c.hold(c.Record.Opened.Add(c.role.wait))
}

// hold waits for the first snapshot until deadline. Its publisher wakes all waits.
func (c *Conn) hold(deadline time.Time) bool {
	for {
		if c.governed.snapshot = c.role.mesh.Snapshot(); c.governed.snapshot != nil {
			return true
		}
		if c.role.engine.Draining() {
			c.Refuse(flow.Drained, nil)
			return false
		}
		err := c.w.Wait(deadline, c.Down, nil)
		if err == nil {
			err = c.Down.Failed()
		}
		switch {
		case errors.Is(err, tcp.ErrDeadline):
			c.Refuse(flow.NoConfiguration, nil)
			return false
		case err != nil:
			c.Refuse(sniff.Reason(err), err)
			return false
		}
	}
}

// Admit refuses a connection that the control plane's configuration does not let pass. Call it after ReadFirst, and after
// WatchBoth: a client that was silent is judged again by what it sends. Without a control plane it does nothing.
func (c *Conn) Admit() bool {
	g := c.governed
	switch {
	case g == nil:
		return true
	case g.secured:
		return g.chain == nil || c.expect(g.chain)
	case g.admitted && g.judged == c.protocol:
		return true
	}
	return c.judge(g)
}

// judge judges by the snapshot in force now: it may be stricter than the one at the beginning of a client's silence.
func (c *Conn) judge(g *governed) bool {
	g.admitted, g.judged, g.snapshot = true, c.protocol, c.role.mesh.Snapshot()
	var refusal string
	info := c.info()
	if g.chain, refusal = c.role.meet(g.snapshot, &info); refusal != "" {
		c.Record.Ask(c.role.unmatched(g.snapshot, info.Destination.Port()))
		return c.refuse(c.refusal(refusal))
	}
	c.Record.Ask(c.role.recorded(g.snapshot, g.chain))
	return g.chain == nil || g.chain.TLS != nil || c.expect(g.chain)
}

// meet returns the filter chain that a connection meets, or why it is refused; both are empty if no listener is for it.
func (r *Role) meet(s *mesh.Snapshot, info *mesh.ConnInfo) (chain *mesh.FilterChain, refusal string) {
	switch {
	case r.gateway:
		return s.Gateway(info)
	case r.direction == flow.Inbound:
		return s.Inbound(info)
	}
	return s.Outbound(info)
}

// admits reports whether a configuration has a filter chain for a connection that asks no more of its client than what the
// handshake has followed.
func (r *Role) admits(s *mesh.Snapshot, info *mesh.ConnInfo, followed *mesh.DownstreamTLS) bool {
	var chain *mesh.FilterChain
	if r.gateway {
		chain = s.GatewayChain(info)
	} else if l := s.VirtualListener(true); l != nil {
		chain = l.Meet(info)
	}
	return chain != nil && chain.TLS.Admits(followed)
}

// refusal returns the reason and the error of a connection that the configuration does not let pass.
func (c *Conn) refusal(text string) (flow.Reason, error) {
	if c.lacksTLS() {
		return flow.TLSRequired, errors.New(text + ": it requires mutual TLS")
	}
	return flow.MeshRefused, errors.New(text)
}

// lacksTLS reports whether an inbound connection that is refused would pass if its client spoke TLS as Istio's proxies do.
func (c *Conn) lacksTLS() bool {
	info := c.info()
	if c.role.direction != flow.Inbound || info.TLS {
		return false
	}
	info.TLS, info.Protocols = true, secure.MeshALPN
	chain, refusal := c.governed.snapshot.Inbound(&info)
	return refusal == "" && chain != nil && chain.TLS != nil
}

var errUnexpectedTLS = errors.New("its filter chain is for HTTP without TLS, and the client speaks TLS")

var errNotHTTP = errors.New("its filter chain is for HTTP, and the connection is not HTTP")

// expect refuses a connection of another protocol if its filter chain is for HTTP: carried as opaque bytes, it would pass
// policies of HTTP unseen. Envoy answers it 400.
func (c *Conn) expect(chain *mesh.FilterChain) bool {
	if c.role.gateway && chain.HTTP == nil && c.HTTP() {
		c.protocol, c.governed.judged = sniff.Opaque, sniff.Opaque // as it is configured
	}
	if chain.HTTP != nil && (c.protocol == sniff.Opaque || c.protocol == sniff.TLS) {
		if c.protocol == sniff.TLS && !c.governed.secured {
			return c.abandon(flow.TLSUnexpected, errUnexpectedTLS)
		}
		return c.refuse(flow.MeshRefused, errNotHTTP)
	}
	return true
}

// refuse abandons a connection that its filter chain does not let pass. A client that leaves before its first byte has asked for
// nothing: it is the probe of a load balancer, or the connection that a browser opens in advance.
func (c *Conn) refuse(reason flow.Reason, err error) bool {
	if c.sniffer.Empty {
		reason, err = flow.Closed, nil
	}
	return c.abandon(reason, err)
}

// info returns what filter chains are chosen by.
func (c *Conn) info() mesh.ConnInfo {
	info := mesh.ConnInfo{
		Destination: c.Record.OriginalDestination, Source: c.Record.Downstream, DirectSource: c.Record.Direct().Addr(),
	}
	switch c.protocol {
	case sniff.TLS:
		info.TLS, info.ServerName, info.Protocols = true, c.sniffer.Hello.ServerName, c.sniffer.Hello.ALPN
	case sniff.HTTP1:
		info.Protocols = http1Protocols
	case sniff.HTTP2:
		info.Protocols = http2Protocols
	}
	return info
}

// infoInside returns what filter chains are chosen by for a connection whose TLS is ended here.
func (c *Conn) infoInside() mesh.ConnInfo {
	info := c.info()
	info.TLS, info.ServerName, info.Protocols = true, c.Record.TLS().ServerName, c.Record.TLS().ALPN
	return info
}

// mustSpeak reports whether a connection cannot be carried before its client has sent anything: inbound, no chain for its
// destination accepts it without TLS, or a policy denies what has no identity; outbound and at a gateway, its upstream depends
// on its requests.
func (c *Conn) mustSpeak() bool {
	info := c.info()
	if c.role.direction == flow.Outbound {
		chain, _ := c.role.meet(c.governed.snapshot, &info)
		return chain != nil && chain.HTTP != nil
	}
	chain, refusal := c.governed.snapshot.Inbound(&info)
	if chain == nil || len(chain.Policies) == 0 {
		return refusal != ""
	}
	subject := c.subject()
	_, denied := authorize(chain.Policies, &subject)
	return denied
}

// Names of the versions of HTTP in Envoy's HTTP inspector.
var (
	http1Protocols = []string{"http/1.1", "http/1.0"}
	http2Protocols = []string{"h2c"}
)
