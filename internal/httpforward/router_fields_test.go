package httpforward

import (
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// seeing is a Router that writes down what it sees.
type seeing struct {
	to   upstream.Target
	mu   sync.Mutex
	seen []string
}

func (s *seeing) Route(r *Request) Decision {
	var b strings.Builder
	b.WriteString(string(r.Method) + " " + string(r.Scheme) + " " + string(r.Authority) + " " + string(r.Path))
	for i := range r.Fields.Len() {
		name, value := r.Fields.At(i)
		b.WriteString("|" + string(name) + "=" + string(value))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = append(s.seen, b.String())
	return Decision{Target: s.to}
}

func (s *seeing) last() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[len(s.seen)-1]
}

func TestARouterSeesTheFieldsOfAnHTTP1Request(t *testing.T) {
	for _, test := range []struct{ request, want string }{
		{"GET /a?b HTTP/1.1\r\nHost: h\r\nX-One: 1\r\nx-two:\r\nX-One: 2\r\n\r\n", "GET http h /a?b|Host=h|X-One=1|x-two=|X-One=2"},
		{"GET https://other:1/a?b HTTP/1.1\r\nHost: h\r\n\r\n", "GET https other:1 /a?b|Host=h"},
		{"GET http://other?b=/ HTTP/1.1\r\nHost: h\r\n\r\n", "GET http other /?b=/|Host=h"},
		{"GET http://other HTTP/1.1\r\nHost: h\r\n\r\n", "GET http other /|Host=h"},
		{"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", "OPTIONS http h *|Host=h"},
	} {
		o := newOrigin(t)
		r := newRig(t, o.address, false, plain)
		s := &seeing{to: upstream.Target{Address: o.address}}
		r.set(func() { r.router = s })
		client := r.dial(t)
		send(t, client, test.request)
		expect(t, o.accept(), test.request) // as it was received
		if got := s.last(); got != test.want {
			t.Errorf("%q is seen as %q, want %q", test.request, got, test.want)
		}
	}
}

func TestARouterSeesTheFieldsOfAnHTTP2Request(t *testing.T) {
	home := serveHTTP2(t, func(http.ResponseWriter, *http.Request) {})
	r := newRig(t, home, true, plain)
	s := &seeing{to: upstream.Target{Address: home}}
	r.set(func() { r.router = s })
	request, err := http.NewRequest("GET", "http://"+r.address+"/a?b", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Host = "h"
	request.Header["X-One"] = []string{"1", "2"}
	request.Header.Set("User-Agent", "")
	response, err := http2Client(t).Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if got, want := s.last(), "GET http h /a?b|x-one=1|x-one=2"; got != want {
		t.Errorf("the request is seen as %q, want %q", got, want)
	}
}

// Over HTTP/2 a request asks for another protocol by extended CONNECT (RFC 8441).
func TestARouterSeesTheProtocolThatAnHTTP2RequestAsksFor(t *testing.T) {
	for _, protocol := range []string{"", "connect-udp"} {
		s := &stream{}
		s.record.Connection, s.record.HTTP = &flow.Record{}, new(flow.Request)
		if got := string(new(heads).view(s, &http2.Request{Method: "CONNECT", Path: "/", Protocol: protocol}, nil).Upgrade); got != protocol {
			t.Errorf("%q is seen as %q", protocol, got)
		}
	}
}
