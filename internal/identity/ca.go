package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"net/url"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/grpcwire"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// CreateCertificate is the path of the CA's method.
const CreateCertificate = "/istio.v1.auth.IstioCertificateService/CreateCertificate"

// CA gets certificates from an Istio CA.
type CA struct {
	// Call makes one call of a method with an encoded message, on a connection that was made for it or is still in order.
	Call func(ctx context.Context, method string, message []byte) ([]byte, error)

	SPIFFE   string        // the identity that the CSR asks for. istiod takes the token's in its place
	Lifetime time.Duration // of the certificate that is asked for; the CA may grant another
	Signer   string        // CertSigner in the request's metadata; may be empty
}

// Field numbers of istio.v1.auth.
const (
	requestCSR, requestValidity, requestMetadata = 1, 3, 4
	responseChain                                = 1
)

// A call is tried five times, as istio-agent does it: the first pauses are short, because most failures are those of an
// istiod that restarts.
const (
	tries      = 5
	firstPause = 100 * time.Millisecond
)

// Fetch makes a key, has it certified and returns the identity.
func (ca *CA) Fetch(ctx context.Context) (*Identity, error) {
	// P-256: a handshake with an RSA key of 2048 bits costs its server tens of times more.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	request, err := ca.request(key)
	if err != nil {
		return nil, err
	}
	response, err := ca.try(ctx, request)
	if err != nil {
		return nil, err
	}
	chain, roots, err := decodeChain(response)
	if err != nil {
		return nil, fmt.Errorf("the CA's response: %w", err)
	}
	identity, err := New(chain, key, roots, time.Now())
	if err != nil {
		return nil, fmt.Errorf("the CA's certificate: %w", err)
	}
	return identity, nil
}

// Next returns the time until half of the identity's lifetime has passed, with 2 % of jitter, so that
// workloads that start together do not renew together.
func (ca *CA) Next(identity *Identity) time.Duration {
	leaf := identity.Certificate.Leaf
	lifetime := leaf.NotAfter.Sub(leaf.NotBefore)
	return time.Until(leaf.NotAfter) - jitter(lifetime/2, 0.02)
}

// request returns the encoded request.
func (ca *CA) request(key *ecdsa.PrivateKey) ([]byte, error) {
	id, err := url.Parse(ca.SPIFFE)
	if err != nil {
		return nil, fmt.Errorf("SPIFFE ID: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id}}, key)
	if err != nil {
		return nil, err
	}
	b := wire.AppendBytes(nil, requestCSR, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))
	b = wire.AppendVarint(b, requestValidity, uint64(ca.Lifetime/time.Second))
	// google.protobuf.Struct{fields: {"CertSigner": Value{string_value: ca.Signer}}}
	entry := wire.AppendBytes(wire.AppendString(nil, 1, "CertSigner"), 2, wire.AppendString(nil, 3, ca.Signer))
	return wire.AppendBytes(b, requestMetadata, wire.AppendBytes(nil, 1, entry)), nil
}

// try makes the call until it succeeds, fails for good, or has failed too often.
func (ca *CA) try(ctx context.Context, request []byte) ([]byte, error) {
	pause := firstPause
	for attempt := 1; ; attempt++ {
		response, err := ca.Call(ctx, CreateCertificate, request)
		if err == nil || attempt == tries || ctx.Err() != nil || !retriable(err) {
			return response, err
		}
		timer := time.NewTimer(jitter(pause, 0.1))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		case <-timer.C:
		}
		pause *= 2
	}
}

// retriable reports whether another try may succeed: after a failed connection, and after the statuses that are not about
// the request.
func retriable(err error) bool {
	var status *grpcwire.Error
	if !errors.As(err, &status) {
		return true
	}
	switch status.Code {
	case envoy.GRPCCanceled, envoy.GRPCDeadlineExceeded, envoy.GRPCResourceExhausted, envoy.GRPCAborted, envoy.GRPCInternal, envoy.GRPCUnavailable:
		return true
	}
	return false
}

// jitter returns d changed by a random share of at most part in either direction.
func jitter(d time.Duration, part float64) time.Duration {
	return d + time.Duration((2*mrand.Float64()-1)*part*float64(d))
}

// decodeChain returns the certificates of an IstioCertificateResponse. The last element of cert_chain has the roots, and
// may have several; those before it are the chain.
func decodeChain(response []byte) (chain []*x509.Certificate, roots *Roots, err error) {
	var elements [][]byte
	m := wire.Read(response, &err)
	for m.Next() {
		if m.Number == responseChain {
			elements = append(elements, []byte(m.String()))
		}
	}
	if err != nil {
		return nil, nil, err
	}
	if len(elements) < 2 {
		return nil, nil, fmt.Errorf("cert_chain has %d elements, want a certificate and the roots", len(elements))
	}
	if roots, err = ParseRoots(elements[len(elements)-1]); err != nil {
		return nil, nil, fmt.Errorf("roots: %w", err)
	}
	for _, element := range elements[:len(elements)-1] {
		certificates, err := parseCertificates(element)
		if err != nil {
			return nil, nil, fmt.Errorf("chain: %w", err)
		}
		chain = append(chain, certificates...)
	}
	return chain, roots, nil
}
