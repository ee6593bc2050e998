package e2e

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// world has the servers of good.example and evil.example, over HTTP of both versions and TLS, and records what arrives.
type world struct {
	*caller
	mu    sync.Mutex
	hosts []string    // of requests to good.example's server
	evil  int         // connections to evil.example's servers
	other *nameServer // another DNS server
}

const (
	goodAddress  = "203.0.113.81"
	evilAddress  = "203.0.113.66"
	evilAddress6 = "2001:db8:2::66"
)

func newWorld(t *testing.T, c *caller) *world {
	t.Helper()
	w := &world{caller: c}
	for _, address := range []string{goodAddress + "/32", evilAddress + "/32", evilAddress6 + "/128"} {
		c.peer.AddAddress(t, "lo", netip.MustParsePrefix(address))
	}
	w.other = startNameServer(t, c.peer, netip.MustParseAddr(evilAddress))
	w.serve(t, goodAddress, func(net.Conn) {}, func(r *http.Request) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.hosts = append(w.hosts, r.Host)
	})
	for _, address := range []string{evilAddress, "[" + evilAddress6 + "]"} {
		w.serve(t, address, func(net.Conn) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.evil++
		}, func(*http.Request) {})
	}
	return w
}

// serve serves HTTP at port 80 and HTTPS at port 443 of an address.
func (w *world) serve(t *testing.T, host string, accepted func(net.Conn), requested func(*http.Request)) {
	t.Helper()
	for _, port := range []string{"80", "443"} {
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requested(r)
			io.WriteString(w, "served\n")
		}))
		server.Listener.Close()
		server.Listener = w.peer.Listen(t, "tcp", host+":"+port)
		server.Config.ErrorLog = log.New(io.Discard, "", 0)
		server.Config.ConnState = func(conn net.Conn, state http.ConnState) {
			if state == http.StateNew {
				accepted(conn)
			}
		}
		server.Config.Protocols = new(http.Protocols)
		server.Config.Protocols.SetHTTP1(true)
		server.Config.Protocols.SetHTTP2(true)
		server.Config.Protocols.SetUnencryptedHTTP2(true)
		if port == "443" {
			server.EnableHTTP2 = true
			server.StartTLS()
		} else {
			server.Start()
		}
		t.Cleanup(server.Close)
	}
}

// attempt is a way of a command to reach a server.
type attempt struct {
	name    string
	command []string
	denied  bool
	dns     bool // it ends with the query of a name
}

func withCurl(arguments ...string) []string {
	return append([]string{"curl", "-sS", "-k", "-m", "60", "--noproxy", "none.example"}, arguments...)
}

// withPython sends bytes to an address, with a pause between parts, and prints what comes back.
func withPython(address, port string, parts ...[]byte) []string {
	command := []string{"python3", "-c", `
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
for i, part in enumerate(sys.argv[3:]):
    time.sleep(1.5 * i)
    s.sendall(bytes.fromhex(part))
sys.stdout.write(s.recv(1000).decode("latin-1"))`, address, port}
	for _, part := range parts {
		command = append(command, hex.EncodeToString(part))
	}
	return command
}

// try runs a command under a policy. It returns its output, and the reasons of the records.
func (w *world) try(t *testing.T, flags, command []string) (output string, reasons []string) {
	t.Helper()
	stdout, stderr, _ := w.run(t, append(append(append([]string{"--log", "json"}, flags...), "--", "sh", "-c", `"$@" 2>&1`, "sh"), command...)...)
	for _, r := range recorded(t, stderr) {
		reasons = append(reasons, r.Reason)
	}
	return stdout, reasons
}

// clientHello returns the first bytes of TLS with a server name; with ech, the name is that of the outer ClientHello.
func clientHello(t *testing.T, name string, ech []byte) []byte {
	t.Helper()
	near, far := net.Pipe()
	config := &tls.Config{ServerName: name, InsecureSkipVerify: true}
	if ech != nil {
		config.ServerName, config.EncryptedClientHelloConfigList = "hidden.example", ech
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		tls.Client(near, config).Handshake()
	}()
	hello := make([]byte, 16<<10)
	n, err := far.Read(hello)
	if err != nil {
		t.Fatal(err)
	}
	far.Close()
	<-done
	return hello[:n]
}

