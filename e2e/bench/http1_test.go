package bench

import (
	"bytes"
	"fmt"
	"net"
	"strconv"
)

// A minimal client and origin for HTTP/1.1: they send precomputed bytes and parse only what they need.

// smallBody is the body of a response to a small request.
const smallBody = "a small body, such as a health check or a counter would give.\n" // 62 bytes

// answer1 returns a response's head with the blank line.
func answer1(contentLength int64) []byte {
	return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nServer: origin\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n"+
		"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n", contentLength)
}

// request1 returns a request's head with the blank line, with a Content-Length if there is a body.
func request1(method, path string, contentLength int64) []byte {
	length := ""
	if contentLength > 0 {
		length = fmt.Sprintf("Content-Length: %d\r\n", contentLength)
	}
	return fmt.Appendf(nil, "%s %s HTTP/1.1\r\nHost: workload.example:%d\r\nUser-Agent: load\r\nAccept: */*\r\n%s\r\n",
		method, path, http1Port, length)
}

var smallRequest1, smallAnswer1 = request1("GET", "/", 0), append(answer1(int64(len(smallBody))), smallBody...)

// http1Origin answers "GET /" with smallBody, "GET /N" with N bytes, and a request with a Content-Length with smallBody
// after it has read the body.
type http1Origin struct {
	*socket
	partial []byte // incomplete head
	body    int64  // remaining bytes of a request's body
}

func newHTTP1Origin(s *socket) reader { return &http1Origin{socket: s} }

// readable closes the connection after an error. The load then misses a response and reports it.
func (o *http1Origin) readable() error {
	in, err := o.read()
	if err == nil {
		err = o.take(in)
	}
	if err != nil {
		o.close()
	}
	return nil
}

func (o *http1Origin) take(in []byte) error {
	for len(in) > 0 {
		if o.body > 0 {
			n := min(o.body, int64(len(in)))
			in, o.body = in[n:], o.body-n
			if o.body == 0 {
				if err := o.write(smallAnswer1); err != nil {
					return err
				}
			}
			continue
		}
		if len(o.partial) > 0 {
			in, o.partial = append(o.partial, in...), nil
		}
		end := bytes.Index(in, []byte("\r\n\r\n"))
		if end < 0 {
			o.partial = bytes.Clone(in)
			return nil
		}
		if err := o.answer(in[:end+4]); err != nil {
			return err
		}
		in = in[end+4:]
	}
	return nil
}

// answer answers a request without a body; for others it sets o.body.
func (o *http1Origin) answer(head []byte) (err error) {
	if bytes.HasPrefix(head, []byte("GET / ")) {
		return o.write(smallAnswer1)
	}
	if o.body, err = contentLength(head); err != nil || o.body > 0 {
		return err
	}
	line, _, _ := bytes.Cut(head, []byte(" HTTP/1.1\r\n"))
	size, err := strconv.ParseInt(string(bytes.TrimPrefix(line, []byte("GET /"))), 10, 64)
	if err != nil {
		return err
	}
	if err := o.write(answer1(size)); err != nil {
		return err
	}
	for buf := make([]byte, bulkBuffer); size > 0 && err == nil; size -= min(size, bulkBuffer) {
		err = o.write(buf[:min(size, bulkBuffer)])
	}
	return err
}

// contentLength returns a head's Content-Length, or 0 without one.
func contentLength(head []byte) (int64, error) {
	for line := range bytes.Lines(head) {
		if name, value, _ := bytes.Cut(line, []byte(":")); bytes.EqualFold(name, []byte("content-length")) {
			return strconv.ParseInt(string(bytes.TrimSpace(value)), 10, 64)
		}
	}
	return 0, nil
}

// checkSmall reports whether in is a complete response to smallRequest1. It returns an error if in cannot become one.
func checkSmall(in []byte) (whole bool, err error) {
	end := bytes.Index(in, []byte("\r\n\r\n"))
	if end < 0 || len(in) < end+4+len(smallBody) {
		return false, nil
	}
	if !bytes.HasPrefix(in, []byte("HTTP/1.1 200 ")) || string(in[end+4:]) != smallBody {
		return false, fmt.Errorf("unexpected response %q", in)
	}
	return true, nil
}

// http1Client sends one request at a time on a connection in a loop.
type http1Client struct {
	*socket
	partial  []byte // incomplete response
	answered func(*http1Client) error
}

