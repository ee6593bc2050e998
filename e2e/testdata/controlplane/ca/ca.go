// Package ca is a CA as istiod has it, for tests: it signs whatever the bearer of its token asks for.
package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	security "istio.io/api/security/v1alpha1"
)

// Authority is a CA. It also issues the server's own certificate.
type Authority struct {
	security.UnimplementedIstioCertificateServiceServer
	root  *x509.Certificate
	key   *ecdsa.PrivateKey
	token string

	mu   sync.Mutex
	away bool
}

// New returns a CA with a new root.
func New(token string) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return of(key, token)
}

// Load returns the CA whose key is in a file. Without the file it writes a new one.
func Load(path, token string) (*Authority, error) {
	der, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		a, err := New(token)
		if err != nil {
			return nil, err
		}
		if der, err = x509.MarshalECPrivateKey(a.key); err != nil {
			return nil, err
		}
		return a, os.WriteFile(path, der, 0o600)
	}
	if err != nil {
		return nil, err
	}
	key, err := x509.ParseECPrivateKey(der)
	if err != nil {
		return nil, err
	}
	return of(key, token)
}

// of returns a CA with a key. Roots with one key and one name are interchangeable.
func of(key *ecdsa.PrivateKey, token string) (*Authority, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	root, err := x509.ParseCertificate(der)
	return &Authority{root: root, key: key, token: token}, err
}

// sign issues a certificate for what template names.
func (a *Authority) sign(template *x509.Certificate, public crypto.PublicKey) ([]byte, error) {
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	return x509.CreateCertificate(rand.Reader, template, a.root, public, a.key)
}

// RootPEM returns the root.
func (a *Authority) RootPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.root.Raw})
}

// Credentials are those of a server at an address.
func (a *Authority) Credentials(address net.IP) credentials.TransportCredentials {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	der, err := a.sign(&x509.Certificate{IPAddresses: []net.IP{address}}, key.Public())
	if err != nil {
		panic(err)
	}
	return credentials.NewServerTLSFromCert(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})
}

// Issue returns a certificate with a SPIFFE ID and its key, in PEM.
func (a *Authority) Issue(id *url.URL) (chain, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	leaf, err := a.sign(&x509.Certificate{URIs: []*url.URL{id}}, private.Public())
	if err != nil {
		return nil, nil, err
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), err
}

// SetAway makes calls fail as those of an istiod that is starting.
func (a *Authority) SetAway(away bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.away = away
}

// CreateCertificate implements istiod's service.
func (a *Authority) CreateCertificate(ctx context.Context, r *security.IstioCertificateRequest) (*security.IstioCertificateResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.away {
		return nil, status.Error(codes.Unavailable, "starting")
	}
	header, _ := metadata.FromIncomingContext(ctx)
	if got := header.Get("authorization"); len(got) != 1 || got[0] != "Bearer "+a.token {
		return nil, status.Error(codes.Unauthenticated, "no token of ours")
	}
	block, _ := pem.Decode([]byte(r.Csr))
	if block == nil {
		return nil, status.Error(codes.InvalidArgument, "no CSR")
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	der, err := a.sign(&x509.Certificate{URIs: request.URIs}, request.PublicKey)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	leaf := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return &security.IstioCertificateResponse{CertChain: []string{string(leaf), string(a.RootPEM())}}, nil
}
