package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// The wall clock jumps: the machine was suspended, or the clock was set. Renewal follows it.
func TestRenewalFollowsTheWallClock(t *testing.T) {
	for _, test := range []struct {
		name   string
		jump   time.Duration // an hour after the first fetch
		latest time.Duration // of the second fetch, after the jump
	}{
		{"suspended past the renewal", 12 * time.Hour, time.Minute},
		{"suspended past the expiry", 48 * time.Hour, time.Minute},
		{"suspended for a while", 6 * time.Hour, 5*time.Hour + time.Minute},
		{"set back", -48 * time.Hour, 11*time.Hour + time.Minute},
	} {
		synctest.Test(t, func(t *testing.T) {
			root := newAuthority(t, "root")
			var fetched []time.Time
			s := &source{next: 12 * time.Hour, fetch: func() (*Identity, error) {
				fetched = append(fetched, time.Now())
				return root.identity(t, 24*time.Hour), nil
			}}
			var mu sync.Mutex
			offset := time.Duration(0)
			k := NewKeeper(Config{Source: s, Log: slog.New(slog.DiscardHandler)})
			k.wall = func() time.Time {
				mu.Lock()
				defer mu.Unlock()
				return time.Now().Round(0).Add(offset)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go k.Run(ctx)
			time.Sleep(time.Hour)
			mu.Lock()
			offset = test.jump
			mu.Unlock()
			jumped := time.Now()
			time.Sleep(test.latest)
			synctest.Wait()
			if len(fetched) != 2 {
				t.Fatalf("%s: %d fetches within %v of the jump, want 2", test.name, len(fetched), test.latest)
			}
			if after := fetched[1].Sub(jumped); after < test.latest-2*time.Minute {
				t.Errorf("%s: fetched again %v after the jump, want %v", test.name, after, test.latest)
			}
		})
	}
}

// A failed fetch is tried again within its pause although the clock was set back meanwhile.
func TestARetryDoesNotWaitForAClockThatWasSetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetches := 0
		s := &source{fetch: func() (*Identity, error) { fetches++; return nil, errors.New("away") }}
		k := NewKeeper(Config{Source: s, Log: slog.New(slog.DiscardHandler)})
		begun := time.Now()
		k.wall = func() time.Time { return begun.Add(-time.Since(begun)) } // it runs backwards
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go k.Run(ctx)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if fetches < 10 {
			t.Errorf("%d fetches in ten minutes", fetches)
		}
	})
}

func TestTheKeyIsInNoTextOfAnIdentity(t *testing.T) {
	root := newAuthority(t, "root")
	identity := root.identity(t, time.Hour)
	key := identity.Certificate.PrivateKey.(*ecdsa.PrivateKey)
	raw, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	store(t, directory, identity)
	files := &Files{Certificate: filepath.Join(directory, "cert-chain.pem"), Key: filepath.Join(directory, "key.pem"), Roots: filepath.Join(directory, "root-cert.pem")}
	if _, err := files.Fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	keyPEM, err := os.ReadFile(files.Key)
	if err != nil {
		t.Fatal(err)
	}
	socket := &Socket{secrets: &secrets{key: keyPEM}, current: identity}
	k := NewKeeper(Config{Source: files, Log: slog.New(slog.DiscardHandler)})
	k.accept(identity)

	var b strings.Builder
	logs := []*slog.Logger{slog.New(slog.NewTextHandler(&b, nil)), slog.New(slog.NewJSONHandler(&b, nil))}
	for _, value := range []any{identity, *identity, identity.Roots, files, *files, socket, *socket, k, k.Status(), []any{identity}, map[string]*Identity{"x": identity}, struct{ I *Identity }{identity}, struct{ I Identity }{*identity}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&b, verb+"\n", value)
		}
		encoded, _ := json.Marshal(value)
		b.Write(encoded)
		for _, log := range logs {
			log.Info("identity", "value", value)
		}
	}
	got := b.String()
	if !strings.Contains(got, web) {
		t.Error("the SPIFFE ID is not in the text")
	}
	pemLine := strings.Split(string(keyPEM), "\n")[1]
	for form, secret := range map[string]string{
		"decimal": new(big.Int).SetBytes(raw).String(), "hexadecimal": hex.EncodeToString(raw), "base64": base64.StdEncoding.EncodeToString(raw), "bytes": strings.Trim(fmt.Sprint(raw), "[]"),
		"PEM": pemLine, "PEM's bytes": strings.Trim(fmt.Sprint(keyPEM), "[]"), "PEM in hexadecimal": hex.EncodeToString([]byte(pemLine)),
	} {
		if strings.Contains(strings.ToLower(got), strings.ToLower(secret)) {
			t.Errorf("the key is in the text, in %s", form)
		}
	}
}

