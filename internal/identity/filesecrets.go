package identity

import (
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"strings"
	"sync"
	"time"
)

// Names of secrets in files, as istiod gives them: "file-cert:CHAIN~KEY" and "file-root:PATH" with paths of PEM.
const (
	fileCertificate = "file-cert:"
	fileRoots       = "file-root:"
	systemRoots     = "system" // in place of a path: the roots of the operating system
)

// maxFileSecrets bounds what a FileSecrets keeps.
const maxFileSecrets = 1024

// IsFileSecret reports whether a name of the configuration is that of a secret in files.
func IsFileSecret(name string) bool {
	return strings.HasPrefix(name, fileCertificate) || strings.HasPrefix(name, fileRoots)
}

// FileSecrets are certificates and roots in files. They are read when they are used, and again when they are used 10 s later:
// files may be replaced at any time. While new files cannot be used, such as in the midst of a rotation, those before them
// are. The zero value is empty and ready.
type FileSecrets struct {
	mu      sync.Mutex
	secrets map[string]*fileSecret
}

// fileSecret is the last good content of a secret: a certificate or roots.
type fileSecret struct {
	hash        [sha256.Size]byte // of the files
	read        time.Time         // when they were read last
	certificate *tls.Certificate
	roots       *Roots
	revocations *Revocations
}

// Certificate returns the certificate with a name. Its Leaf is set.
func (f *FileSecrets) Certificate(name string) (*tls.Certificate, error) {
	chain, key, ok := strings.Cut(strings.TrimPrefix(name, fileCertificate), "~")
	if !ok || !strings.HasPrefix(name, fileCertificate) || chain == "" || key == "" {
		return nil, fmt.Errorf("the secret %s does not name two files", name)
	}
	secret, err := f.get(name, []string{chain, key}, func(s *fileSecret, texts [][]byte) error {
		pair, err := tls.X509KeyPair(texts[0], texts[1])
		s.certificate = &pair
		return err
	})
	if err != nil {
		return nil, err
	}
	return secret.certificate, nil
}

// Roots returns the roots with a name. Those of the operating system have a nil Pool.
func (f *FileSecrets) Roots(name string) (*Roots, error) {
	path, ok := strings.CutPrefix(name, fileRoots)
	switch {
	case !ok || path == "":
		return nil, fmt.Errorf("the secret %s does not name a file of roots", name)
	case path == systemRoots:
		return &Roots{}, nil
	}
	secret, err := f.get(name, []string{path}, func(s *fileSecret, texts [][]byte) (err error) {
		s.roots, err = ParseRoots(texts[0])
		return err
	})
	if err != nil {
		return nil, err
	}
	return secret.roots, nil
}

// Revocations returns the lists in a file.
func (f *FileSecrets) Revocations(path string) (*Revocations, error) {
	secret, err := f.get("crl "+path, []string{path}, func(s *fileSecret, texts [][]byte) (err error) {
		s.revocations, err = ParseRevocations(texts[0])
		return err
	})
	if err != nil {
		return nil, err
	}
	return secret.revocations, nil
}

// get returns a secret, and reads its files if that is due.
func (f *FileSecrets) get(name string, paths []string, parse func(s *fileSecret, texts [][]byte) error) (*fileSecret, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.secrets[name]
	if old != nil && time.Since(old.read) < filePoll {
		return old, nil
	}
	next, err := readSecret(old, paths, parse)
	if err != nil && old == nil {
		return nil, fmt.Errorf("the secret %s: %w", name, err)
	}
	if err != nil {
		next = old
	}
	next.read = time.Now()
	if f.secrets == nil || len(f.secrets) >= maxFileSecrets {
		f.secrets = map[string]*fileSecret{}
	}
	f.secrets[name] = next
	return next, nil
}

// readSecret returns the content of files, or old if they are as they were.
func readSecret(old *fileSecret, paths []string, parse func(s *fileSecret, texts [][]byte) error) (*fileSecret, error) {
	hash := sha256.New()
	var texts [][]byte
	for _, path := range paths {
		text, err := ReadFile(path)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(text)
		hash.Write(sum[:])
		texts = append(texts, text)
	}
	next := &fileSecret{hash: [sha256.Size]byte(hash.Sum(nil))}
	if old != nil && old.hash == next.hash {
		return old, nil
	}
	return next, parse(next, texts)
}
