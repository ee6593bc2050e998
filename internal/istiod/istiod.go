// Package istiod makes connections to istiod as istio-agent does: it finds the roots that istiod is verified with, reads
// the token for each call, and describes this proxy as a node.
package istiod

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/grpcwire"
	"github.com/pillion-proxy/pillion/internal/identity"
)

// Where the injector mounts what identifies the workload to istiod, below the root directory.
const (
	TokenFile = "var/run/secrets/tokens/istio-token"
	rootFile  = "var/run/secrets/istio/root-cert.pem" // ConfigMap istio-ca-root-cert
	certsFile = "etc/certs/root-cert.pem"             // of VMs
)

// SystemRoots stands for the roots of the operating system in place of a path.
const SystemRoots = "SYSTEM"

// FindRoots returns the path of the roots that istiod is verified with, or SystemRoots: the first that applies of the
// explicit path, the file of a VM, that in the directory of provisioned certificates, the file that is mounted for
// clients, and the ConfigMap of the namespace. Empty arguments do not apply. A missing file is an error when it is
// opened, not here.
func FindRoots(directory, explicit, provisioned, mounted string) string {
	certs := filepath.Join(directory, certsFile)
	switch _, err := os.Stat(certs); {
	case explicit != "":
		return explicit
	case err == nil:
		return certs
	case provisioned != "":
		return filepath.Join(provisioned, "root-cert.pem")
	case mounted != "":
		return mounted
	}
	return filepath.Join(directory, rootFile)
}

// ServerName returns the name that the certificate of the istiod at address (host:port) must have. override replaces it.
// Through a port-forward istiod is reached at localhost and still has the name of its service.
func ServerName(address, override string) string {
	if override != "" {
		return override
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	if strings.Contains(host, "localhost") {
		return "istiod.istio-system.svc"
	}
	return host
}

// Server is an istiod, and how to reach it.
type Server struct {
	Address    string // host:port
	Plaintext  bool   // no TLS: istiod has no identity then, sends no secrets and answers no debugging
	ServerName string // verified, and sent as SNI
	Roots      string // a path, or SystemRoots; read for each connection
	Token      string // path of the token, read for each call; may be empty
	Header     http.Header

	// Certificate returns a client certificate, if the workload has one from a file. It may be nil.
	Certificate func() (*tls.Certificate, error)

	// Dial makes the connection. Nil: a net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

const (
	dialTimeout = 5 * time.Second

	// istiod ends connections that are pinged more often than every 15 s.
	pingAfter   = 30 * time.Second
	pingTimeout = 10 * time.Second

	receiveWindow = 1 << 20  // bytes; pushes are long
	maxMessage    = 64 << 20 // bytes; a push of 1,000 services has 5.5 MB
)

// Connection is a client with a connection of its own. Close it.
type Connection struct {
	*grpcwire.Client
	transport *http.Transport
}

// Close ends the connection after the calls that are open.
func (c *Connection) Close() { c.transport.CloseIdleConnections() }

// Connect returns a client that dials with its first call. The roots are read now: a new connection uses new roots.
func (s *Server) Connect() (*Connection, error) {
	transport := &http.Transport{
		DialContext: s.dial,
		Protocols:   new(http.Protocols),
		HTTP2:       &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout, MaxReceiveBufferPerStream: receiveWindow, MaxReceiveBufferPerConnection: receiveWindow},
	}
	scheme := "http"
	if s.Plaintext {
		transport.Protocols.SetUnencryptedHTTP2(true)
	} else {
		roots, err := readRoots(s.Roots)
		if err != nil {
			return nil, err
		}
		scheme = "https"
		transport.Protocols.SetHTTP2(true)
		transport.TLSHandshakeTimeout = dialTimeout
		transport.TLSClientConfig = &tls.Config{RootCAs: roots, ServerName: s.ServerName, MinVersion: tls.VersionTLS12}
		if s.Certificate != nil {
			transport.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return s.Certificate() }
		}
	}
	return &Connection{
		Client:    &grpcwire.Client{Transport: transport, Base: url.URL{Scheme: scheme, Host: s.Address}, Header: s.Header, Token: s.token, MaxMessage: maxMessage},
		transport: transport,
	}, nil
}

func (s *Server) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if s.Dial != nil {
		return s.Dial(ctx, network, address)
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	return dialer.DialContext(ctx, network, address)
}

// token returns the token. A missing file is not an error, because a client certificate may identify the workload.
func (s *Server) token() (string, error) {
	if s.Token == "" {
		return "", nil
	}
	text, err := identity.ReadFile(s.Token)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(text)), err
}

// readRoots returns the roots in a file; nil stands for those of the operating system.
func readRoots(path string) (*x509.CertPool, error) {
	if path == SystemRoots {
		return nil, nil
	}
	text, err := identity.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("roots of the control plane: %w", err)
	}
	roots, err := identity.ParseRoots(text)
	if err != nil {
		return nil, fmt.Errorf("roots of the control plane: %s: %w", path, err)
	}
	return roots.Pool, nil
}
