package certview

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const (
	idOfServer = "spiffe://cluster.local/ns/shop/sa/server"
	idOfClient = "spiffe://cluster.local/ns/shop/sa/client"
)

// session is a Source.
type session struct {
	identity *identity.Identity
	status   Status
}

func (s session) Identity() *identity.Identity { return s.identity }
func (s session) Certificates() Status         { return s.status }

func ask(t *testing.T, source Source, method, target string, into any) (status int, body string) {
	t.Helper()
	recorder := httptest.NewRecorder()
	Handler(source).ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), method, target, nil))
	body = recorder.Body.String()
	if recorder.Code == http.StatusOK {
		if err := json.Unmarshal([]byte(body), into); err != nil {
			t.Fatalf("%s: %v in %s", target, err, body)
		}
	}
	return recorder.Code, body
}

func TestTheIdentityIsShownWithoutItsKey(t *testing.T) {
	a := securetest.New(t, "root of the mesh")
	own := a.Identity(t, idOfClient)
	renewal := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	var i Identity
	status, body := ask(t, session{own, Status{Source: "CA", Renewal: renewal, Renewals: 3, Failures: 1, LastError: errors.New("no CA")}}, "GET", "/identity", &i)
	if status != http.StatusOK || strings.Contains(body, "PRIVATE KEY") {
		t.Fatalf("%d %s", status, body)
	}
	if i.Source != "CA" || i.SPIFFE != idOfClient || !i.Renewal.Equal(renewal) || i.Renewals != 3 || i.Failures != 1 || i.Why != "no CA" {
		t.Errorf("%+v", i)
	}
	if len(i.Chain) != 1 || i.Chain[0].URIs != idOfClient || i.Chain[0].Key != "ECDSA P-256" || !strings.HasPrefix(i.Chain[0].PEM, "-----BEGIN CERTIFICATE-----\n") {
		t.Errorf("the chain is %+v", i.Chain)
	}
	if len(i.Roots) != 1 || i.Roots[0].SHA256 != describe(a.Certificate).SHA256 || !i.Roots[0].CA {
		t.Errorf("the roots are %+v", i.Roots)
	}
	i = Identity{}
	if ask(t, session{status: Status{Source: "files"}}, "GET", "/identity", &i); len(i.Chain) != 0 || i.Source != "files" {
		t.Errorf("before the first certificate: %+v", i)
	}
	if status, body := ask(t, nil, "GET", "/identity", nil); status != http.StatusNotFound || !strings.Contains(body, "--control-plane") {
		t.Errorf("without a control plane: %d %s", status, body)
	}
}

// listen accepts connections and performs handshakes until the test ends.
func listen(t *testing.T, config *tls.Config) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(nettest.Patience))
			secured := tls.Server(conn, config)
			if secured.Handshake() == nil {
				secured.Read(make([]byte, 1)) // until the client leaves
			}
			conn.Close()
		}
	}()
	t.Cleanup(func() { listener.Close(); <-ended })
	return listener.Addr().String()
}

