package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/grpcwire"
	"github.com/pillion-proxy/pillion/internal/wire"
)

const web = "spiffe://cluster.local/ns/default/sa/web"

// authority is a CA of a test.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * 365 * time.Hour),
	}
	a := &authority{key: key}
	a.certificate = a.sign(t, template, &authority{template, key}, key.Public())
	return a
}

func (a *authority) sign(t *testing.T, template *x509.Certificate, parent *authority, public crypto.PublicKey) *x509.Certificate {
	t.Helper()
	raw, err := x509.CreateCertificate(rand.Reader, template, parent.certificate, public, parent.key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

// leaf issues a workload certificate that lives from now.
func (a *authority) leaf(t *testing.T, public crypto.PublicKey, lifetime time.Duration, ids ...string) *x509.Certificate {
	t.Helper()
	return a.change(t, public, func(c *x509.Certificate) {
		c.NotAfter, c.URIs = time.Now().Add(lifetime), nil
		for _, id := range ids {
			uri, err := url.Parse(id)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = append(c.URIs, uri)
		}
	})
}

// change issues a workload certificate whose template has been changed.
func (a *authority) change(t *testing.T, public crypto.PublicKey, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/default/sa/web"}},
	}
	change(template)
	return a.sign(t, template, a, public)
}

func text(certificates ...*x509.Certificate) string {
	var b strings.Builder
	for _, certificate := range certificates {
		pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw})
	}
	return b.String()
}

// response encodes an IstioCertificateResponse.
func response(chain ...string) []byte {
	var b []byte
	for _, element := range chain {
		b = wire.AppendString(b, responseChain, element)
	}
	return b
}

// csr returns the certificate request in an IstioCertificateRequest, whose other fields it checks.
func csr(t *testing.T, message []byte) *x509.CertificateRequest {
	t.Helper()
	var request *x509.CertificateRequest
	var err error
	m := wire.Read(message, &err)
	for m.Next() {
		switch m.Number {
		case requestCSR:
			block, _ := pem.Decode(m.Bytes())
			var problem error
			if request, problem = x509.ParseCertificateRequest(block.Bytes); problem != nil || request.CheckSignature() != nil {
				t.Fatal(problem, request.CheckSignature())
			}
		case requestValidity:
			if seconds := m.Uint64(); seconds != 24*60*60 {
				t.Errorf("validity of %d s, want a day", seconds)
			}
		case requestMetadata:
			if got := string(m.Bytes()); !strings.Contains(got, "CertSigner") || !strings.Contains(got, "signers/x") {
				t.Errorf("metadata %q", got)
			}
		default:
			t.Errorf("field %d", m.Number)
		}
	}
	if err != nil || request == nil {
		t.Fatal(err, request)
	}
	return request
}

func newCA(call func(ctx context.Context, method string, message []byte) ([]byte, error)) *CA {
	return &CA{Call: call, SPIFFE: web, Lifetime: 24 * time.Hour, Signer: "signers/x"}
}

func TestTheCACertifiesAKeyOfOurOwn(t *testing.T) {
	root, old := newAuthority(t, "root"), newAuthority(t, "old root")
	intermediate := newAuthority(t, "unused")
	intermediate.certificate = root.sign(t, intermediate.certificate, root, intermediate.key.Public())
	ca := newCA(func(_ context.Context, method string, message []byte) ([]byte, error) {
		if method != "/istio.v1.auth.IstioCertificateService/CreateCertificate" {
			t.Errorf("method %s", method)
		}
		request := csr(t, message)
		if len(request.URIs) != 1 || request.URIs[0].String() != web {
			t.Errorf("the CSR asks for %v", request.URIs)
		}
		leaf := intermediate.leaf(t, request.PublicKey, time.Hour, web)
		return response(text(leaf), text(intermediate.certificate), text(root.certificate, old.certificate, root.certificate)), nil
	})
	identity, err := ca.Fetch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if identity.SPIFFE != web || len(identity.Certificate.Certificate) != 2 || string(identity.Roots.PEM) != text(root.certificate, old.certificate) {
		t.Errorf("identity %s, %d certificates, roots\n%s", identity.SPIFFE, len(identity.Certificate.Certificate), identity.Roots.PEM)
	}
	if _, ok := identity.Certificate.PrivateKey.(*ecdsa.PrivateKey); !ok {
		t.Errorf("the key is a %T", identity.Certificate.PrivateKey)
	}
	if next := ca.Next(identity); next < 29*time.Minute || next > 31*time.Minute {
		t.Errorf("renewal in %v, want half an hour", next)
	}
}

