// Package jwks fetches the keys of issuers of tokens, and keeps them for the configured time.
//
// Keys are fetched when a token needs them, or early. While they are renewed, the ones that were fetched last are used, for
// as long again as they are kept; then tokens are not accepted until there are new ones. So a server that is away for a
// while refuses no token, and one that is gone does not keep withdrawn keys alive. A token that names another key renews
// them before their time, if they are not recent.
package jwks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/jwt"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Getter sends requests to clusters: a *callout.Client.
type Getter interface {
	Get(ctx context.Context, cluster, uri string, limit int) (*callout.Answer, error)
}

const (
	maxBytes       = 1 << 20     // of a set
	maxSets        = 256         // that are kept
	shortestCache  = time.Second // so that a request finds the keys that it has waited for
	shortestPause  = 100 * time.Millisecond
	maxKeys        = 1024 // of a set: a token without the name of its key is verified by each of them
	defaultTimeout = 5 * time.Second
	maxRetries     = 10
	renewalPause   = 10 * time.Second // between fetches that tokens cause by naming keys that are not there
)

// Store has the keys that were fetched. Make it with New, and Close it.
type Store struct {
	getter Getter
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	now    func() time.Time

	sets atomic.Pointer[map[source]*set] // never changed; replaced with mu held
	mu   sync.Mutex                      // not needed for keys that are recent

	fetched, failed atomic.Uint64
}

// source is where keys are fetched from.
type source struct{ cluster, uri string }

// set is what is known of a source. Its other fields are guarded by Store.mu.
type set struct {
	last atomic.Pointer[result] // nil: not fetched yet
	used atomic.Int64           // in Unix nanoseconds, to a second

	renewed  time.Time     // when a token last asked for another key
	retry    time.Time     // no fetch begins before
	fetching chan struct{} // closed when the fetch ends; nil: no fetch is in progress
}

// result is the keys of a fetch. It is never changed.
type result struct {
	keys  *jwt.KeySet
	since time.Time
}

// within returns the keys if they are younger than age; r may be nil.
func (r *result) within(age time.Duration, now time.Time) *jwt.KeySet {
	if r == nil || now.Sub(r.since) >= age {
		return nil
	}
	return r.keys
}

// use notes that the set is used. Most calls write nothing, because other processors read the set.
func (k *set) use(now time.Time) {
	if at := now.UnixNano(); at-k.used.Load() >= int64(time.Second) {
		k.used.Store(at)
	}
}

