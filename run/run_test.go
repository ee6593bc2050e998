package run

import (
	"bytes"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/sandbox"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

func TestMain(m *testing.M) {
	if sandbox.IsHelper(os.Args) {
		os.Exit(sandbox.RunHelper(os.Args))
	}
	os.Exit(nettest.Main(m))
}

// What fails while the sandbox makes its network has its own error, and ends the sandbox.
func TestAFailureBesideTheSandboxEndsIt(t *testing.T) {
	nettest.RequireRoot(t)
	missing := filepath.Join(t.TempDir(), "missing", "records.jsonl")
	status, err := Run(Config{
		Command: []string{"true"}, Log: "off", Record: missing, Errors: io.Discard, Logger: slog.New(slog.DiscardHandler),
	})
	if status != 1 || !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "--record") {
		t.Errorf("status %d, %v", status, err)
	}
	if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
		t.Errorf("a process is left: %d, %v", pid, err)
	}
}

func TestHostsAreRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	text := "127.0.0.1 localhost\n# 203.0.113.1 commented\n203.0.113.2\tDB.example. db # both\n2001:db8::2 db.example\nfe80::1%lo zone\nbroken\n203.0.113.3\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, host := range readHosts(path) {
		line := host.Name
		for _, address := range host.Addresses {
			line += " " + address.String()
		}
		got = append(got, line)
	}
	if want := []string{"localhost 127.0.0.1", "db.example 203.0.113.2 2001:db8::2", "db 203.0.113.2"}; !slices.Equal(got, want) {
		t.Errorf("readHosts = %q, want %q", got, want)
	}
	if got := readHosts(path + "missing"); got != nil {
		t.Errorf("a missing file has hosts: %v", got)
	}
}

// Each duration is in a bucket whose upper bound exceeds it by at most a sixteenth.
func TestBucketsAreNarrow(t *testing.T) {
	for n := uint64(0); n < 1<<40; n += 1 + n/7 {
		bound := upperBound(bucketOf(n))
		if bound < n || bound > n+n/perDoubling {
			t.Fatalf("%d is in a bucket up to %d", n, bound)
		}
	}
}

func TestPercentiles(t *testing.T) {
	var h histogram
	for i := 1; i <= 100; i++ {
		h.add(time.Duration(i) * time.Millisecond)
	}
	for share, want := range map[float64]float64{0.5: 50, 0.99: 99, 1: 100} {
		if got := h.percentile(share); got < want || got > want*(1+1.0/perDoubling) {
			t.Errorf("percentile(%v) = %v, want %v", share, got, want)
		}
	}
}

func TestTheTableHasARowForEachDestination(t *testing.T) {
	var s summary
	s.print(nil) // without traffic there is no table
	for _, r := range []live.Record{
		{Request: true, Authority: "b.example", Status: 200, Sent: 10, DurationMS: 2},
		{Request: true, Authority: "b.example", Status: 503, Failed: true, Reason: "upstream_refused", DurationMS: 2},
		{Request: true, Authority: "b.example", Status: 302, DurationMS: 2},
		{Request: true, Authority: "b.example", Status: 500, Failed: true, Reason: "completed", DurationMS: 2}, // its class suffices
		{SNI: "a.example", Destination: "203.0.113.1:443", Received: 1000, Sent: 1000},
		{Direction: "inbound", Destination: "127.0.0.1:80", Failed: true, Reason: "upstream_reset"},
	} {
		s.add(&r)
	}
	var out strings.Builder
	s.print(&out)
	var rows [][]string
	for line := range strings.Lines(out.String()) {
		rows = append(rows, strings.Fields(line))
	}
	want := [][]string{
		{"destination", "flows", "statuses", "p50", "p99", "bytes", "failures"},
		{"b.example", "4", "2xx:1", "3xx:1", "5xx:2", "2.0ms", "2.0ms", "10B", "upstream_refused:1"},
		{"a.example", "1", "-", "0ms", "0ms", "2.0K", "-"},
		{"←", "127.0.0.1:80", "1", "-", "0ms", "0ms", "0B", "upstream_reset:1"},
	}
	for i := range want {
		if i >= len(rows) || len(rows[i]) != len(want[i]) || i != 1 && !slices.Equal(rows[i][:3], want[i][:3]) {
			t.Fatalf("the table is\n%s", &out)
		}
	}
}

