package mesh

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Transport is a way to secure connections to endpoints.
type Transport struct {
	Name string

	// TLSMode is what an endpoint's TLSMode must be. Empty: every endpoint matches.
	TLSMode string

	TLS     *UpstreamTLS // nil: plain
	Refused bool         // it is not understood, so connections that would use it are refused
}

// UpstreamTLS is TLS to an endpoint.
type UpstreamTLS struct {
	SNI         string
	ALPN        []string
	Certificate string // name of the secret that is presented; may be empty
	Roots       string // name of the secret that endpoints are verified with; empty: they are not verified

	// Names has matchers of subject alternative names, of which one must match. Empty: the chain is verified only.
	Names []NameMatcher

	// Of HTTP: the host that a request names is the SNI, unless it is an address, or the name that the certificate must have,
	// in the place of SNI and Names.
	HostSNI, HostName bool

	Pins []Pin // of which the certificate must have one; empty: any certificate
	CRL  CRL

	MinVersion, MaxVersion TLSVersion
	Suites                 []uint16 // of TLS 1.2, by their numbers; empty: the default
}

// CRL is a file of revocation lists, besides those of the secret of roots.
type CRL struct {
	Path     string // empty: there is none
	LeafOnly bool   // only the first certificate of a chain is looked up, in all lists
}

// Pin is the SHA-256 hash of a certificate or of its public key, both as DER.
type Pin struct {
	Key  bool // the hash is of the SubjectPublicKeyInfo
	Hash [sha256.Size]byte
}

// NameMatcher matches a subject alternative name.
type NameMatcher struct {
	Type NameType
	StringMatcher
}

// NameType is the type of a subject alternative name.
type NameType uint8

// The types, with Envoy's numbers. Names of other types are not supported.
const (
	AnyName NameType = iota
	EmailName
	DNSName
	URIName
	IPName
)

// TLSVersion is a version of TLS, with Envoy's numbers; 0 is the default.
type TLSVersion uint8

const maxTLSVersion = 4 // TLS 1.3

// StringMatcher matches a text. One of the fields besides IgnoreCase is set; the zero value matches the empty text.
type StringMatcher struct {
	Kind       MatchKind
	Text       string
	IgnoreCase bool
}

// MatchKind is how a StringMatcher matches.
type MatchKind uint8

// The kinds.
const (
	MatchExact MatchKind = iota
	MatchPrefix
	MatchSuffix
	MatchContains
	MatchRegex
)

// Type URLs of configurations of extensions.
const (
	typePrefix      = "type.googleapis.com/"
	upstreamTLSType = typePrefix + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
	rawBufferType   = typePrefix + "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
)

var transportMatchFields = message{"envoy.config.cluster.v3.Cluster.TransportSocketMatch", Security, []field{1: {"name", decoded}, 2: {"match", once}, 3: {"transport_socket", once}}}

func (d *decoder) transportMatch(m wire.Message) Transport {
	var name, mode string
	var t Transport
	before := d.refusals
	for d.next(&m, &transportMatchFields) {
		switch m.Number {
		case 1:
			name = m.String()
		case 2:
			d.strings(m.Message(), func(key, text string) {
				if key == "tlsMode" {
					mode = text
				} else {
					d.report(Security, "matches by "+key+" are not supported")
				}
			})
		case 3:
			t = d.transport(m.Message())
		}
	}
	t.Name, t.TLSMode, t.Refused = name, mode, d.refusals > before
	return t
}

var transportFields = message{"envoy.config.core.v3.TransportSocket", Security, []field{1: {"name", decoded}, 3: {"typed_config", once}}}

// transport returns the transport in a TransportSocket. Findings about it that concern security refuse it.
func (d *decoder) transport(m wire.Message) Transport {
	var t Transport
	before := d.refusals
	for d.next(&m, &transportFields) {
		switch m.Number {
		case 1:
			t.Name = m.String()
		case 3:
			switch url, value := d.any(m.Message()); url {
			case upstreamTLSType:
				t.TLS = d.upstreamTLS(m.Nested(value))
			case rawBufferType:
			default:
				d.report(Security, "transport sockets of type "+shortType(url)+" are not supported")
			}
		}
	}
	t.Refused = d.refusals > before
	return t
}