// New returns an empty Store. log may be nil.
func New(getter Getter, log *slog.Logger) *Store {
	s := &Store{getter: getter, log: log, now: time.Now}
	s.sets.Store(&map[source]*set{})
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Close ends the fetches.
func (s *Store) Close() {
	s.mu.Lock()
	s.cancel()
	s.mu.Unlock()
	s.tasks.Wait()
}

// Stats returns how many fetches have succeeded and failed.
func (s *Store) Stats() (fetched, failed uint64) { return s.fetched.Load(), s.failed.Load() }

// Keys implements jwt.Keys. It begins a fetch if there is need of one. While as many sets as are kept are being fetched, those of
// other sources count as not fetched.
func (s *Store) Keys(from *mesh.RemoteKeys) (keys *jwt.KeySet, known bool) {
	now, life := s.now(), max(from.CacheFor, shortestCache)
	if k := s.known(from); k != nil {
		if keys := k.last.Load().within(life, now); keys != nil {
			k.use(now)
			return keys, true
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.set(from, now)
	if k == nil {
		return nil, true
	}
	last := k.last.Load()
	if last.within(life, now) == nil {
		s.fetch(k, from, now)
	}
	if keys := last.within(2*life, now); keys != nil {
		return keys, true
	}
	return nil, k.fetching == nil
}

// known returns the set of a source; nil: there is none.
func (s *Store) known(from *mesh.RemoteKeys) *set {
	return (*s.sets.Load())[source{from.Service.Cluster, from.Service.URI}]
}

// Renew implements jwt.Keys.
func (s *Store) Renew(from *mesh.RemoteKeys) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	k := s.set(from, now)
	if k == nil {
		return false
	}
	if k.fetching == nil && k.last.Load().within(renewalPause, now) == nil && now.Sub(k.renewed) >= renewalPause {
		k.renewed = now
		s.fetch(k, from, now)
	}
	return k.fetching != nil
}

// Early begins a fetch if the configuration asks for it before the first token.
func (s *Store) Early(from *mesh.RemoteKeys) {
	if from.Early {
		s.Keys(from)
	}
}

// Fetched returns a channel that is closed when the fetch in progress has ended; nil: no fetch is in progress.
func (s *Store) Fetched(from *mesh.RemoteKeys) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.set(from, s.now()); k != nil {
		return k.fetching
	}
	return nil
}

// set returns the set of a source; nil: there is no room for it. s.mu is held.
func (s *Store) set(from *mesh.RemoteKeys, now time.Time) *set {
	k := s.known(from)
	if k == nil {
		sets := maps.Clone(*s.sets.Load())
		if len(sets) >= maxSets && !forget(sets) {
			return nil
		}
		k = &set{}
		sets[source{from.Service.Cluster, from.Service.URI}] = k
		s.sets.Store(&sets)
	}
	k.use(now)
	return k
}

// forget drops the set that was not used for the longest time. It returns false if all are being fetched. Store.mu is held.
func forget(sets map[source]*set) bool {
	var oldest source
	var at int64
	found := false
	for source, k := range sets {
		if used := k.used.Load(); k.fetching == nil && (!found || used < at) {
			oldest, at, found = source, used, true
		}
	}
	delete(sets, oldest)
	return found
}

// fetch begins a fetch, except while one is in progress or has just failed. s.mu is held.
func (s *Store) fetch(k *set, from *mesh.RemoteKeys, now time.Time) {
	if k.fetching != nil || now.Before(k.retry) || s.ctx.Err() != nil {
		return
	}
	k.fetching = make(chan struct{})
	s.tasks.Add(1)
	go s.run(k, from)
}

// run fetches keys.
func (s *Store) run(k *set, from *mesh.RemoteKeys) {
	defer s.tasks.Done()
	keys, err := s.get(from)
	s.mu.Lock()
	defer s.mu.Unlock()
	close(k.fetching)
	k.fetching = nil
	if err != nil {
		s.failed.Add(1)
		k.retry = s.now().Add(max(min(from.Pause, from.CacheFor), shortestPause)) // a renewal that fails early must not prevent the one in time
		if s.log != nil && s.ctx.Err() == nil {
			s.log.Warn("cannot fetch the keys of tokens", "cluster", from.Service.Cluster, "uri", from.Service.URI, "err", err)
		}
		return
	}
	s.fetched.Add(1)
	k.last.Store(&result{keys, s.now()})
}

// errContent is that of an answer that another attempt would not change.
var errContent = errors.New("the answer is not usable")

// get fetches keys. The timeout bounds all attempts together, as in Envoy, whose attempts have the greatest interval as limit.
func (s *Store) get(from *mesh.RemoteKeys) (keys *jwt.KeySet, err error) {
	timeout := from.Service.Timeout
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	limit := from.MaxBackOff
	if from.Retries == 0 {
		limit = timeout
	}
	interval := from.BackOff
	for tries := min(from.Retries, maxRetries); ; tries-- {
		keys, err = s.attempt(ctx, from, limit)
		if err == nil || tries == 0 || errors.Is(err, errContent) {
			return keys, err
		}
		select {
		case <-time.After(rand.N(max(interval, 1))):
		case <-ctx.Done():
			return nil, err
		}
		interval = min(2*interval, from.MaxBackOff)
	}
}

func (s *Store) attempt(ctx context.Context, from *mesh.RemoteKeys, limit time.Duration) (*jwt.KeySet, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	answer, err := s.getter.Get(ctx, from.Service.Cluster, from.Service.URI, maxBytes)
	switch {
	case err != nil:
		return nil, err
	case answer.Status >= http.StatusInternalServerError:
		return nil, fmt.Errorf("the server answered %d", answer.Status)
	case answer.Status != http.StatusOK:
		return nil, fmt.Errorf("%w: status %d", errContent, answer.Status)
	case !json.Valid(answer.Body):
		return nil, fmt.Errorf("%w: not JSON", errContent)
	}
	keys := jwt.ParseKeys(answer.Body)
	switch n := keys.Len(); {
	case n == 0:
		return nil, fmt.Errorf("%w: no key can be used", errContent)
	case n > maxKeys:
		return nil, fmt.Errorf("%w: %d keys, at most %d", errContent, n, maxKeys)
	}
	return keys, nil
}