// Under --default deny nothing passes but what is allowed, whatever a client claims, and a denied server is not dialled.
func TestRunDeniesWhatIsNotAllowed(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		w := newWorld(t, c)
		flags := []string{"--default", "deny", "--allow", "good.example:80,good.example:443", "--allow", "*.good.example"}
		for _, a := range []attempt{
			{name: "HTTP", command: withCurl("http://good.example/")},
			{name: "HTTP/2", command: withCurl("--http2-prior-knowledge", "http://good.example/")},
			{name: "HTTPS", command: withCurl("https://good.example/")},
			{name: "a name below a wildcard", command: withCurl("http://www.good.example/")},
			{name: "TLS without a name", command: withCurl("https://" + goodAddress + "/")},

			{name: "another host", command: withCurl("http://evil.example/"), denied: true, dns: true},
			{name: "an address", command: withCurl("-w", "%{http_code}", "http://"+evilAddress+"/"), denied: true},
			{name: "an IPv6 address", command: withCurl("http://[" + evilAddress6 + "]/"), denied: true},
			{name: "TLS to an address", command: withCurl("https://" + evilAddress + "/"), denied: true},
			{name: "another port", command: withCurl("http://good.example:8080/"), denied: true},
			{name: "a forged Host", command: withCurl("-H", "Host: good.example", "http://"+evilAddress+"/"), denied: true},
			{name: "a forged :authority", command: withCurl("--http2-prior-knowledge", "-H", "Host: good.example", "http://"+evilAddress+"/"), denied: true},
			{name: "a forged server name", command: withCurl("--resolve", "good.example:443:"+evilAddress, "https://good.example/"), denied: true},
			{name: "another host of the same address", command: withCurl("--resolve", "cdn.example:80:"+goodAddress, "http://cdn.example/"), denied: true},
			{name: "another host of the same address by TLS", command: withCurl("--resolve", "cdn.example:443:"+goodAddress, "https://cdn.example/"), denied: true},
			{name: "a coalesced connection", command: withCurl("--http2-prior-knowledge", "-H", "Host: cdn.example", "http://good.example/"), denied: true},
			{name: "a proxy", command: withCurl("--proxy", "http://good.example:80", "http://evil.example/"), denied: true},
			{name: "CONNECT", command: withCurl("-p", "--proxy", "http://good.example:80", "http://evil.example/"), denied: true},
			{name: "a target unlike Host", denied: true, command: withPython(goodAddress, "80",
				[]byte("GET http://good.example/ HTTP/1.1\r\nHost: cdn.example\r\n\r\n"))},
			{name: "a request that pauses in its first word", denied: true, command: withPython(goodAddress, "80",
				[]byte("G"), []byte("ET / HTTP/1.1\r\nHost: cdn.example\r\n\r\n"))},
			{name: "a preface that pauses", denied: true, command: withPython(goodAddress, "80", []byte("PRI"),
				[]byte(" * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x10\x01\x05\x00\x00\x00\x01\x82\x86\x84\x01\x0bcdn.example"))},
			{name: "a method in lower case", denied: true, command: withPython(goodAddress, "80", []byte("f"), []byte("oo / HTTP/1.1\r\nHost: cdn.example\r\n\r\n"))},
			{name: "a ClientHello in a record of version 0", denied: true, command: withPython(goodAddress, "443",
				append([]byte{22, 0, 0}, clientHello(t, "cdn.example", nil)[3:]...))},
			{name: "a ClientHello behind an alert", denied: true, command: withPython(goodAddress, "443",
				append([]byte{21, 3, 1, 0, 2, 1, 90}, clientHello(t, "cdn.example", nil)...))},
			{name: "bytes to an address", command: withPython(evilAddress, "80", []byte("\x00\x01\x02")), denied: true},
			{name: "an encrypted ClientHello", command: withPython(goodAddress, "443", clientHello(t, "", echConfigs(t, "cdn.example"))), denied: true},
			{name: "a broken ClientHello", command: withPython(goodAddress, "443", append([]byte{22, 3, 1, 1, 0, 9}, make([]byte, 255)...)), denied: true},
			{name: "another DNS server", denied: true, dns: true, command: []string{"python3", "-c", `
import socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(60)
s.connect(("` + evilAddress + `", 53))
s.send(struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + b"\4evil\7example\0\0\1\0\1")
print("rcode", s.recv(1000)[3] & 15)`}},
		} {
			output, reasons := w.try(t, flags, a.command)
			if denied := slices.Contains(reasons, "denied"); denied != a.denied {
				t.Errorf("%s: denied %v, the records have %q\n%s", a.name, denied, reasons, output)
			}
			if served := strings.Contains(output, "served"); served == a.denied {
				t.Errorf("%s: the command printed %q", a.name, output)
			}
			if a.name == "another DNS server" && output != "rcode 5\n" {
				t.Errorf("%s: %q, want REFUSED", a.name, output)
			}
			if a.name == "an address" && output != "pillion: "+evilAddress+":80 is not allowed by a rule\n403" {
				t.Errorf("%s: %q, want the reason and 403", a.name, output)
			}
			if reset := a.name == "TLS to an address" || a.name == "bytes to an address"; reset && !strings.Contains(output, "reset by peer") {
				t.Errorf("%s: %q, want a reset", a.name, output)
			}
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.evil != 0 {
			t.Errorf("evil.example's servers received %d connections", w.evil)
		}
		for _, host := range w.hosts {
			if host != "good.example" && host != "www.good.example" && host != goodAddress {
				t.Errorf("good.example's server received a request for %s", host)
			}
		}
		for _, s := range []*nameServer{w.names, w.other} {
			for len(s.queries) > 0 {
				if query := <-s.queries; s == w.other || strings.Contains(query, "evil") {
					t.Errorf("a server was asked for %s", query)
				}
			}
		}
	})
}

