package e2e

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// gatewayAddress is where eachEdge's gateways listen.
var gatewayAddress = netip.AddrPortFrom(nettest.PodIP4, 8443)

// eachEdge runs a test with a gateway of plain HTTP and with one of HTTPS, at port 8443. Requests go to port 9001.
func eachEdge(t *testing.T, test func(t *testing.T, e *edge, scheme string)) {
	for _, scheme := range []string{"http", "https"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			e := newEdge(t)
			flags := []string{"--listen", "8443", "--route", "*=127.0.0.1:9001"}
			if scheme == "https" {
				e.certify(t, "a", "shop.example")
				flags = append(flags, "--cert", e.path("a.pem"), "--key", e.path("a.pem"))
			}
			e.start(t, flags...)
			test(t, e, scheme)
		})
	}
}

// way is from the peer to a program on the pod's loopback interface.
func (e *edge) way() way {
	return way{name: "gateway", from: e.peer, to: e.pod, address: netip.MustParseAddr("127.0.0.1")}
}

// runPeer runs a program of testdata/peers in the peer. It trusts the certificates of certify.
func (e *edge) runPeer(t *testing.T, program string, arguments ...string) string {
	t.Helper()
	cmd := e.peer.Command(0, 0, program, arguments...)
	cmd.Env = append(os.Environ(), "SSL_CERT_FILE="+e.path("root.crt"))
	out, err := e.peer.Run(cmd)
	if err != nil {
		t.Fatalf("%v\n%s", err, e.agent.log)
	}
	return out
}

// clients are of HTTP/1 and HTTP/2. In the clear, the latter begins without an upgrade.
func (e *edge) clients() map[string]*http.Client {
	return map[string]*http.Client{"HTTP/1.1": e.client(false), "HTTP/2": func() *http.Client {
		c := e.client(true)
		c.Transport.(*http.Transport).Protocols.SetUnencryptedHTTP2(true)
		return c
	}()}
}

// eachVersion runs a test by HTTP/1 and HTTP/2, in the clear and inside TLS, with a handler behind the gateway.
func eachVersion(t *testing.T, handler http.HandlerFunc, test func(t *testing.T, client *http.Client, url string)) {
	eachEdge(t, func(t *testing.T, e *edge, scheme string) {
		serveHTTP(t, e.pod.Listen(t, "tcp", "127.0.0.1:9001"), handler)
		for version, client := range e.clients() {
			t.Run(version, func(t *testing.T) {
				defer client.CloseIdleConnections()
				test(t, client, scheme+"://shop.example:8443/")
			})
		}
	})
}

// gRPC's interoperability test passes: all kinds of calls, deadlines, cancellation and trailers, for a server that speaks
// only HTTP/2.
func TestGatewayCarriesGRPC(t *testing.T) {
	t.Parallel()
	program := peer(t, "grpc")
	eachEdge(t, func(t *testing.T, e *edge, scheme string) {
		e.way().startPeer(t, 9001, program, "serve", "ADDRESS")
		output := e.runPeer(t, program, "call", strings.TrimPrefix(scheme+"://"+gatewayAddress.String(), "http://"))
		if !strings.HasSuffix(output, "ok unimplemented method\n") || strings.Count(output, "ok ") != strings.Count(output, "\n") {
			t.Errorf("client output:\n%s", output)
		}
		e.agent.access.await(t, "/grpc.testing.TestService/FullDuplexCall HTTP/2")
	})
}

// h2specExcept are tests of h2spec that fail, with the reason.
var h2specExcept = map[string]string{
	"http2/3.5/2 Sends invalid connection preface": "the first bytes decide for HTTP/1, which answers 400 and closes",
}

// The gateway passes the tests of h2spec, although its server speaks HTTP/1.
func TestGatewayPassesH2spec(t *testing.T) {
	t.Parallel()
	program := peer(t, "h2spec")
	eachEdge(t, func(t *testing.T, e *edge, scheme string) {
		e.serve(t, 9001, "hello")
		arguments := []string{"-timeout", (nettest.Patience / 2).String(), nettest.PodIP4.String(), strconv.Itoa(int(gatewayAddress.Port()))}
		if scheme == "https" {
			arguments = append([]string{"-tls"}, arguments...)
		}
		cmd := e.peer.Command(0, 0, program, arguments...)
		cmd.Stderr = io.Discard
		out, err := e.peer.Run(cmd)
		if err != nil || strings.Count(out, "pass ") < 100 {
			t.Fatalf("%v\n%s", err, out)
		}
		for line := range strings.Lines(out) {
			verdict, test, _ := strings.Cut(strings.TrimSpace(line), " ")
			if verdict != "pass" && h2specExcept[test] == "" {
				t.Errorf("h2spec: %s", line)
			}
		}
	})
}

