package httpforward

import (
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

var frameRuleConversations = []conversation{
	{"a host that differs from the authority, and a second host", met + `
		> HEADERS 1 end :method=GET :scheme=http :path=/ :authority=a host=b
		<< RST 1 PROTOCOL_ERROR
		> HEADERS 3 end :method=GET :scheme=http :path=/ :authority=a host=a host=a
		<< RST 3 PROTOCOL_ERROR
		> HEADERS 5 end :method=GET :scheme=http :path=/ host=a host=b
		<< RST 5 PROTOCOL_ERROR
		> HEADERS 7 end :method=GET :scheme=http :path=/ :authority=a.test host=A.TEST:80
		>> HEADERS 7 end :method=GET :scheme=http :path=/ :authority=a.test host=A.TEST:80
		< HEADERS 7 end :status=200
		<< HEADERS 7 end :status=200
	`, []recorded{{reason: flow.BadFraming, flags: "DPE"}, {reason: flow.BadFraming, flags: "DPE"}, {reason: flow.BadFraming, flags: "DPE"},
		{reason: flow.Completed, status: 200}}},

	{"trailers of a request for framing, routing or the connection", met + `
		> POST 1
		>> POST 1
		> HEADERS 1 end host=b
		>> RST 1 CANCEL
		<< RST 1 PROTOCOL_ERROR
		> POST 3
		>> POST 3
		> HEADERS 3 end a=b content-length=0
		>> RST 3 CANCEL
		<< RST 3 PROTOCOL_ERROR
		> POST 5
		>> POST 5
		> HEADERS 5 end te=trailers
		>> RST 5 CANCEL
		<< RST 5 PROTOCOL_ERROR
	`, []recorded{{reason: flow.BadFraming, flags: "DPE"}, {reason: flow.BadFraming, flags: "DPE"}, {reason: flow.BadFraming, flags: "DPE"}}},

	{"trailers of a response for framing, routing or the connection", met + `
		> GET 1
		>> GET 1
		< HEADERS 1 :status=200
		<< HEADERS 1 :status=200
		< HEADERS 1 end content-length=0
		>> RST 1 PROTOCOL_ERROR
		<< RST 1 INTERNAL_ERROR
		> GET 3
		>> GET 3
		< HEADERS 3 :status=200
		<< HEADERS 3 :status=200
		< HEADERS 3 end grpc-status=0 connection=close
		>> RST 3 PROTOCOL_ERROR
		<< RST 3 INTERNAL_ERROR
	`, []recorded{{reason: flow.BadResponse, flags: "UPE", status: 200}, {reason: flow.BadResponse, flags: "UPE", status: 200}}},

	{"equal lengths become one", met + `
		> HEADERS 1 :method=PUT :scheme=http :path=/ :authority=a content-length=2,_2 a=b content-length=2
		>> HEADERS 1 :method=PUT :scheme=http :path=/ :authority=a content-length=2 a=b
		> DATA 1 end ab
		>> DATA 1 end ab
		< HEADERS 1 :status=200 content-length=3 content-length=3
		<< HEADERS 1 :status=200 content-length=3
		< DATA 1 end abc
		<< DATA 1 end abc
		> HEADERS 3 end :method=GET :scheme=http :path=/ :authority=a content-length=0,1
		<< RST 3 PROTOCOL_ERROR
	`, []recorded{{reason: flow.Completed, status: 200, received: 2, sent: 3}, {reason: flow.BadFraming, flags: "DPE"}}},
}

func TestHTTP2RuleConversations(t *testing.T) {
	for _, c := range frameRuleConversations {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.playFrames(t)
		})
	}
}

