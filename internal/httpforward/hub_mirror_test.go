package httpforward

import (
	"net/http"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// mirrorsOf makes a hub whose requests are copied, and returns its client, and the headers of the copies.
func mirrorsOf(t *testing.T, held *leases) (*rig, *speaker, chan http.Header) {
	copied := make(chan http.Header, 1)
	mirror := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { copied <- r.Header })
	origin := serveHTTP2(t, func(http.ResponseWriter, *http.Request) {})
	r := newHub(t, origin, &planned{leases: held, decide: func(_ *Request, d *Decision) {
		d.Mirrors = []Mirror{{Target: upstream.Target{Address: mirror}, Policy: &mesh.Mirror{}, Lease: held.open()}}
	}}, plain)
	return r, greetHub(t, r, ""), copied
}

// A copy has one cookie field, and none that belongs to an upgrade.
func TestCopiesOfAHubAreValidHTTP1(t *testing.T) {
	_, client, copied := mirrorsOf(t, &leases{})
	client.sends("HEADERS 1 end " + getFields + " cookie=a=1 cookie=b=2 http2-settings=x")
	select {
	case got := <-copied:
		if c := got.Values("cookie"); len(c) != 1 || c[0] != "a=1; b=2" || got.Get("http2-settings") != "" {
			t.Errorf("copied %v", got)
		}
	case <-time.After(nettest.Patience):
		t.Error("no copy")
	}
}

// A path in absolute form would be a request for another host: it is not copied.
func TestAHubCopiesNoRequestForAnotherHost(t *testing.T) {
	held := &leases{}
	r, client, copied := mirrorsOf(t, held)
	client.sends("HEADERS 1 end :method=GET :scheme=http :path=http://b/ :authority=a")
	stats := &r.engine.config.Pool.Stats
	nettest.Eventually(t, "the copy to be dropped or sent", func() bool { return stats.CopiesDropped.Load()+stats.Copied.Load() == 1 })
	if n := stats.Copied.Load(); n != 0 {
		t.Errorf("%d copies of %v", n, <-copied)
	}
	if got := r.records.await(t, 0); got.reason != flow.Completed {
		t.Errorf("the record is %+v", got)
	}
}