func (c *http1Client) send() error { return c.write(smallRequest1) }

func (c *http1Client) readable() error {
	in, err := c.read()
	if err != nil {
		return fmt.Errorf("response missing: %w", err)
	}
	if len(c.partial) > 0 {
		in = append(c.partial, in...)
	}
	whole, err := checkSmall(in)
	if err != nil || !whole {
		c.partial = append(c.partial[:0], in...)
		return err
	}
	c.partial = c.partial[:0]
	return c.answered(c)
}

// dialHTTP1 opens HTTP/1.1 connections in a new loop. answered is called for every response.
func dialHTTP1(connections int, answered func(*http1Client) error) (*loop, []*http1Client, error) {
	l, err := newLoop()
	if err != nil {
		return nil, nil, err
	}
	clients := make([]*http1Client, connections)
	for i := range clients {
		s, err := l.dial(int64(i), http1Port)
		if err != nil {
			return nil, nil, err
		}
		clients[i] = &http1Client{socket: s, answered: answered}
		if err := l.add(s.fd, clients[i]); err != nil {
			return nil, nil, err
		}
	}
	return l, clients, nil
}

// http1Load sends the next request on each connection when the previous one is answered.
func http1Load(connections int, requests int64) load {
	var l *loop
	var clients []*http1Client
	var toSend, toCome int64
	next := func(c *http1Client) error {
		if toSend == 0 {
			return nil
		}
		toSend--
		return c.send()
	}
	all := func(n int64) error {
		toSend, toCome = n, n
		for _, c := range clients {
			if err := next(c); err != nil {
				return err
			}
		}
		return l.run(patience, func() bool { return toCome == 0 })
	}
	return load{
		warm: func() (err error) {
			l, clients, err = dialHTTP1(connections, func(c *http1Client) error {
				toCome--
				return next(c)
			})
			if err != nil {
				return err
			}
			return all(min(requests, 5000))
		},
		run: func() error { return all(requests) },
	}
}

// requestOnce opens a connection, sends one request and closes the connection after the response.
func requestOnce(serial int64) error {
	conn, err := dial(serial, http1Port)
	if err != nil {
		return err
	}
	defer conn.Close()
	return request(conn)
}

// request sends a small request and reads the response.
func request(conn net.Conn) error {
	if _, err := conn.Write(smallRequest1); err != nil {
		return err
	}
	return awaitSmall(conn)
}

func awaitSmall(conn net.Conn) error {
	var buf [1024]byte
	for n := 0; ; {
		read, err := conn.Read(buf[n:])
		if err != nil {
			return fmt.Errorf("response missing: %w", err)
		}
		n += read
		if whole, err := checkSmall(buf[:n]); whole || err != nil {
			return err
		}
	}
}

// httpDownloadOnce sends a request for a response with a body of size bytes.
func httpDownloadOnce(size int64) error {
	conn, err := dial(0, http1Port)
	if err != nil {
		return err
	}
	defer conn.Close()
	return httpDownload(conn, size)
}

func httpDownload(conn net.Conn, size int64) error {
	if _, err := conn.Write(request1("GET", fmt.Sprintf("/%d", size), 0)); err != nil {
		return err
	}
	buf := make([]byte, bulkBuffer)
	end, n := -1, 0
	for end < 0 {
		read, err := conn.Read(buf[n:])
		if err != nil {
			return fmt.Errorf("response missing: %w", err)
		}
		n += read
		end = bytes.Index(buf[:n], []byte("\r\n\r\n"))
	}
	if !bytes.HasPrefix(buf, []byte("HTTP/1.1 200 ")) {
		return fmt.Errorf("unexpected response %q", buf[:end])
	}
	left := size - int64(n-end-4)
	for left > 0 {
		read, err := conn.Read(buf[:min(left, bulkBuffer)])
		if err != nil {
			return fmt.Errorf("downloading, %d bytes to come: %w", left, err)
		}
		left -= int64(read)
	}
	return nil
}

// httpUploadOnce sends a request with a body of size bytes.
func httpUploadOnce(size int64) error {
	conn, err := dial(0, http1Port)
	if err != nil {
		return err
	}
	defer conn.Close()
	return httpUpload(conn, size)
}

func httpUpload(conn net.Conn, size int64) error {
	if _, err := conn.Write(request1("POST", "/", size)); err != nil {
		return err
	}
	writeBytes(conn, size)
	return awaitSmall(conn)
}
