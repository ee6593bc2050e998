package secure

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/peers"
)

// Source is what Contexts take certificates and roots from: the session with the control plane.
type Source interface {
	Snapshot() *mesh.Snapshot     // nil before the first configuration
	Identity() *identity.Identity // nil before the first certificate
}

// Contexts compiles the TLS of a mesh's configuration. It keeps what it has compiled while a configuration uses it.
// Certificates and roots are looked up at each handshake, so a renewal needs no new context.
type Contexts struct {
	source Source
	files  identity.FileSecrets

	mu           sync.Mutex
	of           *mesh.Snapshot // what generations are of
	servers      generations[server, *ServerContext]
	clients      generations[client, *ClientContext]
	certificates generations[*mesh.Secret, *tls.Certificate]
	trusts       generations[*mesh.Secret, Trust]
}

// NewContexts returns an empty Contexts. log gets errors of files that the configuration names; it may be nil.
func NewContexts(source Source, log *slog.Logger) *Contexts {
	return &Contexts{source: source, files: identity.FileSecrets{Log: log}}
}

// Names that istiod gives to the workload's own certificate and roots, in the place of a secret.
const (
	OwnCertificate = "default"
	OwnRoots       = "ROOTCA"
)

var (
	errNoCertificate = errors.New("the control plane has issued no certificate yet")
	errNoRoots       = errors.New("the control plane has sent no roots of trust yet")
)

// server is TLS with the clients of a filter chain.
type server struct {
	*mesh.DownstreamTLS
	metadata bool // is exchanged with clients of TCP
}

// Server returns the context of a filter chain. metadata is whether it exchanges metadata with clients of TCP.
func (c *Contexts) Server(t *mesh.DownstreamTLS, metadata bool) (*ServerContext, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turn()
	key := server{t, metadata}
	return c.servers.get(key, func() (*ServerContext, error) { return c.newServer(key) })
}

// turn begins a new generation with each snapshot. c.mu is held.
func (c *Contexts) turn() {
	if s := c.source.Snapshot(); s != c.of {
		c.of = s
		c.servers.turn()
		c.clients.turn()
		c.certificates.turn()
		c.trusts.turn()
	}
}

func (c *Contexts) newServer(t server) (*ServerContext, error) {
	config := ServerConfig{
		Certificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) { return c.choose(t.Certificates, hello) },
		Protocols:   spoken(t.ALPN, t.metadata),
		Optional:    !t.RequireClient,
		MinVersion:  version(t.MinVersion), MaxVersion: version(t.MaxVersion), Suites: t.Suites,
	}
	if t.Roots == "" {
		return NewServer(config), nil
	}
	names, err := Names(t.Names)
	if err != nil {
		return nil, err
	}
	config.Clients = &Verifier{
		Trust:  func() (Trust, error) { return c.trustWith(t.Roots, t.CRL) },
		Names:  names,
		Pins:   t.Pins,
		SPIFFE: t.Roots == OwnRoots,
	}
	return NewServer(config), nil
}

// spoken returns the protocols that can be agreed on. A client begins istio-peer-exchange with a preamble of metadata, which
// would reach the workload if metadata is not exchanged; without a protocol in common it sends the connection's bytes only.
func spoken(protocols []string, metadata bool) []string {
	return slices.DeleteFunc(slices.Clone(protocols), func(p string) bool { return p == peers.Protocol && !metadata || p == "istio" })
}

// client is TLS with the endpoints of a cluster, and what is spoken inside.
type client struct {
	*mesh.UpstreamTLS
	inside Inside
}

// Inside is what is spoken inside TLS. Istio's proxies find their filter chain by the ALPN that stands for it.
type Inside uint8

// The protocols.
const (
	TCP         Inside = iota
	MetadataTCP        // with metadata before it
	HTTP1
	HTTP2
)

// meshProtocols are the ALPN of Istio's clients.
var meshProtocols = [...][]string{TCP: {"istio"}, MetadataTCP: {peers.Protocol, "istio"}, HTTP1: {"istio-http/1.1", "istio", "http/1.1"}, HTTP2: {"istio-h2", "istio", "h2"}}

// MeshALPN is what a proxy of the mesh offers that does not know yet what is spoken inside TLS.
var MeshALPN = meshProtocols[TCP]