// The command cannot undo the rules, nor leave its namespaces, and the policy still holds after it has tried.
func TestRunHoldsAgainstItsCommand(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		w := newWorld(t, c)
		const attempts = `
import ctypes, os, signal, socket, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def system(call, *arguments):
    if getattr(libc, call)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "")
def option(level, name):
    socket.socket().setsockopt(level, name, 1)
def program(*words):
    if subprocess.run(words, capture_output=True).returncode != 0:
        raise PermissionError
def thread(*ids):
    for id in ids:
        try:
            system("ptrace", PTRACE_ATTACH, id, 0, 0)
        except PermissionError:
            continue
        return
    raise PermissionError
def dumpable(pid): # proc(5): the files of a process that is not dumpable are root's
    if os.getuid() == 0 or os.stat(f"/proc/{pid}/stat").st_uid != os.getuid():
        raise PermissionError
PTRACE_ATTACH, SO_MARK, IP_TRANSPARENT, CLONE_NEWNET, CLONE_NEWNS = 16, 36, 19, 0x40000000, 0x20000
for name, attempt in {
    "a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP),
    "a mark": lambda: option(socket.SOL_SOCKET, SO_MARK),
    "a transparent socket": lambda: option(socket.SOL_IP, IP_TRANSPARENT),
    "a trace of the helper": lambda: system("ptrace", PTRACE_ATTACH, 1, 0, 0),
    "a trace of the helper's threads": lambda: thread(*map(int, os.listdir("/proc/1/task"))),
    "a helper that others may trace": lambda: dumpable(1),
    "the helper's files": lambda: os.readlink("/proc/1/fd/3"),
    "its network": lambda: system("setns", os.open("/proc/self/ns/net", os.O_RDONLY), CLONE_NEWNET),
    "a namespace": lambda: system("unshare", CLONE_NEWNS),
    "a mount": lambda: program("mount", "-t", "tmpfs", "none", "/mnt"),
    "a route": lambda: program("ip", "route", "add", "` + evilAddress + `", "dev", "lo"),
    "an address": lambda: program("ip", "address", "add", "` + evilAddress + `/32", "dev", "pillion0"),
    "the rules": lambda: program("nft", "flush", "ruleset"),
}.items():
    try:
        attempt()
        print(name, "was had")
    except PermissionError:
        pass
os.kill(1, signal.SIGKILL)
os.kill(1, signal.SIGTERM)
os.execvp("curl", ["curl", "-sS", "-m", "60", "--noproxy", "*", "http://` + evilAddress + `/"])`
		output, reasons := w.try(t, []string{"--default", "deny", "--allow", "good.example"}, []string{"python3", "-c", attempts})
		if want := "pillion: " + evilAddress + ":80 is not allowed by a rule\n"; output != want || !slices.Equal(reasons, []string{"denied"}) {
			t.Errorf("the command printed %q, want %q; the reasons are %q", output, want, reasons)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.evil != 0 {
			t.Errorf("evil.example's servers received %d connections", w.evil)
		}
	})
}