func TestTheIdentityIsWrittenWhereItIsAskedFor(t *testing.T) {
	for _, shared := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			root := newAuthority(t, "root")
			directory := t.TempDir()
			s := &source{next: time.Hour, fetch: func() (*Identity, error) { return root.identity(t, 2*time.Hour), nil }}
			k := NewKeeper(Config{Source: s, Log: slog.New(slog.DiscardHandler), Output: directory, OutputShared: shared})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { k.Run(ctx); close(done) }()
			defer func() { cancel(); <-done }()
			for range 4 {
				synctest.Wait()
				pair, err := tls.LoadX509KeyPair(filepath.Join(directory, "cert-chain.pem"), filepath.Join(directory, "key.pem"))
				if err != nil || string(pair.Certificate[0]) != string(k.Current().Certificate.Certificate[0]) {
					t.Errorf("error %v, or another certificate", err)
				}
				if roots, err := os.ReadFile(filepath.Join(directory, "root-cert.pem")); err != nil || string(roots) != text(root.certificate) {
					t.Errorf("roots %s, error %v", roots, err)
				}
				time.Sleep(time.Hour)
			}
			synctest.Wait()
			entries, err := os.ReadDir(directory)
			if err != nil || len(entries) != 6 { // three files, the link, and two generations
				t.Errorf("%d entries, error %v", len(entries), err)
			}
			want := map[bool]os.FileMode{false: 0o600, true: 0o644}[shared]
			for _, name := range []string{"key.pem", "cert-chain.pem", "root-cert.pem"} {
				if info, err := os.Stat(filepath.Join(directory, name)); err != nil || info.Mode().Perm() != want {
					t.Errorf("%s: mode %v, error %v", name, info.Mode(), err)
				}
			}
		})
	}
}

// A reader that resolves the directory once reads files that fit, also while they are replaced.
func TestFilesOfTheOutputFit(t *testing.T) {
	root := newAuthority(t, "root")
	directory := t.TempDir()
	identities := []*Identity{root.identity(t, time.Hour), root.identity(t, time.Hour), root.identity(t, time.Hour)}
	// Files of another program, or of an older version.
	for _, name := range []string{"key.pem", "cert-chain.pem"} {
		if err := os.WriteFile(filepath.Join(directory, name), []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := write(directory, identities[0], false); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 300 {
			if err := write(directory, identities[i%len(identities)], false); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	reads := 0
	for running := true; running; reads++ {
		select {
		case <-done:
			running = false
		default:
		}
		data, err := os.Readlink(filepath.Join(directory, "..data"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = tls.LoadX509KeyPair(filepath.Join(directory, data, "cert-chain.pem"), filepath.Join(directory, data, "key.pem"))
		if err != nil && !errors.Is(err, os.ErrNotExist) { // replaced twice while they were read
			t.Fatalf("read %d: %v", reads, err)
		}
	}
}

func TestAnOutputThatCannotBeWrittenIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root")
		directory := filepath.Join(t.TempDir(), "later")
		k, log := keep(t, &source{next: time.Hour, fetch: func() (*Identity, error) { return root.identity(t, 2*time.Hour), nil }}, directory)
		time.Sleep(35 * time.Second)
		synctest.Wait()
		if k.Status().OutputError == nil || strings.Count(log.String(), "cannot write the workload certificate") != 1 {
			t.Errorf("status %+v, log\n%s", k.Status(), log)
		}
		if err := os.Mkdir(directory, 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(filePoll)
		synctest.Wait()
		if _, err := os.Stat(filepath.Join(directory, "key.pem")); err != nil || k.Status().OutputError != nil {
			t.Errorf("error %v, status %+v", err, k.Status())
		}
	})
}
