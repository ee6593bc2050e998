package identity

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// revoke returns a revocation list of a that is valid for an hour around now.
func (a *authority) revoke(t *testing.T, change func(*x509.RevocationList), revoked ...*x509.Certificate) string {
	t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour)}
	for _, certificate := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: certificate.SerialNumber, RevocationTime: time.Now()})
	}
	if change != nil {
		change(list)
	}
	raw, err := x509.CreateRevocationList(rand.Reader, list, a.certificate, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: raw}))
}

func TestARevokedCertificateIsFound(t *testing.T) {
	root, other := newAuthority(t, "root"), newAuthority(t, "other")
	intermediate := newAuthority(t, "intermediate")
	intermediate.certificate.SerialNumber = big.NewInt(77)
	intermediate.certificate = root.sign(t, intermediate.certificate, root, intermediate.key.Public())
	forger := newAuthority(t, "intermediate") // the same name with another key
	first, second := intermediate.leaf(t, forger.key.Public(), time.Hour, web), intermediate.leaf(t, other.key.Public(), time.Hour, web)
	chain := []*x509.Certificate{first, intermediate.certificate, root.certificate}
	expired := func(l *x509.RevocationList) { l.NextUpdate = time.Now().Add(-time.Minute) }
	early := func(l *x509.RevocationList) { l.ThisUpdate = time.Now().Add(time.Minute) }
	endless := func(l *x509.RevocationList) { l.NextUpdate = time.Now().Add(100 * 365 * 24 * time.Hour) }
	for name, test := range map[string]struct {
		text string
		want error
		leaf error // if only the leaf is looked up
	}{
		"of neither issuer":        {other.revoke(t, nil, first), ErrNoList, ErrNoList},
		"of the root alone":        {root.revoke(t, nil), ErrNoList, ErrNoList},
		"of both issuers":          {root.revoke(t, nil) + intermediate.revoke(t, nil, second), nil, nil},
		"valid for long":           {root.revoke(t, endless) + intermediate.revoke(t, endless), nil, nil},
		"with the leaf":            {root.revoke(t, nil) + intermediate.revoke(t, nil, second, first), ErrRevoked, ErrRevoked},
		"with the intermediate":    {intermediate.revoke(t, nil) + root.revoke(t, nil, intermediate.certificate), ErrRevoked, nil},
		"with the root":            {intermediate.revoke(t, nil) + root.revoke(t, nil, root.certificate), ErrRevoked, nil},
		"forged":                   {root.revoke(t, nil) + forger.revoke(t, nil), ErrNoList, ErrNoList},
		"forged, and a good one":   {root.revoke(t, nil) + forger.revoke(t, nil, first) + intermediate.revoke(t, nil), nil, nil},
		"expired":                  {root.revoke(t, nil) + intermediate.revoke(t, expired), ErrListExpired, ErrListExpired},
		"not valid yet":            {root.revoke(t, nil) + intermediate.revoke(t, early), ErrListExpired, ErrListExpired},
		"expired, and a good one":  {root.revoke(t, nil) + intermediate.revoke(t, expired) + intermediate.revoke(t, nil), nil, nil},
		"a good one, and expired":  {root.revoke(t, nil) + intermediate.revoke(t, nil) + intermediate.revoke(t, expired), nil, nil},
		"expired, with the leaf":   {root.revoke(t, nil) + intermediate.revoke(t, nil) + intermediate.revoke(t, expired, first), ErrRevoked, ErrRevoked},
		"between other PEM blocks": {text(first) + root.revoke(t, nil) + "x\n" + intermediate.revoke(t, nil) + text(second), nil, nil},
	} {
		lists, err := ParseRevocations([]byte(test.text))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := lists.Check(chain, time.Now()); !errors.Is(err, test.want) {
			t.Errorf("lists %s: error %v, want %v", name, err, test.want)
		}
		if err := lists.CheckLeaf(chain, time.Now()); !errors.Is(err, test.leaf) {
			t.Errorf("lists %s for the leaf: error %v, want %v", name, err, test.leaf)
		}
	}
	if err := (*Revocations)(nil).Check(chain, time.Now()); err != nil {
		t.Errorf("without lists: %v", err)
	}
	lists, err := ParseRevocations([]byte(root.revoke(t, nil, intermediate.certificate)))
	if err != nil {
		t.Fatal(err)
	}
	if err := lists.Check(chain[1:], time.Now()); err == nil || !strings.Contains(err.Error(), "4d") || !strings.Contains(err.Error(), "CN=root") {
		t.Errorf("error %v, want one with the serial number and the issuer", err)
	}
}

