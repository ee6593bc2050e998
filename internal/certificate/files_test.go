package certificate

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// pairOf writes a new certificate and its key. Each write has a modification time of its own, even where clocks are coarse.
func pairOf(t *testing.T, directory string, serial int) (leaf *x509.Certificate) {
	t.Helper()
	i := &Issuer{IssuerConfig: IssuerConfig{Service: "pillion-webhook", Namespace: "pillion-system"}}
	authority, _, _, err := i.newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	pair, err := i.issue(authority)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(directory, "tls.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]}), serial)
	put(t, filepath.Join(directory, "tls.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), serial)
	return pair.Leaf
}

func put(t *testing.T, name string, content []byte, serial int) {
	t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	changed := time.Unix(1_700_000_000+int64(serial), 0)
	if err := os.Chtimes(name, changed, changed); err != nil {
		t.Fatal(err)
	}
}

func TestFilesAreReloadedWhenTheyChange(t *testing.T) {
	directory := t.TempDir()
	cert, key := filepath.Join(directory, "tls.crt"), filepath.Join(directory, "tls.key")
	var text bytes.Buffer
	log := slog.New(slog.NewTextHandler(&text, nil))
	if _, err := FromFiles(cert, key, log); err == nil {
		t.Fatal("there are no files")
	}
	want := pairOf(t, directory, 1)
	files, err := FromFiles(cert, key, log)
	if err != nil {
		t.Fatal(err)
	}
	expect := func(when string) {
		t.Helper()
		if got, err := files.Get(nil); err != nil || !got.Leaf.Equal(want) {
			t.Errorf("%s: %v, %+v", when, err, got)
		}
	}
	expect("at first")
	want = pairOf(t, directory, 2)
	expect("after a rotation")
	put(t, cert, []byte("half"), 3)
	expect("with half a rotation")
	if !strings.Contains(text.String(), "new certificate rejected, keeping the old one") {
		t.Errorf("the log is %s", &text)
	}
	rejected := strings.Count(text.String(), "rejected")
	expect("with the same files again")
	if strings.Count(text.String(), "rejected") != rejected {
		t.Error("each handshake reads the broken files again")
	}
	os.Remove(key)
	expect("without a file")
	want = pairOf(t, directory, 4)
	expect("after another rotation")
	var handshakes sync.WaitGroup
	for range 8 {
		handshakes.Go(func() { expect("of many handshakes") })
	}
	handshakes.Wait()
}
