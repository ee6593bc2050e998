package httpforward

import (
	"bytes"
	"crypto/rand"
	"io"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
)

// Rates of the tests, and bodies that take some time at them.
const (
	testRate = 80_000
	pacedLen = 30_000
	pacedFor = (pacedLen - testRate/20) * time.Second / testRate // the first step passes at once
)

// limiting limits the rates of requests with the field "slow".
func limiting(rates Decision) *planned {
	return &planned{decide: func(r *Request, d *Decision) {
		for i := range r.Fields.Len() {
			if name, _ := r.Fields.At(i); string(bytes.ToLower(name)) == "slow" {
				d.RequestRate, d.ResponseRate = rates.RequestRate, rates.ResponseRate
			}
		}
	}}
}

// served returns an origin of either version, and a client.
func served(t *testing.T, http2 bool, handler http.HandlerFunc) (netip.AddrPort, *http.Client) {
	if http2 {
		return serveHTTP2(t, handler), http2Client(t)
	}
	client := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(client.CloseIdleConnections)
	return serveLayered(t, false, handler), client
}

func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Write(body)
}

// A limit holds for each direction, whatever the framing of the body is, and changes no byte.
func TestRatesAreLimited(t *testing.T) {
	for _, test := range []struct {
		name  string
		http2 bool
		rates Decision
		least time.Duration
	}{
		{"requests of HTTP/1", false, Decision{RequestRate: testRate}, pacedFor},
		{"responses of HTTP/1", false, Decision{ResponseRate: testRate}, pacedFor},
		{"both of HTTP/1", false, Decision{RequestRate: testRate, ResponseRate: testRate}, 2 * pacedFor},
		{"requests of HTTP/2", true, Decision{RequestRate: testRate}, pacedFor},
		{"responses of HTTP/2", true, Decision{ResponseRate: testRate}, pacedFor},
		{"both of HTTP/2", true, Decision{RequestRate: testRate, ResponseRate: testRate}, 2 * pacedFor},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			origin, client := served(t, test.http2, echo)
			r := newRig(t, origin, test.http2)
			r.set(func() { r.many, r.router = true, limiting(test.rates) })
			sent := make([]byte, pacedLen)
			rand.Read(sent)
			for n, body := range []io.Reader{bytes.NewReader(sent), io.MultiReader(bytes.NewReader(sent))} { // the second is chunked
				request, err := http.NewRequest("POST", "http://"+r.address+"/", body)
				if err != nil {
					t.Fatal(err)
				}
				request.Header.Set("slow", "yes")
				began := time.Now()
				response, err := client.Do(request)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(response.Body)
				response.Body.Close()
				if took := time.Since(began); took < test.least {
					t.Errorf("request %d took %v, want at least %v", n, took, test.least)
				}
				if err != nil || !bytes.Equal(got, sent) {
					t.Errorf("request %d: read %d bytes and %v, want those that were sent", n, len(got), err)
				}
				if record := r.records.await(t, n); record.reason != flow.Completed || record.received != pacedLen || record.sent != pacedLen {
					t.Errorf("request %d: the record is %+v", n, record)
				}
			}
		})
	}
}

// A reply in place of a response arrives at once, whatever the rate of responses is.
func TestRatesDoNotLimitReplies(t *testing.T) {
	for _, test := range []struct {
		name  string
		http2 bool
	}{{"HTTP/1", false}, {"HTTP/2", true}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			_, client := served(t, test.http2, echo)
			r := newRig(t, nettest.Refusing(t), test.http2)
			r.set(func() { r.many, r.router = true, limiting(Decision{RequestRate: 100, ResponseRate: 100}) })
			request, err := http.NewRequest("GET", "http://"+r.address+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("slow", "yes")
			client.Timeout = nettest.Patience
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			if got, err := io.ReadAll(response.Body); err != nil || len(got) < 20 || response.StatusCode != 503 {
				t.Errorf("read %s with %q, %v", response.Status, got, err)
			}
			if got := r.records.await(t, 0); got.reason != flow.UpstreamRefused || got.status != 503 {
				t.Errorf("the record is %+v", got)
			}
		})
	}
}

// A limited stream holds back no other stream of its connection.
func TestARateIsThatOfOneStream(t *testing.T) {
	t.Parallel()
	origin := serveHTTP2(t, func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 1<<20)) })
	r := newHub(t, origin, limiting(Decision{ResponseRate: 1000}))
	client := http2Client(t)
	slow, err := http.NewRequest("GET", "http://"+r.address+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	slow.Header.Set("slow", "yes")
	limited, err := client.Do(slow)
	if err != nil {
		t.Fatal(err)
	}
	defer limited.Body.Close()
	for range 3 { // would take a quarter of an hour each
		response, err := client.Get("http://" + r.address + "/")
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, response.Body)
		response.Body.Close()
		if err != nil || n != 1<<20 {
			t.Fatalf("read %d bytes and %v", n, err)
		}
	}
}

// A response that a rate holds back ends when the client leaves.
func TestAClientLeavesALimitedResponse(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		origin, client := served(t, http2, func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 1<<20)) })
		r := newRig(t, origin, http2)
		r.set(func() { r.many, r.router = true, limiting(Decision{ResponseRate: 1}) })
		request, err := http.NewRequest("GET", "http://"+r.address+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("slow", "yes")
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := response.Body.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if record := r.records.await(t, 0); record.reason != flow.DownstreamLeft {
			t.Errorf("HTTP/2 %v: the record is %+v", http2, record)
		}
	}
}

// Streams of a hub are reset as those of other connections.
func TestAHubResetsStreamsOnPurpose(t *testing.T) {
	origin := serveHTTP2(t, echo)
	r := newHub(t, origin, &planned{decide: func(_ *Request, d *Decision) { *d = Decision{Reply: replyResets} }})
	client := http2Client(t)
	for n := range 2 {
		if _, err := client.Get("http://" + r.address + "/"); err == nil {
			t.Fatal("the request was answered")
		}
		if record := r.records.await(t, n); record.reason != flow.FaultInjected || record.status != 0 {
			t.Errorf("the record is %+v", record)
		}
	}
}

var replyResets = &route.Reply{Reset: true, Reason: flow.FaultInjected}
