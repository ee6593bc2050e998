package run

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/secure"
)

// decryption is the serve.Decryption of a run. The command trusts its authority, and the servers are verified with the
// certificates that the caller trusts.
type decryption struct {
	authority *authority
	roots     *identity.Roots
	directory string // of the trust stores
	variables []string
	report    func(line string)

	mu     sync.Mutex
	passed map[string]bool // hosts that are not decrypted any more
	used   map[string]bool // hosts to which the command has sent something inside TLS
	named  map[string]bool // hosts of which one connection was not decrypted
}

// newDecryption makes the authority and writes the trust stores. close removes them.
func newDecryption(report func(string)) (*decryption, error) {
	ca, err := newAuthority()
	if err != nil {
		return nil, fmt.Errorf("making a certificate authority: %w", err)
	}
	d := &decryption{authority: ca, report: report, passed: make(map[string]bool), used: make(map[string]bool), named: make(map[string]bool)}
	certificates := trusted(os.Getenv)
	d.roots = &identity.Roots{PEM: certificates, Pool: x509.NewCertPool()}
	d.roots.Pool.AppendCertsFromPEM(certificates)
	if d.directory, err = os.MkdirTemp(os.Getenv("XDG_RUNTIME_DIR"), "pillion-run-"); err != nil {
		return nil, fmt.Errorf("making a directory for trust stores: %w", err)
	}
	if d.variables, err = trustStore(d.directory, certificates, ca, os.Getenv); err != nil {
		d.close()
		return nil, fmt.Errorf("writing trust stores: %w", err)
	}
	return d, nil
}

func (d *decryption) close() { _ = os.RemoveAll(d.directory) }

// nameOf is what a server must be certified for: the name that the client sends, or its address.
func nameOf(to netip.AddrPort, hello flow.Hello) string {
	if hello.ServerName != "" {
		return hello.ServerName
	}
	return to.Addr().Unmap().String()
}

var errClientCertificate = errors.New("the server asks for a certificate of the client")

// Server implements serve.Decryption.
func (d *decryption) Server(to netip.AddrPort, hello flow.Hello) *secure.ClientContext {
	name := nameOf(to, hello)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.passed[name] {
		return nil
	}
	return secure.NewClient(secure.ClientConfig{
		ServerName: hello.ServerName, Protocols: hello.ALPN,
		Certificate: func() (*tls.Certificate, error) { return nil, errClientCertificate },
		Servers: &secure.Verifier{
			Trust: func() (secure.Trust, error) { return secure.Trust{Roots: d.roots}, nil }, Names: []secure.Name{hostName(name)},
		},
	})
}

// Client implements serve.Decryption.
func (d *decryption) Client(to netip.AddrPort, hello flow.Hello, protocol string) *secure.ServerContext {
	config := secure.ServerConfig{
		Certificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return d.authority.issue(nameOf(to, hello)) },
	}
	if protocol != "" {
		config.Protocols = []string{protocol}
	}
	return secure.NewServer(config)
}

// Failed implements serve.Decryption: later connections to the host pass undecrypted, unless the cause may be gone by then. Each
// host is named once.
func (d *decryption) Failed(to netip.AddrPort, hello flow.Hello, withClient bool, err error) {
	name := nameOf(to, hello)
	if withClient && !rejects(err) {
		return // the client went away
	}
	list := d.passed
	if !withClient && passes(err) {
		list = d.named
	}
	d.mu.Lock()
	known := !first(list, name)
	d.mu.Unlock()
	switch {
	case known:
	case !withClient && passes(err):
		d.report(fmt.Sprintf("a connection to %q is not decrypted: %v", name, err))
	case withClient:
		d.report(fmt.Sprintf("the command does not accept pillion's certificate for %q; it may pin the server's. Its connections to it are not decrypted any more", name))
	default:
		d.report(fmt.Sprintf("connections to %q are not decrypted: %v", name, err))
	}
}

// closed takes the record of a connection that was decrypted, or of a request on one. Programs that pin certificates may
// complete the handshake, and then leave. So does the first connection to a host that is left without a byte count as a
// rejection.
//
// A tunnel through a proxy is not decrypted, which is reported once for each host.
func (d *decryption) closed(r *flow.Record, method string) {
	if method == http.MethodConnect {
		d.tunnelled(string(r.HTTP.Authority))
		return
	}
	if r.Security == nil || r.Protocol == flow.TLS { // not decrypted, or without a handshake with the client
		return
	}
	connection := r
	if r.IsRequest() {
		connection = r.Connection
	}
	name := nameOf(connection.OriginalDestination, connection.TLS())
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case r.IsRequest(), r.Received.Load() > 0:
		first(d.used, name)
	case d.used[name], !slices.Contains([]flow.Reason{flow.Closed, flow.DownstreamReset, flow.UpstreamReset}, r.Reason):
	case first(d.passed, name):
		d.report(fmt.Sprintf("the command left its first connection to %q when it had seen pillion's certificate; it may pin the server's. Its connections to it are not decrypted any more", name))
	}
}

func (d *decryption) tunnelled(host string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if first(d.named, "CONNECT "+host) {
		d.report(fmt.Sprintf("connections to %q by way of a proxy are not decrypted", host))
	}
}

// first adds a name to a bounded list, and reports whether it was not there.
func first(list map[string]bool, name string) bool {
	if list[name] {
		return false
	}
	makeRoom(list)
	list[name] = true
	return true
}

// passes reports whether the cause of a failed handshake may be gone at the next connection.
func passes(err error) bool {
	var failed *secure.Error
	return errors.As(err, &failed) &&
		slices.Contains([]secure.Failure{secure.Deadline, secure.Ended, secure.NoMemory, secure.NoResources}, failed.Failure)
}

// rejects reports whether a client ended the handshake because of our part of it. OpenSSL's clients send the alert of TLS 1.3
// with keys of their own, so that it looks like a violation of the protocol.
func rejects(err error) bool {
	var failed *secure.Error
	return errors.As(err, &failed) &&
		slices.Contains([]secure.Failure{secure.Alert, secure.Ended, secure.Protocol, secure.Version}, failed.Failure)
}

// hostName is a secure.Name: a certificate is verified for it as by package x509.
type hostName string

func (n hostName) Match(certificate *x509.Certificate) bool {
	return certificate.VerifyHostname(string(n)) == nil
}
func (n hostName) String() string { return string(n) }