var upstreamTLSFields = message{"envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", Security, []field{
	1: {"common_tls_context", once},
	2: {"sni", decoded},
	3: {"allow_renegotiation", ignored}, // crypto/tls never renegotiates
	4: {"max_session_keys", ignored},    // sessions are not resumed
	5: {"enforce_rsa_key_usage", ignored},
	6: {"auto_host_sni", security},
	7: {"auto_sni_san_validation", security},
}}

func (d *decoder) upstreamTLS(m wire.Message) *UpstreamTLS {
	t := &UpstreamTLS{}
	common := &commonTLS{}
	for d.next(&m, &upstreamTLSFields) {
		switch m.Number {
		case 1:
			common = share(d, commonTLSFields.name, m.Bytes(), func() *commonTLS {
				read := &commonTLS{}
				d.commonTLS(m.Message(), read)
				return read
			})
		case 2:
			t.SNI = m.String()
		}
	}
	if len(common.certificates) > 1 {
		d.report(Security, "more than one certificate")
	}
	if len(common.certificates) > 0 {
		t.Certificate = common.certificates[0]
	}
	t.ALPN, t.Roots, t.Names, t.MinVersion, t.MaxVersion = common.alpn, common.roots, common.names, common.minVersion, common.maxVersion
	t.Pins, t.CRL, t.Suites = common.pins, common.crl, common.suites
	if t.Roots == "" && len(t.Names)+len(t.Pins) > 0 {
		d.report(Security, "no roots to verify endpoints with")
	}
	return t
}

// commonTLS is what TLS with clients and with endpoints have in common.
type commonTLS struct {
	alpn                   []string
	certificates           []string
	roots                  string
	names                  []NameMatcher
	pins                   []Pin
	crl                    CRL
	minVersion, maxVersion TLSVersion
	suites                 []uint16
}

var commonTLSFields = message{"envoy.extensions.transport_sockets.tls.v3.CommonTlsContext", Security, []field{
	1:  {"tls_params", once},
	2:  {"tls_certificates", security},
	3:  {"validation_context", once},
	4:  {"alpn_protocols", decoded},
	6:  {"tls_certificate_sds_secret_configs", decoded},
	7:  {"validation_context_sds_secret_config", once},
	8:  {"combined_validation_context", once},
	9:  {"tls_certificate_certificate_provider", security},
	10: {"validation_context_certificate_provider", security},
	11: {"tls_certificate_certificate_provider_instance", security},
	12: {"validation_context_certificate_provider_instance", security},
	13: {"custom_handshaker", security},
	14: {"tls_certificate_provider_instance", security},
	15: {"key_log", cosmetic}, // keys are never logged
	16: {"custom_tls_certificate_selector", security},
}}

func (d *decoder) commonTLS(m wire.Message, t *commonTLS) {
	for d.next(&m, &commonTLSFields) {
		switch m.Number {
		case 1:
			d.tlsParameters(m.Message(), t)
		case 3:
			d.validation(m.Message(), t)
		case 4:
			add(d, &t.alpn, &m, m.String())
		case 6:
			add(d, &t.certificates, &m, d.secretName(m.Message()))
		case 7:
			t.roots = d.secretName(m.Message())
		case 8:
			d.combinedValidation(m.Message(), t)
		}
	}
}

var tlsParametersFields = message{"envoy.extensions.transport_sockets.tls.v3.TlsParameters", Security, []field{
	1: {"tls_minimum_protocol_version", decoded},
	2: {"tls_maximum_protocol_version", decoded},
	3: {"cipher_suites", decoded},
	4: {"ecdh_curves", cosmetic},
	5: {"signature_algorithms", cosmetic},
	6: {"compliance_policies", security},
}}

