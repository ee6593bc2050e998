package httpforward

import (
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

func done(status int, received, sent uint64) recorded {
	return recorded{reason: flow.Completed, status: status, received: received, sent: sent}
}

var conversations = []conversation{
	{"keep-alive", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 2$$ok
		<< HTTP/1.1 200 OK$Content-Length: 2$$ok
		> GET /2 HTTP/1.1$Host: a$$
		>> GET /2 HTTP/1.1$Host: a$$
		< HTTP/1.1 404 Not Found$Content-Length: 0$$
		<< HTTP/1.1 404 Not Found$Content-Length: 0$$
		client closes
		the pool has a connection
		client connects again
		> GET /3 HTTP/1.1$Host: a$$
		>> GET /3 HTTP/1.1$Host: a$$
		< HTTP/1.1 204 No Content$$
		<< HTTP/1.1 204 No Content$$`,
		[]recorded{done(200, 0, 2), done(404, 0, 0), done(204, 0, 0)}},
	{"pipelined requests are answered in order", `
		> GET /1 HTTP/1.1$Host: a$$POST /2 HTTP/1.1$Host: a$Content-Length: 3$$abcGET /3 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 1$$1
		<< HTTP/1.1 200 OK$Content-Length: 1$$1
		>> POST /2 HTTP/1.1$Host: a$Content-Length: 3$$abc
		< HTTP/1.1 200 OK$Content-Length: 1$$2
		<< HTTP/1.1 200 OK$Content-Length: 1$$2
		>> GET /3 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 1$$3
		<< HTTP/1.1 200 OK$Content-Length: 1$$3`,
		[]recorded{done(200, 0, 1), done(200, 3, 1), done(200, 0, 1)}},
	{"chunks, extensions and trailers keep their bytes", `
		> POST / HTTP/1.1$Host: a$Transfer-Encoding: Chunked$Trailer: X-T$$4;ext=1$wiki$0005$pedia$0$X-T: v$$
		>> POST / HTTP/1.1$Host: a$Transfer-Encoding: Chunked$Trailer: X-T$$4;ext=1$wiki$0005$pedia$0$X-T: v$$
		< HTTP/1.1 200 OK$transfer-encoding: chunked$$3;a="b"$abc$
		<< HTTP/1.1 200 OK$transfer-encoding: chunked$$3;a="b"$abc$
		< 0$x-sum: 1$$
		<< 0$x-sum: 1$$`,
		[]recorded{done(200, 9, 3)}},
	{"a body that comes in pieces", `
		> PUT / HTTP/1.1$Host: a$Content-Length: 6$$ab
		>> PUT / HTTP/1.1$Host: a$Content-Length: 6$$ab
		> cd
		>> cd
		> ef
		>> ef
		< HTTP/1.1 200 OK$Content-Length: 4$$12
		<< HTTP/1.1 200 OK$Content-Length: 4$$12
		< 34
		<< 34`,
		[]recorded{done(200, 6, 4)}},
	{"a response that ends with the connection", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$$some
		<< HTTP/1.1 200 OK$Connection: close$$some
		< more
		<< more
		upstream closes
		client reads the end`,
		[]recorded{done(200, 0, 8)}},
	{"a response that should end with the connection, and is reset", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$$some
		<< HTTP/1.1 200 OK$Connection: close$$some
		upstream resets
		client is reset`,
		[]recorded{{reason: flow.ResponseIncomplete, status: 200, flags: "UC", sent: 4}}},
	{"HEAD, 204 and 304 have no body, whatever they say", `
		> HEAD / HTTP/1.1$Host: a$$
		>> HEAD / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 100$$
		<< HTTP/1.1 200 OK$Content-Length: 100$$
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 304 Not Modified$Content-Length: 100$$
		<< HTTP/1.1 304 Not Modified$Content-Length: 100$$
		> HEAD / HTTP/1.1$Host: a$$
		>> HEAD / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$
		<< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 204 No Content$$
		<< HTTP/1.1 204 No Content$$`,
		[]recorded{done(200, 0, 0), done(304, 0, 0), done(200, 0, 0), done(204, 0, 0)}},
	{"100-continue", `
		> POST / HTTP/1.1$Host: a$Expect: 100-continue$Content-Length: 4$$
		>> POST / HTTP/1.1$Host: a$Expect: 100-continue$Content-Length: 4$$
		< HTTP/1.1 100 Continue$$
		<< HTTP/1.1 100 Continue$$
		> body
		>> body
		< HTTP/1.1 201 Created$Content-Length: 0$$
		<< HTTP/1.1 201 Created$Content-Length: 0$$`,
		[]recorded{done(201, 4, 0)}},
	{"early hints, twice, and with the response", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 103 Early Hints$Link: x$$
		<< HTTP/1.1 103 Early Hints$Link: x$$
		< HTTP/1.1 103 Early Hints$Link: y$$HTTP/1.1 200 OK$Content-Length: 1$$!
		<< HTTP/1.1 103 Early Hints$Link: y$$HTTP/1.1 200 OK$Content-Length: 1$$!`,
		[]recorded{done(200, 0, 1)}},
	{"HTTP/1.0 does not get interim responses", `
		> GET / HTTP/1.0$$
		>> GET / HTTP/1.0$$
		< HTTP/1.1 103 Early Hints$Link: x$$HTTP/1.1 200 OK$Content-Length: 1$$!
		<< HTTP/1.1 200 OK$Content-Length: 1$Connection: close$$!
		client reads the end`,
		[]recorded{done(200, 0, 1)}},
	{"HTTP/1.0 with keep-alive", `
		> GET /1 HTTP/1.0$Connection: Keep-Alive$$
		>> GET /1 HTTP/1.0$Connection: keep-alive$$
		< HTTP/1.1 200 OK$Connection: keep-alive$Content-Length: 1$$1
		<< HTTP/1.1 200 OK$Content-Length: 1$Connection: keep-alive$$1
		> GET /2 HTTP/1.0$$
		>> GET /2 HTTP/1.0$$
		< HTTP/1.0 200 OK$$to the end
		<< HTTP/1.0 200 OK$Connection: close$$to the end
		upstream closes
		client reads the end`,
		[]recorded{done(200, 0, 1), done(200, 0, 10)}},
	{"an early response while the body is on its way", `
		> POST / HTTP/1.1$Host: a$Content-Length: 6$$ab
		>> POST / HTTP/1.1$Host: a$Content-Length: 6$$ab
		< HTTP/1.1 200 OK$Content-Length: 5$$early
		<< HTTP/1.1 200 OK$Content-Length: 5$$early
		> cdef
		>> cdef
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 6, 5), done(200, 0, 0)}},
	{"an early response that ends the connection", `
		> POST / HTTP/1.1$Host: a$Content-Length: 6$$ab
		>> POST / HTTP/1.1$Host: a$Content-Length: 6$$ab
		< HTTP/1.1 413 Too Large$Content-Length: 2$Connection: close$$no
		<< HTTP/1.1 413 Too Large$Content-Length: 2$Connection: close$$no
		client reads the end`,
		[]recorded{done(413, 2, 2)}},
	{"hop-by-hop fields, and those that Connection names", `
		> GET / HTTP/1.1$Host: a$Connection: keep-alive, X-Mine$X-Mine: 1$X-Other: 2$Keep-Alive: 5$Proxy-Connection: x$TE: gzip$$
		>> GET / HTTP/1.1$Host: a$X-Other: 2$$
		< HTTP/1.1 200 OK$Connection: X-Theirs$X-Theirs: 1$Keep-Alive: timeout=5$Upgrade: h2c$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> GET / HTTP/1.1$Host: a$TE: trailers$Connection: TE$$
		>> GET / HTTP/1.1$Host: a$Connection: TE$TE: trailers$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0), done(200, 0, 0)}},
	{"a request that says close", `
		> GET / HTTP/1.1$Host: a$Connection: close$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 1$$x
		<< HTTP/1.1 200 OK$Content-Length: 1$Connection: close$$x
		client reads the end
		the pool has a connection`,
		[]recorded{done(200, 0, 1)}},
	{"bytes behind a request that says close do not destroy its answer", `
		> GET / HTTP/1.1$Host: a$Connection: close$$GET /ignored HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 1$$x
		> and more that nobody reads
		<< HTTP/1.1 200 OK$Content-Length: 1$Connection: close$$x
		client reads the end
		the pool has a connection`,
		[]recorded{done(200, 0, 1)}},
	{"a response that says close", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Connection: close$Content-Length: 1$$x
		<< HTTP/1.1 200 OK$Content-Length: 1$Connection: close$$x
		client reads the end
		nothing is left in the pool`,
		[]recorded{done(200, 0, 1)}},
	{"absolute form, and OPTIONS *", `
		> GET http://b.example/x HTTP/1.1$Host: b.example$$
		>> GET http://b.example/x HTTP/1.1$Host: b.example$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> OPTIONS * HTTP/1.1$Host: a$$
		>> OPTIONS * HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0), done(200, 0, 0)}},
	{"websocket, with bytes right behind the switch, both ways", `
		> GET /ws HTTP/1.1$Host: a$Upgrade: websocket$Connection: keep-alive, Upgrade$Sec-WebSocket-Key: k$$
		>> GET /ws HTTP/1.1$Host: a$Upgrade: websocket$Sec-WebSocket-Key: k$Connection: Upgrade$$
		< HTTP/1.1 101 Switching Protocols$Upgrade: websocket$Connection: Upgrade$$first
		<< HTTP/1.1 101 Switching Protocols$Upgrade: websocket$Connection: Upgrade$$first
		> frames
		>> frames
		< HTTP/1.1 500 is no response here$
		<< HTTP/1.1 500 is no response here$
		client closes its half
		upstream reads the end
		< last words
		<< last words
		upstream closes
		client reads the end`,
		[]recorded{{reason: flow.Closed, status: 101, received: 6, sent: 49}}},
	{"any upgrade", `
		> GET / HTTP/1.1$Host: a$Upgrade: my-protocol/2$Connection: upgrade$$early bytes
		>> GET / HTTP/1.1$Host: a$Upgrade: my-protocol/2$Connection: Upgrade$$
		< HTTP/1.1 101 Go$Upgrade: my-protocol/2$Connection: upgrade$$
		<< HTTP/1.1 101 Go$Upgrade: my-protocol/2$Connection: Upgrade$$
		>> early bytes
		upstream closes
		client reads the end`,
		[]recorded{{reason: flow.Closed, status: 101, received: 11, sent: 0}}},
	{"an upgrade that upstream does not take", `
		> GET / HTTP/1.1$Host: a$Upgrade: websocket$Connection: Upgrade$$
		>> GET / HTTP/1.1$Host: a$Upgrade: websocket$Connection: Upgrade$$
		< HTTP/1.1 400 No$Content-Length: 0$$
		<< HTTP/1.1 400 No$Content-Length: 0$$
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(400, 0, 0), done(200, 0, 0)}},
	{"an upgrade to HTTP/2 is not passed on", `
		> GET / HTTP/1.1$Host: a$Connection: Upgrade, HTTP2-Settings$Upgrade: h2c$HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0)}},
	{"nor is one that stands behind another", `
		> GET / HTTP/1.1$Host: a$Connection: Upgrade$Upgrade: websocket$Upgrade: other, H2C$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0)}},
	{"upstream switches unasked", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 101 Switching Protocols$Upgrade: x$Connection: Upgrade$$
		<< HTTP/1.1 502 Bad Gateway$`,
		[]recorded{{reason: flow.BadResponse, status: 502, flags: "UPE", sent: 87}}},
	{"CONNECT", `
		> CONNECT b.example:443 HTTP/1.1$Host: b.example:443$$
		>> CONNECT b.example:443 HTTP/1.1$Host: b.example:443$$
		< HTTP/1.1 200 Connection established$$
		<< HTTP/1.1 200 Connection established$$
		> secret
		>> secret
		< answer
		<< answer
		client closes
		upstream reads the end
		upstream closes`,
		[]recorded{{reason: flow.Closed, status: 200, received: 6, sent: 6}}},
	{"CONNECT that is refused", `
		> CONNECT b.example:443 HTTP/1.1$Host: b.example:443$$
		>> CONNECT b.example:443 HTTP/1.1$Host: b.example:443$$
		< HTTP/1.1 407 Proxy Authentication Required$Content-Length: 2$$no
		<< HTTP/1.1 407 Proxy Authentication Required$Content-Length: 2$$no`,
		[]recorded{done(407, 0, 2)}},
	{"downstream closes its half and still gets its response", `
		> GET / HTTP/1.1$Host: a$$
		client closes its half
		>> GET / HTTP/1.1$Host: a$$
		upstream reads the end
		< HTTP/1.1 200 OK$Content-Length: 2$$ok
		<< HTTP/1.1 200 OK$Content-Length: 2$$ok
		client reads the end`,
		[]recorded{done(200, 0, 2)}},
	{"downstream closes its half behind several requests, and gets each response", `
		> GET /1 HTTP/1.1$Host: a$$GET /2 HTTP/1.1$Host: a$$
		client closes its half
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 1$$1
		<< HTTP/1.1 200 OK$Content-Length: 1$$1
		>> GET /2 HTTP/1.1$Host: a$$
		upstream reads the end
		< HTTP/1.1 200 OK$Content-Length: 1$$2
		<< HTTP/1.1 200 OK$Content-Length: 1$$2
		client reads the end`,
		[]recorded{done(200, 0, 1), done(200, 0, 1)}},
	{"an empty line behind a body is no request", `
		> POST / HTTP/1.1$Host: a$Content-Length: 1$$a$
		>> POST / HTTP/1.1$Host: a$Content-Length: 1$$a
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> $GET / HTTP/1.1$Host: a$$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		the agent drains
		client reads the end`,
		[]recorded{done(200, 1, 0), done(200, 0, 0)}},
	{"downstream closes while upstream thinks", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		client closes
		upstream reads the end
		upstream closes`,
		[]recorded{{reason: flow.DownstreamLeft, flags: "DC"}}},
	{"downstream closes in the middle of an endless response", `
		> GET /events HTTP/1.1$Host: a$$
		>> GET /events HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$1$a$
		<< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$1$a$
		client closes
		upstream reads the end
		< 1$b$`,
		[]recorded{{reason: flow.DownstreamLeft, status: 200, flags: "DC", sent: 2}}},
	{"downstream resets while upstream thinks", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		client resets
		upstream is reset`,
		[]recorded{{reason: flow.DownstreamLeft, flags: "DC"}}},
	{"downstream leaves in the middle of its body", `
		> POST / HTTP/1.1$Host: a$Content-Length: 10$$abc
		>> POST / HTTP/1.1$Host: a$Content-Length: 10$$abc
		client closes
		upstream is reset`,
		[]recorded{{reason: flow.DownstreamLeft, flags: "DC", received: 3}}},
	{"upstream closes without an answer, on a fresh connection", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		upstream closes
		<< HTTP/1.1 503 Service Unavailable$`,
		[]recorded{{reason: flow.UpstreamClosed, status: 503, flags: "UC", sent: 95}}},
	{"upstream closes in the middle of a head", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-
		upstream closes
		<< HTTP/1.1 503 Service Unavailable$`,
		[]recorded{{reason: flow.UpstreamClosed, status: 503, flags: "UC", sent: 95}}},
	{"upstream closes in the middle of a body", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 10$$part
		<< HTTP/1.1 200 OK$Content-Length: 10$$part
		upstream closes
		client reads the end`,
		[]recorded{{reason: flow.ResponseIncomplete, status: 200, flags: "UC", sent: 4}}},
	{"a workload closes between two requests, and the second one gets a new connection", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		upstream closes its half
		upstream reads the end
		> POST /2 HTTP/1.1$Host: a$Content-Length: 4$$body
		upstream gets a connection
		>> POST /2 HTTP/1.1$Host: a$Content-Length: 4$$body
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0), done(200, 4, 0)}},
	{"a workload closes behind its response, and the next request gets a new connection", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		upstream closes its half
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		upstream reads the end
		> GET /2 HTTP/1.1$Host: a$$
		upstream gets a connection
		>> GET /2 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0), done(200, 0, 0)}},
	{"a workload closes just before a request that cannot be sent again", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		upstream closes
		> POST /2 HTTP/1.1$Host: a$Content-Length: 0$$
		upstream gets a connection
		>> POST /2 HTTP/1.1$Host: a$Content-Length: 0$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0), done(200, 0, 0)}},
	{"a workload closes a connection that is authenticated: so does downstream", `
		> GET / HTTP/1.1$Host: a$Authorization: NTLM abc$$
		>> GET / HTTP/1.1$Host: a$Authorization: NTLM abc$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		upstream closes its half
		client reads the end`,
		[]recorded{done(200, 0, 0)}},
	{"a workload closes and listens no more: downstream closes, so that the client connects elsewhere", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		upstream listens no more
		upstream closes its half
		client reads the end`,
		[]recorded{done(200, 0, 0)}},
	{"a workload closes, and listens no more a while later", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		upstream closes its half
		upstream reads the end
		upstream listens no more
		client reads the end`,
		[]recorded{done(200, 0, 0)}},
	{"a client that closes its half has its request sent again, too", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> GET /2 HTTP/1.1$Host: a$$
		client closes its half
		>> GET /2 HTTP/1.1$Host: a$$
		upstream reads the end
		upstream resets
		upstream gets a connection
		>> GET /2 HTTP/1.1$Host: a$$
		upstream reads the end
		< HTTP/1.1 200 OK$Content-Length: 1$$2
		<< HTTP/1.1 200 OK$Content-Length: 1$$2
		client reads the end`,
		[]recorded{done(200, 0, 0), done(200, 0, 1)}},
	{"a client that closes its half has its request sent again once", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> GET /2 HTTP/1.1$Host: a$$
		client closes its half
		>> GET /2 HTTP/1.1$Host: a$$
		upstream closes
		upstream gets a connection
		>> GET /2 HTTP/1.1$Host: a$$
		upstream reads the end
		upstream closes
		client reads the end`,
		[]recorded{done(200, 0, 0), {reason: flow.DownstreamLeft, flags: "DC"}}},
	{"downstream closes in the middle of a response, and upstream follows", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 10$$part
		<< HTTP/1.1 200 OK$Content-Length: 10$$part
		client closes
		upstream reads the end
		upstream closes`,
		[]recorded{{reason: flow.DownstreamLeft, status: 200, flags: "DC", sent: 4}}},
	{"downstream closes in the middle of a response, and upstream resets", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$4$part$
		<< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$4$part$
		client closes
		upstream reads the end
		upstream resets`,
		[]recorded{{reason: flow.ResponseIncomplete, status: 200, flags: "UC", sent: 4}}},
	{"downstream closes its half, and upstream resets without an answer", `
		> POST / HTTP/1.1$Host: a$Content-Length: 0$$
		>> POST / HTTP/1.1$Host: a$Content-Length: 0$$
		client closes its half
		upstream reads the end
		upstream resets
		<< HTTP/1.1 503 Service Unavailable$
		client reads a message that ends the connection`,
		[]recorded{{reason: flow.UpstreamClosed, status: 503, flags: "UC", sent: 95}}},
	{"a request meets an upstream that closes: it is sent again", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> GET /2 HTTP/1.1$Host: a$$
		>> GET /2 HTTP/1.1$Host: a$$
		upstream closes
		upstream gets a connection
		>> GET /2 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0), done(200, 0, 0)}},
	{"a PUT with its whole body is sent again, after a reset", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> PUT /2 HTTP/1.1$Host: a$Content-Length: 4$$body
		>> PUT /2 HTTP/1.1$Host: a$Content-Length: 4$$body
		upstream resets
		upstream gets a connection
		>> PUT /2 HTTP/1.1$Host: a$Content-Length: 4$$body
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0), done(200, 4, 0)}},
	{"a POST is not sent again", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> POST /2 HTTP/1.1$Host: a$Content-Length: 4$$body
		>> POST /2 HTTP/1.1$Host: a$Content-Length: 4$$body
		upstream closes
		<< HTTP/1.1 503 Service Unavailable$`,
		[]recorded{done(200, 0, 0), {reason: flow.UpstreamClosed, status: 503, flags: "UC", received: 4, sent: 95}}},
	{"what could not be sent again does not go out on a connection that others have used", `
		> POST /1 HTTP/1.1$Host: a$Content-Length: 0$$
		>> POST /1 HTTP/1.1$Host: a$Content-Length: 0$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> POST /2 HTTP/1.1$Host: a$Content-Length: 0$$
		>> POST /2 HTTP/1.1$Host: a$Content-Length: 0$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		client closes
		the pool has a connection
		client connects again
		> POST /3 HTTP/1.1$Host: a$Content-Length: 0$$
		upstream gets a connection
		>> POST /3 HTTP/1.1$Host: a$Content-Length: 0$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0), done(200, 0, 0), done(200, 0, 0)}},
	{"a body in pieces is sent again up to where it is, and goes on from there", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> PUT /2 HTTP/1.1$Host: a$Transfer-Encoding: chunked$$3$abc$0
		>> PUT /2 HTTP/1.1$Host: a$Transfer-Encoding: chunked$$3$abc$
		upstream resets
		upstream gets a connection
		>> PUT /2 HTTP/1.1$Host: a$Transfer-Encoding: chunked$$3$abc$
		> 00a$1234567890$0$$GET /3 HTTP/1.1$Host: a$$
		>> 000a$1234567890$0$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		>> GET /3 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 0), done(200, 13, 0), done(200, 0, 0)}},
	{"what is sent again leaves what stands behind it", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> PUT /2 HTTP/1.1$Host: a$Content-Length: 2$$hiGET /3 HTTP/1.1$Host: a$$
		client closes its half
		>> PUT /2 HTTP/1.1$Host: a$Content-Length: 2$$hi
		upstream closes
		upstream gets a connection
		>> PUT /2 HTTP/1.1$Host: a$Content-Length: 2$$hi
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		>> GET /3 HTTP/1.1$Host: a$$
		upstream reads the end
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		client reads the end`,
		[]recorded{done(200, 0, 0), done(200, 2, 0), done(200, 0, 0)}},
	{"requests that come while a response is silent", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$1$a$
		<< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$1$a$
		> GET /2 HTTP/1.1$Host: a$$GE
		< 1$b$0$$
		<< 1$b$0$$
		>> GET /2 HTTP/1.1$Host: a$$
		> T /3 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		>> GET /3 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 0, 2), done(200, 0, 0), done(200, 0, 0)}},
	{"bytes of a tunnel that come before it", `
		> GET /ws HTTP/1.1$Host: a$Upgrade: websocket$Connection: Upgrade$$
		>> GET /ws HTTP/1.1$Host: a$Upgrade: websocket$Connection: Upgrade$$
		> early
		< HTTP/1.1 101 Go$Upgrade: websocket$$hello
		<< HTTP/1.1 101 Go$Upgrade: websocket$Connection: Upgrade$$hello
		>> early
		client closes its half
		upstream reads the end
		upstream closes
		client reads the end`,
		[]recorded{{reason: flow.Closed, status: 101, received: 5, sent: 5}}},
	{"a request is sent again once, not for ever", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> GET /2 HTTP/1.1$Host: a$$
		>> GET /2 HTTP/1.1$Host: a$$
		upstream closes
		upstream gets a connection
		>> GET /2 HTTP/1.1$Host: a$$
		upstream closes
		<< HTTP/1.1 503 Service Unavailable$`,
		[]recorded{done(200, 0, 0), {reason: flow.UpstreamClosed, status: 503, flags: "UC", sent: 95}}},
	{"NTLM: the connection stays with its downstream, and dies with it", `
		> GET / HTTP/1.1$Host: a$Authorization: NTLM abc$$
		>> GET / HTTP/1.1$Host: a$Authorization: NTLM abc$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		client closes
		upstream reads the end
		nothing is left in the pool`,
		[]recorded{done(200, 0, 0), done(200, 0, 0)}},
	{"Negotiate, offered by upstream", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 401 Unauthorized$WWW-Authenticate: Basic x$WWW-Authenticate: negotiate$Content-Length: 0$$
		<< HTTP/1.1 401 Unauthorized$WWW-Authenticate: Basic x$WWW-Authenticate: negotiate$Content-Length: 0$$
		client closes
		upstream reads the end
		nothing is left in the pool`,
		[]recorded{done(401, 0, 0)}},
	{"a malformed request is answered and not forwarded", `
		> GET / HTTP/1.1$Host: a$Content-Length: 1$Transfer-Encoding: chunked$$0$$
		<< HTTP/1.1 400 Bad Request$`,
		[]recorded{{reason: flow.BadFraming, status: 400, flags: "DPE", sent: 11}}},
	{"a bad chunk, behind a good one", `
		> POST / HTTP/1.1$Host: a$Transfer-Encoding: chunked$$3$abc$
		>> POST / HTTP/1.1$Host: a$Transfer-Encoding: chunked$$3$abc$
		> zz$
		<< HTTP/1.1 400 Bad Request$
		upstream is reset`,
		[]recorded{{reason: flow.BadFraming, status: 400, flags: "DPE", received: 3, sent: 11}}},
	{"a malformed response", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 1$Content-Length: 2$$xx
		<< HTTP/1.1 502 Bad Gateway$
		upstream is reset`,
		[]recorded{{reason: flow.BadResponse, status: 502, flags: "UPE", sent: 87}}},
	{"a response that is no HTTP", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< ICY 200 OK$$
		<< HTTP/1.1 502 Bad Gateway$`,
		[]recorded{{reason: flow.BadResponse, status: 502, flags: "UPE", sent: 87}}},
	{"a bad chunk in a response", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$3$abc$
		<< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$3$abc$
		< -1$
		client is reset`,
		[]recorded{{reason: flow.BadResponse, status: 200, flags: "UPE", sent: 3}}},
	{"a bad chunk right behind the head of a response", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$3$abc$-1$
		<< HTTP/1.1 502 Bad Gateway$
		upstream is reset`,
		[]recorded{{reason: flow.BadResponse, status: 502, flags: "UPE", sent: 87}}},
	{"more than a response", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 1$$xHTTP/1.1 200 OK$Content-Length: 6$$poison
		<< HTTP/1.1 200 OK$Content-Length: 1$$x
		client closes
		nothing is left in the pool`,
		[]recorded{done(200, 0, 1)}},
	{"nobody listens upstream: the client has to connect again", `
		upstream listens no more
		> GET / HTTP/1.1$Host: a$$
		<< HTTP/1.1 503 Service Unavailable$
		client reads a message that ends the connection`,
		[]recorded{{reason: flow.UpstreamRefused, status: 503, flags: "UF", sent: 167}}},
	{"while the end is announced, answers close", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		the end is announced
		< HTTP/1.1 200 OK$Content-Length: 1$$x
		<< HTTP/1.1 200 OK$Content-Length: 1$Connection: close$$x
		client reads the end`,
		[]recorded{done(200, 0, 1)}},
	{"a connection without a request closes when the agent drains", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 1$$x
		<< HTTP/1.1 200 OK$Content-Length: 1$$x
		the agent drains
		client reads the end`,
		[]recorded{done(200, 0, 1)}},
	{"a request under way finishes when the agent drains", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		the agent drains
		< HTTP/1.1 200 OK$Content-Length: 1$$x
		<< HTTP/1.1 200 OK$Content-Length: 1$Connection: close$$x
		client reads the end`,
		[]recorded{done(200, 0, 1)}},
	{"empty lines before a request", `
		> $$GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> $
		> $$GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> $$$
		> $
		> $
		<< HTTP/1.1 400 Bad Request$`,
		[]recorded{done(200, 0, 0), done(200, 0, 0), {reason: flow.BadFraming, status: 400, flags: "DPE", sent: 11}}},
}

