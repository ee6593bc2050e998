package identity

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// Source is where identities come from: a *CA or *Files.
type Source interface {
	Fetch(ctx context.Context) (*Identity, error)

	// Next returns how long after now the identity is to be fetched again. At most 0: now.
	Next(*Identity) time.Duration
}

// Config is the configuration of a Keeper. Source and Log are required.
type Config struct {
	Source Source
	Log    *slog.Logger

	// Output is a directory into which the identity is written as cert-chain.pem, key.pem and root-cert.pem, for programs
	// that make connections of their own. Empty: the key does not leave memory.
	Output string

	// Changed is called after the identity has changed, by Run's goroutine. It may be nil.
	Changed func(*Identity)
}

// Keeper keeps the current identity. Make it with NewKeeper and start it with Run.
type Keeper struct {
	config  Config
	current atomic.Pointer[Identity]
	again   chan struct{} // asks Run to fetch now

	mu      sync.Mutex
	anchors *Roots // of the mesh, besides those of the source; may be nil
	status  Status
}

// Status is what a Keeper has done, for people and metrics.
type Status struct {
	Renewals  int64 // successful fetches that changed the identity
	Failures  int64
	LastError error // of the last fetch; nil if it succeeded
}

// NewKeeper returns a Keeper without an identity.
func NewKeeper(config Config) *Keeper {
	return &Keeper{config: config, again: make(chan struct{}, 1)}
}

// Current returns the identity, or nil before the first one has come. It may have expired.
func (k *Keeper) Current() *Identity { return k.current.Load() }

// Status returns the counts.
func (k *Keeper) Status() Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.status
}

// Anchor sets roots of the mesh. They are trusted besides those of the source. A new certificate is fetched, because
// istiod announces new roots before it signs with them.
func (k *Keeper) Anchor(anchors *Roots) {
	k.mu.Lock()
	same := k.anchors.Equal(anchors)
	k.anchors = anchors
	k.mu.Unlock()
	if same {
		return
	}
	select {
	case k.again <- struct{}{}:
	default:
	}
}

// Pauses after failed fetches.
const (
	minRetry = time.Second
	maxRetry = time.Minute
)

// Run fetches identities until ctx ends. A failed fetch leaves the current identity in place.
func (k *Keeper) Run(ctx context.Context) {
	retry := minRetry
	var fetched *Identity
	for ctx.Err() == nil {
		identity, err := k.config.Source.Fetch(ctx)
		if ctx.Err() != nil {
			return
		}
		var pause time.Duration
		if err != nil {
			pause, retry = jitter(retry, 0.2), min(2*retry, maxRetry)
			k.failed(err, pause)
		} else {
			k.accept(identity, identity != fetched)
			fetched, retry = identity, minRetry
			pause = max(k.config.Source.Next(identity), minRetry)
		}
		k.wait(ctx, pause)
	}
}

// wait returns when the wall clock has advanced by d, a fetch was asked for, or ctx has ended. A timer alone would stand
// still while the machine is suspended, and an identity would expire.
func (k *Keeper) wait(ctx context.Context, d time.Duration) {
	until := time.Now().Round(0).Add(d)
	for {
		left := time.Until(until)
		if left <= 0 {
			return
		}
		timer := time.NewTimer(min(left, time.Minute))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-k.again:
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

func (k *Keeper) failed(err error, pause time.Duration) {
	k.mu.Lock()
	k.status.Failures++
	k.status.LastError = err
	k.mu.Unlock()
	attributes := []any{"err", err, "retry_in", pause.Round(time.Millisecond)}
	if current := k.Current(); current != nil {
		attributes = append(attributes, "expires", current.NotAfter())
	}
	k.config.Log.Warn("workload certificate not renewed", attributes...)
}

// accept makes an identity the current one, with the mesh's roots added.
func (k *Keeper) accept(identity *Identity, isNew bool) {
	k.mu.Lock()
	k.status.LastError = nil
	anchors := k.anchors
	k.mu.Unlock()
	old := k.Current()
	if anchors != nil {
		if roots, err := ParseRoots(identity.Roots.PEM, anchors.PEM); err == nil { // both were parsed before
			merged := *identity
			merged.Roots = roots
			identity = &merged
		}
	}
	if old != nil && !isNew && old.Roots.Equal(identity.Roots) {
		return
	}
	k.current.Store(identity)
	k.mu.Lock()
	k.status.Renewals++
	k.mu.Unlock()
	k.config.Log.Info("workload certificate renewed", "spiffe_id", identity.SPIFFE, "expires", identity.NotAfter(), "roots_changed", old != nil && !old.Roots.Equal(identity.Roots))
	if err := k.output(identity); err != nil {
		k.config.Log.Error("cannot write the workload certificate", "directory", k.config.Output, "err", err)
	}
	if k.config.Changed != nil {
		k.config.Changed(identity)
	}
}

// output writes the identity into the Output directory. Each file is replaced as a whole.
func (k *Keeper) output(identity *Identity) error {
	if k.config.Output == "" {
		return nil
	}
	key, err := x509.MarshalPKCS8PrivateKey(identity.Certificate.PrivateKey)
	if err != nil {
		return err
	}
	var chain []byte
	for _, raw := range identity.Certificate.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})...)
	}
	for _, file := range []struct {
		name string
		text []byte
		mode os.FileMode
	}{
		{"key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600},
		{"root-cert.pem", identity.Roots.PEM, 0o644},
		{"cert-chain.pem", chain, 0o644},
	} {
		if err := replaceFile(filepath.Join(k.config.Output, file.name), file.text, file.mode); err != nil {
			return err
		}
	}
	return nil
}

// replaceFile writes a file beside path and renames it to path.
func replaceFile(path string, text []byte, mode os.FileMode) error {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name()) // fails after the rename
	_, err = file.Write(text)
	if err == nil {
		err = file.Chmod(mode)
	}
	if closing := file.Close(); err == nil {
		err = closing
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return os.Rename(file.Name(), path)
}
