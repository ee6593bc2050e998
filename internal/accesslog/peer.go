package accesslog

import (
	"fmt"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// certificateOf is a part of a certificate: a text, or for verbValidity a time.
type certificateOf struct {
	text func(*flow.Certificate) string
	time func(*flow.Certificate) time.Time
}

// certificateOperators returns Envoy's operators of the certificates in TLS with one side.
func certificateOperators(name string, side flow.Direction) (all []operator) {
	add := func(suffix string, own bool, text func(*flow.Certificate) string) {
		all = append(all, operator{name + suffix, takesNone, piece{does: verbCertificate, side: side, local: own, of: certificateOf{text: text}}})
	}
	for owner, own := range map[string]bool{"_PEER": false, "_LOCAL": true} {
		add(owner+"_DNS_SAN", own, func(c *flow.Certificate) string { return c.DNS })
		add(owner+"_IP_SAN", own, func(c *flow.Certificate) string { return c.IPs })
		add(owner+"_EMAIL_SAN", own, func(c *flow.Certificate) string { return c.Emails })
		add(owner+"_SUBJECT", own, func(c *flow.Certificate) string { return c.Subject })
	}
	add("_PEER_ISSUER", false, func(c *flow.Certificate) string { return c.Issuer })
	add("_PEER_CERT", false, func(c *flow.Certificate) string { return c.PEM })
	for suffix, moment := range map[string]func(*flow.Certificate) time.Time{
		"_START": func(c *flow.Certificate) time.Time { return c.NotBefore }, "_END": func(c *flow.Certificate) time.Time { return c.NotAfter },
	} {
		all = append(all, operator{name + "_PEER_CERT_V" + suffix, takesLayout, piece{does: verbValidity, side: side, of: certificateOf{time: moment}}})
	}
	if side == flow.Inbound { // Envoy has these of downstream only
		add("_PEER_SERIAL", false, func(c *flow.Certificate) string { return c.Serial })
		add("_PEER_FINGERPRINT_256", false, func(c *flow.Certificate) string { return c.SHA256 })
		add("_PEER_FINGERPRINT_1", false, func(c *flow.Certificate) string { return c.SHA1 })
		add("_PEER_CHAIN_SERIALS", false, func(c *flow.Certificate) string { return c.ChainSerials })
		add("_PEER_CHAIN_FINGERPRINTS_256", false, func(c *flow.Certificate) string { return c.ChainSHA256 })
		add("_PEER_CHAIN_FINGERPRINTS_1", false, func(c *flow.Certificate) string { return c.ChainSHA1 })
	}
	return all
}

// uris returns the URIs of a certificate, or those of a verified identity if the certificate is not described.
func uris(c *flow.Certificate, identity string) string {
	if c == nil {
		return identity
	}
	return c.URIs
}

// certificate returns the certificate that the operator names; nil if it is not in the record.
func (p *piece) certificate(r *flow.Record) *flow.Certificate {
	switch s := r.SecurityOf(p.side); {
	case s == nil:
		return nil
	case p.local:
		return s.OwnCertificate
	default:
		return s.PeerCertificate
	}
}

func (p *piece) ofCertificate(r *flow.Record) string {
	if c := p.certificate(r); c != nil {
		return p.of.text(c)
	}
	return ""
}

// appendValidity appends the beginning or the end of a certificate's validity.
func (p *piece) appendValidity(dst []byte, l *line, r *flow.Record) ([]byte, bool) {
	switch c := p.certificate(r); {
	case c == nil:
		return dst, false
	case p.layout == "":
		return l.appendStart(dst, p.of.time(c)), true
	default:
		return appendTime(dst, p.of.time(c), p.layout), true
	}
}

// filterState compiles the argument of %FILTER_STATE%: the workload of a peer is the only state that there is.
func (p *piece) filterState(arg *string) error {
	text := ""
	if arg != nil {
		text = *arg
	}
	if p.does == verbDryRun {
		return p.metadata(text)
	}
	key, name, _ := strings.Cut(text, ":FIELD:")
	p.side = map[string]flow.Direction{"downstream_peer": flow.Inbound, "upstream_peer": flow.Outbound}[key]
	if p.name = flow.WorkloadNames[name]; p.name == nil || key != "downstream_peer" && key != "upstream_peer" {
		return fmt.Errorf("%q is not a state of the agent; write, for example, downstream_peer:FIELD:workload or upstream_peer:FIELD:namespace "+
			"(fields: workload, namespace, cluster, service, revision, app, version)", text)
	}
	return nil
}

// appendWorkload appends a name of the peer's workload.
func (p *piece) appendWorkload(dst []byte, r *flow.Record) ([]byte, bool) {
	w := r.Workload.Get()
	if w == nil || r.Direction != p.side {
		return dst, false
	}
	name := p.name(w)
	if p.max >= 0 {
		name = name[:min(p.max, len(name))]
	}
	return orMissing(p, dst, name)
}

// dryRunFilter begins the names of the values in Envoy's metadata of policies that are not enforced.
const dryRunFilter = "envoy.filters.http.rbac:"

// metadata compiles the argument of %DYNAMIC_METADATA%: dry runs are the only values that there are.
func (p *piece) metadata(text string) error {
	key, found := strings.CutPrefix(text, dryRunFilter)
	if !found { // of connections
		key, found = strings.CutPrefix(text, "envoy.filters.network.rbac:")
	}
	if !found || !envoy.IsDryRunKey(key) {
		return fmt.Errorf("%q is not metadata of the agent; write, for example, %sistio_dry_run_deny_shadow_effective_policy_id or "+
			"%[2]sistio_dry_run_allow_shadow_engine_result", text, dryRunFilter)
	}
	p.own = key
	return nil
}

// appendDryRun appends what a dry run has found.
func (p *piece) appendDryRun(dst []byte, d *flow.DryRun) ([]byte, bool) {
	value := d.Value(p.own)
	if p.max >= 0 {
		value = value[:min(p.max, len(value))]
	}
	return orMissing(p, dst, value)
}
