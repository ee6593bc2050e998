package mesh

import (
	"slices"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// DownstreamTLS is TLS with clients
// (envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext). Sessions are not resumed: a ticket would outlive a
// change of the roots.
type DownstreamTLS struct {
	ALPN         []string
	Certificates []string // names of secrets
	Roots        string   // name of the secret that clients are verified with; empty: they are not verified

	// Names has matchers of subject alternative names, of which one must match. Empty: the chain is verified only.
	Names []NameMatcher

	RequireClient bool // a client without a certificate is rejected

	Pins []Pin // of which a client's certificate must have one; empty: any certificate
	CRL  CRL

	MinVersion, MaxVersion TLSVersion
	Suites                 []uint16 // of TLS 1.2, by their numbers; empty: the default
}

// Admits reports whether a client whose handshake followed before may go on where t is in force: t asks no more of clients. Both
// may be nil.
func (t *DownstreamTLS) Admits(before *DownstreamTLS) bool {
	switch {
	case t == before:
		return true
	case t == nil || before == nil:
		return false
	case t.Roots == "":
		return true
	}
	return t.Roots == before.Roots && (before.RequireClient || !t.RequireClient) && slices.Equal(t.Names, before.Names) && slices.Equal(t.Pins, before.Pins) && t.CRL == before.CRL
}

const downstreamTLSType = typePrefix + "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"

// downstreamTransport returns the TLS in a TransportSocket; nil is plain.
func (d *decoder) downstreamTransport(m wire.Message) (t *DownstreamTLS) {
	configured := false
	for d.next(&m, &transportFields) {
		if m.Number != 3 {
			continue
		}
		configured = true
		switch url, value := d.any(m.Message()); url {
		case downstreamTLSType:
			t = d.downstreamTLS(m.Nested(value))
		case rawBufferType:
			t = nil
		default:
			d.report(Security, "transport sockets of type "+shortType(url)+" are not supported")
		}
	}
	if !configured {
		d.report(Security, "a transport socket without a configuration")
	}
	return t
}

var downstreamTLSFields = message{"envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", Security, []field{
	1:  {"common_tls_context", decoded},
	2:  {"require_client_certificate", once},
	3:  {"require_sni", security},
	4:  {"session_ticket_keys", ignored}, // sessions are not resumed
	5:  {"session_ticket_keys_sds_secret_config", ignored},
	6:  {"session_timeout", ignored},
	7:  {"disable_stateless_session_resumption", ignored},
	8:  {"ocsp_staple_policy", security}, // other than lenient
	9:  {"full_scan_certs_on_sni_mismatch", ignored},
	10: {"disable_stateful_session_resumption", ignored},
	11: {"prefer_client_ciphers", ignored},
}}

func (d *decoder) downstreamTLS(m wire.Message) *DownstreamTLS {
	t := &DownstreamTLS{}
	var common commonTLS
	for d.next(&m, &downstreamTLSFields) {
		switch m.Number {
		case 1:
			d.commonTLS(m.Message(), &common)
		case 2:
			t.RequireClient = d.boolValue(m.Message())
		}
	}
	t.ALPN, t.Roots, t.Names, t.MinVersion, t.MaxVersion = common.alpn, common.roots, common.names, common.minVersion, common.maxVersion
	t.Certificates, t.Pins, t.CRL, t.Suites = common.certificates, common.pins, common.crl, common.suites
	if len(t.Certificates) == 0 {
		d.report(Security, "no certificate to present")
	}
	if t.Roots == "" && (t.RequireClient || len(t.Names)+len(t.Pins) > 0) {
		d.report(Security, "no roots to verify clients with")
	}
	return t
}
