package http1test

const (
	ok      = "HTTP/1.1 200 OK\r\n"
	chunked = ok + "Transfer-Encoding: chunked\r\n"
	answer  = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad" // what an attacker would like to have read as a response
)

// Responses are the responses of the table.
var Responses = []Message{
	// The status line.
	{Name: "an ordinary response", Bytes: ok + "Content-Length: 5\r\n\r\nhello", Want: "sized 5"},
	{Name: "a reason of several words", Bytes: "HTTP/1.1 404 Not Found, sorry: \xc3\xa9\t\r\nContent-Length: 0\r\n\r\n", Want: "sized 0"},
	{Name: "an empty reason", Bytes: "HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", Want: "sized 0"},
	{Name: "no reason", Bytes: "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", Want: "sized 0"},
	{Name: "a status of its own", Bytes: "HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", Want: "sized 0"},
	{Name: "an HTTP/1.0 response", Bytes: "HTTP/1.0 200 OK\r\n\r\nhello", Want: "until close 5"},
	{Name: "lines of a response that end with LF", Bytes: "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", Want: "sized 5",
		Head: ok + "Content-Length: 5\r\n\r\n"},
	{Name: "an empty line before the response", Bytes: "\r\n" + ok + "\r\n", Want: "bad_status_line"},
	{Name: "a status of two digits", Bytes: "HTTP/1.1 20 OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "a status of four digits", Bytes: "HTTP/1.1 2000 OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "a status below 100", Bytes: "HTTP/1.1 099 OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "a status with a sign", Bytes: "HTTP/1.1 +20 OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "a status with a letter", Bytes: "HTTP/1.1 2xx OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "no status", Bytes: "HTTP/1.1\r\n\r\n", Want: "bad_status_line"},
	{Name: "a reason for a status", Bytes: "HTTP/1.1 OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "two spaces before the status", Bytes: "HTTP/1.1  200 OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "a tab before the status", Bytes: "HTTP/1.1\t200 OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "a tab behind the status", Bytes: "HTTP/1.1 200\tOK\r\n\r\n", Want: "bad_status_line"},
	{Name: "a space before the response", Bytes: " HTTP/1.1 200 OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "a response of HTTP/2", Bytes: "HTTP/2.0 200 OK\r\n\r\n", Want: "bad_version"},
	{Name: "a response of another protocol", Bytes: "XTTP/1.0 200 OK\r\n\r\n", Want: "bad_version"},
	{Name: "a response of ICY", Bytes: "ICY 200 OK\r\n\r\n", Want: "bad_status_line"},
	{Name: "a version of a response in small letters", Bytes: "http/1.1 200 OK\r\n\r\n", Want: "bad_version"},
	{Name: "a page without a head", Bytes: "<html>\n", Want: "bad_status_line"},
	{Name: "NUL in a reason", Bytes: "HTTP/1.1 200 O\x00K\r\n\r\n", Want: "nul"},
	{Name: "CR in a reason", Bytes: "HTTP/1.1 200 O\rK\r\n\r\n", Want: "bare_cr"},
	{Name: "a folded field of a response", Bytes: ok + "X: a\r\n b\r\n\r\n", Want: "obs_fold"},
	{Name: "a response with a space before the colon", Bytes: ok + "Content-Length : 5\r\n\r\nhello", Want: "space_before_colon"},

	// Framing.
	{Name: "a response until close", Bytes: ok + "\r\nhello", Want: "until close 5"},
	{Name: "a response until close that has nothing", Bytes: ok + "Connection: close\r\n\r\n", Want: "until close 0", Head: ok + "\r\n"},
	{Name: "a response that looks like two until close", Bytes: ok + "\r\n" + answer, Want: "until close 41"},
	{Name: "a sized response and more", Bytes: ok + "Content-Length: 5\r\n\r\nhello" + answer, Want: "sized 5", Rest: answer},
	{Name: "a chunked response and more", Bytes: chunked + "\r\n5\r\nhello\r\n0\r\n\r\n" + answer, Want: "chunked 5", Rest: answer},
	{Name: "a response that ends too early", Bytes: ok + "Content-Length: 5\r\n\r\nhell", Want: Incomplete},
	{Name: "a chunked response that ends too early", Bytes: chunked + "\r\n5\r\nhello\r\n", Want: Incomplete},
	{Name: "a response with both framings", Bytes: chunked + "Content-Length: 5\r\n\r\n0\r\n\r\n", Want: "both_framings"},
	{Name: "a response with two sizes", Bytes: ok + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", Want: "content_lengths_differ"},
	{Name: "a response with two equal sizes", Bytes: ok + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", Want: "sized 5",
		Head: ok + "Content-Length: 5\r\n\r\n"},
	{Name: "a response with a size that is none", Bytes: ok + "Content-Length: five\r\n\r\nhello", Want: "bad_content_length"},
	{Name: "a response with an unknown coding", Bytes: ok + "Transfer-Encoding: gzip\r\n\r\nhello", Want: "unsupported_coding"},
	{Name: "a response with gzip and chunked", Bytes: ok + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", Want: "unsupported_coding"},
	{Name: "a response with two codings", Bytes: chunked + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Want: "repeated_transfer_encoding"},
	{Name: "an HTTP/1.0 response with a coding", Bytes: "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Want: "transfer_encoding_in_http10"},
	{Name: "a chunk of a response that is too short", Bytes: chunked + "\r\n7\r\nhello\r\n0\r\n\r\n", Want: "bad_chunk_end"},
	{Name: "two Hosts in a response", Bytes: ok + "Host: a\r\nHost: b\r\nContent-Length: 0\r\n\r\n", Want: "sized 0"},

	// No body, whatever the fields say.
	{Name: "an answer to HEAD", Method: "HEAD", Bytes: ok + "Content-Length: 5\r\n\r\n" + answer, Want: "no body", Rest: answer},
	{Name: "a chunked answer to HEAD", Method: "HEAD", Bytes: chunked + "\r\n" + answer, Want: "no body", Rest: answer},
	{Name: "an answer to HEAD without a framing", Method: "HEAD", Bytes: ok + "\r\n" + answer, Want: "no body", Rest: answer},
	{Name: "an answer to HEAD with both framings", Method: "HEAD", Bytes: chunked + "Content-Length: 5\r\n\r\n", Want: "both_framings"},
	{Name: "an answer to HEAD with a size that is none", Method: "HEAD", Bytes: ok + "Content-Length: x\r\n\r\n", Want: "bad_content_length"},
	{Name: "an answer to head is one to another method", Method: "head", Bytes: ok + "Content-Length: 5\r\n\r\nhello", Want: "sized 5"},
	{Name: "100", Bytes: "HTTP/1.1 100 Continue\r\n\r\n" + answer, Want: "no body", Rest: answer},
	{Name: "103", Bytes: "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + answer, Want: "no body", Rest: answer},
	{Name: "100 with a size", Bytes: "HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n" + answer, Want: "no body", Rest: answer},
	{Name: "204", Bytes: "HTTP/1.1 204 No Content\r\n\r\n" + answer, Want: "no body", Rest: answer},
	{Name: "204 with a coding", Bytes: "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n" + answer, Want: "no body", Rest: answer},
	{Name: "204 with both framings", Bytes: "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n", Want: "both_framings"},
	{Name: "304 with a size", Bytes: "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n" + answer, Want: "no body", Rest: answer},
	{Name: "205 has the body that it says", Bytes: "HTTP/1.1 205 Reset Content\r\nContent-Length: 5\r\n\r\nhello", Want: "sized 5"},

	// Tunnels.
	{Name: "101", Bytes: "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x05hello", Want: "tunnel",
		Head: "HTTP/1.1 101 Switching Protocols\r\n\r\n", Rest: "\x81\x05hello"},
	{Name: "101 with both framings", Bytes: "HTTP/1.1 101 Switching Protocols\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n", Want: "both_framings"},
	{Name: "200 to CONNECT", Method: "CONNECT", Bytes: ok + "\r\n\x16\x03\x01", Want: "tunnel", Rest: "\x16\x03\x01"},
	{Name: "200 to CONNECT with fields that mean nothing", Method: "CONNECT", Bytes: chunked + "Content-Length: x\r\n\r\n\x16", Want: "tunnel", Rest: "\x16"},
	{Name: "403 to CONNECT", Method: "CONNECT", Bytes: "HTTP/1.1 403 No\r\nContent-Length: 5\r\n\r\nhello", Want: "sized 5"},

	// What is not forwarded.
	{Name: "hop-by-hop fields of a response", Bytes: ok + "Connection: X-Hop, close\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\nX-End: 2\r\n\r\n",
		Want: "sized 0", Head: ok + "Content-Length: 0\r\nX-End: 2\r\n\r\n"},
	{Name: "Connection names what identity depends on in a response", Bytes: ok + "Connection: Set-Cookie, WWW-Authenticate, Server\r\nSet-Cookie: a\r\n" +
		"WWW-Authenticate: b\r\nServer: c\r\nContent-Length: 0\r\n\r\n", Want: "sized 0",
		Head: ok + "Set-Cookie: a\r\nWWW-Authenticate: b\r\nServer: c\r\nContent-Length: 0\r\n\r\n"},
	{Name: "an upgrade to h2c that is only offered", Bytes: ok + "Connection: Upgrade\r\nUpgrade: h2,h2c\r\nContent-Length: 0\r\n\r\n", Want: "sized 0",
		Head: ok + "Content-Length: 0\r\n\r\n"},

	// Too short.
	{Name: "no response", Bytes: "", Want: Incomplete},
	{Name: "half a status line", Bytes: "HTTP/1.1 200", Want: Incomplete},
	{Name: "half a head", Bytes: ok, Want: Incomplete},
}
