package serve

import (
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// oneField is a header with one field.
type oneField struct{ name, value string }

func (oneField) Len() int { return 1 }

func (f oneField) At(int) (name, value []byte) { return []byte(f.name), []byte(f.value) }

// A request of HTTP/2 with two hosts is rejected before a policy judges one of them.
func TestTwoHostsAreRejected(t *testing.T) {
	h := &mesh.HTTPManager{Filters: []mesh.HTTPFilter{{Name: "rbac", RBAC: &mesh.RBAC{}}}}
	for _, c := range []struct {
		host     string
		rejected bool
	}{{"public", false}, {"private", true}} {
		r := &httpforward.Request{
			Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte("/"), Authority: []byte("public"), Fields: oneField{"host", c.host},
		}
		if _, reply, _ := new(gate).pass(&mesh.Snapshot{}, h, r); (reply != nil && reply.Status == 400) != c.rejected {
			t.Errorf("host %s: %+v", c.host, reply)
		}
	}
}