// Each way in which a handshake ends, as an operator has to see it.
func TestWhatAClientOfTheMeshSees(t *testing.T) {
	a, other := securetest.New(t, "root of the mesh"), securetest.New(t, "another root")
	own := a.Identity(t, idOfClient)
	server := func(change func(*tls.Config)) *tls.Config {
		c := &tls.Config{Certificates: []tls.Certificate{*a.Leaf(t, idOfServer, nil)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.Roots.Pool, NextProtos: []string{"http/1.1"}}
		if change != nil {
			change(c)
		}
		return c
	}
	expired := a.Leaf(t, idOfServer, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = c.NotBefore.Add(-2*time.Hour), c.NotBefore.Add(-time.Hour)
	})
	for name, c := range map[string]struct {
		server  *tls.Config
		options func(*Options)
		ok      bool
		seen    func(*Handshake) bool
	}{
		"both accept": {server(nil), nil, true, func(h *Handshake) bool {
			return h.Verified && h.Requested && h.Presented == idOfClient && h.SPIFFE == idOfServer && h.Protocol == "http/1.1" && h.Version == "TLSv1.3" &&
				slices.Equal(h.AcceptableCAs, []string{"CN=root of the mesh"}) && h.ServerName == "web.shop" && len(h.Chain) == 1
		}},
		"the expected name": {server(nil), func(o *Options) { o.Expect = idOfServer }, true, func(h *Handshake) bool { return h.Verified }},
		"another name":      {server(nil), func(o *Options) { o.Expect = idOfClient }, false, func(h *Handshake) bool { return strings.Contains(h.Refused, idOfClient) && !h.Verified }},
		"an expired server": {server(func(c *tls.Config) { c.Certificates = []tls.Certificate{*expired} }), nil, false, func(h *Handshake) bool {
			return strings.Contains(h.Refused, "expired") && len(h.Chain) == 1
		}},
		"an unknown root": {server(func(c *tls.Config) { c.Certificates = []tls.Certificate{*other.Leaf(t, idOfServer, nil)} }), nil, false, func(h *Handshake) bool {
			return strings.Contains(h.Refused, "not issued under a trusted root")
		}},
		"a server that trusts another root": {server(func(c *tls.Config) { c.ClientCAs = other.Roots.Pool }), nil, false, func(h *Handshake) bool {
			return h.Verified && h.Rejected != "" && slices.Equal(h.AcceptableCAs, []string{"CN=another root"})
		}},
		"the same with TLS 1.2": {server(func(c *tls.Config) { c.ClientCAs, c.MaxVersion = other.Roots.Pool, tls.VersionTLS12 }), nil, false, func(h *Handshake) bool {
			return h.Rejected != ""
		}},
		"no certificate": {server(nil), func(o *Options) { o.Certificate = nil }, false, func(h *Handshake) bool {
			return h.Requested && h.Presented == "" && strings.Contains(h.Rejected, "certificate")
		}},
		"a server that does not ask": {server(func(c *tls.Config) { c.ClientAuth = tls.NoClientCert }), nil, true, func(h *Handshake) bool { return !h.Requested }},
		"other protocols": {server(nil), func(o *Options) { o.ALPN = []string{"istio"} }, false, func(h *Handshake) bool {
			return strings.Contains(h.Rejected, "application protocol")
		}},
		"no roots": {server(nil), func(o *Options) { o.Trust = secure.Trust{} }, true, func(h *Handshake) bool { return !h.Verified && h.Refused == "" }},
	} {
		o := Options{Address: listen(t, c.server), ServerName: "web.shop", ALPN: []string{"h2", "http/1.1"}, Timeout: MaxTimeout}
		o.OfIdentity(own)
		if c.options != nil {
			c.options(&o)
		}
		if h := Shake(t.Context(), o); h.OK() != c.ok || !c.seen(h) {
			h.Chain = nil
			t.Errorf("%s: %+v", name, h)
		}
	}
}

func TestWhatDoesNotSpeakTLSIsTold(t *testing.T) {
	plain, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	silent, err := net.Listen("tcp4", "127.0.0.1:0") // the kernel accepts
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			conn, err := plain.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 5))
			conn.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			conn.(*net.TCPConn).CloseWrite()
			conn.Read(make([]byte, 4096))
			conn.Close()
		}
	}()
	defer func() { plain.Close(); <-served }()
	for address, want := range map[string]string{
		plain.Addr().String(): "does not speak TLS", silent.Addr().String(): "in time", nettest.Refusing(t).String(): "refused",
	} {
		limit := MaxTimeout
		if want == "in time" {
			limit = 100 * time.Millisecond
		}
		if h := Shake(context.Background(), Options{Address: address, Timeout: limit}); h.OK() || !strings.Contains(h.Error, want) {
			t.Errorf("%+v, want %s", h, want)
		}
	}
}

func TestTheAgentPerformsTheHandshake(t *testing.T) {
	a := securetest.New(t, "root of the mesh")
	own := a.Identity(t, idOfClient)
	address := listen(t, &tls.Config{Certificates: []tls.Certificate{*a.Leaf(t, idOfServer, nil)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.Roots.Pool, NextProtos: []string{"istio"}})
	query := url.Values{"to": {address}, "sni": {"web"}, "alpn": {"h2,istio"}, "expect": {idOfServer}, "timeout": {"5s"}}
	var h Handshake
	if status, body := ask(t, session{identity: own}, "POST", "/identity/handshake?"+query.Encode(), &h); status != http.StatusOK || !h.OK() || !h.Verified ||
		h.Presented != idOfClient || h.ServerName != "web" || !slices.Equal(h.Offered, []string{"h2", "istio"}) || h.Protocol != "istio" {
		t.Errorf("%d %s", status, body)
	}
	for _, wrong := range []string{"", "to=web", "to=:80", "to=web:80&timeout=x", "to=web:80&timeout=0s", "to=web:80&timeout=1h"} {
		if status, body := ask(t, session{identity: own}, "POST", "/identity/handshake?"+wrong, nil); status != http.StatusBadRequest || !strings.Contains(body, "use ") {
			t.Errorf("%q: %d %s", wrong, status, body)
		}
	}
}