func TestTextThatIsNotARevocationListIsNamed(t *testing.T) {
	root := newAuthority(t, "root")
	critical := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 1}}
	for want, text := range map[string]string{
		"no revocation list":                            text(root.certificate),
		"revocation list 1: ":                           string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte("x")})),
		"critical extension 2.5.29.27 is not supported": root.revoke(t, func(l *x509.RevocationList) { l.ExtraExtensions = []pkix.Extension{critical} }),
		"critical extension 2.5.29.27 of an entry": root.revoke(t, func(l *x509.RevocationList) {
			l.RevokedCertificateEntries[0].ExtraExtensions = []pkix.Extension{critical}
		}, root.certificate),
		"more than 256 revocation lists": strings.Repeat(root.revoke(t, nil), maxCertificates+1),
	} {
		if lists, err := ParseRevocations([]byte(text)); err == nil || !strings.Contains(err.Error(), want) || lists != nil {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}
}

// lockedBuilder is a strings.Builder for several goroutines.
type lockedBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuilder) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuilder) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestRevocationListsAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root")
		file := filepath.Join(t.TempDir(), "ca-crl.pem")
		s := &source{next: 24 * time.Hour, fetch: func() (*Identity, error) { return root.identity(t, 48*time.Hour), nil }}
		var log lockedBuilder
		var changes atomic.Int32
		k := NewKeeper(Config{Source: s, Log: slog.New(slog.NewTextHandler(&log, nil)), Revocations: file, Changed: func(*Identity) { changes.Add(1) }})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { k.Run(ctx); close(done) }()
		defer func() { cancel(); <-done }()
		step := func(name, text string, want *Revocations, wantChanges int32, wantError string) {
			t.Helper()
			err := os.WriteFile(file, []byte(text), 0o600)
			if text == "" {
				err = os.Remove(file)
			}
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * filePoll)
			synctest.Wait()
			problem := k.Status().RevocationError
			if !k.Current().Revocations.Equal(want) || changes.Load() != wantChanges || (problem == nil) != (wantError == "") || problem != nil && !strings.Contains(problem.Error(), wantError) {
				t.Errorf("%s: lists %v, %d changes, error %v", name, k.Current().Revocations, changes.Load(), problem)
			}
		}
		synctest.Wait()
		if k.Current().Revocations != nil || changes.Load() != 1 {
			t.Fatalf("without a file: %v, %d changes", k.Current().Revocations, changes.Load())
		}
		first, second := root.revoke(t, nil), root.revoke(t, nil, root.certificate)
		parse := func(text string) *Revocations {
			lists, err := ParseRevocations([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			return lists
		}
		step("a file", first, parse(first), 2, "")
		step("a changed file", second, parse(second), 3, "")
		step("the same file", second, parse(second), 3, "")
		step("a broken file", "x", parse(second), 3, "no revocation list")
		if n := strings.Count(log.String(), "cannot use the revocation lists"); n != 1 {
			t.Errorf("the broken file is logged %d times", n)
		}
		step("a good file again", second, parse(second), 3, "")
		step("no file", "", nil, 4, "")
		if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
			t.Errorf("%d errors in the log, want 1:\n%s", n, log.String())
		}
	})
}