// balancedConversations take place with an upstream behind whose address the network may have several servers.
var balancedConversations = []conversation{
	{"a connection serves one downstream connection", `
		> GET /1 HTTP/1.1$Host: a$$
		>> GET /1 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> GET /2 HTTP/1.1$Host: a$$
		>> GET /2 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		client closes
		upstream reads the end
		nothing is left in the pool
		client connects again
		> GET /3 HTTP/1.1$Host: a$$
		upstream gets a connection
		>> GET /3 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		the pool was not asked`,
		[]recorded{done(200, 0, 0), done(200, 0, 0), done(200, 0, 0)}},
	{"upstream closes between two requests: so does downstream, and the client connects anew", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		upstream closes its half
		client reads the end`,
		[]recorded{done(200, 0, 0)}},
	{"a new connection ends before a byte of a response: the request is sent again, once", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		upstream resets
		upstream gets a connection
		>> GET / HTTP/1.1$Host: a$$
		upstream resets
		<< HTTP/1.1 503 Service Unavailable$`,
		[]recorded{{reason: flow.UpstreamClosed, status: 503, flags: "UC", sent: 95}}},
	{"a PUT with its body is sent again, too", `
		> PUT / HTTP/1.1$Host: a$Content-Length: 4$$body
		>> PUT / HTTP/1.1$Host: a$Content-Length: 4$$body
		upstream closes
		upstream gets a connection
		>> PUT / HTTP/1.1$Host: a$Content-Length: 4$$body
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$
		> GET /2 HTTP/1.1$Host: a$$
		>> GET /2 HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{done(200, 4, 0), done(200, 0, 0)}},
	{"a POST is not sent again after a new connection has ended", `
		> POST / HTTP/1.1$Host: a$Content-Length: 4$$body
		>> POST / HTTP/1.1$Host: a$Content-Length: 4$$body
		upstream closes
		<< HTTP/1.1 503 Service Unavailable$`,
		[]recorded{{reason: flow.UpstreamClosed, status: 503, flags: "UC", received: 4, sent: 95}}},
	{"a request is not sent again after a part of its response", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 2
		upstream closes
		<< HTTP/1.1 503 Service Unavailable$`,
		[]recorded{{reason: flow.UpstreamClosed, status: 503, flags: "UC", sent: 95}}},
	{"a server that closes on a half-close has decided so", `
		> GET / HTTP/1.1$Host: a$$
		client closes its half
		>> GET / HTTP/1.1$Host: a$$
		upstream reads the end
		upstream closes
		client reads the end`,
		[]recorded{{reason: flow.DownstreamLeft, flags: "DC"}}},
}

