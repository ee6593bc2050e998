package jwks

import (
	"context"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/mesh"
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
