package httpforward

import (
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// met is the beginning of each conversation: both sides send their SETTINGS, and the engine adds its limits.
const met = `
	> SETTINGS
	>> SETTINGS 2=0 6=65536
	< SETTINGS
	<< SETTINGS 3=4096 6=65536
	> SETTINGS ack
	>> SETTINGS ack
	< SETTINGS ack
	<< SETTINGS ack
`

// frameConversations are scripts like those of HTTP/1, with a frame a line; see speaker.
var frameConversations = []conversation{
	{"a request and its response", met + `
		> GET 1
		>> GET 1
		< HEADERS 1 :status=200 content-length=5 a=b
		<< HEADERS 1 :status=200 content-length=5 a=b
		< DATA 1 end hello
		<< DATA 1 end hello
	`, []recorded{{reason: flow.Completed, status: 200, sent: 5}}},

	{"fields keep their order, their values, and that they are secret", met + `
		> HEADERS 1 end :method=GET :authority=a :scheme=https :path=/?q !authorization=secret b=2 a=1 b=3 cookie=x cookie=y te=trailers
		>> HEADERS 1 end :method=GET :authority=a :scheme=https :path=/?q !authorization=secret b=2 a=1 b=3 cookie=x cookie=y te=trailers
		< HEADERS 1 end :status=204 z=1 !set-cookie=secret y=2
		<< HEADERS 1 end :status=204 z=1 !set-cookie=secret y=2
	`, []recorded{{reason: flow.Completed, status: 204}}},

	{"requests may be sent before upstream has said anything", `
		> SETTINGS
		> GET 1
		>> SETTINGS 2=0 6=65536
		>> GET 1
		< SETTINGS 3=7
		< SETTINGS ack
		< HEADERS 1 end :status=200
		<< SETTINGS 3=7 6=65536
		<< SETTINGS ack
		<< HEADERS 1 end :status=200
	`, []recorded{{reason: flow.Completed, status: 200}}},

	{"a request that is refused before upstream has said anything is refused after it", `
		> SETTINGS
		> HEADERS 1 end :method=GET
		>> SETTINGS 2=0 6=65536
		< SETTINGS
		<< SETTINGS 3=4096 6=65536
		<< RST 1 PROTOCOL_ERROR
	`, []recorded{{reason: flow.BadFraming, flags: "DPE"}}},

	{"settings pass, lowered to what we bear; extensions do not", `
		> SETTINGS 1=1000000 2=1 3=10 4=70000 5=20000 6=100 99=1
		>> SETTINGS 1=65536 2=0 3=10 4=70000 5=20000 6=100
		< SETTINGS 3=1000000 4=1 6=10000000 8=1 9=1
		<< SETTINGS 3=4096 4=1 6=65536 8=1
		> SETTINGS 4=1
		>> SETTINGS 4=1
	`, nil},

	{"interim responses and trailers pass", met + `
		> POST 1
		>> POST 1
		< HEADERS 1 :status=100
		<< HEADERS 1 :status=100
		> DATA 1 body
		>> DATA 1 body
		> HEADERS 1 end trailer=1
		>> HEADERS 1 end trailer=1
		< HEADERS 1 :status=103 link=x
		<< HEADERS 1 :status=103 link=x
		< HEADERS 1 :status=200
		<< HEADERS 1 :status=200
		< DATA 1 answer
		<< DATA 1 answer
		< HEADERS 1 end grpc-status=0
		<< HEADERS 1 end grpc-status=0
	`, []recorded{{reason: flow.Completed, status: 200, received: 4, sent: 6}}},

	{"a response may be complete before its request", met + `
		> POST 1
		>> POST 1
		< HEADERS 1 end :status=403
		<< HEADERS 1 end :status=403
		> DATA 1 end more
		>> DATA 1 end more
	`, []recorded{{reason: flow.Completed, status: 403, received: 4}}},

	{"upstream stops a request after its response", met + `
		> POST 1
		>> POST 1
		< HEADERS 1 end :status=403
		< RST 1 NO_ERROR
		<< HEADERS 1 end :status=403
		<< RST 1 NO_ERROR
		> DATA 1 12345
		<< WINDOW 0 5
		> GET 3
		>> GET 3
		client closes
		>> the end
		upstream closes
	`, []recorded{{reason: flow.Completed, status: 403}, {reason: flow.DownstreamLeft, flags: "DC"}}},

	{"pings, windows and goodbyes pass both ways", met + `
		> PING 12345678
		>> PING 12345678
		< PING ack 12345678
		<< PING ack 12345678
		< PING abcdefgh
		<< PING abcdefgh
		> WINDOW 0 100
		>> WINDOW 0 100
		< WINDOW 0 7
		<< WINDOW 0 7
		> GET 1
		>> GET 1
		> WINDOW 1 5
		>> WINDOW 1 5
		> GOAWAY 0 NO_ERROR
		>> GOAWAY 0 NO_ERROR
		< GOAWAY 1 NO_ERROR
		<< GOAWAY 1 NO_ERROR
		< HEADERS 1 end :status=200
		<< HEADERS 1 end :status=200
	`, []recorded{{reason: flow.Completed, status: 200}}},

	{"priorities and extensions stay between neighbours", met + `
		> PRIORITY 1
		> RAW 000003 fa 00 00000000 aabbcc
		> HEADERS 1 end :method=GET :scheme=http :path=/ :authority=a priority=u=1
		>> HEADERS 1 end :method=GET :scheme=http :path=/ :authority=a priority=u=1
		< RAW 000001 0c 00 00000001 aa
		< HEADERS 1 end :status=200
		<< HEADERS 1 end :status=200
	`, []recorded{{reason: flow.Completed, status: 200}}},

	{"padding is not forwarded, and its credit is returned", met + `
		> POST 1
		>> POST 1
		> RAW 000008 00 08 00000001 04 414243 00000000
		<< WINDOW 1 5
		<< WINDOW 0 5
		>> DATA 1 ABC
		> RAW 000003 00 09 00000001 02 0000
		<< WINDOW 0 3
		>> DATA 1 end
		< HEADERS 1 end :status=200
		<< HEADERS 1 end :status=200
	`, []recorded{{reason: flow.Completed, status: 200, received: 3}}},

	{"what is there of a frame goes on at once", met + `
		> POST 1
		>> POST 1
		> RAW 000006 00 01 00000001 4142
		>> DATA 1 AB
		> RAW 43
		>> DATA 1 C
		> RAW 444546
		>> DATA 1 end DEF
		< HEADERS 1 end :status=200
		<< HEADERS 1 end :status=200
	`, []recorded{{reason: flow.Completed, status: 200, received: 6}}},

	{"a frame of ours may come in the middle of another", met + `
		> POST 1
		>> POST 1
		> GET 3
		>> GET 3
		< HEADERS 1 :status=200
		<< HEADERS 1 :status=200
		< RAW 000004 00 00 00000001 4142
		<< DATA 1 AB
		> HEADERS 5 end :method=GET
		<< RST 5 PROTOCOL_ERROR
		< RAW 4344
		<< DATA 1 CD
	`, []recorded{{reason: flow.BadFraming, flags: "DPE"}}},

	{"downstream resets a stream", met + `
		> GET 1
		>> GET 1
		> RST 1 CANCEL
		>> RST 1 CANCEL
		< HEADERS 1 :status=200
		< DATA 1 12345
		>> WINDOW 0 5
		> GET 3
		>> GET 3
		< HEADERS 3 end :status=200
		<< HEADERS 3 end :status=200
	`, []recorded{{reason: flow.DownstreamLeft, flags: "DC"}, {reason: flow.Completed, status: 200}}},

	{"upstream resets a stream", met + `
		> POST 1
		>> POST 1
		< RST 1 REFUSED_STREAM
		<< RST 1 REFUSED_STREAM
		> DATA 1 end 12345
		<< WINDOW 0 5
		> HEADERS 3 :method=POST :scheme=http :path=/ :authority=a
		>> POST 3
		< HEADERS 3 :status=200
		<< HEADERS 3 :status=200
		< RST 3 INTERNAL_ERROR
		<< RST 3 INTERNAL_ERROR
		> HEADERS 3 end trailer=1
		> GET 5
		>> GET 5
		< HEADERS 5 end :status=200
		<< HEADERS 5 end :status=200
	`, []recorded{{reason: flow.UpstreamReset, flags: "UR"}, {reason: flow.UpstreamReset, flags: "UR", status: 200}, {reason: flow.Completed, status: 200}}},

	{"upstream goes away: what it does not serve is refused, the rest goes on", met + `
		> GET 1
		>> GET 1
		> GET 3
		>> GET 3
		< GOAWAY 1 NO_ERROR
		<< GOAWAY 1 NO_ERROR
		<< RST 3 REFUSED_STREAM
		> GET 5
		<< RST 5 REFUSED_STREAM
		< HEADERS 1 end :status=200
		<< HEADERS 1 end :status=200
		upstream closes
		<< the end
	`, []recorded{{reason: flow.UpstreamReset, flags: "UR"}, {reason: flow.Completed, status: 200}}},

	{"upstream closes with requests in all states", met + `
		> GET 1
		>> GET 1
		< HEADERS 1 :status=200
		<< HEADERS 1 :status=200
		< DATA 1 half
		<< DATA 1 half
		upstream closes
		<< RST 1 INTERNAL_ERROR
		<< GOAWAY 1 NO_ERROR
		<< the end
	`, []recorded{{reason: flow.ResponseIncomplete, flags: "UC", status: 200, sent: 4}}},

	{"upstream closes between requests", met + `
		> GET 1
		>> GET 1
		< HEADERS 1 end :status=200
		<< HEADERS 1 end :status=200
		upstream closes
		<< GOAWAY 1 NO_ERROR
		<< the end
	`, []recorded{{reason: flow.Completed, status: 200}}},

	{"upstream resets before a response", met + `
		> HEADERS 1 end :method=HEAD :scheme=http :path=/ :authority=a
		>> HEADERS 1 end :method=HEAD :scheme=http :path=/ :authority=a
		upstream resets
		<< HEADERS 1 end :status=503 server=pillion content-type=text/plain content-length=95
		<< GOAWAY 1 NO_ERROR
		<< the end
	`, []recorded{{reason: flow.UpstreamClosed, flags: "UC", status: 503}}},

	{"upstream closes before a response", met + `
		> POST 1
		>> POST 1
		upstream closes
		<< HEADERS 1 :status=503 server=pillion content-type=text/plain content-length=95
		<< DATA 1 end upstream_connect_error_or_disconnect/reset_before_headers._reset_reason:_connection_termination
		<< RST 1 NO_ERROR
		<< GOAWAY 1 NO_ERROR
		<< the end
	`, []recorded{{reason: flow.UpstreamClosed, flags: "UC", status: 503, sent: 95}}},

	{"upstream closes before a response for which downstream has no room", `
		> SETTINGS 4=10
		>> SETTINGS 2=0 4=10 6=65536
		> GET 1
		>> GET 1
		upstream closes
		<< SETTINGS 3=4096 6=65536
		<< SETTINGS ack
		<< HEADERS 1 end :status=503 server=pillion content-length=0
		<< GOAWAY 1 NO_ERROR
		<< the end
	`, []recorded{{reason: flow.UpstreamClosed, flags: "UC", status: 503}}},

	{"upstream closes before a response of gRPC", met + `
		> HEADERS 1 end :method=POST :scheme=http :path=/ :authority=a content-type=application/grpc
		>> HEADERS 1 end :method=POST :scheme=http :path=/ :authority=a content-type=application/grpc
		upstream closes
		<< HEADERS 1 end :status=200 server=pillion content-type=application/grpc grpc-status=14 grpc-message=upstream_connect_error_or_disconnect/reset_before_headers._reset_reason:_connection_termination
		<< GOAWAY 1 NO_ERROR
		<< the end
	`, []recorded{{reason: flow.UpstreamClosed, flags: "UC", status: 200}}},

	{"upstream says goodbye at its end, and nothing is added", met + `
		> GET 1
		>> GET 1
		< GOAWAY 0 NO_ERROR
		upstream closes
		<< GOAWAY 0 NO_ERROR
		<< RST 1 REFUSED_STREAM
		<< the end
	`, []recorded{{reason: flow.UpstreamReset, flags: "UR"}}},

	{"downstream closes", met + `
		> GET 1
		>> GET 1
		client closes
		>> the end
		upstream closes
	`, []recorded{{reason: flow.DownstreamLeft, flags: "DC"}}},

	{"downstream closes between requests", met + `
		> GET 1
		>> GET 1
		< HEADERS 1 end :status=200
		<< HEADERS 1 end :status=200
		client closes
		>> the end
	`, []recorded{{reason: flow.Completed, status: 200}}},

	{"downstream closes its half, and the response arrives", met + `
		> GET 1
		>> GET 1
		client closes its half
		>> the end
		< HEADERS 1 end :status=200
		<< HEADERS 1 end :status=200
		upstream closes
		<< the end
	`, []recorded{{reason: flow.Completed, status: 200}}},

	{"downstream closes its half, and what we would tell upstream is dropped", met + `
		> GET 1
		>> GET 1
		> GET 3
		>> GET 3
		client closes its half
		>> the end
		< HEADERS 1 :status=200
		<< HEADERS 1 :status=200
		< RAW 000005 00 08 00000001 02 4142 0000
		<< DATA 1 AB
		< HEADERS 3 end status=200
		<< HEADERS 3 end :status=502 server=pillion content-length=0
		< DATA 1 end CD
		<< DATA 1 end CD
		<< the end
		client closes
	`, []recorded{{reason: flow.BadResponse, flags: "UPE", status: 502}, {reason: flow.Completed, status: 200, sent: 4}}},

	{"downstream resets", met + `
		> GET 1
		>> GET 1
		client resets
		upstream is reset
	`, []recorded{{reason: flow.DownstreamLeft, flags: "DC"}}},

	{"upstream speaks something else", `
		> SETTINGS
		>> SETTINGS 2=0 6=65536
		< RAW 485454502f312e31203430300d0a0d0a
		client reads HTTP/1.1 400$$
		> RAW 0102
		upstream reads \1\2
		upstream closes
		<< the end
		client closes
	`, []recorded{{reason: flow.Closed, received: 24 + 21 + 2, sent: 16}}},

	{"upstream speaks something else to a request", `
		> SETTINGS
		> GET 1
		>> SETTINGS 2=0 6=65536
		>> GET 1
		< RAW 48
		client reads H
		client closes
		upstream closes
	`, []recorded{{reason: flow.BadResponse, flags: "UPE"}, {reason: flow.Closed, received: 24 + 21 + 15, sent: 1}}},

	{"CONNECT makes a tunnel, and so does its extension", met + `
		> HEADERS 1 :method=CONNECT :authority=a:1
		>> HEADERS 1 :method=CONNECT :authority=a:1
		< HEADERS 1 :status=200
		<< HEADERS 1 :status=200
		> DATA 1 up
		>> DATA 1 up
		< DATA 1 end down
		<< DATA 1 end down
		> DATA 1 end
		>> DATA 1 end
		> HEADERS 3 :method=CONNECT :protocol=websocket :scheme=http :path=/ :authority=a
		>> HEADERS 3 :method=CONNECT :protocol=websocket :scheme=http :path=/ :authority=a
		< HEADERS 3 :status=200
		<< HEADERS 3 :status=200
		> RST 3 CANCEL
		>> RST 3 CANCEL
	`, []recorded{{reason: flow.Completed, status: 200, received: 2, sent: 4}, {reason: flow.DownstreamLeft, flags: "DC", status: 200}}},

	{"downstream closes its half in the middle of a response, and upstream resets the stream", met + `
		> GET 1
		>> GET 1
		< HEADERS 1 :status=200
		<< HEADERS 1 :status=200
		client closes its half
		>> the end
		< RST 1 CANCEL
		<< RST 1 CANCEL
	`, []recorded{{reason: flow.DownstreamLeft, flags: "DC", status: 200}}},

	{"downstream closes its half in the middle of a response, and upstream closes", met + `
		> GET 1
		>> GET 1
		< HEADERS 1 :status=200
		<< HEADERS 1 :status=200
		client closes its half
		>> the end
		upstream closes
		<< the end
	`, []recorded{{reason: flow.DownstreamLeft, flags: "DC", status: 200}}},

	{"downstream closes its half in the middle of a response, and upstream resets", met + `
		> GET 1
		>> GET 1
		< HEADERS 1 :status=200
		<< HEADERS 1 :status=200
		client closes its half
		>> the end
		upstream resets
		<< RST 1 INTERNAL_ERROR
		<< GOAWAY 1 NO_ERROR
		<< the end
	`, []recorded{{reason: flow.ResponseIncomplete, flags: "UC", status: 200}}},

	{"HEAD and 304 declare what they do not send", met + `
		> HEADERS 1 end :method=HEAD :scheme=http :path=/ :authority=a
		>> HEADERS 1 end :method=HEAD :scheme=http :path=/ :authority=a
		< HEADERS 1 end :status=200 content-length=100
		<< HEADERS 1 end :status=200 content-length=100
		> GET 3
		>> GET 3
		< HEADERS 3 end :status=304 content-length=100
		<< HEADERS 3 end :status=304 content-length=100
	`, []recorded{{reason: flow.Completed, status: 200}, {reason: flow.Completed, status: 304}}},

	{"a malformed response is answered for", met + `
		> GET 1
		>> GET 1
		< HEADERS 1 end status=200
		>> RST 1 PROTOCOL_ERROR
		<< HEADERS 1 end :status=502 server=pillion content-length=0
		> GET 3
		>> GET 3
		< HEADERS 3 :status=200 content-length=3
		<< HEADERS 3 :status=200 content-length=3
		< DATA 3 1234
		>> RST 3 PROTOCOL_ERROR
		>> WINDOW 0 4
		<< RST 3 INTERNAL_ERROR
		> GET 5
		>> GET 5
		< DATA 5 early
		>> RST 5 PROTOCOL_ERROR
		>> WINDOW 0 5
		<< HEADERS 5 end :status=502 server=pillion content-length=0
		> GET 7
		>> GET 7
		< HEADERS 7 end :status=200 connection=close
		>> RST 7 PROTOCOL_ERROR
		<< HEADERS 7 end :status=502 server=pillion content-length=0
		> GET 9
		>> GET 9
		< HEADERS 9 end :status=200
		<< HEADERS 9 end :status=200
	`, []recorded{{reason: flow.BadResponse, flags: "UPE", status: 502}, {reason: flow.BadResponse, flags: "UPE", status: 200},
		{reason: flow.BadResponse, flags: "UPE", status: 502}, {reason: flow.BadResponse, flags: "UPE", status: 502}, {reason: flow.Completed, status: 200}}},

	{"upstream pushes although it may not", met + `
		> GET 1
		>> GET 1
		< RAW 000005 05 04 00000001 00000002 88
		<< HEADERS 1 :status=502 server=pillion content-type=text/plain content-length=87
		<< DATA 1 end upstream_connect_error_or_disconnect/reset_before_headers._reset_reason:_protocol_error
		<< GOAWAY 1 NO_ERROR
		<< the end
	`, []recorded{{reason: flow.BadResponse, flags: "UPE", status: 502, sent: 87}}},

	{"the agent drains", met + `
		> GET 1
		>> GET 1
		the agent drains
		<< GOAWAY 2147483647 NO_ERROR
		> GET 3
		>> GET 3
		<< GOAWAY 3 NO_ERROR
		> HEADERS 5 end :method=GET :scheme=http :path=/new :authority=a in=table
		<< RST 5 REFUSED_STREAM
		< HEADERS 1 end :status=200
		<< HEADERS 1 end :status=200
		< HEADERS 3 end :status=200
		<< HEADERS 3 end :status=200
		<< the end
		client closes
		>> the end
	`, []recorded{{reason: flow.Completed, status: 200}, {reason: flow.Completed, status: 200}}},

	{"the agent drains an idle connection", met + `
		the agent drains
		<< GOAWAY 2147483647 NO_ERROR
		<< GOAWAY 0 NO_ERROR
		<< the end
		client closes
		>> the end
	`, nil},
}

func TestHTTP2Conversations(t *testing.T) {
	for _, c := range frameConversations {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.playFrames(t)
		})
	}
}

