// Package jwks fetches the keys of issuers of tokens, and keeps them as long as the configuration says.
//
// Keys are fetched when a token needs them, or early. While they are renewed, the ones that were fetched last are used, for
// as long again as they are kept; then tokens are not accepted until there are new ones. So a server that is away for a
// while refuses no token, and one that is gone does not keep withdrawn keys alive.
package jwks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
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
	defaultTimeout = 5 * time.Second
	attempts       = 3
	attemptPause   = 100 * time.Millisecond // after the first attempt; it doubles
	failurePause   = time.Second            // after a fetch that failed, as in Envoy
)

// Store has the keys that were fetched. Make it with New, and Close it.
type Store struct {
	getter Getter
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	now    func() time.Time

	mu   sync.Mutex
	sets map[source]*set

	fetched, failed atomic.Uint64
}

// source is where keys are fetched from.
type source struct{ cluster, uri string }

// set is what is known of a source. Its fields are guarded by Store.mu.
type set struct {
	keys     *jwt.KeySet   // nil: there are none
	since    time.Time     // of keys
	retry    time.Time     // no fetch begins before
	fetching chan struct{} // closed when the fetch ends; nil: none is in progress
	used     time.Time
}

// New returns an empty Store. log may be nil.
func New(getter Getter, log *slog.Logger) *Store {
	s := &Store{getter: getter, log: log, now: time.Now, sets: map[source]*set{}}
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
	s.mu.Lock()
	defer s.mu.Unlock()
	k, now := s.set(from), s.now()
	if k == nil {
		return nil, true
	}
	age, life := now.Sub(k.since), max(from.CacheFor, shortestCache)
	if k.keys == nil || age >= life {
		s.fetch(k, from, now)
	}
	if k.keys != nil && age < 2*life {
		return k.keys, true
	}
	return nil, k.fetching == nil
}

// Early begins a fetch if the configuration asks for it before the first request.
func (s *Store) Early(from *mesh.RemoteKeys) {
	if from.Early {
		s.Keys(from)
	}
}

// Fetched returns a channel that is closed when the fetch in progress has ended; nil: there is none.
func (s *Store) Fetched(from *mesh.RemoteKeys) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.set(from); k != nil {
		return k.fetching
	}
	return nil
}

// set returns the set of a source; nil: there is no room for it. s.mu is held.
func (s *Store) set(from *mesh.RemoteKeys) *set {
	at := source{from.Service.Cluster, from.Service.URI}
	k := s.sets[at]
	if k == nil {
		if len(s.sets) >= maxSets && !s.forget() {
			return nil
		}
		k = &set{}
		s.sets[at] = k
	}
	k.used = s.now()
	return k
}

// forget drops the set that was not used for the longest time. It returns false if all are being fetched. s.mu is held.
func (s *Store) forget() bool {
	var oldest source
	var at time.Time
	for source, k := range s.sets {
		if k.fetching == nil && (at.IsZero() || k.used.Before(at)) {
			oldest, at = source, k.used
		}
	}
	delete(s.sets, oldest)
	return !at.IsZero()
}

// fetch begins a fetch, unless one is in progress or has just failed. s.mu is held.
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
		k.retry = s.now().Add(failurePause)
		if s.log != nil && s.ctx.Err() == nil {
			s.log.Warn("cannot fetch the keys of tokens", "cluster", from.Service.Cluster, "uri", from.Service.URI, "err", err)
		}
		return
	}
	s.fetched.Add(1)
	k.keys, k.since = keys, s.now()
}

// get fetches keys, in several attempts.
func (s *Store) get(from *mesh.RemoteKeys) (keys *jwt.KeySet, err error) {
	pause := attemptPause
	for i := range attempts {
		if i > 0 {
			select {
			case <-time.After(pause):
			case <-s.ctx.Done():
				return nil, s.ctx.Err()
			}
			pause *= 2
		}
		if keys, err = s.attempt(from); err == nil {
			return keys, nil
		}
	}
	return nil, err
}

func (s *Store) attempt(from *mesh.RemoteKeys) (*jwt.KeySet, error) {
	timeout := from.Service.Timeout
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	answer, err := s.getter.Get(ctx, from.Service.Cluster, from.Service.URI, maxBytes)
	switch {
	case err != nil:
		return nil, err
	case answer.Status != http.StatusOK:
		return nil, fmt.Errorf("the server answered %d", answer.Status)
	case !json.Valid(answer.Body):
		return nil, errors.New("the answer is not JSON")
	}
	keys := jwt.ParseKeys(answer.Body)
	if keys.Len() == 0 {
		return nil, errors.New("the answer has no keys that can be used")
	}
	return keys, nil
}
