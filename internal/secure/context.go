package secure

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// ServerConfig is TLS with the clients of a filter chain.
type ServerConfig struct {
	// Certificate returns the certificate that is presented, at each handshake. An error is a NoIdentity.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)

	Protocols []string  // ALPN, in the order of preference. A client that offers no protocol of them goes on without ALPN
	Clients   *Verifier // nil: clients are not asked for a certificate
	Optional  bool      // a client without a certificate is accepted

	MinVersion, MaxVersion uint16   // numbers of crypto/tls; 0: 1.2 and 1.3
	Suites                 []uint16 // of TLS 1.2, as numbers of crypto/tls; empty: the default
}

// ServerContext is a compiled ServerConfig. It is used by any number of handshakes at a time.
type ServerContext struct{ config *tls.Config }

// NewServer compiles a configuration.
//
// Sessions are not resumed: a ticket would outlive a change of the roots (CVE-2022-21654).
func NewServer(config ServerConfig) *ServerContext {
	base := newConfig(config.MinVersion, config.MaxVersion, config.Suites)
	base.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		certificate, err := config.Certificate(hello)
		if err != nil {
			return nil, &Error{NoIdentity, err.Error(), err}
		}
		if s, ok := hello.Conn.(*socket); ok {
			s.presented = certificate.Leaf
			s.pause() // half of the computation is done: keys are agreed on, and the signature follows
		}
		return certificate, nil
	}
	if config.Clients != nil {
		base.ClientAuth = tls.RequireAnyClientCert
		if config.Optional {
			base.ClientAuth = tls.RequestClientCert
		}
		base.VerifyConnection = func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return nil // Optional
			}
			return config.Clients.verify(state.PeerCertificates, x509.ExtKeyUsageClientAuth)
		}
	}
	base.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if config.Clients != nil { // without roots, clients without a certificate are not accepted either
			if _, err := config.Clients.Trust(); err != nil {
				return nil, &Error{NoIdentity, err.Error(), err}
			}
		}
		own := base.Clone()
		own.NextProtos = protocol(config.Protocols, hello.SupportedProtos)
		if s, ok := hello.Conn.(*socket); ok {
			own.KeyLogWriter = &s.secrets
		}
		return own, nil
	}
	return &ServerContext{base}
}

// protocol returns just the protocol to agree on, or nil. Crypto/tls ends a handshake without a protocol in common by an
// alert, and Envoy goes on without ALPN, which Istio's clients rely on.
func protocol(ours, theirs []string) []string {
	for i, p := range ours {
		if slices.Contains(theirs, p) {
			return ours[i : i+1]
		}
	}
	return nil
}

// ClientConfig is TLS with the servers of a cluster.
type ClientConfig struct {
	ServerName string   // sent as SNI; empty: none is sent
	Protocols  []string // ALPN that is offered; may be empty

	// Certificate returns the certificate that is presented if the server asks for one. Nil: none is presented.
	Certificate func() (*tls.Certificate, error)

	Servers *Verifier // nil: the server is not verified

	MinVersion, MaxVersion uint16   // numbers of crypto/tls; 0: 1.2 and 1.3
	Suites                 []uint16 // of TLS 1.2, as numbers of crypto/tls; empty: the default
}

// ClientContext is a compiled ClientConfig. It is used by any number of handshakes at a time.
type ClientContext struct{ config *tls.Config }

// NewClient compiles a configuration.
func NewClient(config ClientConfig) *ClientContext {
	base := newConfig(config.MinVersion, config.MaxVersion, config.Suites)
	base.ServerName, base.NextProtos = config.ServerName, config.Protocols
	base.InsecureSkipVerify = true // VerifyConnection verifies instead, without comparing ServerName
	if config.Certificate != nil {
		base.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			certificate, err := config.Certificate()
			if err != nil {
				return nil, &Error{NoIdentity, err.Error(), err}
			}
			return certificate, nil
		}
	}
	if config.Servers != nil {
		base.VerifyConnection = func(state tls.ConnectionState) error {
			return config.Servers.verify(state.PeerCertificates, x509.ExtKeyUsageServerAuth)
		}
	}
	return &ClientContext{base}
}

// Conn returns the client's side of TLS on conn. Unlike Client, it leaves the connection as one of package net.
func (c *ClientContext) Conn(conn net.Conn) *tls.Conn { return tls.Client(conn, c.config) }

// defaultSuites are the first of mesh.Suites: those of Istio's proxies, and ChaCha20 for clients without AES in hardware.
const defaultSuites = 6

