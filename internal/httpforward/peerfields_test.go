package httpforward

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"

	"github.com/pillion-proxy/pillion/internal/mesh"

	"github.com/pillion-proxy/pillion/internal/route"

	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Each treatment, over both versions, of a request that has the field never, once, and twice.
func TestTheClientCertificateFieldIsTreatedAsConfigured(t *testing.T) {
	never, once, twice := []string(nil), []string{"Hash=1"}, []string{"Hash=1", `Hash=2;Subject="CN=a,O=b"`}
	for name, c := range map[string]struct {
		peers              *PeerFields
		never, once, twice string // as the server receives them; several fields are joined by "|"
	}{
		"no mesh": {nil, "", "Hash=1", `Hash=1|Hash=2;Subject="CN=a,O=b"`},
		"keep":    {&PeerFields{}, "", "Hash=1", `Hash=1|Hash=2;Subject="CN=a,O=b"`},
		"remove":  {&PeerFields{ClientCert: RemoveClientCert}, "", "", ""},
		"append":  {&PeerFields{ClientCert: AppendClientCert, Element: "Hash=own"}, "Hash=own", "Hash=1,Hash=own", `Hash=1,Hash=2;Subject="CN=a,O=b",Hash=own`},
		"replace": {&PeerFields{ClientCert: ReplaceClientCert, Element: "Hash=own"}, "Hash=own", "Hash=own", "Hash=own"},
	} {
		for _, two := range []bool{false, true} {
			got := seenFields(t, two, c.peers, clientCertField, never, once, twice)
			if got[0] != c.never || got[1] != c.once || got[2] != c.twice {
				t.Errorf("%s, HTTP/2 %v: the server receives %q", name, two, got)
			}
		}
	}
}

// seenFields sends a request with each list of values of a field, on one connection, and returns what the server receives.
func seenFields(t *testing.T, two bool, peers *PeerFields, field string, requests ...[]string) (seen []string) {
	t.Helper()
	server := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("seen", strings.Join(r.Header.Values(field), "|"))
	})
	r := newRig(t, server, two)
	r.set(func() { r.peers = peers })
	client := http2Client(t)
	if !two {
		client = &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}, Timeout: nettest.Patience}
		defer client.CloseIdleConnections()
	}
	for _, values := range requests {
		request, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+r.address, nil)
		request.Header[http.CanonicalHeaderKey(field)] = values
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		seen = append(seen, response.Header.Get("seen"))
	}
	return seen
}

// The field in other letters, named by Connection, or in trailers of HTTP/1 does not escape the treatment.
func TestTheClientCertificateFieldCannotBeSmuggled(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	r.set(func() { r.peers = &PeerFields{ClientCert: AppendClientCert, Element: "Hash=own"} })
	client := r.dial(t)
	send(t, client, "GET / HTTP/1.1\r\nHost: a\r\nX-FORWARDED-Client-cert:\r\nConnection: x-forwarded-client-cert\r\n\r\n")
	server := o.accept()
	expect(t, server, "GET / HTTP/1.1\r\nHost: a\r\nx-forwarded-client-cert: Hash=own\r\n\r\n")
	send(t, server, ok("hello"))
	expect(t, client, ok("hello"))
	for _, named := range []string{"", "Connection: a, b\r\n"} {
		client := r.dial(t)
		send(t, client, "POST / HTTP/1.1\r\nHost: a\r\n"+named+"Transfer-Encoding: chunked\r\n\r\n0\r\nx-forwarded-client-cert: Hash=forged\r\n\r\n")
		if got := head(t, bufio.NewReader(client)); !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("a trailer with the field is answered %q, want 400", got)
		}
	}
}

// Applications may read trailers like a head.
func TestTrailersOfHTTP2HaveNoClientCertificateField(t *testing.T) {
	seen := make(chan http.Header, 1)
	r := newRig(t, serveHTTP2(t, func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		seen <- r.Trailer
	}), true)
	r.set(func() { r.peers = &PeerFields{ClientCert: AppendClientCert, Element: "Hash=own"} })
	request, _ := http.NewRequestWithContext(t.Context(), "POST", "http://"+r.address, io.MultiReader(strings.NewReader("body")))
	request.Trailer = http.Header{http.CanonicalHeaderKey(clientCertField): {"Hash=forged"}, "Other": {"kept"}}
	response, err := http2Client(t).Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if got := <-seen; got.Get(clientCertField) != "" || got.Get("Other") != "kept" {
		t.Errorf("the server receives the trailers %v", got)
	}
}

// The fields in which proxies describe themselves pass neither way.
func TestPeerMetadataIsRemoved(t *testing.T) {
	for _, two := range []bool{false, true} {
		for _, peers := range []*PeerFields{nil, {}, {ClientCert: RemoveClientCert}} {
			server := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
				for _, field := range []string{peerMetadataField, peerMetadataIDField} {
					if got := r.Header.Get(field); (got != "") == (peers != nil) {
						t.Errorf("HTTP/2 %v, %+v: the server receives %s: %q", two, peers, field, got)
					}
					w.Header().Set(field, "of the server")
				}
				w.WriteHeader(http.StatusEarlyHints)
			})
			r := newRig(t, server, two)
			r.set(func() { r.peers = peers })
			client := http2Client(t)
			if !two {
				client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: nettest.Patience}
			}
			request, _ := http.NewRequestWithContext(withHints(t, peers, two), "GET", "http://"+r.address, nil)
			request.Header.Set(peerMetadataField, "of the client")
			request.Header.Set(peerMetadataIDField, "of the client")
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			checkMetadata(t, "the response", response.Header, peers, two)
		}
	}
}

