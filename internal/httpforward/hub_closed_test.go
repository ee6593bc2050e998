package httpforward

import (
	"fmt"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Calls that wait for a place on a connection are not sent while all calls of a hub are closed.
func TestAHubThatEndsOpensNoWaitingStream(t *testing.T) {
	const waiting = 20
	o := newOrigin(t)
	r := newHub(t, o.address, toOrigin(o), plain)
	client := greetHub(t, r, "")
	for n := range maxLegs {
		client.sends(fmt.Sprintf("GET %d", 2*n+1))
		server := acceptHub(t, o, "3=1")
		server.reads("GET 1")
		server.reads("SETTINGS ack")
	}
	for n := range waiting {
		client.sends(fmt.Sprintf("GET %d", 2*(maxLegs+n)+1))
	}
	client.sends("WINDOW 0 0")
	nettest.Eventually(t, "all records", func() bool { return r.records.count() == maxLegs+waiting })
	sent := 0
	for i := range maxLegs + waiting {
		sent += int(r.records.await(t, i).attempts)
	}
	if sent != maxLegs {
		t.Errorf("%d requests were sent, want %d", sent, maxLegs)
	}
}

// A connection opens no stream with a number over the highest (RFC 9113 §5.1.1).
func TestALegOfAHubRunsOutOfStreamNumbers(t *testing.T) {
	const last = 1<<31 - 1
	for _, c := range []struct {
		next    uint32
		waiting int
		over    bool
	}{{1, 0, false}, {last, 0, false}, {last, 1, true}, {last - 2, 1, false}, {last + 2, 0, true}} {
		l := &leg{h: new(hub)}
		l.next = c.next
		if got := l.over(c.waiting); got != c.over {
			t.Errorf("the next stream is %d, behind %d that wait: over is %v", c.next, c.waiting, got)
		}
	}
}