func (d *decoder) tlsParameters(m wire.Message, t *commonTLS) {
	const tls12, tls13 = 3, 4
	listed := false
	for d.next(&m, &tlsParametersFields) {
		switch m.Number {
		case 1:
			t.minVersion = TLSVersion(d.enum(&m, maxTLSVersion))
			d.oldVersion(t.minVersion)
		case 2:
			t.maxVersion = TLSVersion(d.enum(&m, maxTLSVersion))
			d.oldVersion(t.maxVersion)
		case 3:
			listed = true
			d.suite(m.String(), &t.suites)
		}
	}
	switch {
	case !listed || len(t.suites) > 0 || t.minVersion == tls13:
	case t.maxVersion == 0 || t.maxVersion == tls13:
		t.minVersion = tls13
		d.report(Traffic, "no cipher suite for TLS 1.2 can be chosen, so only TLS 1.3 is served")
	default:
		d.report(Security, "no cipher suite can be chosen")
	}
}

// oldVersion reports a limit below TLS 1.2. It is raised to that.
func (d *decoder) oldVersion(v TLSVersion) {
	if v == 1 || v == 2 {
		d.report(Traffic, "TLS 1.0 and 1.1 are not served")
	}
}

// suite adds a cipher suite of TLS 1.2, given by its name in OpenSSL, to suites.
func (d *decoder) suite(name string, suites *[]uint16) {
	i := slices.IndexFunc(Suites, func(s Suite) bool { return s.Name == name })
	switch {
	case i >= 0:
		*suites = append(*suites, Suites[i].Number)
	case name != "AES256-GCM-SHA384" && name != "AES128-GCM-SHA256": // istiod lists them for the mesh, and no peer there needs them
		d.report(Cosmetic, "the cipher suite "+name+" cannot be chosen")
	}
}

// Suite is a cipher suite of TLS 1.2.
type Suite struct {
	Name   string // in OpenSSL and Envoy
	Number uint16 // of IANA
}

// Suites are the suites that can be chosen. All have forward secrecy. Those of TLS 1.3 are not configurable.
var Suites = []Suite{
	{"ECDHE-ECDSA-AES256-GCM-SHA384", 0xc02c},
	{"ECDHE-RSA-AES256-GCM-SHA384", 0xc030},
	{"ECDHE-ECDSA-AES128-GCM-SHA256", 0xc02b},
	{"ECDHE-RSA-AES128-GCM-SHA256", 0xc02f},
	{"ECDHE-ECDSA-CHACHA20-POLY1305", 0xcca9},
	{"ECDHE-RSA-CHACHA20-POLY1305", 0xcca8},
	{"ECDHE-ECDSA-AES128-SHA", 0xc009},
	{"ECDHE-RSA-AES128-SHA", 0xc013},
	{"ECDHE-ECDSA-AES256-SHA", 0xc00a},
	{"ECDHE-RSA-AES256-SHA", 0xc014},
}

var combinedFields = message{"envoy.extensions.transport_sockets.tls.v3.CommonTlsContext.CombinedCertificateValidationContext", Security, []field{
	1: {"default_validation_context", once},
	2: {"validation_context_sds_secret_config", once},
	3: {"validation_context_certificate_provider", security},
	4: {"validation_context_certificate_provider_instance", security},
}}

func (d *decoder) combinedValidation(m wire.Message, t *commonTLS) {
	for d.next(&m, &combinedFields) {
		switch m.Number {
		case 1:
			d.validation(m.Message(), t)
		case 2:
			t.roots = d.secretName(m.Message())
		}
	}
}

var validationFields = message{"envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext", Security, []field{
	1:  {"trusted_ca", security}, // istiod names a secret
	2:  {"verify_certificate_hash", decoded},
	3:  {"verify_certificate_spki", decoded},
	6:  {"require_signed_certificate_timestamp", security},
	7:  {"crl", once},
	8:  {"allow_expired_certificate", security},
	9:  {"match_subject_alt_names", decoded},
	10: {"trust_chain_verification", security},
	11: {"watched_directory", ignored},
	12: {"custom_validator_config", security},
	13: {"ca_certificate_provider_instance", security},
	14: {"only_verify_leaf_cert_crl", decoded},
	15: {"match_typed_subject_alt_names", decoded},
	16: {"max_verify_depth", security},
	17: {"system_root_certs", security},
	18: {"suppress_client_ca_list", ignored},
}}

