package httpforward

import (
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/upstream"
)

// The fields of a call are those of its own cluster, also if it waits for its connection while others are decided about: an
// external service must not receive the metadata of the workload.
func TestTheCallsOfAHubHaveTheFieldsOfTheirClusters(t *testing.T) {
	const get = ":method=GET :scheme=http :authority=a :path="
	for path, other := range map[string]string{"/mesh": "/external", "/external": "/mesh"} {
		t.Run(path[1:], func(t *testing.T) {
			origins := map[string]*origin{path: newOrigin(t), other: newOrigin(t)}
			fields := map[string]*PeerFields{"/mesh": {Exchange: ofReviews, Introduces: true}, "/external": {}}
			r := newHub(t, origins[path].address, &planned{decide: func(r *Request, d *Decision) {
				d.Target, d.Peers = upstream.Target{Address: origins[string(r.Path)].address}, fields[string(r.Path)]
			}}, plain)
			client := greetHub(t, r, "")
			client.sends("HEADERS 1 end " + get + path)
			server := acceptHub(t, origins[path], "3=0") // from now on, it takes no requests
			server.next()
			server.reads("SETTINGS ack")
			server.sends("HEADERS 1 end :status=200")
			client.reads("HEADERS 1 end :status=200")

			client.sends("HEADERS 3 end " + get + path)
			client.sends("HEADERS 5 end " + get + other)
			next := acceptHub(t, origins[other], "")
			next.next()
			server.sends("SETTINGS 3=1")
			server.reads("SETTINGS ack")
			inside := path == "/mesh"
			if got := server.next(); !strings.HasPrefix(got, "HEADERS 3 end "+get+path) || strings.Contains(got, peerMetadataField) != inside {
				t.Errorf("the server received %q", got)
			}
			next.sends("HEADERS 1 :status=200")
			client.reads("HEADERS 5 :status=200")
			server.sends("HEADERS 3 end :status=200 " + peerMetadataField + "=" + ofRatings.Metadata)
			client.reads("HEADERS 3 end :status=200")
			if got := r.records.await(t, 1).workload; (got != nil) != inside {
				t.Errorf("the record has the workload %+v", got)
			}
		})
	}
}
