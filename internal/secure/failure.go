package secure

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Failure is why a handshake has failed.
type Failure uint8

// The failures.
const (
	Protocol      Failure = iota // the peer violates TLS
	NoIdentity                   // we have no certificate, or no roots to verify the peer with
	Deadline                     // the peer did not finish in time
	Ended                        // the peer closed or reset the connection, or we cancelled the wait
	NotTLS                       // the peer's bytes are not TLS
	Version                      // there is no version, cipher suite or key exchange that both sides support
	NoCertificate                // the client has none
	Malformed                    // the peer's certificate cannot be parsed or used
	Expired                      // a certificate of the peer's chain is expired
	NotYetValid                  // a certificate of the peer's chain is not valid yet
	UnknownRoot                  // the peer's chain does not end in a root that we trust
	WrongUsage                   // the peer's certificate is not for this side of TLS
	Revoked                      // a certificate of the peer's chain is on a revocation list, or its issuer has no valid list
	NoSPIFFE                     // the peer's certificate has not exactly one SPIFFE ID
	NameRefused                  // the peer's names are not among those that are expected
	NotPinned                    // the peer's certificate has none of the hashes that are expected
	Alert                        // the peer has rejected our part of the handshake
	NoMemory                     // the memory budget is used up
	NoResources                  // the kernel has no descriptors or memory left for this process
)

var failureNames = [...]string{
	Protocol:      "the peer violates TLS",
	NoIdentity:    "this workload has no certificate or no roots yet",
	Deadline:      "the peer did not finish the handshake in time",
	Ended:         "the connection ended during the handshake",
	NotTLS:        "the peer does not speak TLS",
	Version:       "no version, cipher suite or key exchange in common",
	NoCertificate: "the client has no certificate",
	Malformed:     "the peer's certificate cannot be used",
	Expired:       "the peer's certificate is expired",
	NotYetValid:   "the peer's certificate is not valid yet",
	UnknownRoot:   "the peer's certificate is not issued under a trusted root",
	WrongUsage:    "the peer's certificate is not for this use",
	Revoked:       "the peer's certificate is revoked, or that cannot be known",
	NoSPIFFE:      "the peer's certificate has not exactly one SPIFFE ID",
	NameRefused:   "the peer's names are not accepted",
	NotPinned:     "the peer's certificate has none of the configured hashes",
	Alert:         "the peer rejected the handshake",
	NoMemory:      "no memory is left for the handshake",
	NoResources:   "the process has reached a limit of the kernel",
}

func (f Failure) String() string { return failureNames[f] }

// Error is a failed handshake.
type Error struct {
	Failure Failure
	Detail  string // for people; text of the peer is quoted
	Err     error  // of crypto/tls, crypto/x509 or package tcp; may be nil
}

func (e *Error) Error() string {
	if e.Detail == "" {
		return e.Failure.String()
	}
	return e.Failure.String() + ": " + e.Detail
}

func (e *Error) Unwrap() error { return e.Err }

// Is makes every failed handshake a tcp.ErrHandshake.
func (e *Error) Is(target error) bool { return target == tcp.ErrHandshake }

// failureOf returns an error of a handshake as an *Error.
func failureOf(err error) *Error {
	var ours *Error
	if rejected, ok := rejection(err); ok {
		return rejected
	}
	switch {
	case errors.As(err, &ours):
		return ours
	case errors.Is(err, tcp.ErrDeadline):
		return &Error{Deadline, "", err}
	case errors.Is(err, budget.ErrEvicted):
		return &Error{NoMemory, err.Error(), err}
	case errors.As(err, new(tls.RecordHeaderError)):
		return &Error{NotTLS, "", err}
	}
	if failure, ok := failureOfSocket(err); ok {
		return &Error{failure, "", err}
	}
	text := strings.TrimPrefix(err.Error(), "tls: ")
	for _, known := range texts {
		if strings.HasPrefix(text, known.prefix) {
			return &Error{known.failure, text, err}
		}
	}
	return &Error{Protocol, text, err}
}

// rejection returns the error for an alert of the peer.
func rejection(err error) (rejected *Error, ok bool) {
	var alert *net.OpError // with an alert, from the peer or to it
	if !errors.As(err, &alert) || alert.Op != "remote error" {
		return nil, false
	}
	return &Error{Alert, strings.TrimPrefix(alert.Err.Error(), "tls: "), err}, true
}

// failureOfSocket maps an error that is not of TLS: of the connection, or of a wait.
func failureOfSocket(err error) (failure Failure, ok bool) {
	for _, limit := range []error{unix.ENOSPC, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, limit) {
			return NoResources, true
		}
	}
	for _, end := range []error{io.EOF, io.ErrUnexpectedEOF, tcp.ErrCanceled, tcp.ErrInterrupted} {
		if errors.Is(err, end) {
			return Ended, true
		}
	}
	return Ended, errors.As(err, new(unix.Errno))
}

// texts are errors of crypto/tls that have no type. Tests hold each to a handshake that fails with it.
var texts = []struct {
	prefix  string
	failure Failure
}{
	{"client offered only unsupported versions", Version},
	{"no cipher suite supported by both", Version},
	{"no key exchanges supported by both", Version},
	{"server selected unsupported protocol version", Version},
	{"client didn't provide a certificate", NoCertificate},
	{"failed to parse certificate", Malformed},
	{"failed to parse client certificate", Malformed},
}

// invalid returns the error for the chain of leaf that did not verify at now.
func invalid(leaf *x509.Certificate, now time.Time, err error) *Error {
	var unknown x509.UnknownAuthorityError
	var reason x509.CertificateInvalidError
	who := describe(leaf)
	switch {
	case errors.As(err, &unknown):
		return &Error{UnknownRoot, fmt.Sprintf("%s, issued by %q", who, cut(leaf.Issuer.String())), err}
	case !errors.As(err, &reason):
	case reason.Reason == x509.Expired && now.Before(reason.Cert.NotBefore):
		return &Error{NotYetValid, who + ": " + reason.Detail, err}
	case reason.Reason == x509.Expired:
		return &Error{Expired, who + ": " + reason.Detail, err}
	case reason.Reason == x509.IncompatibleUsage:
		return &Error{WrongUsage, who, err}
	}
	return &Error{Malformed, who + ": " + cut(err.Error()), err}
}

// describe names a certificate for people. The peer may have chosen all its text, so that is quoted, and has not proved
// that it has the key.
func describe(leaf *x509.Certificate) string {
	name := leaf.Subject.String()
	switch {
	case len(leaf.URIs) > 0:
		name = leaf.URIs[0].String()
	case len(leaf.DNSNames) > 0:
		name = leaf.DNSNames[0]
	}
	return "it claims to be " + strconv.Quote(cut(name))
}

// cut bounds text of a peer in an error.
func cut(text string) string {
	const most = 256
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}