// echConfigs returns a configuration of encrypted ClientHellos whose outer name is name.
func echConfigs(t *testing.T, name string) []byte {
	t.Helper()
	const x25519, sha256, aes128 = 0x20, 1, 1
	key := make([]byte, 32)
	key[0] = 9 // the base point, a valid public key
	contents := []byte{1, 0, x25519, 0, 32}
	contents = append(contents, key...)
	contents = append(contents, 0, 4, 0, sha256, 0, aes128, 0, byte(len(name)))
	contents = append(append(contents, name...), 0, 0)
	config := append([]byte{0xfe, 0x0d, 0, byte(len(contents))}, contents...)
	return append([]byte{0, byte(len(config))}, config...)
}

// A denied host is denied by name and by address.
func TestRunDeniesWhatIsDenied(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		w := newWorld(t, c)
		flags := []string{"--deny", "evil.example,2001:db8:2::/64"}
		for _, a := range []attempt{
			{name: "another host", command: withCurl("http://good.example/")},
			{name: "another host's address", command: withCurl("http://" + goodAddress + "/")},
			{name: "its name", command: withCurl("http://evil.example/"), denied: true},
			{name: "its address", command: withCurl("http://" + evilAddress + "/"), denied: true},
			{name: "TLS", command: withCurl("--resolve", "evil.example:443:"+evilAddress, "https://evil.example/"), denied: true},
			{name: "a forged server name", command: withCurl("--resolve", "good.example:443:"+evilAddress, "https://good.example/"), denied: true},
			{name: "its network", command: withCurl("http://[" + evilAddress6 + "]/"), denied: true},
		} {
			output, reasons := w.try(t, flags, a.command)
			if denied := slices.Contains(reasons, "denied"); denied != a.denied || strings.Contains(output, "served") == a.denied {
				t.Errorf("%s: denied %v, the records have %q\n%s", a.name, denied, reasons, output)
			}
		}
		if w.evil != 0 {
			t.Errorf("evil.example's servers received %d connections", w.evil)
		}
	})
}

// Rules that cannot be meant are refused before anything starts.
func TestRunRefusesSenselessRules(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	ns := nettest.New(t, "caller")
	for _, flags := range [][]string{
		{"--allow", "good.example"}, {"--deny", "good..example"}, {"--deny", "203.0.113.7/24"}, {"--deny", "good.example:0"}, {"--default", "maybe"},
	} {
		stdout, stderr, code := execute(t, ns, nil, append(append([]string{"run"}, flags...), "--", "echo", "started")...)
		if code != 2 || stdout != "" || !strings.HasPrefix(stderr, "pillion: error: ") {
			t.Errorf("%q: exit status %d, %s%s", flags, code, stdout, stderr)
		}
	}
}

// An error names the flag and the value, and what to write in its place. Nothing is started.
func TestRunNamesWhatIsWrong(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	ns := nettest.New(t, "caller")
	taken := ns.Listen(t, "tcp", "127.0.0.1:8080")
	defer taken.Close()
	for _, test := range []struct {
		flags []string
		code  int
		want  []string
	}{
		{[]string{"--log", "xml"}, 2, []string{"--log xml: use off, text or json", "./xml"}},
		{[]string{"--log", "/nonexistent/log"}, 1, []string{"--log: open /nonexistent/log: no such file"}},
		{[]string{"--record", "/nonexistent/all.har"}, 1, []string{"--record: open /nonexistent/all.har: no such file"}},
		{[]string{"--record-credentials", "--record", "all.jsonl"}, 2, []string{"--record-credentials has no effect", "add --record FILE.har"}},
		{[]string{"--record-bodies"}, 2, []string{"--record-bodies has no effect", "add --record FILE.har"}},
		{[]string{"--default", "deny", "--allow", "http://good.example/"}, 2, []string{"--allow", `"http://good.example/"`, "write its host"}},
		{[]string{"--ui", "127.0.0.1:70000"}, 2, []string{"--ui", `"127.0.0.1:70000"`, "use 127.0.0.1:0"}},
		{[]string{"--publish", "8080:80"}, 1, []string{"127.0.0.1:8080", "address already in use", "--publish 0:80"}},
	} {
		stdout, stderr, code := execute(t, ns, nil, append(append([]string{"run"}, test.flags...), "--", "echo", "started")...)
		if code != test.code || stdout != "" || !strings.HasPrefix(stderr, "pillion: error: ") {
			t.Errorf("%q: exit status %d, %s%s", test.flags, code, stdout, stderr)
		}
		for _, want := range test.want {
			if !strings.Contains(stderr, want) {
				t.Errorf("%q: the error lacks %q: %s", test.flags, want, stderr)
			}
		}
	}
}

