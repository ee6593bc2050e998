package identity

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Source is where identities come from: a *CA, *Files or *Socket.
type Source interface {
	Fetch(ctx context.Context) (*Identity, error)

	// Next returns how long after now the identity is to be fetched again. At most 0: now.
	Next(*Identity) time.Duration
}

// Config is the configuration of a Keeper. Source and Log are required.
type Config struct {
	Source Source
	Log    *slog.Logger

	// Revocations is the path of a file with revocation lists, in PEM. It is read again and again, and need not exist.
	// Empty: there are no lists.
	Revocations string

	// Output is a directory into which the identity is written as cert-chain.pem, key.pem and root-cert.pem, for programs
	// that make connections of their own. Empty: the key does not leave memory. OutputShared makes the files readable for
	// all users, as Istio's agent does in a pod: its containers run as different users.
	Output       string
	OutputShared bool

	// Changed is called after the identity has changed, one call at a time, by Run's goroutines and by Anchor. It must
	// not call Anchor. It may be nil.
	Changed func(*Identity)
}

// Keeper keeps the current identity. Make it with NewKeeper and start it with Run.
type Keeper struct {
	config  Config
	current atomic.Pointer[Identity]
	again   chan struct{}    // asks Run to fetch now
	wall    func() time.Time // without a monotonic reading

	publishing sync.Mutex // held while the identity changes
	written    *Identity  // in the output directory; guarded by publishing

	mu          sync.Mutex
	fetched     *Identity    // by the last successful fetch
	anchors     *Roots       // of the mesh, besides those of the source; may be nil
	revocations *Revocations // may be nil
	status      Status
}

// Status is what a Keeper has done, for people and metrics.
type Status struct {
	Renewals        int64 // fetches of another certificate than the one before
	Failures        int64
	LastError       error     // of the last fetch; nil if it succeeded
	Next            time.Time // when the next fetch is due; zero before the first has ended
	RevocationError error     // why the file of revocation lists is not used as it is; nil if it is, or does not exist
	OutputError     error     // why the output directory does not have the current identity; nil if it does
}

// NewKeeper returns a Keeper without an identity.
func NewKeeper(config Config) *Keeper {
	return &Keeper{config: config, again: make(chan struct{}, 1), wall: func() time.Time { return time.Now().Round(0) }}
}

// Current returns the identity, or nil before the first one has come. It may have expired.
func (k *Keeper) Current() *Identity { return k.current.Load() }

// Status returns the counts.
func (k *Keeper) Status() Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.status
}

// Anchor sets roots of the mesh. They are trusted at once, besides those of the source. If that changes the roots of an
// identity, a new certificate is fetched, because istiod announces new roots before it signs with them.
func (k *Keeper) Anchor(anchors *Roots) {
	k.mu.Lock()
	same := k.anchors.Equal(anchors)
	k.anchors = anchors
	k.mu.Unlock()
	if same {
		return
	}
	old := k.Current()
	k.publish()
	if old == nil || old.Roots.Equal(k.Current().Roots) {
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
	var watch sync.WaitGroup
	defer watch.Wait()
	k.readRevocations()
	watch.Go(func() { k.watch(ctx) })
	retry := minRetry
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
			k.accept(identity)
			retry = minRetry
			pause = max(k.config.Source.Next(identity), minRetry)
		}
		k.mu.Lock()
		k.status.Next = k.wall().Add(pause)
		k.mu.Unlock()
		k.wait(ctx, pause)
	}
}

