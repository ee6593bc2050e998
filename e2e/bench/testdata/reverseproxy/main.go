// Command reverseproxy is a transparent HTTP proxy made from the standard library: http.Server in front, and
// httputil.ReverseProxy with a Transport for each protocol, to the original destination of each connection. Pillion's HTTP
// engines must outperform it. HTTP/1.1 and HTTP/2 without TLS, IPv4 only; see package bench.
package main

import (
	"bufio"
	"context"
	"fmt"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/sockopt"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: reverseproxy <listen address> <readiness address>")
	}
	access := newAccessLog(os.Stdout)
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	proxy := http.Server{
		Addr:        os.Args[1],
		Handler:     access.handler(newReverseProxy()),
		Protocols:   &protocols,
		ConnContext: withOriginalDestination,
		ErrorLog:    log.New(os.Stderr, "", 0),
	}
	go serveReadiness(os.Args[2])
	log.Fatal(proxy.ListenAndServe())
}

func serveReadiness(address string) {
	ready := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	log.Fatal(http.ListenAndServe(address, ready))
}

// destination is the context's key for the original destination of a connection, as text.
type destination struct{}

func withOriginalDestination(ctx context.Context, conn net.Conn) context.Context {
	peer := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		log.Fatal(err)
	}
	var original netip.AddrPort
	var failed error
	if err := raw.Control(func(fd uintptr) { original, failed = sockopt.OriginalDst(int(fd), peer) }); err != nil || failed != nil {
		log.Print(err, failed) // the requests of this connection fail without a destination
	}
	return context.WithValue(ctx, destination{}, original.String())
}

func newReverseProxy() *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme = "http"
			r.Out.URL.Host = r.In.Context().Value(destination{}).(string)
			r.Out.Host = r.In.Host
			r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"] // ReverseProxy removed it
			r.SetXForwarded()
			r.Out.Header.Del("X-Forwarded-Host")
			r.Out.Header.Del("X-Forwarded-Proto")
			r.Out.Header.Set("X-Request-Id", requestID())
		},
		Transport:  sameProtocol{newTransport((*http.Protocols).SetHTTP1), newTransport((*http.Protocols).SetUnencryptedHTTP2)},
		BufferPool: &buffers{sync.Pool{New: func() any { return make([]byte, 32<<10) }}},
	}
}

// sameProtocol sends a request in the protocol version in which it arrived.
type sameProtocol struct{ http1, http2 *http.Transport }

func (s sameProtocol) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.ProtoMajor == 2 {
		return s.http2.RoundTrip(r)
	}
	return s.http1.RoundTrip(r)
}

func newTransport(set func(*http.Protocols, bool)) *http.Transport {
	var protocols http.Protocols
	set(&protocols, true)
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 6)}, Timeout: 10 * time.Second}
	return &http.Transport{
		DialContext:         dialer.DialContext,
		Protocols:           &protocols,
		MaxIdleConns:        0, // no limit
		MaxIdleConnsPerHost: 8192,
		DisableCompression:  true,
	}
}

type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte  { return b.pool.Get().([]byte) }
func (b *buffers) Put(s []byte) { b.pool.Put(s) }

// requestID returns a random UUID of version 4.
func requestID() string {
	high, low := rand.Uint64(), rand.Uint64()
	return fmt.Sprintf("%08x-%04x-4%03x-%04x-%012x", high>>32, high>>16&0xffff, high&0xfff, low>>48&0x3fff|0x8000, low&(1<<48-1))
}

// accessLog writes a line for each request, through a buffer.
type accessLog struct {
	mu   sync.Mutex
	out  *bufio.Writer
	line []byte
}

func newAccessLog(to *os.File) *accessLog {
	return &accessLog{out: bufio.NewWriterSize(to, 64<<10)}
}

func (a *accessLog) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begin := time.Now()
		counted := counter{ResponseWriter: w}
		next.ServeHTTP(&counted, r)
		a.write(begin, r, &counted)
	})
}

func (a *accessLog) write(begin time.Time, r *http.Request, answer *counter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	line := begin.AppendFormat(a.line[:0], time.RFC3339Nano)
	for _, field := range []string{r.RemoteAddr, r.Method, r.RequestURI, r.Proto, r.Host} {
		line = append(append(line, ' '), field...)
	}
	line = strconv.AppendInt(append(line, ' '), int64(answer.status), 10)
	line = strconv.AppendInt(append(line, ' '), answer.bytes, 10)
	line = strconv.AppendInt(append(line, ' '), time.Since(begin).Microseconds(), 10)
	a.line = append(line, '\n')
	a.out.Write(a.line)
}

// counter records the status and the size of a response.
type counter struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (c *counter) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.bytes += int64(n)
	return n, err
}

// Unwrap lets ReverseProxy flush.
func (c *counter) Unwrap() http.ResponseWriter { return c.ResponseWriter }