// Client returns the context of a cluster. host is the host that a request of HTTP names, without a port; see HostOf. It may
// be empty if the configuration does not need it: see NeedsHost.
func (c *Contexts) Client(t *mesh.UpstreamTLS, inside Inside, host string) (*ClientContext, error) {
	if NeedsHost(t, inside) {
		if host == "" {
			return nil, errors.New("the configuration verifies the host that the request names, and it names none")
		}
		own := *t
		if _, err := netip.ParseAddr(host); err != nil && t.HostSNI {
			own.SNI = host
		}
		if t.HostName {
			own.Names = []mesh.NameMatcher{{StringMatcher: mesh.StringMatcher{Text: host}}}
		}
		return c.newClient(&own, inside) // clients choose the host, so it is not kept
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turn()
	return c.clients.get(client{t, inside}, func() (*ClientContext, error) { return c.newClient(t, inside) })
}

func (c *Contexts) newClient(t *mesh.UpstreamTLS, inside Inside) (*ClientContext, error) {
	config := ClientConfig{ServerName: t.SNI, Protocols: t.ALPN, MinVersion: version(t.MinVersion), MaxVersion: version(t.MaxVersion), Suites: t.Suites}
	if slices.Contains(t.ALPN, "istio") {
		config.Protocols = meshProtocols[inside]
	}
	if t.Certificate != "" {
		config.Certificate = func() (*tls.Certificate, error) { return c.certificate(t.Certificate) }
	}
	if t.Roots == "" && len(t.Names)+len(t.Pins) > 0 {
		return nil, errors.New("the configuration has names or hashes of the server, and no roots to verify it with")
	}
	if t.Roots != "" {
		names, err := Names(t.Names)
		if err != nil {
			return nil, err
		}
		config.Servers = &Verifier{
			Trust: func() (Trust, error) { return c.trustWith(t.Roots, t.CRL) },
			Names: names, Pins: t.Pins, SPIFFE: t.Roots == OwnRoots,
		}
	}
	return NewClient(config), nil
}

// NeedsHost reports whether the host of a request decides the server's name: its SNI, or what its certificate must have.
func NeedsHost(t *mesh.UpstreamTLS, inside Inside) bool {
	return (t.HostSNI || t.HostName) && (inside == HTTP1 || inside == HTTP2)
}

// HostOf returns the host of an authority in lower case, without its port and the brackets of an IPv6 address. It is empty if
// that is no host.
func HostOf(authority []byte) string {
	host := string(bytes.ToLower(authority))
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.Contains(host[i:], "]") {
		host = host[:i]
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if strings.ContainsAny(host, "@/ *[]") {
		return ""
	}
	return host
}

// version returns the number of crypto/tls for a version of Envoy; 0 is the default of both. Versions before 1.2 are
// raised to it: crypto/tls does not serve them by default.
func version(v mesh.TLSVersion) uint16 {
	const tls10 = 1
	if v == 0 {
		return 0
	}
	return max(tls.VersionTLS12, tls.VersionTLS10+uint16(v)-tls10)
}

// choose returns the certificate that suits the client best: as in Envoy, one with the name that it asks for comes before others,
// then one with an ECDSA key, then the first. Certificates that have not come are left out. Without one that the client can use, it gets
// the first.
func (c *Contexts) choose(names []string, hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if len(names) == 1 {
		return c.certificate(names[0])
	}
	anyName := *hello
	anyName.ServerName = ""
	var best *tls.Certificate
	var missing error
	most := -1
	for _, name := range names {
		certificate, err := c.certificate(name)
		if err != nil {
			missing = err
			continue
		}
		if suits := suitability(certificate, hello.ServerName, &anyName); suits > most {
			best, most = certificate, suits
		}
	}
	if best == nil {
		return nil, missing
	}
	return best, nil
}

// suitability ranks a certificate for a client that asks for a name. 0: the client cannot use its key.
func suitability(certificate *tls.Certificate, name string, client *tls.ClientHelloInfo) int {
	leaf := certificate.Leaf
	if client.SupportsCertificate(certificate) != nil {
		return 0
	}
	suits := 1
	if leaf.PublicKeyAlgorithm == x509.ECDSA {
		suits++
	}
	switch {
	case name == "" || leaf.VerifyHostname(name) != nil:
	case slices.ContainsFunc(leaf.DNSNames, func(own string) bool { return strings.EqualFold(own, name) }):
		suits += 4
	default: // a wildcard
		suits += 2
	}
	return suits
}

// certificate returns the current certificate with a name.
func (c *Contexts) certificate(name string) (*tls.Certificate, error) {
	if name == OwnCertificate {
		if i := c.source.Identity(); i != nil {
			return &i.Certificate, nil
		}
		return nil, errNoCertificate
	}
	if identity.IsFileSecret(name) {
		return c.files.Certificate(name)
	}
	secret, err := c.secret(name)
	if err != nil {
		return nil, err
	}
	if secret.Certificate == nil {
		return nil, fmt.Errorf("the secret %s has no certificate", name)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turn()
	return c.certificates.get(secret, func() (*tls.Certificate, error) {
		pair, err := tls.X509KeyPair(secret.Certificate.Chain, secret.Certificate.Key.PEM())
		if err != nil {
			return nil, fmt.Errorf("the secret %s: %w", name, err)
		}
		pair.OCSPStaple = secret.Certificate.OCSP
		return &pair, nil
	})
}

// Presented returns the chain that servers of a cluster see if they ask for a certificate; nil: none.
func (c *Contexts) Presented(t *mesh.UpstreamTLS) []*x509.Certificate {
	if t.Certificate == "" {
		return nil
	}
	certificate, err := c.certificate(t.Certificate)
	if err != nil || certificate.Leaf == nil {
		return nil
	}
	return []*x509.Certificate{certificate.Leaf}
}

// trustWith returns the current roots with a name, and the lists of a file. While the file cannot be used, no certificate is accepted.
func (c *Contexts) trustWith(name string, crl mesh.CRL) (Trust, error) {
	t, err := c.trust(name)
	if t.LeafOnly = crl.LeafOnly; err != nil || crl.Path == "" {
		return t, err
	}
	lists, err := c.files.Revocations(crl.Path)
	if err != nil {
		return Trust{}, fmt.Errorf("revocation lists: %w", err)
	}
	t.Revocations = t.Revocations.And(lists)
	return t, nil
}

// trust returns the current roots with a name.
func (c *Contexts) trust(name string) (Trust, error) {
	if name == OwnRoots {
		if i := c.source.Identity(); i != nil {
			return Trust{Roots: i.Roots, Revocations: i.Revocations}, nil
		}
		return Trust{}, errNoRoots
	}
	if identity.IsFileSecret(name) {
		roots, err := c.files.Roots(name)
		return Trust{Roots: roots}, err
	}
	secret, err := c.secret(name)
	if err != nil {
		return Trust{}, err
	}
	if secret.Roots == nil {
		return Trust{}, fmt.Errorf("the secret %s has no roots of trust", name)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turn()
	return c.trusts.get(secret, func() (Trust, error) { return parseTrust(secret) })
}

// FileRoots returns what stands for the content of roots in a file, to compare it with an earlier one; nil: they cannot be
// read, or are those of the operating system. The file is read at most every 10 s.
func (c *Contexts) FileRoots(name string) *identity.Roots {
	roots, err := c.files.Roots(name)
	if err != nil || roots.Pool == nil {
		return nil
	}
	return roots
}

// FileRevocations returns the lists of a file, to compare them with earlier ones; nil: they cannot be read.
func (c *Contexts) FileRevocations(path string) *identity.Revocations {
	lists, _ := c.files.Revocations(path)
	return lists
}

func parseTrust(secret *mesh.Secret) (t Trust, err error) {
	if t.Roots, err = identity.ParseRoots(secret.Roots.CA); err != nil {
		return Trust{}, fmt.Errorf("the secret %s: %w", secret.Name, err)
	}
	if len(secret.Roots.CRL) > 0 {
		if t.Revocations, err = identity.ParseRevocations(secret.Roots.CRL); err != nil {
			return Trust{}, fmt.Errorf("the secret %s: %w", secret.Name, err)
		}
	}
	return t, nil
}

// secret returns a secret of the control plane that is in force and usable.
func (c *Contexts) secret(name string) (*mesh.Secret, error) {
	var secret *mesh.Secret
	if s := c.source.Snapshot(); s != nil {
		secret = s.Secret(name)
	}
	switch {
	case secret == nil:
		return nil, fmt.Errorf("the control plane has not sent the secret %s", name)
	case secret.Refused:
		return nil, fmt.Errorf("the secret %s is not supported", name)
	}
	return secret, nil
}

// generations keeps values that were used since the turn before the last.
type generations[K comparable, V any] struct{ now, before map[K]V }

func (g *generations[K, V]) turn() { g.before, g.now = g.now, nil }

// get returns the value of a key, which it makes if necessary. An error is not kept.
func (g *generations[K, V]) get(key K, make func() (V, error)) (value V, err error) {
	value, ok := g.now[key]
	if ok {
		return value, nil
	}
	if value, ok = g.before[key]; !ok {
		if value, err = make(); err != nil {
			return value, err
		}
	}
	if g.now == nil {
		g.now = map[K]V{}
	}
	g.now[key] = value
	return value, nil
}
