package identity

import (
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"log/slog"
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

// maxLists bounds the revocation lists of a FileSecrets, in bytes of their files: about 150,000 revoked certificates. Volumes of
// ConfigMaps and Secrets have at most 1 MiB each. Lists that were not read for idleLists do not count.
const (
	maxLists  = 8 << 20
	idleLists = time.Minute
)

// FileSecrets are certificates, roots and revocation lists in files. They are read when they are used, and again when they are used
// 10 s later: files may be replaced at any time. While new files of certificates and roots cannot be used, such as in the midst of
// a rotation, those before them are. Lists that cannot be used are an error: those before them may lack a certificate that was
// revoked since. The zero value is empty and ready.
type FileSecrets struct {
	Log *slog.Logger // gets errors of files; nil: they are not logged

	mu      sync.Mutex
	secrets map[string]*fileSecret
}

// fileSecret is the last good content of a secret: a certificate, roots, or lists.
type fileSecret struct {
	hash        [sha256.Size]byte // of the files
	size        int               // likewise, in bytes
	lists       bool              // it is of revocation lists
	err         error             // why the files cannot be used now; nil: they can
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
	secret, err := f.get(name, []string{chain, key}, false, func(s *fileSecret, texts [][]byte) error {
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
	secret, err := f.get(name, []string{path}, false, func(s *fileSecret, texts [][]byte) (err error) {
		s.roots, err = ParseRoots(texts[0])
		return err
	})
	if err != nil {
		return nil, err
	}
	return secret.roots, nil
}

// Revocations returns the lists in a file, without their text. They are an error while the file is missing, damaged or too large.
func (f *FileSecrets) Revocations(path string) (*Revocations, error) {
	secret, err := f.get("crl "+path, []string{path}, true, func(s *fileSecret, texts [][]byte) (err error) {
		if s.revocations, err = ParseRevocations(texts[0]); err == nil {
			s.revocations.PEM = nil // the hash stands for it
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return secret.revocations, nil
}

// get returns a secret, and reads its files if that is due.
func (f *FileSecrets) get(name string, paths []string, lists bool, parse func(s *fileSecret, texts [][]byte) error) (*fileSecret, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.secrets[name]
	if old == nil || time.Since(old.read) >= filePoll {
		limit := maxFile
		if lists {
			limit = f.room(name)
		}
		next, err := readSecret(old, paths, limit, parse)
		if err != nil {
			err = fmt.Errorf("the secret %s: %w", name, err)
		}
		switch {
		case err == nil:
		case lists: // kept, so that a damaged file is not read at each handshake
			next = &fileSecret{}
		case old == nil:
			return nil, err
		default:
			next = old
		}
		f.note(name, old, err, next == old)
		next.read, next.lists, next.err = time.Now(), lists, err
		if f.secrets == nil || len(f.secrets) >= maxFileSecrets {
			f.secrets = map[string]*fileSecret{}
		}
		f.secrets[name] = next
		old = next
	}
	if lists && old.err != nil {
		return nil, old.err
	}
	return old, nil
}

// room returns how many bytes the lists with a name may have, and forgets idle ones.
func (f *FileSecrets) room(name string) int {
	room := maxLists
	for other, s := range f.secrets {
		switch {
		case !s.lists || other == name:
		case time.Since(s.read) > idleLists:
			delete(f.secrets, other)
		default:
			room -= s.size
		}
	}
	return room
}

// note logs an error of files if it is another one than before.
func (f *FileSecrets) note(name string, old *fileSecret, err error, kept bool) {
	before := ""
	if old != nil && old.err != nil {
		before = old.err.Error()
	}
	if f.Log != nil && err != nil && err.Error() != before {
		f.Log.Error("cannot use files of the mesh's configuration", "secret", name, "err", err, "kept", kept)
	}
}

// readSecret returns the content of files of at most limit bytes each, or old if they are as they were.
func readSecret(old *fileSecret, paths []string, limit int, parse func(s *fileSecret, texts [][]byte) error) (*fileSecret, error) {
	hash, size := sha256.New(), 0
	var texts [][]byte
	for _, path := range paths {
		text, err := readFile(path, limit)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(text)
		hash.Write(sum[:])
		size += len(text)
		texts = append(texts, text)
	}
	next := &fileSecret{hash: [sha256.Size]byte(hash.Sum(nil)), size: size}
	if old != nil && old.hash == next.hash {
		return old, nil
	}
	return next, parse(next, texts)
}
