package http1

import (
	"strings"
	"testing"
)

func TestAMessageSaysWhatItWantsOfTheConnection(t *testing.T) {
	for _, c := range []struct {
		fields  string
		want    Options
		upgrade string
	}{
		{"", Options{}, ""},
		{"X: close\r\n", Options{}, ""},
		{"Connection: close\r\n", Options{Close: true}, ""},
		{"connection: CLOSE\r\n", Options{Close: true}, ""},
		{"Connection: Keep-Alive\r\n", Options{KeepAlive: true}, ""},
		{"Connection: keep-alive,close\r\n", Options{Close: true, KeepAlive: true}, ""},
		{"Connection: ,, x ,\tclose \r\n", Options{Close: true, Nominates: true}, ""},
		{"Connection: x\r\nConnection: close\r\n", Options{Close: true, Nominates: true}, ""},
		{"Connection: closed, xclose, close x, close;q=1, \x01close\r\n", Options{Nominates: true}, ""},
		{"Proxy-Connection: close\r\n", Options{}, ""},
		{"Connection: upgrade\r\nUpgrade: websocket\r\n", Options{Upgrade: true}, "websocket"},
		{"Upgrade: websocket\r\nConnection: close, Upgrade\r\n", Options{Close: true, Upgrade: true}, "websocket"},
		{"Upgrade: h2c\r\nUpgrade: websocket\r\nConnection: upgrade\r\n", Options{Upgrade: true}, "h2c"},
		{"Upgrade: websocket\r\n", Options{}, "websocket"},
		{"Connection: upgrade\r\n", Options{}, ""},
		{"Connection: upgrade\r\nUpgrade:\r\n", Options{}, ""},
		{"TE: trailers\r\n", Options{Trailers: true}, ""},
		{"TE: deflate;q=0.5 , Trailers\r\nConnection: TE\r\n", Options{Trailers: true}, ""},
		{"TE: deflate\r\n", Options{}, ""},
	} {
		h, b := parseRequest(t, "GET / HTTP/1.1\r\nHost: a\r\n"+c.fields+"\r\n")
		for range 2 { // the second time, the fields are dropped already
			got := h.DropHopByHop(b)
			upgrade := string(got.UpgradeValue.In(b))
			got.UpgradeValue = Span{}
			if got != c.want || upgrade != c.upgrade {
				t.Errorf("%q: %+v and %q, want %+v and %q", c.fields, got, upgrade, c.want, c.upgrade)
			}
		}
	}
}

func TestADroppedUpgradeCanBeKept(t *testing.T) {
	h, b := parseRequest(t, "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\n"+
		"Upgrade: a\r\nX: y\r\nUPGRADE:  b\r\n\r\n")
	h.DropHopByHop(b)
	for i := range h.Fields {
		if h.Fields[i].Known == Upgrade {
			h.Fields[i].Dropped = false
		}
	}
	const want = "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: a\r\nX: y\r\nUPGRADE:  b\r\n"
	if got := string(h.AppendLines([]byte("> "), b)); got != "> "+want {
		t.Errorf("%q, want %q", got, want)
	}
}

// Only a limited number of names is looked up, but options after them are still honoured.
func TestALongConnectionFieldIsNoWorkWithoutEnd(t *testing.T) {
	names := strings.Repeat("Other,,", maxNamed-1) + "X-Early,"
	h, b := parseRequest(t, "GET / HTTP/1.1\r\nHost: a\r\nConnection: "+names+"X-Late\r\n"+
		"Connection: close\r\nX-Early: 1\r\nX-Late: 1\r\n\r\n")
	if o := h.DropHopByHop(b); !o.Close {
		t.Error("close was not recognised")
	}
	if lines := string(h.AppendLines(nil, b)); lines != "GET / HTTP/1.1\r\nHost: a\r\nX-Late: 1\r\n" {
		t.Errorf("%q", lines)
	}
}

// The work on the trailers does not grow with the size of a Connection field: beyond some names, every field is one that
// it may name.
func TestALongConnectionForbidsEveryTrailer(t *testing.T) {
	for _, c := range []struct {
		names string
		every bool
	}{
		{strings.Repeat("a, ", maxNamed-1) + "b", false},
		{strings.Repeat("a, ", maxNamed) + "b", true},
		{strings.Repeat("a", maxNames-2) + ", b", false},
		{strings.Repeat("a", maxNames) + ", b", true},
	} {
		b := []byte("HTTP/1.1 200 OK\r\nConnection: " + c.names + "\r\nTransfer-Encoding: chunked\r\n\r\n")
		var h Head
		if _, err := h.ParseResponse(b, Limits{Head: 1 << 20, Fields: 10}); err != nil {
			t.Fatal(err)
		}
		names := h.Nominated(b)
		if len(names) > maxNames+2 {
			t.Errorf("%.20q…: %d bytes are kept", c.names, len(names))
		}
		for field, want := range map[string]bool{"b": true, "other": c.every} {
			var x Body
			x.Start(Framing{Kind: Chunked}, Limits{Head: 1 << 10, Fields: 10})
			x.Forbid(names)
			if _, err := x.Scan([]byte("0\r\n" + field + ": 1\r\n\r\n")); (err == ErrForbiddenTrailer) != want {
				t.Errorf("%.20q…: trailer %s: error %v", c.names, field, err)
			}
		}
	}
}