func TestTheTableIsBounded(t *testing.T) {
	var s summary
	for i := range 2 * maxDestinations {
		s.add(&live.Record{Destination: strings.Repeat("x", i+1)})
	}
	if rows := len(s.destinations); rows != maxDestinations+1 || s.destinations[other].flows != maxDestinations {
		t.Errorf("%d rows", rows)
	}
}

func TestPublishedPortsAreParsed(t *testing.T) {
	for text, want := range map[string]string{
		"8080": "127.0.0.1:8080 8080", "8080:80": "127.0.0.1:8080 80", "0:80": "127.0.0.1:0 80", "0.0.0.0:8080:80": "0.0.0.0:8080 80",
		"198.51.100.7:8080": "198.51.100.7:8080 8080", "[::1]:8080": "[::1]:8080 8080", "[::]:1:2": "[::]:1 2",
	} {
		if p, err := ParsePort(text); err != nil || fmt.Sprint(p.At, " ", p.Inside) != want {
			t.Errorf("ParsePort(%q) = %v, %v, want %s", text, p, err, want)
		}
	}
	for _, text := range []string{"", "0", "a", "1:0", "70000", "1:70000", "::1", "[::1]", "[::1]8080", "198.51.100.7", "198.51.100:1:2", "1:2:3", "-1", "[x]:1"} {
		if p, err := ParsePort(text); err == nil {
			t.Errorf("ParsePort(%q) = %v", text, p)
		}
	}
}

func TestCredentialsAreMasked(t *testing.T) {
	for query, want := range map[string]string{
		"a=b": "a=b", "": "", "a=b&Access_Token=x&c": "a=b&Access_Token=%28masked%29&c", "key=x&monkey=y": "key=%28masked%29&monkey=y",
		"api%2Dkey=x": "api%2Dkey=%28masked%29", "X-Amz-Signature=x": "X-Amz-Signature=%28masked%29", "token": "token",
	} {
		if got := maskQuery(query); got != want {
			t.Errorf("maskQuery(%q) = %q, want %q", query, got, want)
		}
	}
	for name, want := range map[string]bool{
		"Authorization": true, "Proxy-Authorization": true, "cookie": true, "Set-Cookie": true, "X-Api-Key": true, "x-auth-token": true,
		":authority": false, "WWW-Authenticate": false, "content-type": false, "host": false,
	} {
		if got := secretField(name); got != want {
			t.Errorf("secretField(%q) = %v", name, got)
		}
	}
}

func TestHeadsAreParsed(t *testing.T) {
	const head = "GET /a:b HTTP/1.1\r\nHost: web\r\nEmpty:\r\nCookie: a=b\r\n\r\n"
	if got, want := headFields([]byte(head), true), []harField{{"Host", "web"}, {"Empty", ""}, {"Cookie", masked}}; !slices.Equal(got, want) {
		t.Errorf("headFields = %q, want %q", got, want)
	}
	const block = ":method: GET\r\n:path: /p?token=x\r\ncookie: a=b\r\n"
	if got, want := headFields([]byte(block), true), []harField{{":method", "GET"}, {":path", "/p?token=%28masked%29"}, {"cookie", masked}}; !slices.Equal(got, want) {
		t.Errorf("headFields = %q, want %q", got, want)
	}
	if got := headFields([]byte(head), false); got[2].Value != "a=b" {
		t.Errorf("headFields = %q", got)
	}
}

// A file is a whole archive at any time, and a pipe when it is closed.
func TestArchivesAreComplete(t *testing.T) {
	path, pipe := filepath.Join(t.TempDir(), "all.har"), filepath.Join(t.TempDir(), "pipe.har")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	received := make(chan []byte)
	go func() {
		text, _ := os.ReadFile(pipe)
		received <- text
	}()
	file, err := openHAR(path, "1", 0, true)
	if err != nil {
		t.Fatal(err)
	}
	defer file.close()
	through, err := openHAR(pipe, "1", 0, true)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(text []byte, want int) {
		t.Helper()
		var archive struct{ Log struct{ Entries []harEntry } }
		if err := json.Unmarshal(text, &archive); err != nil || len(archive.Log.Entries) != want {
			t.Errorf("%d entries, want %d; %v:\n%s", len(archive.Log.Entries), want, err, text)
		}
	}
	for n := range 3 {
		if text, err := os.ReadFile(path); err != nil {
			t.Error(err)
		} else {
			verify(text, n)
		}
		for _, h := range []*harFile{file, through} {
			if err := h.write(&event{har: &harEntry{Comment: fmt.Sprint(n)}}); err != nil {
				t.Error(err)
			}
		}
	}
	if err := through.close(); err != nil {
		t.Error(err)
	}
	verify(<-received, 3)
}