// playFrames acts a conversation out.
func (c conversation) playFrames(t *testing.T, configure ...func(*Config)) {
	o := newOrigin(t)
	s := &stage{t: t, origin: o, rig: newRig(t, o.address, true, append([]func(*Config){plain}, configure...)...)}
	s.client = s.rig.dial(t)
	send(t, s.client, http2.ClientPreface)
	client := newSpeaker(t, s.client)
	var server *speaker
	upstream := func() *speaker {
		if server == nil {
			server = newSpeaker(t, s.upstream())
			expect(t, server.conn, http2.ClientPreface)
		}
		return server
	}
	for line := range strings.Lines(c.script) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		t.Log(line)
		verb, text, _ := strings.Cut(line, " ")
		read, isRead := strings.CutPrefix(text, "reads ")
		read = strings.NewReplacer(`\1`, "\x01", `\2`, "\x02", "$", "\r\n").Replace(read)
		switch {
		case verb == ">":
			client.sends(text)
		case verb == ">>":
			upstream().reads(text)
		case verb == "<":
			upstream().sends(text)
		case verb == "<<":
			client.reads(text)
		case isRead && verb == "client":
			expect(t, s.client, read)
		case isRead && verb == "upstream":
			expect(t, server.conn, read)
		case deeds[line] != nil:
			deeds[line](t, s)
		default:
			t.Fatalf("%q is no deed", line)
		}
	}
	s.client.Close()
	for i, want := range c.want {
		got := s.rig.records.await(t, i)
		if got.reason != want.reason || got.status != want.status || got.flags != want.flags ||
			got.received != want.received || got.sent != want.sent || got.unbound {
			t.Errorf("record %d is %+v, want %+v", i, got, want)
		}
	}
}
