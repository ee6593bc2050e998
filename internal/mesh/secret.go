package mesh

import "github.com/pillion-proxy/pillion/internal/wire"

// Secret is a certificate or roots of trust (envoy.extensions.transport_sockets.tls.v3.Secret). One of Certificate and
// Roots is set, unless it is refused.
type Secret struct {
	Name        string
	Certificate *Certificate
	Roots       *Roots
	Refused     bool // it is not understood, so whatever names it is closed
}

// Certificate is a chain with the key of its first certificate, both as PEM.
type Certificate struct {
	Chain []byte
	Key   PrivateKey
	OCSP  []byte // response that is stapled, as DER; may be empty
}

// Roots verify peers.
type Roots struct {
	CA  []byte // as PEM
	CRL []byte // as PEM; may be empty
}

// PrivateKey is a private key. No form of printing shows it: fmt does not follow pointers within a struct.
type PrivateKey struct{ pem *[]byte }

// NewPrivateKey returns the key in a PEM text.
func NewPrivateKey(pem []byte) PrivateKey { return PrivateKey{&pem} }

// PEM returns the key.
func (k PrivateKey) PEM() []byte {
	if k.pem == nil {
		return nil
	}
	return *k.pem
}

func (k PrivateKey) String() string   { return "[redacted]" }
func (k PrivateKey) GoString() string { return k.String() }

// The table has secrets that pillion cannot use as findings of security.
var secretResourceFields = message{"envoy.extensions.transport_sockets.tls.v3.Secret", Security, []field{
	1: {"name", decoded},
	2: {"tls_certificate", once},
	3: {"session_ticket_keys", security},
	4: {"validation_context", once},
	5: {"generic_secret", security},
}}

// secret returns a secret. In the oneof of its kinds the last field counts.
func (d *decoder) secret(m wire.Message) *Secret {
	s := &Secret{}
	for d.next(&m, &secretResourceFields) {
		switch m.Number {
		case 1:
			s.Name = m.String()
		case 2:
			s.Certificate, s.Roots = d.certificate(m.Message()), nil
		case 4:
			s.Certificate, s.Roots = nil, d.roots(m.Message())
		}
	}
	if s.Certificate == nil && s.Roots == nil {
		d.report(Security, "neither a certificate nor roots")
	}
	s.Refused = d.refusals > 0
	return s
}

var certificateFields = message{"envoy.extensions.transport_sockets.tls.v3.TlsCertificate", Security, []field{
	1: {"certificate_chain", once},
	2: {"private_key", once},
	3: {"password", security},
	4: {"ocsp_staple", once},
	5: {"signed_certificate_timestamp", cosmetic},
	6: {"private_key_provider", security},
	7: {"watched_directory", ignored}, // of files; these are reported
	8: {"pkcs12", security},
	9: {"tls_params", security},
}}

func (d *decoder) certificate(m wire.Message) *Certificate {
	c := &Certificate{}
	for d.next(&m, &certificateFields) {
		switch content := d.inline(m.Message()); m.Number {
		case 1:
			c.Chain = content
		case 2:
			c.Key = PrivateKey{&content}
		case 4:
			c.OCSP = content
		}
	}
	if len(c.Chain) == 0 || len(c.Key.PEM()) == 0 {
		d.report(Security, "a certificate without its chain or its key")
	}
	return c
}

// The same message configures a transport; see validationFields. In a secret it has roots only.
var rootsFields = message{"envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext", Security, []field{
	1:  {"trusted_ca", once},
	2:  {"verify_certificate_hash", security},
	3:  {"verify_certificate_spki", security},
	6:  {"require_signed_certificate_timestamp", security},
	7:  {"crl", once},
	8:  {"allow_expired_certificate", security},
	9:  {"match_subject_alt_names", security},
	10: {"trust_chain_verification", security},
	11: {"watched_directory", ignored}, // of files; these are reported
	12: {"custom_validator_config", security},
	13: {"ca_certificate_provider_instance", security},
	14: {"only_verify_leaf_cert_crl", security},
	15: {"match_typed_subject_alt_names", security},
	16: {"max_verify_depth", security},
	17: {"system_root_certs", security},
	18: {"suppress_client_ca_list", ignored},
}}

func (d *decoder) roots(m wire.Message) *Roots {
	r := &Roots{}
	for d.next(&m, &rootsFields) {
		switch content := d.inline(m.Message()); m.Number {
		case 1:
			r.CA = content
		case 7:
			r.CRL = content
		}
	}
	if len(r.CA) == 0 {
		d.report(Security, "roots without a certificate")
	}
	return r
}
