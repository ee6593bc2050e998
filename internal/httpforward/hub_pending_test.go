package httpforward

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// lined is a lease of a cluster where one call may wait.
type lined struct {
	Lease
	waiting *atomic.Int32
}

func (q lined) Wait() bool {
	if q.waiting.Add(1) > 1 {
		q.waiting.Add(-1)
		return false
	}
	return true
}

func (q lined) Go() { q.waiting.Add(-1) }

var _ balance.Queue = lined{}

// A call waits for a server that takes no streams: on one connection, within the limit of its route, and with as many others as
// its cluster permits.
func TestCallsWaitForAServerThatTakesNoStreams(t *testing.T) {
	o := newOrigin(t)
	var waiting atomic.Int32
	held := &leases{}
	short := planOf(t, mesh.Forward{Timeout: 50 * time.Millisecond}, mesh.Edits{})
	r := newHub(t, o.address, &planned{leases: held, decide: func(r *Request, d *Decision) {
		d.Target, d.Lease = upstream.Target{Address: o.address}, lined{d.Lease, &waiting}
		if string(r.Path) == "/short" {
			d.Plan = short
		}
	}}, plain)
	const get = ":method=GET :scheme=http :authority=a :path="
	client := greetHub(t, r, "")
	client.sends("HEADERS 1 end " + get + "/left")
	server := acceptHub(t, o, "3=0")
	server.next() // the request is sent before the server's settings arrive
	server.reads("SETTINGS ack")
	server.sends("RST 1 REFUSED_STREAM")
	nettest.Eventually(t, "the call waits", func() bool { return waiting.Load() == 1 })
	client.sends("RST 1 CANCEL")
	nettest.Eventually(t, "the call has left", func() bool { return waiting.Load() == 0 })
	client.sends("HEADERS 3 end " + get + "/short")
	if got := client.next(); !strings.HasPrefix(got, "HEADERS 3 :status=504") {
		t.Errorf("read %q", got)
	}
	client.next() // its body
	if n := waiting.Load(); n != 0 {
		t.Errorf("%d calls wait after the time limit", n)
	}
	client.sends("HEADERS 5 end " + get + "/waits")
	client.sends("HEADERS 7 end " + get + "/one-too-many")
	if got := client.next(); !strings.HasPrefix(got, "HEADERS 7 :status=503") || !strings.Contains(got, "x-envoy-overloaded=true") {
		t.Errorf("read %q", got)
	}
	client.next()
	if n := waiting.Load(); n != 1 {
		t.Errorf("%d calls wait, want 1", n)
	}
	server.sends("SETTINGS 3=1")
	server.reads("SETTINGS ack")
	server.reads("HEADERS 3 end " + get + "/waits")
	server.sends("HEADERS 3 end :status=200")
	client.reads("HEADERS 5 end :status=200")
	if n := waiting.Load(); n != 0 {
		t.Errorf("%d calls wait at the end", n)
	}
	for i, want := range []recorded{{reason: flow.DownstreamLeft, flags: "DC"}, {reason: flow.RequestTimeout, flags: "UT", status: 504}, {reason: flow.UpstreamOverflow, flags: "UO", status: 503}, {reason: flow.Completed, status: 200}} {
		if got := r.records.await(t, i); got.reason != want.reason || got.flags != want.flags || got.status != want.status {
			t.Errorf("record %d is %+v, want %+v", i, got, want)
		}
	}
	held.check(t, nil)
	o.listener.SetDeadline(time.Now().Add(50 * time.Millisecond)) // one that has passed would end Accept before it takes a connection
	if _, err := o.listener.Accept(); err == nil {
		t.Error("another connection was dialled, where the call would wait as well")
	}
}
