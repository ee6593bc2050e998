package metrics

import (
	"slices"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/promtext"
)

// maxPrincipals bounds the pairs of principals, and of the sets of connections by TLS, of each direction. Peers beyond them
// are counted without principals.
const maxPrincipals = 16

// principals are the labels that TLS gives to requests and connections.
type principals struct {
	foldedSecurity *flow.Security // of folded sets
	mutual         *flow.Security // of peers without a place; nil: they are counted like those without TLS

	// Guarded by the direction's mu.
	pairs  map[flow.Security]*flow.Security
	secure map[tcpKey]*tcpSet
	inTLS  []*tcpSet // those of secure, in their order
}

// tcpKey is a set of connections by TLS. base is the set with the same flags of connections without TLS.
type tcpKey struct {
	base     *tcpSet
	security *flow.Security
}

func (d *direction) initSecurity() {
	d.pairs, d.secure = make(map[flow.Security]*flow.Security), make(map[tcpKey]*tcpSet)
	if d.naming.inbound { // otherwise their labels are those of traffic without TLS
		d.mutual, d.foldedSecurity = &flow.Security{Mutual: true}, &flow.Security{}
	}
}

// securityOf returns the labels of a record, the same pointer for the same labels; nil for those of traffic without TLS.
func (d *direction) securityOf(r *flow.Record) *flow.Security {
	if r.Security == nil {
		return nil
	}
	key := flow.Security{Peer: r.Security.Peer, Own: r.Security.Own, Mutual: r.Security.Mutual && d.naming.inbound}
	if key == (flow.Security{}) {
		return nil
	}
	d.mu.RLock()
	s := d.pairs[key]
	d.mu.RUnlock()
	if s != nil {
		return s
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch s = d.pairs[key]; {
	case s != nil:
		return s
	case key.Mutual && key.Peer == "" && key.Own == "":
		return d.mutual
	case len(d.pairs) < maxPrincipals:
		s = new(flow.Security) // not &key, so that key is not allocated
		*s = key
		d.pairs[key] = s
		return s
	case key.Mutual:
		return d.mutual
	}
	return nil
}

// policy returns Istio's connection_security_policy. The source of a connection does not report it.
func (d *direction) policy(s *flow.Security) string {
	switch {
	case s == nil:
		return d.security
	case s == d.foldedSecurity:
		return podinfo.Unknown
	case s.Mutual:
		return "mutual_tls"
	}
	return d.security
}

// secured returns labels with the principals of both ends.
func (d *direction) secured(labels []promtext.Label, s *flow.Security) []promtext.Label {
	if s == nil || s.Peer == "" && s.Own == "" {
		return labels[:len(labels):len(labels)]
	}
	source, destination := s.Own, s.Peer
	if d.naming.inbound {
		source, destination = s.Peer, s.Own
	}
	labels = slices.Clone(labels)
	for i, l := range labels {
		switch l.Name {
		case "source_principal":
			labels[i] = label(l.Name, orUnknown(source))
		case "destination_principal":
			labels[i] = label(l.Name, orUnknown(destination))
		}
	}
	return labels
}

func orUnknown(principal string) string {
	if principal == "" {
		return podinfo.Unknown
	}
	return principal
}

func (d *direction) newTCPSet(of []promtext.Label, flags string, s *flow.Security) *tcpSet {
	return &tcpSet{flags: flags, service: of, labels: append(d.secured(of, s),
		label("request_protocol", "tcp"),
		label("response_flags", orDash(flags)),
		label("connection_security_policy", d.policy(s)))}
}

// tcpSet returns the set in which a connection is counted that base would count without TLS.
func (d *direction) tcpSet(base *tcpSet, r *flow.Record) *tcpSet {
	key := tcpKey{base, d.securityOf(r)}
	if key.security == nil {
		return base
	}
	d.mu.RLock()
	set := d.secure[key]
	d.mu.RUnlock()
	if set != nil {
		return set
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.secure[key] == nil && len(d.secure) >= maxPrincipals {
		if key.security = d.mutual; key.security == nil {
			return base
		}
	}
	if set = d.secure[key]; set == nil {
		set = d.newTCPSet(base.service, base.flags, key.security)
		d.secure[key] = set
		d.inTLS = append(d.inTLS, set)
	}
	return set
}

// tcpSets returns all sets of connections, always in the same order.
func (d *direction) tcpSets() []*tcpSet {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return slices.Concat(d.tcp, d.inTLS)
}
