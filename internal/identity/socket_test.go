package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/grpcwire"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// server is a workload socket whose streams the test serves.
type server struct {
	path     string
	requests chan string // in the notation of read
	replies  chan []byte // nil ends the stream
}

// short returns a directory with a short path: that of a Unix socket has at most 107 bytes.
func short(t *testing.T) string {
	t.Helper()
	directory, err := os.MkdirTemp("", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(directory) })
	return directory
}

// startServer serves at the workload socket below root.
func startServer(t *testing.T, root, name string) *server {
	t.Helper()
	s := &server{path: filepath.Join(root, socketDirectory, name), requests: make(chan string, 10), replies: make(chan []byte)}
	if err := os.MkdirAll(filepath.Dir(s.path), 0o755); err != nil {
		t.Fatal(err)
	}
	socket, err := net.Listen("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: s, Protocols: new(http.Protocols)}
	server.Protocols.SetUnencryptedHTTP2(true)
	go server.Serve(socket)
	t.Cleanup(func() { server.Close() })
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Trailer", "Grpc-Status, Grpc-Message")
	w.WriteHeader(200)
	w.(http.Flusher).Flush()
	go s.read(r)
	for {
		select {
		case reply := <-s.replies:
			if reply == nil {
				w.Header().Set("Grpc-Status", "7")
				w.Header().Set("Grpc-Message", "no identity issued")
				return
			}
			w.Write(append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(reply))), reply...))
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

// read passes on the requests of a stream, as "node version nonce rejection".
func (s *server) read(r *http.Request) {
	for {
		var prefix [5]byte
		if _, err := io.ReadFull(r.Body, prefix[:]); err != nil {
			return
		}
		message := make([]byte, binary.BigEndian.Uint32(prefix[1:]))
		if _, err := io.ReadFull(r.Body, message); err != nil {
			return
		}
		node, version, nonce, rejection, names := "-", "", "", "", ""
		var err error
		for m := wire.Read(message, &err); m.Next(); {
			switch m.Number {
			case 1:
				version = m.String()
			case 2:
				node = m.String()
			case 3:
				names += m.String() + "+"
			case 4:
				if m.String() != secretType {
					names += "of another type"
				}
			case 5:
				nonce = m.String()
			case 6:
				for status := m.Message(); status.Next(); {
					if status.Number == 2 {
						rejection = status.String()
					}
				}
			}
		}
		if err != nil || names != "default+ROOTCA+" || r.URL.Path != StreamSecrets {
			rejection += fmt.Sprint(" MALFORMED ", names, err, r.URL.Path)
		}
		s.requests <- strings.Join([]string{node, version, nonce, rejection}, " ")
	}
}

func (s *server) expect(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-s.requests:
		if got != want && !(strings.HasSuffix(want, "…") && strings.HasPrefix(got, strings.TrimSuffix(want, "…"))) {
			t.Errorf("request %q, want %q", got, want)
		}
	case <-time.After(nettest.Patience):
		t.Fatalf("no request came, want %q", want)
	}
}

// secret returns an Any with a Secret: a certificate with its key, or roots.
func secret(name string, chain, key, roots string) []byte {
	inline := func(text string) []byte { return wire.AppendString(nil, 2, text) }
	b := wire.AppendString(nil, 1, name)
	if roots != "" {
		b = wire.AppendBytes(b, 4, wire.AppendBytes(nil, 1, inline(roots)))
	} else {
		b = wire.AppendBytes(b, 2, wire.AppendBytes(wire.AppendBytes(nil, 1, inline(chain)), 2, inline(key)))
	}
	return wire.AppendBytes(wire.AppendString(nil, 1, secretType), 2, b)
}

// push returns a DiscoveryResponse.
func push(version, nonce string, resources ...[]byte) []byte {
	b := wire.AppendString(nil, 1, version)
	for _, resource := range resources {
		b = wire.AppendBytes(b, 2, resource)
	}
	return wire.AppendString(wire.AppendString(b, 4, secretType), 5, nonce)
}

// issue returns a certificate and its key, in PEM.
func (a *authority) issue(t *testing.T, lifetime time.Duration, ids ...string) (chain, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return text(a.leaf(t, private.Public(), lifetime, ids...)), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}))
}

// fetched is a result of Fetch.
type fetched struct {
	identity *Identity
	err      error
}

func begin(t *testing.T, s *Socket) chan fetched {
	t.Helper()
	result := make(chan fetched, 1)
	go func() {
		identity, err := s.Fetch(t.Context())
		result <- fetched{identity, err}
	}()
	return result
}