// A file that is damaged when there are no lists of before refuses all certificates of peers, with the lists of configurations
// as well, until it can be read.
func TestDamagedRevocationListsRefuseAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root")
		own := root.identity(t, 48*time.Hour)
		chain := []*x509.Certificate{own.Certificate.Leaf, root.certificate}
		file := filepath.Join(t.TempDir(), "ca-crl.pem")
		write := func(text string) {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write("x")
		var log lockedBuilder
		s := &source{next: 24 * time.Hour, fetch: func() (*Identity, error) { return own, nil }}
		k := NewKeeper(Config{Source: s, Log: slog.New(slog.NewTextHandler(&log, nil)), Revocations: file})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { k.Run(ctx); close(done) }()
		defer func() { cancel(); <-done }()
		good, err := ParseRevocations([]byte(root.revoke(t, nil)))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * filePoll)
		synctest.Wait()
		damaged := k.Current().Revocations
		for name, lists := range map[string]*Revocations{"alone": damaged, "before others": damaged.And(good), "after others": good.And(damaged)} {
			if err := lists.Check(chain, time.Now()); !errors.Is(err, ErrUnreadable) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if n := strings.Count(log.String(), "certificates of peers are refused"); n != 1 || k.Status().RevocationError == nil {
			t.Errorf("logged %d times, status %v", n, k.Status().RevocationError)
		}
		mend := func() {
			t.Helper()
			write(root.revoke(t, nil))
			time.Sleep(2 * filePoll)
			synctest.Wait()
			if err := k.Current().Revocations.Check(chain, time.Now()); err != nil || k.Status().RevocationError != nil {
				t.Errorf("after it was mended: %v, status %v", err, k.Status().RevocationError)
			}
		}
		mend()
		// A file that is missing for a moment leaves no lists behind.
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * filePoll)
		write("x")
		time.Sleep(2 * filePoll)
		synctest.Wait()
		if err := k.Current().Revocations.Check(chain, time.Now()); !errors.Is(err, ErrUnreadable) {
			t.Errorf("damaged after it was missing: %v", err)
		}
		mend()
	})
}

// The signature of a list is verified once for each issuer. How many issuers are remembered is bounded.
func TestTheSignatureOfAListIsVerifiedOnce(t *testing.T) {
	root := newAuthority(t, "root")
	lists, err := ParseRevocations([]byte(root.revoke(t, nil)))
	if err != nil {
		t.Fatal(err)
	}
	list := &lists.lists[0]
	forger := newAuthority(t, "root") // the same name with another key
	for range 2 {
		if err := lists.check(root.certificate, root.certificate, time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := lists.check(root.certificate, forger.certificate, time.Now()); !errors.Is(err, ErrNoList) {
			t.Fatalf("a list of another key: %v", err)
		}
		list.signed.Signature = nil // a second verification fails
	}
	for range 2 * maxSigners {
		list.signedBy(newAuthority(t, "root").certificate)
	}
	if n := len(list.signers.known); n > maxSigners {
		t.Errorf("%d issuers are remembered, want at most %d", n, maxSigners)
	}
}

// Lists are joined in each handshake, before the client is authenticated, so their texts are not copied.
func TestJoinedListsDoNotCopyTheirTexts(t *testing.T) {
	parse := func(name string) *Revocations {
		lists, err := ParseRevocations([]byte(strings.Repeat("x\n", maxFile/2) + newAuthority(t, name).revoke(t, nil)))
		if err != nil {
			t.Fatal(err)
		}
		return lists
	}
	a, b := parse("a"), parse("b")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	joined := a.And(b)
	for range 9 {
		joined = a.And(b)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > maxFile {
		t.Errorf("ten times, %d bytes are allocated", n)
	}
	if len(joined.lists) != 2 || joined.Equal(a) || joined.Equal(a.And(b)) || !joined.Equal(joined) {
		t.Errorf("%d lists, or they are equal to others", len(joined.lists))
	}
}