// Nor do they pass in the trailers of HTTP/1.
func TestPeerMetadataInTrailersIsMalformed(t *testing.T) {
	o := newOrigin(t)
	for _, field := range []string{peerMetadataField, "X-Envoy-Peer-Metadata-Id"} {
		for _, named := range []string{"", "Connection: a, b\r\n"} {
			message := named + "Transfer-Encoding: chunked\r\n\r\n0\r\n" + field + ": forged\r\n\r\n"
			for _, peers := range []*PeerFields{{}, {ClientCert: RemoveClientCert}} {
				r := newRig(t, o.address, false, plain)
				r.set(func() { r.peers = peers })
				client := r.dial(t)
				send(t, client, "POST / HTTP/1.1\r\nHost: a\r\n"+message)
				if got := head(t, bufio.NewReader(client)); !strings.HasPrefix(got, "HTTP/1.1 400 ") {
					t.Errorf("%+v: a request with the trailer %s is answered %q, want 400", peers, field, got)
				}
				r.records.await(t, 0)
				client = r.dial(t)
				send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
				server := o.accept()
				expect(t, server, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
				send(t, server, "HTTP/1.1 200 OK\r\n"+message)
				if got := head(t, bufio.NewReader(client)); !strings.HasPrefix(got, "HTTP/1.1 502 ") {
					t.Errorf("%+v: for a response with the trailer %s the client receives %q, want 502", peers, field, got)
				}
				if got := r.records.await(t, 1).reason; got != flow.BadResponse {
					t.Errorf("%+v: the response ends as %v", peers, got)
				}
			}
		}
	}
	r := newRig(t, o.address, false, plain) // without a mesh
	client := r.dial(t)
	request := "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + peerMetadataField + ": kept\r\n\r\n"
	send(t, client, request)
	expect(t, o.accept(), request)
}

// withHints checks interim responses.
func withHints(t *testing.T, peers *PeerFields, two bool) context.Context {
	return httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(_ int, header textproto.MIMEHeader) error {
			checkMetadata(t, "an interim response", http.Header(header), peers, two)
			return nil
		},
	})
}

func checkMetadata(t *testing.T, what string, header http.Header, peers *PeerFields, two bool) {
	t.Helper()
	for _, field := range []string{peerMetadataField, peerMetadataIDField} {
		if got := header.Get(field); (got != "") == (peers != nil) {
			t.Errorf("HTTP/2 %v, %+v: %s has %s: %q", two, peers, what, field, got)
		}
	}
}

func TestTheServerOfResponsesIsNamed(t *testing.T) {
	edits := planOf(t, mesh.Forward{}, mesh.Edits{Response: mesh.HeaderEdits{Add: []mesh.HeaderEdit{add("x-edited", "yes", mesh.AppendOrAdd)}}})
	for _, test := range []struct {
		peers         PeerFields
		theirs, wants string
	}{
		{PeerFields{}, "theirs", "theirs"},
		{PeerFields{}, "", ""},
		{PeerFields{Server: "envoy"}, "theirs", "envoy"},
		{PeerFields{Server: "envoy"}, "", "envoy"},
		{PeerFields{Server: "envoy", IfAbsent: true}, "theirs", "theirs"},
		{PeerFields{Server: "envoy", IfAbsent: true}, "", "envoy"},
	} {
		for _, plan := range []*route.Plan{nil, edits} {
			prepare := func(r *rig) { withPlan(plan)(r); r.peers = &test.peers }
			theirs, wants, edited, edited2 := "", "", "", ""
			fields, fields2 := "", ""
			if test.theirs != "" {
				theirs, fields = "Server: "+test.theirs+"$", " server="+test.theirs
			}
			switch test.wants {
			case "":
			case test.theirs:
				wants, fields2 = theirs, fields
			default:
				wants, fields2 = "server: "+test.wants+"$", " server="+test.wants
			}
			if plan != nil {
				edited, edited2 = "x-edited: yes$", " x-edited=yes"
			}
			got := "X-A: 1$Content-Length: 0$" + wants + edited
			if test.wants == test.theirs {
				got = "X-A: 1$" + wants + "Content-Length: 0$" + edited
			}
			conversation{"", "> GET / HTTP/1.1$Host: a$$\n>> GET / HTTP/1.1$Host: a$$\n< HTTP/1.1 200 OK$X-A: 1$" + theirs +
				"Content-Length: 0$$\n<< HTTP/1.1 200 OK$" + got + "$", []recorded{answered(200, 0)}}.playOn(t, prepare)
			_, client, server := meetPlanned(t, prepare)
			client.sends("GET 1")
			server.reads("GET 1")
			server.sends("HEADERS 1 end :status=200" + fields)
			client.reads("HEADERS 1 end :status=200" + fields2 + edited2)
		}
	}
}

// Replies of our own have the same name.
func TestTheServerOfRepliesIsNamed(t *testing.T) {
	for _, reply := range []*route.Reply{nil, {Status: 301, Reason: flow.Completed}} {
		prepare := func(r *rig) {
			r.peers = &PeerFields{Server: "envoy"}
			r.router = &planned{decide: func(_ *Request, d *Decision) { d.Target, d.Reply = upstream.Target{}, reply }}
		}
		r := newRig(t, newOrigin(t).address, false, plain)
		r.set(func() { prepare(r) })
		client := r.dial(t)
		send(t, client, getHome)
		if got := head(t, bufio.NewReader(client)); !strings.Contains(got, "\r\nserver: envoy\r\n") {
			t.Errorf("read %q", got)
		}
		_, two, _ := meetPlanned(t, prepare)
		two.sends("GET 1")
		if got := two.next(); !strings.Contains(got, " server=envoy ") {
			t.Errorf("read %q", got)
		}
	}
}
