package serve

import (
	"bytes"
	"errors"
	"net/http"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Egress is the policy for outbound connections: see egress.Policy. Its methods are called from several goroutines, and may
// take as long as looking a name up.
type Egress interface {
	// Connection and Request return why they are denied, or "".
	Connection(to netip.AddrPort, name string) string
	Request(to netip.AddrPort, authority string, proxied bool) string

	// Unnamed reports whether a connection without a name is allowed.
	Unnamed(to netip.AddrPort) bool

	// Version is equal for judgements by the same rules.
	Version() any
}

// nameTimeout is how long a client may be silent that has to name an allowed host before anything is dialled.
const nameTimeout = 15 * time.Second

// mustName reports whether a connection is allowed only if its client names a host.
func (c *Conn) mustName() bool {
	return c.role.egress != nil && !c.role.egress.Unnamed(c.Record.OriginalDestination)
}

// Permit refuses a connection that the policy for outbound connections denies. Call it after ReadFirst, before anything is
// dialled, and after WatchBoth, when a client that was silent has sent something. Requests are judged one by one; their
// connection has to be allowed by its address first in HTTP/2, whose engine dials before the first request. Without a policy
// it does nothing.
func (c *Conn) Permit() bool {
	policy := c.role.egress
	if policy != nil && c.protocol == sniff.Opaque && c.sniffer.Vague() && !c.beginsTLS() {
		c.protocol = sniff.HTTP1 // the request that it may become is judged
	}
	if policy == nil || c.protocol == sniff.HTTP1 {
		return true
	}
	name := ""
	switch {
	case c.role.decryption != nil && c.Record.Security != nil:
		name = c.Record.TLS().ServerName // of the TLS that was ended
	case c.protocol == sniff.TLS:
		name = c.sniffer.Hello.ServerName
	case c.protocol == sniff.Opaque && c.beginsTLS():
		name = unreadable
	}
	denied := policy.Connection(c.Record.OriginalDestination, name)
	if denied == "" {
		return true
	}
	c.Record.Cluster = envoy.BlackHoleCluster
	return c.abandon(flow.Denied, errors.New(denied))
}

// unreadable stands for a server name in a ClientHello that cannot be parsed. It is not a host, so no rule for hosts allows
// it: a server might still find a name there.
const unreadable = "?"

// beginsTLS reports whether the bytes of an opaque connection begin like TLS.
func (c *Conn) beginsTLS() bool {
	return c.sniffer.Read != nil && sniff.BeginsTLS(c.sniffer.Read.Bytes())
}

// permit is the Router of HTTP connections with a policy: each request is judged by its authority, and those that are
// allowed go on to next.
type permit struct {
	policy  Egress
	to      netip.AddrPort
	next    httpforward.Router // nil: allowed
	allowed httpforward.Decision

	// The last judgement. It counts for later requests of the same authority.
	version   any
	authority []byte
	denied    *route.Reply
}

// permitted puts the policy before a connection's router.
func (c *Conn) permitted(next httpforward.Router, to *upstream.Target) httpforward.Router {
	return &permit{
		policy: c.role.egress, to: c.Record.OriginalDestination, next: next,
		allowed: httpforward.Decision{Target: *to, Cluster: c.Record.Cluster, Route: c.Record.Route},
	}
}

// Route implements httpforward.Router. A lookup may block the connection, for 5 s at most.
func (p *permit) Route(r *httpforward.Request) httpforward.Decision {
	proxied := proxied(r)
	version := p.policy.Version()
	if p.version == nil || version != p.version || proxied || otherHost(r) != nil || !bytes.Equal(p.authority, r.Authority) {
		p.judge(r, proxied)
		p.version = version
		if proxied || otherHost(r) != nil {
			p.version = nil // the judgement is for this request alone
		}
	}
	switch {
	case p.denied != nil:
		return httpforward.Decision{Cluster: envoy.BlackHoleCluster, Route: p.allowed.Route, Reply: p.denied}
	case p.next != nil:
		return p.next.Route(r)
	}
	return p.allowed
}

// OnlyHTTP implements httpforward.OnlyHTTP.
func (p *permit) OnlyHTTP() bool { return true }

// Retired implements httpforward.Retirement.
func (p *permit) Retired() bool {
	next, ok := p.next.(httpforward.Retirement)
	return ok && next.Retired()
}

func (p *permit) judge(r *httpforward.Request, proxied bool) {
	p.authority = append(p.authority[:0], r.Authority...)
	denied := p.policy.Request(p.to, string(r.Authority), proxied)
	if proxied && r.Absolute && denied != "" {
		denied = p.policy.Request(p.to, string(r.Authority), false) // a server accepts this form as well (RFC 9112 §3.2.2)
	}
	if host := otherHost(r); denied == "" && host != nil {
		denied = p.policy.Request(p.to, string(host), proxied)
	}
	p.denied = nil
	if denied != "" {
		p.denied = &route.Reply{
			Status: http.StatusForbidden, Body: "pillion: " + denied + "\n", Details: envoy.DetailsDirectResponse, Reason: flow.Denied,
		}
	}
}

// proxied reports whether a request asks a proxy to connect or to send it elsewhere.
func proxied(r *httpforward.Request) bool { return isTunnel(r) || r.Absolute }

// otherHost returns a host field that differs from the authority: a server may go by either.
func otherHost(r *httpforward.Request) []byte {
	for i := range r.Fields.Len() {
		name, value := r.Fields.At(i)
		if len(name) == len("host") && bytes.EqualFold(name, []byte("host")) && !bytes.Equal(value, r.Authority) {
			return value
		}
	}
	return nil
}