func TestTheRecordOfAMalformedHTTP2MessageNamesItsRule(t *testing.T) {
	const request, field = "http2.violation.of.messaging.rule{%s}", "http2.invalid.header.field{%s}"
	const before, after = "upstream_reset_before_response_started{protocol_error|%s}", "upstream_reset_after_response_started{protocol_error|%s}"
	for _, c := range []struct {
		script        string
		details, rule string
		err           string
	}{
		{"> HEADERS 1 end :method=GET :scheme=http :path=/a :authority=a host=b", request, "host_differs", `"host"`},
		{"> HEADERS 1 end :method=GET :scheme=http :path=/a :authority=a connection=x", request, "connection_field", `"connection"`},
		{"> HEADERS 1 end :method=GET :scheme=http :path=/a :authority=a A=b", field, "bad_field_name", `"A"`},
		{"> HEADERS 1 end :method=GET :scheme=http :path=/a :authority=a content-length=1", request, "length_mismatch", "length"},
		{"> HEADERS 1 :method=GET :scheme=http :path=/a :authority=a\n> HEADERS 1 end host=a", request, "forbidden_trailer", `"host"`},
		{"> HEADERS 1 end :method=GET :scheme=http :path=/a :authority=a\n>> read\n< HEADERS 1 end :status=20", before, "bad_status", "status"},
		{"> HEADERS 1 end :method=GET :scheme=http :path=/a :authority=a\n>> read\n< DATA 1 x", before, "data_before_the_head_of_a_response", "data"},
		{"> HEADERS 1 end :method=GET :scheme=http :path=/a :authority=a\n>> read\n< HEADERS 1 :status=200 content-length=1\n< DATA 1 end", after,
			"length_mismatch", "length"},
	} {
		r, client, server := meet(t)
		for line := range strings.Lines(c.script) {
			switch verb, text, _ := strings.Cut(strings.TrimSpace(line), " "); verb {
			case ">":
				client.sends(text)
			case "<":
				server.sends(text)
			default:
				server.next()
			}
		}
		got := r.records.await(t, 0)
		if want := fmt.Sprintf(c.details, c.rule); got.method != "GET" || got.path != "/a" || got.details != want {
			t.Errorf("%s: %q %q, %q; want %q", c.script, got.method, got.path, got.details, want)
		}
		if got.err == nil || !strings.Contains(got.err.Error(), c.err) {
			t.Errorf("%s: the error is %v, want one with %s", c.script, got.err, c.err)
		}
	}
}

// The same for HTTP/2.
func TestInterimResponsesDoNotProlongAnHTTP2Request(t *testing.T) {
	r, client, server := meet(t, func(c *Config) { c.RequestTimeout, c.maxInterim = 20*time.Millisecond, math.MaxInt })
	client.sends("GET 1")
	server.reads("GET 1")
	go io.Copy(io.Discard, client.conn)
	flood := strings.Repeat(rawFrame(1, 4, 1, "\x08\x03102"), 10_000)
	var err error
	for sent := 0; sent < 120<<20 && r.records.count() == 0 && err == nil; sent += len(flood) {
		_, err = io.WriteString(server.conn, flood)
	}
	if r.records.count() == 0 && err == nil {
		t.Fatal("all of the flood was forwarded")
	}
	if got := r.records.await(t, 0); got.reason != flow.RequestTimeout || got.status != 504 {
		t.Errorf("the record is %s, %d: %v", got.reason, got.status, got.err)
	}
}

func TestHTTP2InterimResponsesAreLimited(t *testing.T) {
	r, client, server := meet(t)
	client.sends("GET 1")
	server.reads("GET 1")
	for range maxInterim {
		server.sends("HEADERS 1 :status=102")
		client.reads("HEADERS 1 :status=102")
	}
	server.sends("HEADERS 1 :status=102")
	server.reads("RST 1 PROTOCOL_ERROR")
	if got := r.records.await(t, 0); got.reason != flow.BadResponse || got.status != 502 || !strings.Contains(got.details, "too_many_interim") {
		t.Errorf("the record is %+v", got)
	}
}

// Over HTTP/2 the content-type decides whether a request is a gRPC call. Only the response to one has a grpc-status.
func TestOnlyAGRPCCallHasAStatusOfGRPC(t *testing.T) {
	for contentType, want := range map[string]string{
		"application/grpc": "14", "application/grpc+proto": "14", "application/grpc-web": "", "application/grpc-web+proto": "", "text/plain": "",
	} {
		r, client, server := meet(t)
		client.sends("HEADERS 1 end :method=POST :scheme=http :path=/ :authority=a content-type=" + contentType)
		server.next()
		server.sends("HEADERS 1 end :status=200 grpc-status=14")
		if got := r.records.await(t, 0); got.grpc != want {
			t.Errorf("%s: the record has grpc-status %q, want %q", contentType, got.grpc, want)
		}
	}
}
