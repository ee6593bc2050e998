package httpforward

import (
	"bufio"
	"net/http"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// change applies settings that differ from the current ones.
func (r *rig) change(t *testing.T, change func(*Settings)) {
	t.Helper()
	settings := r.engine.Settings()
	change(&settings)
	if err := r.engine.Apply(settings); err != nil {
		t.Fatal(err)
	}
}

func TestSettingsApplyToTheNextRequestOfAnHTTP1Connection(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	client := r.dial(t)
	send(t, client, getHome)
	server := o.accept()
	expect(t, server, getHome)
	r.change(t, func(s *Settings) {
		s.Fields = Fields{ForwardedFor: ForwardedForAppend, ServiceTime: true}
		s.MaxHeadBytes = 100
	})
	send(t, server, ok("1"))
	expect(t, client, ok("1")) // without a service time: the request began under the old settings
	send(t, client, getHome)
	expect(t, server, strings.TrimSuffix(getHome, "\r\n")+"x-forwarded-for: 127.0.0.1\r\n\r\n")
	r.change(t, func(s *Settings) { s.Fields = Fields{} })
	send(t, server, ok("2"))
	reader := bufio.NewReader(client)
	if got := head(t, reader); !strings.Contains(got, "\r\nx-envoy-upstream-service-time: ") {
		t.Errorf("the client received %q, want a service time: the request began under those settings", got)
	}
	expect(t, reader, "2")
	send(t, client, "GET /"+strings.Repeat("x", 200)+" HTTP/1.1\r\nHost: a\r\n\r\n")
	expect(t, reader, "HTTP/1.1 431 ")
}

func TestSettingsApplyToTheNextRequestOrConnectionOfHTTP2(t *testing.T) {
	seen := make(chan string, 1)
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { seen <- r.Header.Get("X-Forwarded-For") })
	r := newRig(t, origin, true, plain)
	client := http2Client(t)
	get := func(client *http.Client, field string) (status int, forwardedFor string) {
		t.Helper()
		request, err := http.NewRequest("GET", "http://"+r.address, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("A", field)
		response, err := client.Do(request)
		if err != nil {
			return 0, "" // the client itself holds to the limit that was announced
		}
		response.Body.Close()
		if response.StatusCode == http.StatusOK {
			forwardedFor = <-seen
		}
		return response.StatusCode, forwardedFor
	}
	long := strings.Repeat("x", 10<<10)
	if status, got := get(client, ""); status != 200 || got != "" {
		t.Errorf("at first: %d, x-forwarded-for %q", status, got)
	}
	first := r.last.Load()
	r.change(t, func(s *Settings) {
		s.Fields.ForwardedFor = ForwardedForAppend
		s.MaxHeadBytes = 1 << 10
	})
	if status, got := get(client, long); status != 200 || got != "127.0.0.1" {
		t.Errorf("on the open connection: %d, x-forwarded-for %q, want the old limit and the new field", status, got)
	}
	if r.last.Load() != first {
		t.Error("the request did not go by the open connection")
	}
	if status, _ := get(http2Client(t), long); status == 200 {
		t.Error("a new connection still has the old limit")
	}
}

func TestInvalidSettingsChangeNothing(t *testing.T) {
	r := newRig(t, newOrigin(t).address, false)
	before := r.engine.Settings()
	for _, change := range []func(*Settings){
		func(s *Settings) { s.MaxHeadBytes = 0 },
		func(s *Settings) { s.MaxHeadFields = -1 },
	} {
		settings := before
		change(&settings)
		settings.IdleTimeout++
		if r.engine.Apply(settings) == nil {
			t.Errorf("%+v was accepted", settings)
		}
		if got := r.engine.Settings(); got.IdleTimeout != before.IdleTimeout {
			t.Errorf("the settings are %+v, want those before", got)
		}
	}
}

// Bytes after a response are not a response to the next request: the connection is out of step.
func TestAnUpstreamConnectionWithBytesAfterItsResponseIsNotUsedAgain(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	client := r.dial(t)
	send(t, client, getHome)
	server := o.accept()
	expect(t, server, getHome)
	send(t, server, ok("1")+ok("smuggled")) // in one segment
	expect(t, client, ok("1"))
	send(t, client, getHome)
	next := o.accept()
	expect(t, next, getHome)
	send(t, next, ok("2"))
	expect(t, client, ok("2"))
}

func TestBytesThatWaitAreNotDelivered(t *testing.T) {
	m := message{in: tcp.TakeBuffer(), head: []byte("head")}
	defer func() { m.in.Release() }()
	m.in.Append([]byte("hello"))
	m.retain = true
	m.start(m.in, http1.Framing{Kind: http1.Sized, Length: 5}, http1.Limits{})
	if n := m.delivered(); n != 0 {
		t.Errorf("%d bytes delivered while all of the message waits, want 0", n)
	}
	m.out.Reset() // dst accepts the head and 3 bytes
	m.out.Append([]byte("lo"))
	if n := m.delivered(); n != 3 {
		t.Errorf("%d bytes delivered while 2 of 5 wait, want 3", n)
	}
	m.out.Reset()
	if n := m.delivered(); n != 5 {
		t.Errorf("%d bytes delivered of a whole message, want 5", n)
	}
}
