package httpforward

import (
	"bufio"
	"regexp"
	"strings"
	"testing"
)

// plain switches off what is added, so that bytes can be compared.
func plain(c *Config) { c.Fields = Fields{} }

func TestARequestAndItsResponseKeepTheirBytes(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	client := r.dial(t)
	request := "PUT /a?b=c%20d HTTP/1.1\r\nhOsT:  example.test \r\nX-b: 2\r\nx-A:\t1\r\nContent-Length: 4\r\n\r\nbody"
	response := "HTTP/1.1 299 Fine  Indeed\r\nServer: theirs\r\nsEt-Cookie: a\r\nSet-cookie: b\r\nContent-length: 6\r\n\r\nanswer"
	send(t, client, request)
	upstream := o.accept()
	expect(t, upstream, request)
	send(t, upstream, response)
	expect(t, client, response)
	for range 3 { // the connections stay
		send(t, client, request)
		expect(t, upstream, request)
		send(t, upstream, response)
		expect(t, client, response)
	}
	for i := range 4 {
		got := r.records.await(t, i)
		if got.reason != "completed" || got.status != 299 || got.method != "PUT" || got.path != "/a?b=c%20d" ||
			got.authority != "example.test" || got.received != 4 || got.sent != 6 || got.details != "via_upstream" {
			t.Errorf("record %d: %+v", i, got)
		}
	}
}

func TestFieldsAreAdded(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, false)
	client := r.dial(t)
	send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	upstream := o.accept()
	lines := strings.Split(head(t, bufio.NewReader(upstream)), "\r\n")
	if len(lines) != 7 || lines[0] != "GET / HTTP/1.1" || lines[1] != "Host: a" || len(lines[2]) != len("x-request-id: ")+36 ||
		lines[3] != "x-forwarded-proto: http" || lines[4] != "x-forwarded-for: 127.0.0.1" {
		t.Errorf("upstream got %q", lines)
	}
	send(t, upstream, ok("hello"))
	got := head(t, bufio.NewReader(client))
	if !regexp.MustCompile(`^HTTP/1.1 200 OK\r\nContent-Length: 5\r\nx-envoy-upstream-service-time: \d+\r\n\r\n$`).MatchString(got) {
		t.Errorf("downstream got %q", got)
	}
}
