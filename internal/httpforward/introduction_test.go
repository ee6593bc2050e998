package httpforward

import (
	"net/http"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/peers"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// named returns the exchange of a workload with a name, in the namespace shop.
func named(name string) *peers.Exchange {
	entry := func(key, value string) []byte {
		return wire.AppendBytes(wire.AppendString(nil, 1, key), 2, wire.AppendString(nil, 3, value))
	}
	metadata := wire.AppendBytes(nil, 1, entry("NAMESPACE", "shop"))
	return peers.New("sidecar~192.0.2.1~"+name+".shop~shop.svc.cluster.local", wire.AppendBytes(metadata, 1, entry("WORKLOAD_NAME", name)))
}

var ofReviews, ofRatings = named("reviews"), named("ratings")

// A proxy introduces itself in requests, and answers clients that have done so. Neither application sees any of it.
func TestProxiesDescribeThemselvesToEachOther(t *testing.T) {
	both := map[string]string{peerMetadataField: ofRatings.Metadata, peerMetadataIDField: ofRatings.ID}
	for name, c := range map[string]struct {
		peers          PeerFields
		sends, answers map[string]string // by the peer: in a request, in a response
		receives       [2]string         // the server, and the client: metadata that is not the peer's own
		recorded       string            // workload of the other side
	}{
		"client":                   {PeerFields{Exchange: ofReviews, Introduces: true}, nil, both, [2]string{"reviews", ""}, "ratings"},
		"client of no proxy":       {PeerFields{Exchange: ofReviews, Introduces: true}, nil, nil, [2]string{"reviews", ""}, ""},
		"client that forges":       {PeerFields{Exchange: ofReviews, Introduces: true}, both, nil, [2]string{"reviews", ""}, ""},
		"server":                   {PeerFields{Exchange: ofReviews}, both, nil, [2]string{"", "reviews"}, "ratings"},
		"server of no proxy":       {PeerFields{Exchange: ofReviews}, nil, both, [2]string{"", ""}, ""},
		"server, malformed":        {PeerFields{Exchange: ofReviews}, map[string]string{peerMetadataField: "%"}, nil, [2]string{"", "reviews"}, ""},
		"server, metadata only":    {PeerFields{Exchange: ofReviews}, map[string]string{peerMetadataField: ofRatings.Metadata}, nil, [2]string{"", "reviews"}, "ratings"},
		"server, ID only":          {PeerFields{Exchange: ofReviews}, map[string]string{peerMetadataIDField: ofRatings.ID}, nil, [2]string{"", ""}, ""},
		"without an exchange":      {PeerFields{}, both, both, [2]string{"", ""}, ""},
		"other fields are treated": {PeerFields{ClientCert: RemoveClientCert, Exchange: ofReviews}, both, nil, [2]string{"", "reviews"}, "ratings"},
	} {
		for _, two := range []bool{false, true} {
			received := make(chan http.Header, 1)
			server := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
				received <- r.Header
				for field, value := range c.answers {
					w.Header().Set(field, value)
				}
			})
			r := newRig(t, server, two)
			r.set(func() { r.peers = &c.peers })
			client := http2Client(t)
			if !two {
				client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: nettest.Patience}
			}
			request, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+r.address, nil)
			for field, value := range c.sends {
				request.Header.Set(field, value)
			}
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			for i, header := range []http.Header{<-received, response.Header} {
				want := map[string]string{"": "", "reviews": ofReviews.Metadata}[c.receives[i]]
				if got := header.Values(peerMetadataField); len(got) > 1 || header.Get(peerMetadataField) != want {
					t.Errorf("%s, HTTP/2 %v: side %d receives metadata %q, want %q", name, two, i, got, want)
				}
				wantID := ""
				if want != "" || i == 1 && c.peers.Exchange != nil && !c.peers.Introduces && c.sends[peerMetadataIDField] != "" {
					wantID = ofReviews.ID
				}
				if c.sends[peerMetadataIDField] == "" && i == 1 {
					wantID = ""
				}
				if got := header.Values(peerMetadataIDField); len(got) > 1 || header.Get(peerMetadataIDField) != wantID {
					t.Errorf("%s, HTTP/2 %v: side %d receives the ID %q, want %q", name, two, i, got, wantID)
				}
			}
			got := ""
			if w := r.records.await(t, 0).workload; w != nil {
				got = w.Name
			}
			if got != c.recorded {
				t.Errorf("%s, HTTP/2 %v: the record has the workload %q, want %q", name, two, got, c.recorded)
			}
		}
	}
}

// A description of another namespace than that of the verified identity is a lie or a mistake.
func TestADescriptionMustAgreeWithTheIdentity(t *testing.T) {
	for identity, want := range map[string]bool{
		"spiffe://cluster.local/ns/shop/sa/ratings":  true,
		"spiffe://cluster.local/ns/other/sa/ratings": false,
		"spiffe://cluster.local/ratings":             true, // it has no namespace
		"":                                           true,
	} {
		if got := (&flow.Security{Peer: identity}).Agrees(peers.Find(ofReviews, ofRatings.Metadata)); got != want {
			t.Errorf("%q: %v", identity, got)
		}
		c := &Connection{Peers: &PeerFields{Exchange: ofReviews}}
		record := flow.Record{Security: &flow.Security{Peer: identity}}
		if describe(c, &record, ofRatings.Metadata); (record.Workload.Get() != nil) != want {
			t.Errorf("%q: the record has %+v", identity, record.Workload.Get())
		}
	}
}
