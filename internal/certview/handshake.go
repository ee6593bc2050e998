package certview

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
)

// Bounds of a handshake.
const (
	DefaultTimeout = 5 * time.Second
	MaxTimeout     = 9 * time.Second // less than clients of the agent's own ports wait

	// rejectTime is how long a server has to reject the client's certificate. In TLS 1.3 a client has finished by then.
	rejectTime = 300 * time.Millisecond

	maxCAs = 64 // of a server's list that are shown
)

// Options are how a handshake is made.
type Options struct {
	Address    string        // host:port
	ServerName string        // SNI; may be empty
	ALPN       []string      // empty: none
	Expect     string        // a name that the server's certificate must have; empty: any
	Timeout    time.Duration // at most MaxTimeout; zero: DefaultTimeout

	// Certificate is presented if the server asks for one; nil: none is.
	Certificate *tls.Certificate
	SPIFFE      string // of Certificate; may be empty

	// Trust verifies the server; without roots it is not verified. InMesh requires a SPIFFE ID of it.
	Trust  secure.Trust
	InMesh bool
}

// OfIdentity sets the certificate and the roots of a workload.
func (o *Options) OfIdentity(i *identity.Identity) {
	o.Certificate, o.SPIFFE = &i.Certificate, i.SPIFFE
	o.Trust, o.InMesh = secure.Trust{Roots: i.Roots, Revocations: i.Revocations}, true
}

// Handshake is what a client learns in a handshake.
type Handshake struct {
	Address    string   `json:"address"`
	Peer       string   `json:"peer,omitempty"`       // the address that was reached
	ServerName string   `json:"serverName,omitempty"` // SNI that was sent
	Offered    []string `json:"offered,omitempty"`    // ALPN

	Version  string `json:"version,omitempty"`
	Cipher   string `json:"cipher,omitempty"`
	Protocol string `json:"protocol,omitempty"` // ALPN that was agreed on

	SPIFFE string        `json:"spiffe,omitempty"` // of the server, if it has exactly one
	Chain  []Certificate `json:"chain"`            // as the server sent it

	Requested     bool     `json:"requested"`               // the server has asked for a client's certificate
	AcceptableCAs []string `json:"acceptableCAs,omitempty"` // of that certificate, as the server names them
	Presented     string   `json:"presented,omitempty"`     // who this client has said it is: its SPIFFE ID or subject

	Verified bool   `json:"verified"`
	Refused  string `json:"refused,omitempty"`  // why the server's certificate is not accepted; empty if it is, or was not verified
	Rejected string `json:"rejected,omitempty"` // why the server has rejected the handshake, by its alert
	Error    string `json:"error,omitempty"`    // why there was no handshake, or no whole one
}

// OK reports whether a client of the mesh would speak with the server.
func (h *Handshake) OK() bool { return h.Refused == "" && h.Rejected == "" && h.Error == "" }

// Shake connects and performs a handshake. It goes on when the server's certificate is not accepted, to show the rest.
func Shake(ctx context.Context, o Options) *Handshake {
	if o.Timeout <= 0 {
		o.Timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, min(o.Timeout, MaxTimeout))
	defer cancel()
	h := &Handshake{Address: o.Address, ServerName: o.ServerName, Offered: o.ALPN, Chain: []Certificate{}}
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", o.Address)
	if err != nil {
		h.Error = err.Error()
		return h
	}
	defer raw.Close()
	h.Peer = raw.RemoteAddr().String()
	conn := tls.Client(raw, h.config(&o))
	err = conn.HandshakeContext(ctx)
	h.describe(conn.ConnectionState())
	if err == nil {
		err = rejected(conn)
	}
	h.fail(ctx, err)
	return h
}

// config returns the configuration of the handshake. It notes what the server says during the handshake.
func (h *Handshake) config(o *Options) *tls.Config {
	return &tls.Config{
		ServerName: o.ServerName, NextProtos: o.ALPN,
		InsecureSkipVerify: true, // VerifyConnection verifies, and only notes the result
		VerifyConnection: func(state tls.ConnectionState) error {
			h.verify(o, state.PeerCertificates)
			return nil
		},
		GetClientCertificate: func(request *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			h.Requested, h.AcceptableCAs = true, names(request.AcceptableCAs)
			if o.Certificate == nil {
				return &tls.Certificate{}, nil
			}
			if h.Presented = o.SPIFFE; h.Presented == "" && o.Certificate.Leaf != nil {
				h.Presented = o.Certificate.Leaf.Subject.String()
			}
			return o.Certificate, nil
		},
	}
}

func (h *Handshake) verify(o *Options, chain []*x509.Certificate) {
	if o.Trust.Roots == nil {
		return
	}
	v := secure.Verifier{Trust: func() (secure.Trust, error) { return o.Trust, nil }, SPIFFE: o.InMesh}
	if o.Expect != "" {
		v.Names, _ = secure.Names([]mesh.NameMatcher{{StringMatcher: mesh.StringMatcher{Text: o.Expect}}}) // an exact name compiles
	}
	if err := v.VerifyServer(chain); err != nil {
		h.Refused = err.Error()
		return
	}
	h.Verified = true
}

// describe notes what the handshake has agreed on, also if it failed after that.
func (h *Handshake) describe(state tls.ConnectionState) {
	if len(state.PeerCertificates) == 0 {
		return
	}
	session := secure.Session{Version: state.Version, Suite: state.CipherSuite}
	h.Version, h.Cipher, h.Protocol = session.VersionName(), session.CipherName(), state.NegotiatedProtocol
	h.SPIFFE = secure.SPIFFE(state.PeerCertificates[0])
	for _, certificate := range state.PeerCertificates {
		h.Chain = append(h.Chain, describe(certificate))
	}
}

// rejected waits for an alert of the server. Its other bytes do not matter.
func rejected(conn *tls.Conn) error {
	if err := conn.SetReadDeadline(time.Now().Add(rejectTime)); err != nil {
		return err
	}
	_, err := conn.Read(make([]byte, 1))
	if alert := new(net.OpError); errors.As(err, &alert) && alert.Op == "remote error" {
		return err
	}
	return nil
}

// fail notes why there is no session.
func (h *Handshake) fail(ctx context.Context, err error) {
	alert := new(net.OpError)
	switch {
	case err == nil:
	case errors.As(err, &alert) && alert.Op == "remote error":
		h.Rejected = strings.TrimPrefix(alert.Err.Error(), "tls: ")
	case errors.As(err, new(tls.RecordHeaderError)):
		h.Error = "the server does not speak TLS"
	case ctx.Err() != nil:
		h.Error = "the server did not finish the handshake in time"
	default:
		h.Error = strings.TrimPrefix(err.Error(), "tls: ")
	}
}

// names returns distinguished names, in DER, as text of RFC 2253.
func names(list [][]byte) (all []string) {
	for _, der := range list[:min(len(list), maxCAs)] {
		var name pkix.RDNSequence
		if _, err := asn1.Unmarshal(der, &name); err != nil {
			all = append(all, fmt.Sprintf("%x", der))
			continue
		}
		all = append(all, name.String())
	}
	if more := len(list) - maxCAs; more > 0 {
		all = append(all, fmt.Sprintf("and %d more", more))
	}
	return all
}