func newConfig(minVersion, maxVersion uint16, suites []uint16) *tls.Config {
	if minVersion == 0 {
		minVersion = tls.VersionTLS12
	}
	if len(suites) == 0 {
		for _, s := range mesh.Suites[:defaultSuites] {
			suites = append(suites, s.Number)
		}
	}
	return &tls.Config{
		MinVersion: minVersion,
		MaxVersion: maxVersion,

		CipherSuites:           suites,
		SessionTicketsDisabled: true,

		// Small first records help a browser to render early. Records of a proxy are as large as what it has read.
		DynamicRecordSizingDisabled: true,
	}
}

// Verifier verifies a peer's certificate.
type Verifier struct {
	// Trust returns the current roots, at each handshake. An error is a NoIdentity.
	Trust func() (Trust, error)

	// Names has names of which the certificate must have one. Empty: every name is accepted. An empty Names from a
	// configuration that has names must not occur, because it opens the door.
	Names []Name

	Pins []mesh.Pin // of which the certificate must have one; empty: any certificate

	SPIFFE bool // the certificate must have exactly one URI, a SPIFFE ID
}

// Trust is what chains are verified with.
type Trust struct {
	Roots       *identity.Roots
	Revocations *identity.Revocations // nil: no certificate has been revoked
	LeafOnly    bool                  // only the first certificate of a chain may be revoked
}

// Name matches a subject alternative name.
type Name interface {
	// Match reports whether the certificate has a name that matches.
	Match(*x509.Certificate) bool
	String() string
}

// VerifyServer verifies a server's chain, its certificate first. An error is an *Error.
func (v *Verifier) VerifyServer(chain []*x509.Certificate) error {
	return v.verify(chain, x509.ExtKeyUsageServerAuth)
}

// SPIFFE returns the SPIFFE ID of a certificate that has exactly one URI, and otherwise "".
func SPIFFE(leaf *x509.Certificate) string { return spiffeID(leaf) }

// verify is called during a handshake, before the peer has proved that it has the key of the first certificate. Until the
// handshake has ended, the names are a claim.
func (v *Verifier) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) error {
	trust, err := v.Trust()
	if err != nil {
		return &Error{NoIdentity, err.Error(), err}
	}
	leaf, now := chain[0], time.Now()
	options := x509.VerifyOptions{Roots: trust.Roots.Pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}
	if len(chain) > 1 {
		options.Intermediates = x509.NewCertPool()
		for _, intermediate := range chain[1:] {
			options.Intermediates.AddCert(intermediate)
		}
	}
	chains, err := leaf.Verify(options)
	if err != nil {
		return invalid(leaf, now, err)
	}
	if err := trust.revoked(chains, now); err != nil {
		return &Error{Revoked, describe(leaf) + ": " + err.Error(), err}
	}
	if v.SPIFFE && spiffeID(leaf) == "" {
		return &Error{Failure: NoSPIFFE, Detail: describe(leaf)}
	}
	if len(v.Names) > 0 && !slices.ContainsFunc(v.Names, func(n Name) bool { return n.Match(leaf) }) {
		return &Error{Failure: NameRefused, Detail: describe(leaf) + ", want " + v.expected()}
	}
	if len(v.Pins) > 0 && !pinned(v.Pins, leaf) {
		return &Error{Failure: NotPinned, Detail: describe(leaf)}
	}
	return nil
}

// pinned reports whether a certificate, or its key, has one of the hashes.
func pinned(pins []mesh.Pin, leaf *x509.Certificate) bool {
	certificate, key := sha256.Sum256(leaf.Raw), sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	return slices.ContainsFunc(pins, func(p mesh.Pin) bool { return p.Hash == certificate && !p.Key || p.Hash == key && p.Key })
}

// expected lists the names that are accepted.
func (v *Verifier) expected() string {
	const most = 5
	var names []string
	for _, name := range v.Names[:min(len(v.Names), most)] {
		names = append(names, name.String())
	}
	if more := len(v.Names) - most; more > 0 {
		names = append(names, "…")
	}
	return strings.Join(names, " or ")
}

// spiffeID returns the SPIFFE ID of a certificate that has exactly one URI, and otherwise "" (SPIFFE X.509-SVID §2).
func spiffeID(leaf *x509.Certificate) string {
	if len(leaf.URIs) != 1 || leaf.URIs[0].Scheme != "spiffe" {
		return ""
	}
	return leaf.URIs[0].String()
}

// revoked returns why each of the chains has a certificate that is revoked.
func (t Trust) revoked(chains [][]*x509.Certificate, now time.Time) (err error) {
	for _, chain := range chains {
		if t.LeafOnly {
			err = t.Revocations.CheckLeaf(chain, now)
		} else {
			err = t.Revocations.Check(chain, now)
		}
		if err == nil {
			return nil
		}
	}
	return err
}
