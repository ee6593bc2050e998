package jwks

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// issuer answers each request with a key.
type issuer struct{ asked atomic.Int32 }

func (i *issuer) Get(context.Context, string, string, int) (*callout.Answer, error) {
	i.asked.Add(1)
	return &callout.Answer{Status: http.StatusOK, Body: []byte(`{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}`)}, nil
}

// Keys that expire before the request that waits for them sees them would let it wait for one fetch after the other.
func TestKeysThatAreNotKeptServeTheRequestThatWaitedForThem(t *testing.T) {
	from := &mesh.RemoteKeys{Service: mesh.HTTPService{Cluster: "c", URI: "http://issuer/keys"}}
	server := new(issuer)
	s := New(server, nil)
	defer s.Close()
	if keys, known := s.Keys(from); keys != nil || known {
		t.Fatalf("before the first fetch: %v, %v", keys, known)
	}
	if fetched := s.Fetched(from); fetched != nil {
		<-fetched
	}
	if keys, known := s.Keys(from); keys == nil || !known {
		t.Errorf("after the first fetch: %v, %v", keys, known)
	}
	if n := server.asked.Load(); n != 1 {
		t.Errorf("the issuer was asked %d times", n)
	}
}

// Requests whose keys are recent do not wait for each other, for other sources, or for the end of a fetch.
func TestRecentKeysNeedNoLock(t *testing.T) {
	from := &mesh.RemoteKeys{Service: mesh.HTTPService{Cluster: "c", URI: "http://issuer/keys"}, CacheFor: time.Hour}
	s := New(new(issuer), nil)
	defer s.Close()
	s.Keys(from)
	if fetched := s.Fetched(from); fetched != nil {
		<-fetched
	}
	s.mu.Lock()
	found := make(chan bool, 1)
	go func() {
		keys, known := s.Keys(from)
		found <- keys != nil && known
	}()
	select {
	case ok := <-found:
		if !ok {
			t.Error("there are no keys")
		}
	case <-time.After(nettest.Patience):
		t.Error("recent keys are behind the lock")
	}
	s.mu.Unlock()
	if n := testing.AllocsPerRun(100, func() { s.Keys(from) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// silent answers when it is released, or the fetch ends.
type silent chan struct{}

func (s silent) Get(ctx context.Context, _, _ string, _ int) (*callout.Answer, error) {
	select {
	case <-s:
		return &callout.Answer{Status: http.StatusOK, Body: []byte(`{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}`)}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Sets and their fetches are bounded also while all issuers hang. A source without room has no keys, until another set can be
// dropped.
func TestFetchesInProgressAreBounded(t *testing.T) {
	server := make(silent)
	s := New(server, nil)
	defer s.Close()
	from := func(i int) *mesh.RemoteKeys {
		return &mesh.RemoteKeys{
			Service: mesh.HTTPService{Cluster: "c", URI: fmt.Sprint("http://issuer/", i), Timeout: nettest.Patience}, CacheFor: time.Hour,
		}
	}
	for i := range maxSets {
		if keys, known := s.Keys(from(i)); keys != nil || known {
			t.Fatalf("set %d: %v, %v", i, keys, known)
		}
	}
	for i := range 10 {
		if keys, known := s.Keys(from(maxSets + i)); keys != nil || !known || s.Fetched(from(maxSets+i)) != nil {
			t.Fatalf("beyond the bound: %v, %v", keys, known)
		}
	}
	if n := len(*s.sets.Load()); n != maxSets {
		t.Errorf("there are %d sets", n)
	}
	if _, known := s.Keys(from(0)); known {
		t.Error("a set that is being fetched was dropped")
	}
	fetched := s.Fetched(from(0))
	close(server)
	<-fetched
	if _, known := s.Keys(from(maxSets)); known {
		t.Error("there is no room although a fetch has ended")
	}
}
