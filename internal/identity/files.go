package identity

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// Files is an identity in three files of PEM. A rotation may replace them one after another or by one symbolic link.
type Files struct {
	Certificate, Key, Roots string // paths

	hashes   [3][sha256.Size]byte // of the files of identity
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

// MountedFiles returns the files at paths that the pod names. They are an identity if all exist and the certificate has a
// SPIFFE ID. Certificates without one serve the TLS that names them as files only.
func MountedFiles(certificate, key, roots string) (*Files, bool) {
	files := &Files{Certificate: certificate, Key: key, Roots: roots}
	if !files.exist() {
		return nil, false
	}
	text, err := ReadFile(certificate)
	if err != nil {
		return nil, false
	}
	chain, err := parseCertificates(text)
	if err != nil || len(chain) == 0 || !hasSPIFFE(chain[0]) {
		return nil, false
	}
	return files, true
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
	var hashes [3][sha256.Size]byte
	for i, path := range []string{f.Certificate, f.Key, f.Roots} {
		var err error
		if texts[i], err = ReadFile(path); err != nil {
			return nil, err
		}
		hashes[i] = sha256.Sum256(texts[i])
	}
	if f.identity != nil && hashes == f.hashes {
		return f.identity, nil
	}
	identity, err := parseIdentity(texts[0], texts[1], texts[2], f.Certificate+" and "+f.Key, f.Roots)
	if err != nil {
		return nil, err
	}
	f.hashes, f.identity = hashes, identity
	return identity, nil
}

// ReadFile returns the content of a file of at most maxFile bytes.
func ReadFile(path string) ([]byte, error) { return readFile(path, maxFile) }

func readFile(path string, limit int) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, int64(limit)+1))
	if err == nil && len(content) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return content, err
}

// Next returns filePoll.
func (f *Files) Next(*Identity) time.Duration { return filePoll }