// Handshake, compression, messages of all sizes and the orderly end of a WebSocket.
func TestGatewayCarriesWebSockets(t *testing.T) {
	t.Parallel()
	program := peer(t, "websocket")
	eachEdge(t, func(t *testing.T, e *edge, scheme string) {
		e.way().startPeer(t, 9001, program, "serve", "ADDRESS")
		e.runPeer(t, program, "talk", strings.Replace(scheme, "http", "ws", 1)+"://"+gatewayAddress.String()+"/")
		if line := e.agent.access.await(t, "GET / HTTP/1.1"); !strings.Contains(line, " 101 ") { // the end of TLS may look like a lost client
			t.Error(line)
		}
	})
}

// gRPC-Web is HTTP like any other: its messages and the trailers inside its body pass unchanged, and the server gets HTTP/1.
func TestGatewayPassesGRPCWeb(t *testing.T) {
	t.Parallel()
	message := "\x00\x00\x00\x00\x02\x08\x01\x80\x00\x00\x00\x0fgrpc-status:0\r\n"
	eachVersion(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		w.Header().Set("Seen", r.Proto+" "+r.Header.Get("X-Grpc-Web"))
		io.Copy(w, r.Body)
	}, func(t *testing.T, client *http.Client, url string) {
		for _, kind := range []string{"application/grpc-web", "application/grpc-web+proto", "application/grpc-web-text"} {
			request, err := http.NewRequest("POST", url+"shop.Stock/Reserve", strings.NewReader(message))
			if err != nil {
				t.Fatal(err)
			}
			request.Header = http.Header{"Content-Type": {kind}, "X-Grpc-Web": {"1"}}
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(response.Body)
			response.Body.Close()
			if seen := response.Header.Get("Seen"); err != nil || string(body) != message || seen != "HTTP/1.1 1" || response.Header.Get("Content-Type") != kind {
				t.Errorf("%s: %q, %v, content-type %s, the server saw %s", kind, body, err, response.Header.Get("Content-Type"), seen)
			}
		}
	})
}

// Each server-sent event arrives before the next one is written.
func TestGatewayPassesEventsAtOnce(t *testing.T) {
	t.Parallel()
	var streams sync.Map // by the query; a stream that has ended may still wait for its event
	next := func(query string) chan int {
		stream, _ := streams.LoadOrStore(query, make(chan int))
		return stream.(chan int)
	}
	eachVersion(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for {
			w.(http.Flusher).Flush()
			select {
			case i := <-next(r.URL.RawQuery):
				fmt.Fprintf(w, "data: %d\n\n", i)
			case <-r.Context().Done():
				return
			}
		}
	}, func(t *testing.T, client *http.Client, url string) {
		query := fmt.Sprintf("%p", client)
		response, err := client.Get(url + "?" + query)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		reader := bufio.NewReader(response.Body)
		for i := range 5 {
			next(query) <- i
			event, err := reader.ReadString('\n')
			empty, _ := reader.ReadString('\n')
			if err != nil || event != fmt.Sprintf("data: %d\n", i) || empty != "\n" {
				t.Fatalf("event %d: %q, %v", i, event, err)
			}
		}
	})
}

// bodySize is that of a large body.
const (
	bodySize = 256 << 20
	bodyStep = 1 << 20
)

// A body passes both ways at once without being held (bodies of 1 GiB are in the package hostility): each step of the upload comes back before the next is
// sent, and the gateway's memory does not grow with the body.
func TestGatewayHoldsNoBodies(t *testing.T) {
	t.Parallel()
	size := bodySize
	if raceDetector {
		size /= 8
	}
	eachEdge(t, func(t *testing.T, e *edge, scheme string) {
		serveHTTP(t, e.pod.Listen(t, "tcp", "127.0.0.1:9001"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.NewResponseController(w).EnableFullDuplex()
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			io.Copy(flushed{w}, r.Body)
		}))
		for version, client := range e.clients() {
			t.Run(version, func(t *testing.T) {
				defer client.CloseIdleConnections()
				client.Timeout = 10 * nettest.Patience // for all of the body
				echoes(t, client, scheme+"://shop.example:8443/", size)
			})
		}
		peak, err := strconv.Atoi(strings.TrimSuffix(e.agent.status(t, "VmHWM"), " kB"))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("at most %d MiB", peak>>10)
		if limit := size >> 1; peak<<10 > limit && !raceDetector {
			t.Errorf("the gateway used %d KiB, more than %d for bodies of %d", peak, limit>>10, size>>10)
		}
	})
}

// flushed writes through.
type flushed struct{ http.ResponseWriter }

func (f flushed) Write(b []byte) (int, error) {
	n, err := f.ResponseWriter.Write(b)
	f.ResponseWriter.(http.Flusher).Flush()
	return n, err
}

