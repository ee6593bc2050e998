package httpforward

import (
	"bufio"
	"fmt"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// awaitReason waits for a record with a reason, whatever the others have.
func (r *records) awaitReason(t *testing.T, reason flow.Reason) {
	t.Helper()
	nettest.Eventually(t, "a record with the reason "+string(reason), func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for i := range r.closed {
			if r.closed[i].reason == reason {
				return true
			}
		}
		return false
	})
}

// A client that resets its requests before their responses is stopped (CVE-2023-44487), whichever version upstream speaks.
func TestAHubStopsRapidResets(t *testing.T) {
	for name, translate := range map[string]bool{"HTTP/2": false, "HTTP/1": true} {
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t)
			by := toOrigin(o)
			if translate {
				by = translating(o.address)
			}
			r := newHub(t, o.address, by, plain)
			client := greetHub(t, r, "")
			go func() {
				for id := 1; id < 2*(resetBurst+500); id += 2 {
					if client.write(strings.Fields(fmt.Sprintf("HEADERS %d end %s", id, getFields))) != nil ||
						client.write(strings.Fields(fmt.Sprintf("RST %d CANCEL", id))) != nil {
						return
					}
				}
			}()
			r.records.awaitReason(t, flow.Overload)
		})
	}
}

// A server of HTTP/1 that sends interim responses without end is stopped.
func TestAHubStopsInterimResponsesOfHTTP1(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, translating(o.address), plain, func(c *Config) { c.maxInterim = 3 })
	client := greetHub(t, r, "")
	client.sends("GET 1")
	server := o.accept()
	head(t, bufio.NewReader(server))
	send(t, server, strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 4))
	for range 3 {
		client.reads("HEADERS 1 :status=103")
	}
	if got := client.next(); !strings.HasPrefix(got, "HEADERS 1 :status=502") {
		t.Errorf("read %q", got)
	}
	if got := r.records.await(t, 0); got.reason != flow.BadResponse || got.flags != "UPE" {
		t.Errorf("the record is %+v", got)
	}
}

// A server that sends frames without effect in the place of a response to a request of HTTP/1 is stopped.
func TestFloodsByAServerOverHTTP2AreStopped(t *testing.T) {
	for name, frame := range map[string]string{"pings": "PING 12345678", "settings": "SETTINGS", "windows": "WINDOW 1 1"} {
		t.Run(name, func(t *testing.T) {
			o, r, client, answers := newOver(t)
			send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			server := acceptOver(t, o, "")
			server.reads("HEADERS 1 end :method=GET :scheme=http :path=/ :authority=a")
			go func() {
				for range 10 * idleBurst {
					if server.write(strings.Fields(frame)) != nil {
						return
					}
				}
			}()
			if got := head(t, answers); !strings.HasPrefix(got, "HTTP/1.1 502 ") {
				t.Errorf("read %q", got)
			}
			if got := r.records.await(t, 0); got.reason != flow.BadResponse {
				t.Errorf("the record is %+v", got)
			}
		})
	}
}