// An entry for which there is no space leaves the archive as it was.
func TestAnArchiveOutlivesAFullDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "all.har")
	h, err := openHAR(path, "1", 0, true)
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	if err := h.write(&event{har: &harEntry{Comment: "first"}}); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	full := limit
	full.Cur = uint64(len(before) + 100)
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &full); err != nil {
		t.Fatal(err)
	}
	err = h.write(&event{har: &harEntry{Comment: strings.Repeat("second", 100)}})
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, syscall.EFBIG) {
		t.Errorf("error %v", err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("%v:\n%s\nbefore:\n%s", err, after, before)
	}
}

// A command may connect to more hosts than are remembered. One of the others is forgotten for each.
func TestHostsBeyondTheBoundAreRemembered(t *testing.T) {
	ca, err := newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	list := make(map[string]bool)
	for n := range maxIssued {
		host := fmt.Sprint("host", n)
		ca.issued[host] = new(tls.Certificate)
		if !first(list, host) {
			t.Fatalf("%s is known", host)
		}
	}
	const last = "last.example"
	if !first(list, last) || first(list, last) || len(list) != maxIssued {
		t.Errorf("the last of %d hosts is not remembered once", len(list))
	}
	issued, err := ca.issue(last)
	if again, _ := ca.issue(last); err != nil || again != issued || len(ca.issued) != maxIssued {
		t.Errorf("%d certificates are remembered, the last one: %v, %v", len(ca.issued), again == issued, err)
	}
}

// The trust store of Java has each certificate as an entry, and ends with the digest of a known password.
func TestJavaTrustStore(t *testing.T) {
	ca, err := newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	store := javaTrustStore(append([]byte("comment\n"), bytes.Repeat(ca.pem, 2)...))
	body := store[:len(store)-sha1.Size]
	if !bytes.HasPrefix(body, []byte{0xfe, 0xed, 0xfe, 0xed, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 3, 'c', 'a', '0'}) || !bytes.HasSuffix(body, ca.certificate.Raw) ||
		bytes.Count(body, ca.certificate.Raw) != 2 {
		t.Errorf("the store is %x", store)
	}
	var password []byte
	for _, c := range []byte(javaPassword) {
		password = append(password, 0, c)
	}
	if want := sha1.Sum(slices.Concat(password, []byte("Mighty Aphrodite"), body)); !bytes.Equal(store[len(body):], want[:]) {
		t.Error("the digest is wrong")
	}
}

// A status of the server is no failure of the request; the comment has what pillion knows beyond it.
func TestEntriesNameFailures(t *testing.T) {
	r := &flow.Record{HTTP: new(flow.Request), Connection: new(flow.Record)}
	for _, test := range []struct {
		shown live.Record
		want  string
	}{
		{live.Record{Status: 503, Failed: true, Reason: "completed"}, ""},
		{live.Record{Status: 503, Failed: true, Reason: "upstream_refused", Failure: "connection refused"}, "upstream_refused connection refused"},
		{live.Record{Status: 200, Reason: "completed"}, ""},
	} {
		if got := harOf(r, &test.shown, true).Comment; got != test.want {
			t.Errorf("the comment of %+v is %q", test.shown, got)
		}
	}
}

// Requests to proxies have the URL that they ask for.
func TestEntriesHaveURLs(t *testing.T) {
	r := &flow.Record{HTTP: new(flow.Request), Connection: new(flow.Record)}
	for want, shown := range map[string]live.Record{
		"http://web.example/a?b=c": {Method: "GET", Authority: "web.example", Path: "/a?b=c"},
		"http://web.example:81/a":  {Method: "GET", Authority: "web.example:81", Path: "http://web.example:81/a"},
		"http://web.example:443":   {Method: "CONNECT", Authority: "web.example:443", Path: "web.example:443"},
	} {
		if got := harURL(r, &shown, true).String(); got != want {
			t.Errorf("the URL of %+v is %s, want %s", shown, got, want)
		}
	}
}