func TestTheWorkloadSocketServesTheIdentity(t *testing.T) {
	root, next := newAuthority(t, "root"), newAuthority(t, "next")
	directory := short(t)
	server := startServer(t, directory, "socket")
	socket, err := FindSocket(t.Context(), directory, "")
	if err != nil || socket == nil {
		t.Fatalf("socket %v, error %v", socket, err)
	}
	socket.Node = []byte("node")
	chain, key := root.issue(t, time.Hour, web)
	roots := text(root.certificate)

	// Both secrets, one after the other.
	result := begin(t, socket)
	server.expect(t, "node   ")
	server.replies <- push("1", "a", secret("ROOTCA", "", "", roots))
	server.expect(t, "- 1 a ")
	server.replies <- push("2", "b", secret("default", chain, key, ""), secret("other", "x", "y", ""))
	got := <-result
	server.expect(t, "- 2 b ")
	if got.err != nil || got.identity.SPIFFE != web || string(got.identity.Roots.PEM) != roots {
		t.Fatalf("identity %v, error %v", got.identity, got.err)
	}
	first := got.identity

	// The same again is acknowledged; a new certificate is an identity.
	result = begin(t, socket)
	server.replies <- push("3", "c", secret("default", chain, key, ""), secret("ROOTCA", "", "", roots))
	server.expect(t, "- 3 c ")
	chain, key = root.issue(t, time.Hour, web)
	server.replies <- push("4", "d", secret("default", chain, key, ""))
	got = <-result
	server.expect(t, "- 4 d ")
	if got.err != nil || got.identity.Equal(first) {
		t.Fatalf("identity %v, error %v", got.identity, got.err)
	}

	// New roots, without the certificate.
	result = begin(t, socket)
	server.replies <- push("5", "e", secret("ROOTCA", "", "", roots+text(next.certificate)))
	got = <-result
	server.expect(t, "- 5 e ")
	if got.err != nil || string(got.identity.Roots.PEM) != roots+text(next.certificate) {
		t.Fatalf("identity %v, error %v", got.identity, got.err)
	}

	// The end of the stream is an error with its status, and the next call begins again.
	result = begin(t, socket)
	server.replies <- nil
	if got := <-result; got.err == nil || !strings.Contains(got.err.Error(), "no identity issued") || !strings.Contains(got.err.Error(), server.path) {
		t.Errorf("error %v", got.err)
	}
	result = begin(t, socket)
	server.expect(t, "node   ")
	server.replies <- push("1", "a", secret("default", chain, key, ""), secret("ROOTCA", "", "", roots))
	got = <-result
	server.expect(t, "- 1 a ")
	if got.err != nil || got.identity == nil {
		t.Errorf("error %v", got.err)
	}
}

func TestSecretsThatCannotBeAnIdentityAreRejectedByName(t *testing.T) {
	root, foreign := newAuthority(t, "root"), newAuthority(t, "foreign")
	directory := short(t)
	server := startServer(t, directory, "socket")
	socket := &Socket{Path: server.path}
	chain, key := root.issue(t, time.Hour, web)
	otherChain, otherKey := root.issue(t, time.Hour, web)
	expired, expiredKey := root.issue(t, -time.Minute, web)
	foreignChain, foreignKey := foreign.issue(t, time.Hour, web)
	nameless, namelessKey := root.issue(t, time.Hour)
	roots := text(root.certificate)

	result := begin(t, socket)
	server.expect(t, "-   ")
	server.replies <- push("1", "a", secret("default", chain, key, ""), secret("ROOTCA", "", "", roots))
	if got := <-result; got.err != nil {
		t.Fatal(got.err)
	}
	server.expect(t, "- 1 a ")
	for _, test := range []struct {
		resource []byte
		want     string
	}{
		{secret("default", otherChain, key, ""), "default: tls: private key does not match public key"},
		{secret("default", expired, expiredKey, ""), "default: x509: certificate has expired"},
		{secret("default", foreignChain, foreignKey, ""), "default: x509: certificate signed by unknown authority"},
		{secret("default", nameless, namelessKey, ""), "default: the certificate has the URIs"},
		{secret("default", "x", key, ""), "default: tls: failed to find any PEM data"},
		{secret("default", "", key, ""), "default: field 1 has no inline content"},
		{secret("default", chain, "", ""), "default: field 2 has no inline content"},
		{secret("ROOTCA", "", "", "x"), "ROOTCA: no certificate"},
		{secret("ROOTCA", chain, key, ""), "ROOTCA: field 1 has no inline content"},
		{wire.AppendString(nil, 1, "type.googleapis.com/x"), `a resource of type "type.googleapis.com/x", want a secret`},
		{wire.AppendBytes(wire.AppendString(nil, 1, secretType), 2, []byte{0xff}), "a secret: "},
	} {
		result := begin(t, socket)
		server.replies <- push("2", "b", test.resource)
		if got := <-result; got.err == nil || !strings.Contains(got.err.Error(), test.want) || strings.Contains(got.err.Error(), strings.Split(key, "\n")[1]) {
			t.Errorf("error %v, want one with %q", got.err, test.want)
		}
		server.expect(t, "- 1 b "+test.want+"…")
	}
	// The stream goes on.
	result = begin(t, socket)
	server.replies <- push("3", "c", secret("default", otherChain, otherKey, ""))
	if got := <-result; got.err != nil {
		t.Fatal(got.err)
	}
	server.expect(t, "- 3 c ")
	result = begin(t, socket)
	server.replies <- []byte{0xff}
	if got := <-result; got.err == nil || !strings.Contains(got.err.Error(), "the response: ") {
		t.Errorf("error %v", got.err)
	}
}