func TestAResponseThatIsNotACertificateForUsIsRejected(t *testing.T) {
	root, foreign, intermediate := newAuthority(t, "root"), newAuthority(t, "foreign"), newAuthority(t, "intermediate")
	intermediate.certificate = root.sign(t, intermediate.certificate, root, intermediate.key.Public())
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	roots := text(root.certificate)
	for name, test := range map[string]struct {
		respond func(public crypto.PublicKey) []byte
		want    string
	}{
		"for another key": {func(crypto.PublicKey) []byte {
			return response(text(root.leaf(t, other.Public(), time.Hour, web)), roots)
		}, "another key"},
		"expired": {func(p crypto.PublicKey) []byte { return response(text(root.leaf(t, p, -time.Minute, web)), roots) }, "expired"},
		"not valid yet": {func(p crypto.PublicKey) []byte {
			return response(text(root.change(t, p, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })), roots)
		}, "not yet valid"},
		"for mail alone": {func(p crypto.PublicKey) []byte {
			return response(text(root.change(t, p, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} })), roots)
		}, "incompatible key usage"},
		"behind a missing intermediate": {func(p crypto.PublicKey) []byte {
			return response(text(intermediate.leaf(t, p, time.Hour, web)), roots)
		}, "unknown authority"},
		"of a foreign root": {func(p crypto.PublicKey) []byte { return response(text(foreign.leaf(t, p, time.Hour, web)), roots) }, "unknown authority"},
		"without an ID":     {func(p crypto.PublicKey) []byte { return response(text(root.leaf(t, p, time.Hour)), roots) }, "want one SPIFFE ID"},
		"with two IDs": {func(p crypto.PublicKey) []byte {
			return response(text(root.leaf(t, p, time.Hour, web, web+"2")), roots)
		}, "want one SPIFFE ID"},
		"with a web URI": {func(p crypto.PublicKey) []byte { return response(text(root.leaf(t, p, time.Hour, "https://x")), roots) }, "want one SPIFFE ID"},
		"without roots":  {func(p crypto.PublicKey) []byte { return response(text(root.leaf(t, p, time.Hour, web))) }, "1 elements"},
		"empty roots":    {func(p crypto.PublicKey) []byte { return response(text(root.leaf(t, p, time.Hour, web)), "") }, "no certificate"},
		"without a leaf": {func(crypto.PublicKey) []byte { return response("", roots) }, "no certificate"},
		"empty":          {func(crypto.PublicKey) []byte { return nil }, "0 elements"},
		"malformed":      {func(crypto.PublicKey) []byte { return []byte{0xff} }, "malformed"},
		"a broken leaf": {func(crypto.PublicKey) []byte {
			return response(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})), roots)
		}, "chain: certificate 1"},
		"endless roots": {func(p crypto.PublicKey) []byte {
			return response(text(root.leaf(t, p, time.Hour, web)), strings.Repeat(roots, maxCertificates+1))
		}, "more than 256"},
	} {
		calls := 0
		ca := newCA(func(_ context.Context, _ string, message []byte) ([]byte, error) {
			calls++
			return test.respond(csr(t, message).PublicKey), nil
		})
		if identity, err := ca.Fetch(t.Context()); err == nil || !strings.Contains(err.Error(), test.want) || identity != nil {
			t.Errorf("%s: error %v, want one with %q", name, err, test.want)
		}
		if calls != 1 {
			t.Errorf("%s: %d calls", name, calls)
		}
	}
}

// Elements of cert_chain may have several certificates each, and other text between them.
func TestElementsOfAChainMayHaveSeveralCertificates(t *testing.T) {
	root, old := newAuthority(t, "root"), newAuthority(t, "old root")
	first, second := newAuthority(t, "first"), newAuthority(t, "second")
	first.certificate = root.sign(t, first.certificate, root, first.key.Public())
	second.certificate = first.sign(t, second.certificate, first, second.key.Public())
	ca := newCA(func(_ context.Context, _ string, message []byte) ([]byte, error) {
		leaf := second.leaf(t, csr(t, message).PublicKey, time.Hour, web)
		return response(text(leaf, second.certificate), "comment\n"+text(first.certificate), "", text(old.certificate)+"comment\n"+text(root.certificate)), nil
	})
	identity, err := ca.Fetch(t.Context())
	if err != nil || len(identity.Certificate.Certificate) != 3 || string(identity.Roots.PEM) != text(old.certificate, root.certificate) {
		t.Errorf("identity %v, error %v", identity, err)
	}
}

