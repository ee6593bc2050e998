package identity

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Files is an identity in three files of PEM. A rotation may replace them one after another or by one symbolic link.
type Files struct {
	Certificate, Key, Roots string // paths

	texts    [3][]byte // of identity
	identity *Identity
}

// workloadFiles are the places and names in which platforms mount a workload certificate, in the order in which
// istio-agent looks for them.
var workloadFiles = []struct{ directory, certificate, key, roots string }{
	{"var/run/secrets/workload-spiffe-credentials", "cert-chain.pem", "key.pem", "root-cert.pem"},
	{"var/run/secrets/workload-spiffe-credentials", "certificates.pem", "private_key.pem", "ca_certificates.pem"}, // GKE
	{"etc/certs", "cert-chain.pem", "key.pem", "root-cert.pem"},
}

// FindFiles returns the first set of mounted files below the directory root of which all exist.
func FindFiles(root string) (*Files, bool) {
	for _, set := range workloadFiles {
		directory := filepath.Join(root, set.directory)
		files := &Files{Certificate: filepath.Join(directory, set.certificate), Key: filepath.Join(directory, set.key), Roots: filepath.Join(directory, set.roots)}
		if files.exist() {
			return files, true
		}
	}
	return nil, false
}

func (f *Files) exist() bool {
	for _, path := range []string{f.Certificate, f.Key, f.Roots} {
		if info, err := os.Stat(path); err != nil || info.IsDir() {
			return false
		}
	}
	return true
}

// maxFile bounds a file that is read, in bytes.
const maxFile = 1 << 20

// A rotation that replaces three files is seen half done. The files are read again until key and certificate fit.
const (
	fileTries = 5
	filePause = 200 * time.Millisecond
)

// Fetch reads the files. It returns the same identity while they are the same.
func (f *Files) Fetch(ctx context.Context) (*Identity, error) {
	for attempt := 1; ; attempt++ {
		identity, err := f.read()
		if err == nil || attempt == fileTries {
			return identity, err
		}
		timer := time.NewTimer(filePause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		case <-timer.C:
		}
	}
}

func (f *Files) read() (*Identity, error) {
	var texts [3][]byte
	for i, path := range []string{f.Certificate, f.Key, f.Roots} {
		var err error
		if texts[i], err = ReadFile(path); err != nil {
			return nil, err
		}
	}
	if f.identity != nil && slices.EqualFunc(texts[:], f.texts[:], bytes.Equal) {
		return f.identity, nil
	}
	pair, err := tls.X509KeyPair(texts[0], texts[1])
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", f.Certificate, f.Key, err)
	}
	roots, err := ParseRoots(texts[2])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Roots, err)
	}
	chain := make([]*x509.Certificate, len(pair.Certificate))
	for i, raw := range pair.Certificate {
		if chain[i], err = x509.ParseCertificate(raw); err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", f.Certificate, i+1, err)
		}
	}
	identity, err := New(chain, signer(pair.PrivateKey), roots, time.Now())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Certificate, err)
	}
	f.texts, f.identity = texts, identity
	return identity, nil
}

// signer returns the key of a tls.Certificate. It is always a Signer, because tls.X509KeyPair accepts no other.
func signer(key any) crypto.Signer { return key.(crypto.Signer) }

// ReadFile returns the content of a file of at most maxFile bytes.
func ReadFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err == nil && len(content) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", path, maxFile)
	}
	return content, err
}

// filePoll is how often files are read again. Polling finds every kind of rotation, and three small files cost little.
const filePoll = 10 * time.Second

// Next returns filePoll.
func (f *Files) Next(*Identity) time.Duration { return filePoll }