// wait returns after d by the wall clock or by the time that this process has run, by the first of both, when a fetch is
// asked for, or when ctx ends. Certificates expire by the wall clock, which advances while the machine is suspended and
// may be set. The other clock ends waits that began before the wall clock was set back.
func (k *Keeper) wait(ctx context.Context, d time.Duration) {
	start, end := time.Now(), k.wall().Add(d)
	for {
		left := min(end.Sub(k.wall()), d-time.Since(start))
		if left <= 0 {
			return
		}
		timer := time.NewTimer(min(left, maxRetry))
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

// accept makes a fetched identity the current one.
func (k *Keeper) accept(identity *Identity) {
	k.mu.Lock()
	k.status.LastError = nil
	k.fetched = identity
	k.mu.Unlock()
	k.publish()
}

// publish makes the fetched identity, the mesh's roots and the revocation lists the current identity, if that differs.
func (k *Keeper) publish() {
	k.publishing.Lock()
	defer k.publishing.Unlock()
	next, old := k.merged(), k.Current()
	if next == nil || next.Equal(old) {
		return
	}
	k.current.Store(next)
	renewed := old == nil || !old.Certificate.Leaf.Equal(next.Certificate.Leaf)
	if renewed {
		k.mu.Lock()
		k.status.Renewals++
		k.mu.Unlock()
	}
	message := "workload certificate renewed"
	if !renewed {
		message = "trust in peers changed"
	}
	k.config.Log.Info(message, "spiffe_id", next.SPIFFE, "expires", next.NotAfter(), "roots_changed", old != nil && !old.Roots.Equal(next.Roots))
	k.write()
	if k.config.Changed != nil {
		k.config.Changed(next)
	}
}

// merged returns the fetched identity with the mesh's roots and the revocation lists added, or nil before the first fetch.
func (k *Keeper) merged() *Identity {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fetched == nil || k.anchors == nil && k.revocations == nil {
		return k.fetched
	}
	merged := *k.fetched
	merged.Revocations = k.revocations
	if k.anchors != nil {
		if roots, err := ParseRoots(merged.Roots.PEM, k.anchors.PEM); err == nil { // both were parsed before
			merged.Roots = roots
		}
	}
	return &merged
}

// filePoll is how often files are read again. Polling finds every kind of rotation, and small files cost little.
const filePoll = 10 * time.Second

// watch follows the file of revocation lists, and writes the output again that could not be written, until ctx ends.
func (k *Keeper) watch(ctx context.Context) {
	if k.config.Revocations == "" && k.config.Output == "" {
		return
	}
	ticker := time.NewTicker(filePoll)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if k.readRevocations() {
			k.publish()
		}
		k.publishing.Lock()
		k.write()
		k.publishing.Unlock()
	}
}

// readRevocations reads the lists and reports whether they have changed. Lists that cannot be read leave those before them
// in force, as in Envoy. If there are none before, no certificate of a peer is accepted until the file can be read: Envoy
// accepts no connection then. A file that is gone revokes nothing.
func (k *Keeper) readRevocations() (changed bool) {
	if k.config.Revocations == "" {
		return false
	}
	k.mu.Lock()
	old := k.revocations
	k.mu.Unlock()
	next, err := k.parseRevocations(old)
	switch {
	case err != nil && old == nil:
		next = &unreadable
	case err != nil:
		next = old
	}
	k.mu.Lock()
	before := k.status.RevocationError
	k.status.RevocationError = err
	k.revocations = next
	k.mu.Unlock()
	if err != nil && (before == nil || before.Error() != err.Error()) {
		effect := "the lists before stay in force"
		if next == &unreadable {
			effect = "certificates of peers are refused"
		}
		k.config.Log.Error("cannot use the revocation lists", "file", k.config.Revocations, "err", err, "effect", effect)
	}
	return !next.Equal(old)
}

func (k *Keeper) parseRevocations(old *Revocations) (*Revocations, error) {
	text, err := ReadFile(k.config.Revocations)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case old != nil && bytes.Equal(text, old.PEM):
		return old, nil
	}
	return ParseRevocations(text)
}

// write writes the current identity into the output directory, unless it is there.
func (k *Keeper) write() {
	current := k.Current()
	if k.config.Output == "" || current == nil || k.written == current {
		return
	}
	err := write(k.config.Output, current, k.config.OutputShared)
	if err == nil {
		k.written = current
	}
	k.mu.Lock()
	before := k.status.OutputError
	k.status.OutputError = err
	k.mu.Unlock()
	if err != nil && (before == nil || before.Error() != err.Error()) {
		k.config.Log.Error("cannot write the workload certificate", "directory", k.config.Output, "err", err)
	}
}