func TestProxiesThatTheCommandDoesNotReachAreNamed(t *testing.T) {
	environment := map[string]string{
		"http_proxy": "http://localhost:3128/", "HTTP_PROXY": "127.0.0.1:3128", "https_proxy": "[::1]:8118", "HTTPS_PROXY": "http://proxy.example:3129",
		"all_proxy": "socks5h://user:secret@127.0.0.1", "ALL_PROXY": "http://198.51.100.1:80",
	}
	getenv := func(name string) string { return environment[name] }
	got := unreachableProxies(getenv, capture.Ports{List: []capture.PortRange{{First: 8118, Last: 8118}}})
	want := []string{
		"http_proxy leads to the command's own loopback: add --host-loopback 3128 to reach the proxy of this machine",
		"all_proxy leads to the command's own loopback: add --host-loopback 1080 to reach the proxy of this machine",
	}
	if !slices.Equal(got, want) {
		t.Errorf("the lines are %q, want %q", got, want)
	}
	if got := unreachableProxies(getenv, capture.Ports{All: true}); got != nil {
		t.Errorf("with all ports the lines are %q", got)
	}
	if got := unreachableProxies(func(string) string { return "" }, capture.Ports{}); got != nil {
		t.Errorf("without proxies the lines are %q", got)
	}
}

// A server that was not reached once is not given up; one that is not accepted is, and each is named once.
func TestDecryptionIsTriedAgain(t *testing.T) {
	ca, err := newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	for failure, again := range map[secure.Failure]bool{secure.Deadline: true, secure.Ended: true, secure.UnknownRoot: false, secure.NameRefused: false, secure.Version: false} {
		lines := 0
		d := &decryption{authority: ca, roots: new(identity.Roots), report: func(string) { lines++ }, passed: make(map[string]bool), used: make(map[string]bool), named: make(map[string]bool)}
		to, hello := netip.MustParseAddrPort("203.0.113.7:443"), flow.Hello{ServerName: "good.example"}
		for range 2 {
			d.Failed(to, hello, false, &upstream.HandshakeError{Err: &secure.Error{Failure: failure}})
		}
		if got := d.Server(to, hello) != nil; got != again || lines != 1 {
			t.Errorf("after %v the host is decrypted: %v; %d lines", failure, got, lines)
		}
	}
}

// OpenSSL finds a certificate in a directory by this name: the value is that of openssl x509 -hash.
func TestTheAuthorityHasItsNameInADirectory(t *testing.T) {
	ca, err := newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	if got := hashName(ca.certificate.Subject.CommonName); got != "8589db14.0" {
		t.Errorf("the authority's file is %s", got)
	}
}

// The certificates of the directories that SSL_CERT_DIR names are trusted, each file once.
func TestDirectoriesOfCertificatesAreRead(t *testing.T) {
	one, two := t.TempDir(), t.TempDir()
	for path, text := range map[string]string{one + "/a.pem": "first", two + "/b.pem": "second"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{one + "/0a1b2c3d.0": "a.pem", two + "/0a1b2c3d.0": one + "/a.pem", two + "/gone.0": one + "/missing"} {
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
	}
	environment := map[string]string{"SSL_CERT_FILE": one + "/a.pem", "SSL_CERT_DIR": one + ":" + two + "/sub:" + two}
	got := strings.Fields(string(trusted(func(name string) string { return environment[name] })))
	if want := []string{"first", "first", "first", "second"}; !slices.Equal(got, want) {
		t.Errorf("trusted = %q, want %q", got, want)
	}
}

// Certificates are for the name or the address that a client asks for, and verify under the authority.
func TestIssuedCertificatesVerify(t *testing.T) {
	ca, err := newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca.pem)
	for _, host := range []string{"good.example", "203.0.113.7", "2001:db8::7", strings.Repeat("a.", 60) + "example"} {
		issued, err := ca.issue(host)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := issued.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: host}); err != nil {
			t.Errorf("%s: %v", host, err)
		}
		if again, _ := ca.issue(host); again != issued {
			t.Errorf("%s: another certificate is issued", host)
		}
	}
}
