package metrics

import (
	"slices"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/promtext"
)

// maxTCPSets bounds the sets of connections with labels of peers, of each direction. Further connections are counted as
// those of an unknown peer.
const maxTCPSets = 32

// peerLabels are the labels that the other side gives to requests and connections.
type peerLabels struct {
	security flow.Security // Peer, Own and Mutual only
	workload flow.Workload
}

// peersOf are the peers of one direction.
type peersOf struct {
	foldedPeer *peerLabels // of folded sets
	mutual     *peerLabels // of peers without a place; nil: they are counted like unknown ones without TLS

	// Guarded by the direction's mu.
	known    map[peerLabels]*peerLabels
	unproven int // of known
	secure   map[tcpKey]*tcpSet
	ofPeers  []*tcpSet // those of secure, in their order
}

// tcpKey is a set of connections with a peer. base is the set with the same flags of connections with an unknown peer.
type tcpKey struct {
	base *tcpSet
	peer *peerLabels
	plan *plan
}

func (d *direction) initPeers() {
	d.known, d.secure = make(map[peerLabels]*peerLabels), make(map[tcpKey]*tcpSet)
	if d.naming.inbound { // otherwise their labels are those of traffic without TLS
		d.mutual, d.foldedPeer = &peerLabels{security: flow.Security{Mutual: true}}, &peerLabels{}
	}
}

// peerOf returns the labels of a record, the same pointer for the same labels; nil for those of an unknown peer without TLS.
func (d *direction) peerOf(r *flow.Record) *peerLabels {
	security, workload := r.Security, r.Workload.Get()
	if security == nil && workload == nil {
		return nil
	}
	return d.lookUp(security, workload)
}

func (d *direction) lookUp(security *flow.Security, workload *flow.Workload) *peerLabels {
	var key peerLabels
	if security != nil {
		key.security = flow.Security{Peer: security.Peer, Own: security.Own, Mutual: security.Mutual && d.naming.inbound}
	}
	if workload != nil {
		key.workload = *workload
	}
	if key == (peerLabels{}) {
		return nil
	}
	d.mu.RLock()
	p := d.known[key]
	d.mu.RUnlock()
	if p != nil {
		return p
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.place(key)
}

// place returns the peer with a place, and gives it one if there is one left. d.mu is held.
func (d *direction) place(key peerLabels) *peerLabels {
	p := d.known[key]
	unproven := key.security.Peer == "" && key.workload != (flow.Workload{})
	switch {
	case p != nil:
		return p
	case d.mutual != nil && key == *d.mutual:
		return d.mutual
	case len(d.known) < d.budget.peers && (!unproven || d.unproven < d.budget.peers/2):
		p = new(peerLabels) // not &key, so that key is not allocated
		*p = key
		d.known[key] = p
		if unproven {
			d.unproven++
		}
		return p
	case key.security.Mutual:
		return d.mutual
	}
	return nil
}

// policy returns Istio's connection_security_policy. The source of a connection does not report it.
func (d *direction) policy(p *peerLabels) string {
	switch {
	case p == nil:
		return d.security
	case p == d.foldedPeer:
		return podinfo.Unknown
	case p.security.Mutual:
		return "mutual_tls"
	}
	return d.security
}

// named returns labels with the principals of both ends and the workload of the other side.
func (d *direction) named(labels []promtext.Label, p *peerLabels) []promtext.Label {
	if p == nil {
		return labels[:len(labels):len(labels)]
	}
	source, destination, side := p.security.Own, p.security.Peer, "destination_"
	if d.naming.inbound {
		source, destination, side = destination, source, "source_"
	}
	w := &p.workload
	known := map[string]string{
		"source_principal": source, "destination_principal": destination,
		side + "workload": w.Name, side + "workload_namespace": w.Namespace, side + "cluster": w.Cluster,
		side + "app": w.App, side + "version": w.Version,
		side + "canonical_service": w.CanonicalService, side + "canonical_revision": w.CanonicalRevision,
	}
	labels = slices.Clone(labels)
	for i, l := range labels {
		if value := known[l.Name]; value != "" {
			labels[i] = label(l.Name, value)
		}
	}
	return labels
}

func (d *direction) newTCPSet(of []promtext.Label, flags string, p *peerLabels) *tcpSet {
	return &tcpSet{flags: flags, service: of, labels: append(d.named(of, p),
		label("request_protocol", "tcp"),
		label("response_flags", orDash(flags)),
		label("connection_security_policy", d.policy(p)))}
}

// tcpSet returns the set in which a connection is counted that base would count with an unknown peer.
func (d *direction) tcpSet(base *tcpSet, r *flow.Record) *tcpSet {
	key := tcpKey{base, d.peerOf(r), planOf(r)}
	if key.peer == nil && key.plan == nil {
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
	if d.secure[key] == nil && len(d.secure) >= maxTCPSets {
		if key.peer = d.mutual; key.peer != nil && (r.Security == nil || !r.Security.Mutual) {
			key.peer = nil
		}
		if key.peer == nil && key.plan == nil || len(d.secure) >= 2*maxTCPSets {
			return base
		}
	}
	if set = d.secure[key]; set == nil {
		set = d.newTCPSet(base.service, base.flags, key.peer)
		set.plan = key.plan
		d.secure[key] = set
		d.ofPeers = append(d.ofPeers, set)
	}
	return set
}

// tcpSets returns all sets of connections, always in the same order.
func (d *direction) tcpSets() []*tcpSet {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return slices.Concat(d.tcp, d.ofPeers)
}
