package edge

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

// files is a directory with a gateway's files.
type files struct {
	dir  string
	root *securetest.Authority
}

func newFiles(t *testing.T) *files {
	return &files{t.TempDir(), securetest.New(t, "root")}
}

func (f *files) path(name string) string { return filepath.Join(f.dir, name) }

// write replaces a file by a rename.
func (f *files) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(f.path("new"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(f.path("new"), f.path(name)); err != nil {
		t.Fatal(err)
	}
}

// certify writes NAME.crt and NAME.key of a certificate for names.
func (f *files) certify(t *testing.T, name string, names ...string) {
	t.Helper()
	leaf := f.root.Leaf(t, "", func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, names })
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	f.write(t, name+".key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
	f.write(t, name+".crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Certificate[0]})))
}

// config writes the file of settings, with the certificates of names.
func (f *files) config(t *testing.T, settings string, names ...string) string {
	t.Helper()
	for _, setting := range []struct{ name, suffix string }{{"cert", ".crt"}, {"key", ".key"}} {
		if len(names) > 0 {
			settings += "\n" + setting.name + ":"
		}
		for _, name := range names {
			settings += "\n- " + f.path(name+setting.suffix)
		}
	}
	f.write(t, "edge.yaml", settings+"\n")
	return f.path("edge.yaml")
}

// A request is for the longest prefix of its host's routes, whatever their order is.
func TestRoutesAreFoundByHostAndPrefix(t *testing.T) {
	c, err := Parse(`{listen: 1}`)
	if err == nil {
		t.Fatalf("%+v", c)
	}
	c, err = Parse("listen: 80\nroute:\n- '*=10.0.0.1:80'\n- shop.example=10.0.0.2:80\n- shop.example/api/v2/=10.0.0.3:80\n- SHOP.example/api=10.0.0.4:80\n- '*.shop.example=10.0.0.5:80'\n- path.example/only=10.0.0.6:80")
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(c, "", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	table := route.Of(s.Snapshot().RouteTable(routesName))
	for request, want := range map[string]string{
		"other.example/":          "*",
		"shop.example/":           "shop.example",
		"shop.example:8443/x":     "shop.example",
		"Shop.Example/api":        "shop.example/api",
		"shop.example/api/x":      "shop.example/api",
		"shop.example/apis":       "shop.example",
		"shop.example/api/v2":     "shop.example/api/v2",
		"shop.example/api/v2/x?y": "shop.example/api/v2",
		"a.shop.example/api":      "*.shop.example",
		"path.example/only?q":     "path.example/only",
		"path.example/other":      "",
	} {
		authority, path, _ := strings.Cut(request, "/")
		choice := table.Find(&route.Request{Method: []byte("GET"), Authority: []byte(authority), Path: []byte("/" + path), Scheme: []byte("https")})
		got := ""
		if choice.Cluster != nil {
			got = choice.Cluster.Name
		}
		if got != want {
			t.Errorf("%s goes to %q, want %q", request, got, want)
		}
		if want != "" && s.Snapshot().Hosts(s.Snapshot().Cluster(got)) == nil {
			t.Errorf("%s has no endpoints", got)
		}
	}
}

// The listener of each port ends TLS if there are certificates; that of a redirect never does.
func TestListenersFollowFromTheSettings(t *testing.T) {
	f := newFiles(t)
	f.certify(t, "a", "a.example")
	s, err := New(Config{}, f.config(t, "listen: 8443,127.0.0.1:443\nredirect-http: 8080\nroute: a=b:80", "a"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for port, want := range map[uint16][]string{8443: {"0.0.0.0:8443", "[::]:8443"}, 443: {"127.0.0.1:443"}, 8080: {"0.0.0.0:8080", "[::]:8080"}} {
		l := s.Snapshot().Bound(port)
		if l == nil {
			t.Fatalf("no listener has port %d", port)
		}
		var addresses []string
		for _, address := range l.Addresses {
			addresses = append(addresses, address.String())
		}
		if chain := l.Chains[0]; !slices.Equal(addresses, want) || (chain.TLS == nil) != (port == 8080) || !chain.HTTP.UseRemoteAddress {
			t.Errorf("port %d: addresses %v, TLS %v", port, addresses, chain.TLS)
		}
	}
	table := route.Of(s.Snapshot().RouteTable(redirectName))
	choice := table.Find(&route.Request{Method: []byte("GET"), Authority: []byte("a.example:8080"), Path: []byte("/x?y"), Scheme: []byte("http")})
	outcome := choice.Outcome(&route.Request{Method: []byte("GET"), Authority: []byte("a.example:8080"), Path: []byte("/x?y"), Scheme: []byte("http")}, false)
	if outcome.Reply == nil || outcome.Reply.Status != 301 || outcome.Reply.Fields[0].Value != "https://a.example:8443/x?y" {
		t.Errorf("the redirect is %+v", outcome.Reply)
	}
}

func TestUnusableFilesAreErrorsByName(t *testing.T) {
	f := newFiles(t)
	f.certify(t, "a", "a.example")
	f.certify(t, "b", "b.example")
	f.write(t, "empty", "")
	for _, c := range []struct {
		certificate, key, want string
	}{
		{"absent", "a.key", "cert: open " + f.path("absent")},
		{"a.crt", "absent", "key: open " + f.path("absent")},
		{"a.crt", "b.key", "cert: " + f.path("a.crt") + " with the key " + f.path("b.key") + ": tls: private key does not match public key"},
		{"empty", "a.key", "cert: " + f.path("empty")},
	} {
		config := Config{Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:80")}, Certificates: []string{f.path(c.certificate)}, Keys: []string{f.path(c.key)}, Routes: []Route{{Host: "*", Prefix: "/"}}}
		if _, err := New(config, "", slog.New(slog.DiscardHandler)); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%v\nwant %s", err, c.want)
		}
	}
	if _, err := New(Config{}, f.path("absent"), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a missing file is accepted")
	} else if want := f.path("absent") + ": no such file or directory"; err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if _, err := New(Config{}, f.config(t, "listen: x"), slog.New(slog.DiscardHandler)); err == nil || !strings.HasPrefix(err.Error(), f.path("edge.yaml")+": line 1: listen") {
		t.Error(err)
	}
}

// locked is a buffer for several goroutines.
type locked struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buffer.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buffer.String()
}

// Changed files come into force, and values that did not change stay what they are. Unusable files leave everything in force.
func TestFilesAreReadAgainWhenTheyChange(t *testing.T) {
	f := newFiles(t)
	f.certify(t, "a", "a.example")
	f.certify(t, "b", "b.example")
	const first = "listen: 8443\nroute:\n- a=10.0.0.1:80\n- b=10.0.0.2:80"
	log := &locked{}
	s, err := New(Config{}, f.config(t, first, "a", "b"), slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	changed, ended := make(chan struct{}, 10), make(chan struct{})
	go func() {
		defer close(ended)
		s.Run(ctx, func() { changed <- struct{}{} })
	}()
	t.Cleanup(func() { cancel(); <-ended })
	next := func(write func()) (before, after *mesh.Snapshot) {
		t.Helper()
		before = s.Snapshot()
		write()
		nettest.Eventually(t, "the change to be in force", func() bool { return s.Snapshot() != before })
		<-changed
		return before, s.Snapshot()
	}
	certificate := func(name string) string { return "certificate:" + f.path(name+".crt") }

	before, after := next(func() { f.config(t, "listen: 8443,8444\nroute:\n- a=10.0.0.1:80\n- c=10.0.0.3:80", "a", "b") })
	if after.Cluster("b") != nil || after.Cluster("c") == nil || after.Bound(8444) == nil || after.RouteTable(routesName) == before.RouteTable(routesName) {
		t.Error("the new routes and listeners are not in force")
	}
	if after.Cluster("a") != before.Cluster("a") || after.Bound(8443) != before.Bound(8443) || after.Secret(certificate("a")) != before.Secret(certificate("a")) {
		t.Error("values without a change are other ones")
	}

	f.write(t, "a.crt", "no certificate")
	nettest.Eventually(t, "the unusable certificate to be logged", func() bool { return strings.Contains(log.String(), "keeping the one in force") })
	if s.Snapshot() != after {
		t.Error("an unusable certificate changes what is in force")
	}
	f.certify(t, "a", "a.example", "other.example")
	nettest.Eventually(t, "the new certificate to be in force", func() bool {
		secret := s.Snapshot().Secret(certificate("a"))
		pair, err := tls.X509KeyPair(secret.Certificate.Chain, secret.Certificate.Key.PEM())
		return err == nil && pair.Leaf.VerifyHostname("other.example") == nil
	})
	<-changed
	current := s.Snapshot()
	if current.Secret(certificate("b")) != before.Secret(certificate("b")) || current.Bound(8443) != before.Bound(8443) {
		t.Error("the other certificate or the listener is another one")
	}

	f.write(t, "edge.yaml", "listen: 8443\nroute: nonsense\n")
	nettest.Eventually(t, "the unusable file to be logged", func() bool { return strings.Contains(log.String(), `line 2: route \"nonsense\"`) })
	if s.Snapshot() != current {
		t.Error("an unusable file changes what is in force")
	}
	_, after = next(func() { f.config(t, "listen: 8444\nroute: a=10.0.0.1:80", "b") })
	if after.Bound(8443) != nil || after.Secret(certificate("a")) != nil || after.Secret(certificate("b")) == nil {
		t.Error("removed listeners and certificates are in force")
	}
}