func TestMountedCertificatesAreFoundInIstiosOrder(t *testing.T) {
	spiffe, certs := "var/run/secrets/workload-spiffe-credentials/", "etc/certs/"
	sets := [][]string{
		{spiffe + "cert-chain.pem", spiffe + "key.pem", spiffe + "root-cert.pem"},
		{spiffe + "certificates.pem", spiffe + "private_key.pem", spiffe + "ca_certificates.pem"},
		{certs + "cert-chain.pem", certs + "key.pem", certs + "root-cert.pem"},
	}
	for present := range 1 << len(sets) {
		root, want := t.TempDir(), ""
		for i, set := range sets {
			files := set
			if present>>i&1 == 0 {
				files = set[:2] // incomplete
			} else if want == "" {
				want = filepath.Join(root, set[0])
			}
			for _, file := range files {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(root, file)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, file), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		files, ok := FindFiles(root)
		if ok != (want != "") || ok && files.Certificate != want {
			t.Errorf("sets %03b: %+v, want %s", present, files, want)
		}
	}
}

func TestCallsThatMaySucceedLaterAreTriedAgain(t *testing.T) {
	type call struct {
		err  error
		want int
	}
	tests := []call{{errors.New("connection refused"), 5}, {fmt.Errorf("calling: %w", &grpcwire.Error{Code: envoy.GRPCResourceExhausted}), 5}}
	again := []envoy.GRPCCode{envoy.GRPCCanceled, envoy.GRPCDeadlineExceeded, envoy.GRPCResourceExhausted, envoy.GRPCAborted, envoy.GRPCInternal, envoy.GRPCUnavailable}
	for code := envoy.GRPCCanceled; code <= envoy.GRPCUnauthenticated; code++ {
		want := 1
		if slices.Contains(again, code) {
			want = 5
		}
		tests = append(tests, call{&grpcwire.Error{Code: code}, want})
	}
	for _, test := range tests {
		synctest.Test(t, func(t *testing.T) {
			calls, begun := 0, time.Now()
			ca := newCA(func(context.Context, string, []byte) ([]byte, error) { calls++; return nil, test.err })
			if _, err := ca.Fetch(t.Context()); !errors.Is(err, test.err) || calls != test.want {
				t.Errorf("%v: error %v after %d calls, want %d", test.err, err, calls, test.want)
			}
			if took := time.Since(begun); test.want == 5 && (took < 1350*time.Millisecond || took > 1650*time.Millisecond) {
				t.Errorf("%v: the pauses last %v, want 100, 200, 400 and 800 ms within 10 %%", test.err, took)
			}
		})
	}
}

// source is a Source of a test.
type source struct {
	fetch func() (*Identity, error)
	next  time.Duration
}

func (s *source) Fetch(context.Context) (*Identity, error) { return s.fetch() }
func (s *source) Next(*Identity) time.Duration             { return s.next }

func (a *authority) identity(t *testing.T, lifetime time.Duration) *Identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := ParseRoots([]byte(text(a.certificate)))
	if err != nil {
		t.Fatal(err)
	}
	identity, err := New([]*x509.Certificate{a.leaf(t, key.Public(), lifetime, web)}, key, roots, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return identity
}

func keep(t *testing.T, s Source, output string) (*Keeper, *lockedBuilder) {
	t.Helper()
	var log lockedBuilder
	k := NewKeeper(Config{Source: s, Log: slog.New(slog.NewTextHandler(&log, nil)), Output: output})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { k.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return k, &log
}

func TestAKeeperRenewsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root")
		var fetched []time.Time
		s := &source{next: 12 * time.Hour, fetch: func() (*Identity, error) {
			fetched = append(fetched, time.Now())
			return root.identity(t, 24*time.Hour), nil
		}}
		begun := time.Now()
		k, _ := keep(t, s, "")
		synctest.Wait()
		first := k.Current()
		time.Sleep(30 * time.Hour)
		synctest.Wait()
		if len(fetched) != 3 || fetched[1].Sub(begun) != 12*time.Hour || k.Current() == first || k.Status().Renewals != 3 {
			t.Errorf("fetched at %v, status %+v", fetched, k.Status())
		}
	})
}

func TestAFailedRenewalKeepsTheIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root")
		away := errors.New("istiod is away")
		var attempts []time.Time
		first := root.identity(t, time.Hour)
		s := &source{next: time.Minute}
		s.fetch = func() (*Identity, error) {
			attempts = append(attempts, time.Now())
			if len(attempts) == 1 {
				return first, nil
			}
			return nil, away
		}
		k, log := keep(t, s, "")
		time.Sleep(31 * time.Minute)
		synctest.Wait()
		if k.Current() != first || !errors.Is(k.Status().LastError, away) || !strings.Contains(log.String(), "expires=") {
			t.Errorf("identity kept: %v; status %+v; log\n%s", k.Current() == first, k.Status(), log)
		}
		// Half an hour has pauses of 1, 2, 4, … 60 s, each within 20 %.
		if n := len(attempts); n < 28 || n > 46 {
			t.Errorf("%d attempts", n)
		}
		for i := 2; i < len(attempts); i++ {
			if pause := attempts[i].Sub(attempts[i-1]); pause < 800*time.Millisecond || pause > 72*time.Second {
				t.Errorf("pause of %v", pause)
			}
		}
	})
}

func TestAnchorsAreTrustedToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root, next := newAuthority(t, "root"), newAuthority(t, "next root")
		var fetches atomic.Int32
		var away atomic.Bool
		s := &source{next: 24 * time.Hour, fetch: func() (*Identity, error) {
			if away.Load() {
				return nil, errors.New("istiod is away")
			}
			fetches.Add(1)
			return root.identity(t, 48*time.Hour), nil
		}}
		k, log := keep(t, s, "")
		synctest.Wait()
		anchors, err := ParseRoots([]byte(text(next.certificate)))
		if err != nil {
			t.Fatal(err)
		}
		away.Store(true)
		k.Anchor(anchors)
		synctest.Wait()
		if !strings.Contains(log.String(), "trust in peers changed") {
			t.Errorf("log:\n%s", log)
		}
		if want := text(root.certificate, next.certificate); string(k.Current().Roots.PEM) != want || k.Status().Renewals != 1 {
			t.Errorf("while the CA is away, status %+v, the roots are\n%s", k.Status(), k.Current().Roots.PEM)
		}
		away.Store(false)
		time.Sleep(2 * time.Second)
		if want := text(root.certificate, next.certificate); string(k.Current().Roots.PEM) != want || fetches.Load() != 2 {
			t.Errorf("after %d fetches the roots are\n%s", fetches.Load(), k.Current().Roots.PEM)
		}
		if !strings.Contains(log.String(), "roots_changed=true") {
			t.Errorf("log:\n%s", log)
		}
		k.Anchor(anchors)
		synctest.Wait()
		known, err := ParseRoots([]byte(text(root.certificate)), anchors.PEM)
		if err != nil {
			t.Fatal(err)
		}
		k.Anchor(known) // it has the roots of the source as well
		synctest.Wait()
		if fetches.Load() != 2 {
			t.Errorf("the same roots cause a fetch: %d", fetches.Load())
		}
		k.Anchor(nil)
		synctest.Wait()
		if want := text(root.certificate); string(k.Current().Roots.PEM) != want {
			t.Errorf("roots that were withdrawn are trusted:\n%s", k.Current().Roots.PEM)
		}
	})
}