func TestAWorkloadSocketIsUsedIfItAnswers(t *testing.T) {
	listen := func(t *testing.T, path string) net.Listener {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		listener, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		return listener
	}
	for name, test := range map[string]struct {
		prepare func(t *testing.T, path string)
		want    string // of the error if the socket has a name of its own
	}{
		"absent": {func(*testing.T, string) {}, "no such file"},
		"a file": {func(t *testing.T, path string) {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
		}, "it is not a socket"},
		"without a server": {func(t *testing.T, path string) {
			listener := listen(t, path)
			listener.(*net.UnixListener).SetUnlinkOnClose(false)
			listener.Close()
		}, "connection refused"},
		"of a server that does not answer": {func(t *testing.T, path string) { listen(t, path) }, "it does not answer"},
		"whose first frame is a ping": {func(t *testing.T, path string) {
			listener := listen(t, path)
			go func() {
				if conn, err := listener.Accept(); err == nil {
					defer conn.Close()
					io.WriteString(conn, "\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678")
					io.Copy(io.Discard, conn)
				}
			}()
		}, "does not serve HTTP/2"},
		"of another protocol": {func(t *testing.T, path string) {
			listener := listen(t, path)
			go func() {
				if conn, err := listener.Accept(); err == nil {
					defer conn.Close()
					io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
					io.Copy(io.Discard, conn)
				}
			}()
		}, "does not serve HTTP/2"},
		"in order": {func(t *testing.T, path string) {
			root := strings.TrimSuffix(path, filepath.Join(socketDirectory, filepath.Base(path)))
			startServer(t, root, filepath.Base(path))
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			for _, file := range []string{"", "socket", "own"} {
				root := short(t)
				path := filepath.Join(root, socketDirectory, file)
				if file == "" {
					path = filepath.Join(root, socketDirectory, "socket")
				}
				test.prepare(t, path)
				socket, err := FindSocket(t.Context(), root, file)
				switch {
				case test.want == "":
					if err != nil || socket == nil || socket.Path != path {
						t.Errorf("name %q: %v, error %v", file, socket, err)
					}
				case file == "own":
					if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), path) || socket != nil {
						t.Errorf("name %q: %v, error %v, want one with %q", file, socket, err, test.want)
					}
				case err != nil || socket != nil:
					t.Errorf("name %q: %v, error %v", file, socket, err)
				}
			}
		})
	}
	for _, name := range []string{"../socket", "/tmp/socket", "a/b", ".", ".."} {
		if _, err := FindSocket(t.Context(), t.TempDir(), name); err == nil || !strings.Contains(err.Error(), "not the name of a file") {
			t.Errorf("%q: error %v", name, err)
		}
	}
}

// silent is a transport whose streams open and bring nothing.
type silent struct{ opened int }

func (s *silent) RoundTrip(r *http.Request) (*http.Response, error) {
	s.opened++
	go io.Copy(io.Discard, r.Body)
	body, end := io.Pipe()
	context.AfterFunc(r.Context(), func() { end.CloseWithError(r.Context().Err()) })
	return &http.Response{StatusCode: 200, ProtoMajor: 2, Header: http.Header{"Content-Type": {"application/grpc"}}, Body: body}, nil
}

// A server that stops pushing is asked again in time: within 15 s for the first identity, and later by half of what is left
// of the certificate's lifetime.
func TestASilentWorkloadSocketIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		transport := &silent{}
		socket := &Socket{Path: "/silent", client: &grpcwire.Client{Transport: transport, MaxMessage: 1}}
		begun := time.Now()
		if _, err := socket.Fetch(t.Context()); err == nil || !strings.Contains(err.Error(), "/silent: no identity within 15s") || time.Since(begun) != firstAnswer {
			t.Errorf("error %v after %v", err, time.Since(begun))
		}
		root := newAuthority(t, "root")
		if err := socket.open(t.Context()); err != nil {
			t.Fatal(err)
		}
		socket.current = root.identity(t, 24*time.Hour)
		begun = time.Now()
		if _, err := socket.Fetch(t.Context()); err == nil || time.Since(begun) < 11*time.Hour || time.Since(begun) > 12*time.Hour {
			t.Errorf("error %v after %v, want 12 h", err, time.Since(begun))
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := socket.Fetch(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want that of the context", err)
		}
		if transport.opened != 3 || socket.stream != nil {
			t.Errorf("%d streams, open: %v", transport.opened, socket.stream != nil)
		}
	})
}

// FuzzSecrets decodes arbitrary responses: each is an error or leaves secrets that are whole.
func FuzzSecrets(f *testing.F) {
	f.Add(push("1", "a", secret("default", "chain", "key", ""), secret("ROOTCA", "", "", "roots")))
	f.Fuzz(func(t *testing.T, message []byte) {
		r, err := decodeSecrets(message, secrets{})
		if err == nil && (r.secrets.chain == nil) != (r.secrets.key == nil) {
			t.Errorf("%q, %q", r.secrets.chain, r.secrets.key)
		}
	})
}
