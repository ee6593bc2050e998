// Package certificate provides the TLS certificate of the admission webhook: from files that others renew, or issued by an
// authority of our own that API servers learn from the webhook's configuration.
//
// A certificate is served only when API servers can verify it: Issuer writes an authority to the configuration before it
// serves a certificate of that authority, and keeps the former authority there until no replica uses it.
package certificate

import (
	"crypto/tls"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Files is a certificate and its key in PEM files. Each handshake checks them for changes, at the cost of two system calls.
type Files struct {
	cert, key string
	log       *slog.Logger

	mu     sync.Mutex
	tried  [2]stamp
	loaded *tls.Certificate
}

// stamp identifies a version of a file.
type stamp struct {
	changed time.Time
	size    int64
}

// FromFiles loads a certificate. It fails if the files have no valid certificate.
func FromFiles(cert, key string, log *slog.Logger) (*Files, error) {
	f := &Files{cert: cert, key: key, log: log}
	_, err := f.Get(nil)
	return f, err
}

// Get returns the certificate in the files, or the last valid one. It is a tls.Config.GetCertificate.
func (f *Files) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var now [2]stamp
	for i, name := range []string{f.cert, f.key} {
		if info, err := os.Stat(name); err == nil {
			now[i] = stamp{info.ModTime(), info.Size()}
		}
	}
	if f.loaded != nil && now == f.tried {
		return f.loaded, nil
	}
	f.tried = now
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	switch {
	case err == nil:
		f.log.Info("certificate loaded", "file", f.cert, "until", pair.Leaf.NotAfter)
		f.loaded = &pair
	case f.loaded == nil:
		return nil, err
	default: // perhaps only one file has been replaced yet
		f.log.Warn("new certificate rejected, keeping the old one", "error", err)
	}
	return f.loaded, nil
}