// store writes an identity into a directory, as three files.
func store(t *testing.T, directory string, identity *Identity) {
	t.Helper()
	if err := os.MkdirAll(directory, 0o755); err != nil {
		t.Fatal(err)
	}
	scratch := t.TempDir()
	if err := write(scratch, identity, false); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"cert-chain.pem", "key.pem", "root-cert.pem"} {
		text, err := os.ReadFile(filepath.Join(scratch, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(directory, name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestMountedFilesAreFoundAndFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := t.TempDir()
		if files, ok := FindFiles(root); ok {
			t.Fatalf("found %+v", files)
		}
		a := newAuthority(t, "root")
		first, second, third := a.identity(t, 24*time.Hour), a.identity(t, 24*time.Hour), a.identity(t, 24*time.Hour)
		// A projected volume: the files are symbolic links through ..data. A rotation replaces that link.
		volume := filepath.Join(root, "var/run/secrets/workload-spiffe-credentials")
		store(t, filepath.Join(volume, "..1"), first)
		store(t, filepath.Join(volume, "..2"), second)
		link := func(target, name string) {
			if err := os.Symlink(target, filepath.Join(volume, "new")); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(volume, "new"), filepath.Join(volume, name)); err != nil {
				t.Fatal(err)
			}
		}
		link("..1", "..data")
		for _, name := range []string{"cert-chain.pem", "key.pem", "root-cert.pem"} {
			link("..data/"+name, name)
		}
		files, ok := FindFiles(root)
		if !ok {
			t.Fatal("not found")
		}
		k, _ := keep(t, files, "")
		is := func(want *Identity) bool {
			return k.Current() != nil && string(k.Current().Certificate.Certificate[0]) == string(want.Certificate.Certificate[0])
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if !is(first) || k.Status().Renewals != 1 {
			t.Fatalf("status %+v", k.Status())
		}
		link("..2", "..data")
		time.Sleep(filePoll + time.Second)
		synctest.Wait()
		if !is(second) {
			t.Error("the rotation was not followed")
		}
		// A rotation that is half done: the certificate has come and its key has not.
		store(t, filepath.Join(volume, "..3"), third)
		link("..3/cert-chain.pem", "cert-chain.pem")
		time.Sleep(filePoll + 2*time.Second)
		synctest.Wait()
		if !is(second) || k.Status().LastError == nil {
			t.Errorf("status %+v", k.Status())
		}
		link("..3/key.pem", "key.pem")
		time.Sleep(time.Minute)
		synctest.Wait()
		if !is(third) || k.Status().LastError != nil {
			t.Errorf("status %+v", k.Status())
		}
	})
}

func TestFilesThatCannotBeAnIdentityAreNamed(t *testing.T) {
	a := newAuthority(t, "root")
	for name, test := range map[string]struct {
		change func(directory string) error
		want   string
	}{
		"no key":    {func(d string) error { return os.Remove(filepath.Join(d, "key.pem")) }, "key.pem"},
		"bad roots": {func(d string) error { return os.WriteFile(filepath.Join(d, "root-cert.pem"), []byte("x"), 0o600) }, "root-cert.pem: no certificate"},
		"endless":   {func(d string) error { return os.Truncate(filepath.Join(d, "cert-chain.pem"), maxFile+1) }, "more than 1048576 bytes"},
		"other root": {func(d string) error {
			return os.WriteFile(filepath.Join(d, "root-cert.pem"), []byte(text(newAuthority(t, "other").certificate)), 0o600)
		}, "unknown authority"},
	} {
		directory := t.TempDir()
		store(t, directory, a.identity(t, time.Hour))
		if err := test.change(directory); err != nil {
			t.Fatal(err)
		}
		files := Files{Certificate: filepath.Join(directory, "cert-chain.pem"), Key: filepath.Join(directory, "key.pem"), Roots: filepath.Join(directory, "root-cert.pem")}
		if _, err := files.read(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, test.want)
		}
	}
}

func TestAFileMayHaveAsManyBytesAsTheLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for size, ok := range map[int]bool{maxFile: true, maxFile + 1: false} {
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		if content, err := ReadFile(path); (err == nil) != ok || ok && len(content) != size {
			t.Errorf("%d bytes: read %d, error %v", size, len(content), err)
		}
	}
}

// A rotation that is half done when files are read is waited for, for less than a second.
func TestFilesAreReadAgainUntilTheyFit(t *testing.T) {
	for _, complete := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			a := newAuthority(t, "root")
			first, second := a.identity(t, time.Hour), a.identity(t, time.Hour)
			directory, other := t.TempDir(), t.TempDir()
			store(t, directory, first)
			store(t, other, second)
			move := func(name string) {
				if err := os.Rename(filepath.Join(other, name), filepath.Join(directory, name)); err != nil {
					t.Error(err)
				}
			}
			move("cert-chain.pem")
			if complete {
				time.AfterFunc(3*filePause/2, func() { move("key.pem") })
			}
			files := Files{Certificate: filepath.Join(directory, "cert-chain.pem"), Key: filepath.Join(directory, "key.pem"), Roots: filepath.Join(directory, "root-cert.pem")}
			begun := time.Now()
			identity, err := files.Fetch(t.Context())
			took := time.Since(begun)
			if complete && (err != nil || !identity.Equal(second) || took != 2*filePause) {
				t.Errorf("error %v after %v", err, took)
			}
			if !complete && (err == nil || !strings.Contains(err.Error(), "does not match") || took != (fileTries-1)*filePause) {
				t.Errorf("error %v after %v", err, took)
			}
		})
	}
}