func TestConversations(t *testing.T) {
	for _, c := range conversations {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.play(t)
		})
	}
	for _, c := range balancedConversations {
		t.Run("balanced: "+c.name, func(t *testing.T) {
			t.Parallel()
			c.playOn(t, func(r *rig) { r.balanced = true })
		})
	}
}

// within polls for a condition that has no event.
func within(t testing.TB, what string, condition func() bool) {
	t.Helper()
	nettest.Eventually(t, what, condition)
}

func TestARequestHasItsTime(t *testing.T) {
	t.Parallel()
	nettest.UnderLimit(t, 50*time.Millisecond, func(t testing.TB, limit time.Duration) {
		conversation{"", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		<< HTTP/1.1 504 Gateway Timeout$
		upstream is reset`,
			[]recorded{{reason: flow.RequestTimeout, status: 504, flags: "UT", sent: 24}},
		}.play(t, func(c *Config) { c.RequestTimeout = limit })
	})
}

func TestAHeadHasItsTime(t *testing.T) {
	t.Parallel()
	nettest.UnderLimit(t, 50*time.Millisecond, func(t testing.TB, limit time.Duration) {
		conversation{"", `
		> GET / HTTP/1.1$Host: 
		<< HTTP/1.1 408 Request Timeout$`,
			[]recorded{{reason: flow.HeadTimeout, status: 408, sent: 22}},
		}.play(t, func(c *Config) { c.HeadTimeout = limit })
	})
}

func TestAnIdleConnectionEnds(t *testing.T) {
	t.Parallel()
	nettest.UnderLimit(t, 50*time.Millisecond, func(t testing.TB, limit time.Duration) {
		conversation{"", `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$$
			< HTTP/1.1 200 OK$Content-Length: 0$$
			<< HTTP/1.1 200 OK$Content-Length: 0$$
			client reads the end`,
			[]recorded{done(200, 0, 0)},
		}.play(t, func(c *Config) { c.IdleTimeout = limit })
	})
}