// echoes sends size bytes, of which each step must come back before the next.
func echoes(t *testing.T, client *http.Client, url string, size int) {
	t.Helper()
	from, to := io.Pipe()
	defer to.Close()
	request, err := http.NewRequest("POST", url, from)
	if err != nil {
		t.Fatal(err)
	}
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	step, got := make([]byte, bodyStep), make([]byte, bodyStep)
	for i := range step {
		step[i] = byte(i * 31 % 251)
	}
	for n := 0; n < size; n += bodyStep {
		step[0] = byte(n / bodyStep)
		written := make(chan error, 1)
		go func() {
			_, err := to.Write(step)
			written <- err
		}()
		_, err := io.ReadFull(response.Body, got)
		if err := <-written; err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		if err != nil || !bytes.Equal(got, step) {
			t.Fatalf("after %d bytes: another echo, %v", n, err)
		}
	}
	to.Close()
	if rest, err := io.ReadAll(response.Body); len(rest) > 0 || err != nil {
		t.Errorf("%d bytes follow, %v", len(rest), err)
	}
}

// OpenSSL's client gets the certificate of the name that it asks for, and the first of the protocols that both have.
func TestGatewayServesOpenSSL(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.serve(t, 9001, "shop")
	e.certify(t, "shop", "shop.example")
	e.certify(t, "api", "api.example")
	e.start(t, "--listen", "8443", "--route", "*=127.0.0.1:9001",
		"--cert", e.path("shop.pem"), "--key", e.path("shop.pem"), "--cert", e.path("api.pem"), "--key", e.path("api.pem"))
	for _, c := range []struct{ arguments, want string }{
		{"-servername shop.example -verify_hostname shop.example -alpn h2,http/1.1 -tls1_3", "ALPN protocol: h2"},
		{"-servername api.example -verify_hostname api.example -alpn http/1.1 -tls1_2", "ALPN protocol: http/1.1"},
		{"-verify_hostname shop.example -noservername -tls1_3", "No ALPN negotiated"},
		{"-verify_hostname shop.example -servername other.example", "No ALPN negotiated"},
	} {
		arguments := append([]string{"s_client", "-connect", gatewayAddress.String(), "-CAfile", e.path("root.crt"), "-verify_return_error"}, strings.Fields(c.arguments)...)
		cmd := e.peer.Command(0, 0, "openssl", arguments...)
		cmd.Stdin = strings.NewReader("")
		if out, err := e.peer.Run(cmd); err != nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v, want %q\n%s", c.arguments, err, c.want, out)
		}
	}
	cmd := e.peer.Command(0, 0, "openssl", "s_client", "-connect", gatewayAddress.String(), "-tls1_1")
	cmd.Stdin = strings.NewReader("")
	if out, err := e.peer.Run(cmd); err == nil {
		t.Errorf("TLS 1.1 is accepted\n%s", out)
	}
}

// A real browser uses a site behind the gateway; testdata/peers/page/gateway.mjs lists what must work.
func TestGatewayServesABrowser(t *testing.T) {
	t.Parallel()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v: make tools-test installs it", err)
	}
	websocket := peer(t, "websocket")
	e := newEdge(t)
	e.serve(t, 9002, "rest")
	e.way().startPeer(t, 9003, websocket, "serve", "ADDRESS")
	serveSite(t, e.pod.Listen(t, "tcp", "127.0.0.1:9001"))
	shop, others := e.certify(t, "shop", "shop.example"), e.certify(t, "others", "*.other.example", "api.example")
	e.configure(t, "listen: 8443", "redirect-http: 8080", "cert:", "- DIR/shop.pem", "- DIR/others.pem", "key:", "- DIR/shop.pem", "- DIR/others.pem",
		"route:", "- shop.example=127.0.0.1:9001", "- shop.example/echo=127.0.0.1:9003", `- "*=127.0.0.1:9002"`)
	e.start(t, "--config", e.path("edge.yaml"))
	cmd := e.peer.Command(0, 0, "node", "gateway.mjs", chromium, nettest.PodIP4.String(), keyHash(t, shop)+","+keyHash(t, others))
	cmd.Dir = "testdata/peers/page"
	if out, err := e.peer.Run(cmd); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, e.agent.access)
	}
}

// keyHash returns what Chromium compares keys by.
func keyHash(t *testing.T, certificate string) string {
	parsed, err := x509.ParseCertificate([]byte(certificate))
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(parsed.RawSubjectPublicKeyInfo)
	return base64.StdEncoding.EncodeToString(hash[:])
}

// serveSite serves what gateway.mjs uses.
func serveSite(t *testing.T, listener net.Listener) {
	next := make(chan struct{}, 10)
	site := http.NewServeMux()
	site.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "shop %s%s", r.Host, r.URL) })
	site.HandleFunc("/hash", func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		io.Copy(hash, r.Body)
		fmt.Fprintf(w, "%x", hash.Sum(nil))
	})
	site.HandleFunc("/large", func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 16<<20)) })
	site.HandleFunc("/cookies", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%d %d", len(r.Header["Cookie"]), len(r.Cookies()))
	})
	site.HandleFunc("/next", func(http.ResponseWriter, *http.Request) { next <- struct{}{} })
	site.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := 0; ; i++ {
			fmt.Fprintf(w, "data: %d\n\n", i)
			w.(http.Flusher).Flush()
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
		}
	})
	serveHTTP(t, listener, site)
}