// crlFields are those of the file that istiod names.
var crlFields = message{"envoy.config.core.v3.DataSource", Security, []field{
	1: {"filename", choice},
	2: {"inline_bytes", security},
	3: {"inline_string", security},
	4: {"environment_variable", security},
	5: {"watched_directory", ignored},
}}

func (d *decoder) validation(m wire.Message, t *commonTLS) {
	for d.next(&m, &validationFields) {
		switch m.Number {
		case 2:
			add(d, &t.pins, &m, d.pin(strings.ReplaceAll(m.String(), ":", ""), false))
		case 3:
			add(d, &t.pins, &m, d.pin(m.String(), true))
		case 7:
			for m := m.Message(); d.next(&m, &crlFields); {
				t.crl.Path = m.String()
			}
			if t.crl.Path == "" { // it would count as no list
				d.report(Security, "a revocation list without a file")
			}
		case 14:
			t.crl.LeafOnly = m.Bool()
		case 9:
			add(d, &t.names, &m, NameMatcher{StringMatcher: d.stringMatcher(m.Message())})
		case 15:
			add(d, &t.names, &m, d.nameMatcher(m.Message()))
		}
	}
}

// pin returns a hash: in hexadecimal that of a certificate, and in base64 that of a key.
func (d *decoder) pin(text string, key bool) Pin {
	decode := hex.DecodeString
	if key {
		decode = base64.StdEncoding.DecodeString
	}
	hash, err := decode(text)
	if err != nil || len(hash) != sha256.Size {
		d.report(Security, "not a SHA-256 hash")
		return Pin{Key: key}
	}
	return Pin{key, [sha256.Size]byte(hash)}
}

var nameMatcherFields = message{"envoy.extensions.transport_sockets.tls.v3.SubjectAltNameMatcher", Security, []field{
	1: {"san_type", decoded},
	2: {"matcher", once},
	3: {"oid", security},
}}

func (d *decoder) nameMatcher(m wire.Message) NameMatcher {
	var n NameMatcher
	matches := false
	for d.next(&m, &nameMatcherFields) {
		switch m.Number {
		case 1:
			n.Type = NameType(d.enum(&m, uint64(IPName)))
		case 2:
			n.StringMatcher, matches = d.stringMatcher(m.Message()), true
		}
	}
	if n.Type == AnyName || !matches {
		d.report(Security, "a matcher of names without a type or a pattern")
	}
	return n
}

var secretFields = message{"envoy.extensions.transport_sockets.tls.v3.SdsSecretConfig", Security, []field{1: {"name", decoded}, 2: {"sds_config", ignored}}}

func (d *decoder) secretName(m wire.Message) (name string) {
	for d.next(&m, &secretFields) {
		name = m.String()
	}
	if name == "" {
		d.report(Security, "a secret without a name")
	}
	return name
}

var stringMatcherFields = message{"envoy.type.matcher.v3.StringMatcher", Security, []field{
	1: {"exact", choice},
	2: {"prefix", choice},
	3: {"suffix", choice},
	5: {"safe_regex", choice},
	6: {"ignore_case", decoded},
	7: {"contains", choice},
	8: {"custom", security},
}}

// stringMatcher returns a matcher.
func (d *decoder) stringMatcher(m wire.Message) StringMatcher {
	var s StringMatcher
	set := false
	for d.next(&m, &stringMatcherFields) {
		set = set || m.Number != 6
		switch m.Number {
		case 1:
			s.Kind, s.Text = MatchExact, m.String()
		case 2:
			s.Kind, s.Text = MatchPrefix, m.String()
		case 3:
			s.Kind, s.Text = MatchSuffix, m.String()
		case 5:
			s.Kind, s.Text = MatchRegex, d.regex(m.Message())
		case 6:
			s.IgnoreCase = m.Bool()
		case 7:
			s.Kind, s.Text = MatchContains, m.String()
		}
	}
	if !set {
		d.report(Security, "a matcher without a pattern")
	}
	return s
}