// Faults on purpose meet the hosts that they are for: requests in both versions of HTTP, and other connections.
func TestRunInjectsFaults(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		w := newWorld(t, c)
		for _, test := range []struct {
			name, fault string
			command     []string
			want        string // in the output
			reason      string
		}{
			{"abort", "abort=418", withCurl("-w", "%{http_code}", "http://good.example/"), "pillion: fault\n418", "completed"},
			{"abort over HTTP/2", "abort=418", withCurl("-w", "%{http_code}", "--http2-prior-knowledge", "http://good.example/"), "418", "completed"},
			{"another host", "host=other.example,abort=418", withCurl("http://good.example/"), "served", "completed"},
			{"reset", "host=good.example,reset", withCurl("http://good.example/"), "reset by peer", "fault"},
			{"reset over HTTP/2", "host=good.example,reset", withCurl("--http2-prior-knowledge", "http://good.example/"), "INTERNAL_ERROR", "fault"},
			{"reset by address", "host=" + goodAddress + ",reset", withCurl("http://good.example/"), "reset by peer", "fault"},
			{"reset of TLS", "host=good.example,reset", withCurl("https://good.example/"), "reset by peer", "fault"},
		} {
			output, reasons := w.try(t, []string{"--fault", test.fault}, test.command)
			if !strings.Contains(output, test.want) || len(reasons) != 1 || reasons[0] != test.reason {
				t.Errorf("%s: the command printed %q, the reasons are %q", test.name, output, reasons)
			}
		}
		for _, test := range []struct {
			rate    string
			least   time.Duration
			command []string
		}{
			{"20B/s", 300 * time.Millisecond, withCurl("http://good.example/")}, // the first of seven bytes passes at once
			{"20B/s", 300 * time.Millisecond, withCurl("--http2-prior-knowledge", "http://good.example/")},
			{"4KB/s", 100 * time.Millisecond, withCurl("https://good.example/")}, // a handshake has 600 bytes at least
		} {
			began := time.Now()
			if output, _ := w.try(t, []string{"--fault", "host=good.example,rate=" + test.rate}, test.command); output != "served\n" {
				t.Errorf("%q: the command printed %q", test.command, output)
			}
			if took := time.Since(began); took < test.least {
				t.Errorf("%q took %v", test.command, took)
			}
		}
		const delay = 300 * time.Millisecond
		for _, url := range []string{"http://good.example/", "https://good.example/"} {
			began := time.Now()
			if output, _ := w.try(t, []string{"--fault", "host=good.example,delay=" + delay.String()}, withCurl(url)); output != "served\n" {
				t.Errorf("%s: the command printed %q", url, output)
			}
			if took := time.Since(began); took < delay {
				t.Errorf("%s took %v", url, took)
			}
		}
	})
}

// Faults meet requests to published servers, by their Host.
func TestRunInjectsFaultsIntoPublishedServers(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		requireProgram(t, "python3")
		var log logBook
		cmd := c.command("--publish", "127.0.0.1:9000", "--fault", "host=shop.example,abort=418", "--fault", "host=slow.example,reset", "--",
			"python3", "-m", "http.server", "9000", "--bind", "127.0.0.1", "--directory", c.home(t))
		cmd.Stderr = &log
		p := c.net.Start(t, cmd)
		get := func(host string) string {
			client := &http.Client{Timeout: nettest.Patience, Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil,
				DialContext: func(_ context.Context, network, _ string) (net.Conn, error) {
					return c.net.Dial(network, "127.0.0.1:9000", nettest.Patience)
				}}}
			response, err := client.Get("http://" + host + "/")
			if err != nil {
				return err.Error()
			}
			response.Body.Close()
			return response.Status
		}
		nettest.Eventually(t, "the server answers", func() bool { return get("other.example") == "200 OK" })
		if got := get("shop.example"); !strings.HasPrefix(got, "418 ") {
			t.Errorf("an aborted request got %q", got)
		}
		if got := get("slow.example"); !strings.Contains(got, "reset by peer") {
			t.Errorf("a request that is reset got %q", got)
		}
		p.Signal(syscall.SIGTERM)
		if status, err := p.Wait(nettest.Patience); status != 128+15 {
			t.Errorf("exit status %d, %v", status, err)
		}
	})
}
