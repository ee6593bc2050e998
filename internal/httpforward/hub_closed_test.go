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

