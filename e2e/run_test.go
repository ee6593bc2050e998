package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// caller is who runs `pillion run`: root, or an ordinary user without a capability. Its network has a peer with servers.
type caller struct {
	name      string
	uid       uint32
	net, peer *nettest.Namespace
	names     *nameServer
}

// eachCaller runs a subtest as root and one as an ordinary user.
func eachCaller(t *testing.T, test func(t *testing.T, c *caller)) {
	t.Parallel()
	nettest.RequireRoot(t)
	for _, c := range []caller{{name: "root"}, {name: "user", uid: workloadUID}} {
		t.Run(c.name, func(t *testing.T) {
			c.net, c.peer = nettest.PodAndPeer(t)
			c.peer.AddAddress(t, "lo", netip.MustParsePrefix("203.0.113.80/32")) // of web.example
			c.names = startNameServer(t, c.peer, nettest.Elsewhere4)
			test(t, &c)
		})
	}
}

// command prepares `pillion run` with flags and a command.
func (c *caller) command(arguments ...string) *exec.Cmd {
	all := append([]string{"run", "--dns-servers", nettest.Elsewhere4.String()}, arguments...)
	cmd := c.net.Command(c.uid, c.uid, pillion, all...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "HOME=/nonexistent")
	return cmd
}

// run runs `pillion run` and returns the command's output, what was written to standard error, and the exit status.
func (c *caller) run(t testing.TB, arguments ...string) (stdout, stderr string, status int) {
	t.Helper()
	var out, complaint bytes.Buffer
	cmd := c.command(arguments...)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if _, err := c.net.Run(cmd); cmd.ProcessState == nil || errors.Is(err, nettest.ErrHanging) {
		t.Fatal(err)
	}
	if strings.Contains(complaint.String(), "DATA RACE") {
		t.Errorf("pillion run: %s", &complaint)
	}
	return out.String(), complaint.String(), cmd.ProcessState.ExitCode()
}

// serve answers requests at an address of the peer with their path.
func (c *caller) serve(t testing.TB, address netip.AddrPort) {
	t.Helper()
	serveHTTP(t, c.peer.Listen(t, "tcp", address.String()), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s%s from %s\n", r.Host, r.URL.Path, r.RemoteAddr)
	}))
}

func serveHTTP(t testing.TB, listener net.Listener, handler http.Handler) {
	server := &http.Server{Handler: handler}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(listener)
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
}

// recorded parses the records of `--log json`, and sorts them by the start of their connection or request: two connections may
// end in either order. Lines of pillion's own log may be among them: on a busy machine a name server counts as slow.
func recorded(t testing.TB, text string) (records []live.Record) {
	t.Helper()
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "time=") {
			continue
		}
		var r live.Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%q is not a record: %v", line, err)
		}
		records = append(records, r)
	}
	slices.SortStableFunc(records, func(a, b live.Record) int { return began(a).Compare(began(b)) })
	return records
}

func began(r live.Record) time.Time {
	return r.Time.Add(-time.Duration(r.DurationMS * float64(time.Millisecond)))
}

// A command reaches what its caller reaches, from the caller's address, in both families and by names, and each request is
// shown.
func TestRunShowsWhatACommandRequests(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		for _, address := range []string{"203.0.113.80:80", "[" + nettest.Elsewhere6.String() + "]:81"} {
			c.serve(t, netip.MustParseAddrPort(address))
		}
		stdout, stderr, status := c.run(t, "--log", "json", "--", "curl", "-sS", "--noproxy", "*", "http://web.example/by/name",
			"http://["+nettest.Elsewhere6.String()+"]:81/by/address")
		if status != 0 {
			t.Fatalf("exit status %d\n%s", status, stderr)
		}
		for _, want := range []string{"web.example/by/name from " + nettest.PodIP4.String(), "/by/address from [" + nettest.PodIP6.String()} {
			if !strings.Contains(stdout, want) {
				t.Errorf("the output %q lacks %q", stdout, want)
			}
		}
		records := recorded(t, stderr)
		if len(records) != 2 {
			t.Fatalf("%d records:\n%s", len(records), stderr)
		}
		for i, want := range []live.Record{
			{Authority: "web.example", Path: "/by/name", Destination: "203.0.113.80:80"},
			{Authority: "[2001:db8:2::7]:81", Path: "/by/address", Destination: "[2001:db8:2::7]:81"},
		} {
			got := records[i]
			if got.Authority != want.Authority || got.Path != want.Path || got.Destination != want.Destination || got.Status != 200 ||
				got.Method != "GET" || got.Failed || got.Reason != "completed" || got.Direction != "outbound" || got.Sent == 0 {
				t.Errorf("record %d is %+v", i, got)
			}
		}
	})
}

// For people there is one line for each request, and a table at the end.
func TestRunPrintsLinesAndATable(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		c.serve(t, netip.MustParseAddrPort("203.0.113.80:80"))
		_, stderr, status := c.run(t, "--summary", "on", "--", "curl", "-sS", "--noproxy", "*", "http://web.example/a", "http://web.example/b")
		lines := strings.Split(strings.TrimSpace(stderr), "\n")
		if status != 0 || len(lines) != 4 {
			t.Fatalf("exit status %d\n%s", status, stderr)
		}
		for i, want := range []string{"200 GET web.example/a ", "200 GET web.example/b ", "destination ", "web.example "} {
			if !strings.Contains(lines[i], want) {
				t.Errorf("line %d is %q, without %q", i, lines[i], want)
			}
		}
		if fields := strings.Fields(lines[3]); fields[1] != "2" || fields[2] != "2xx:2" {
			t.Errorf("the table has %q", lines[3])
		}
		file := filepath.Join(c.home(t), "log")
		if _, stderr, _ := c.run(t, "--log", file, "--summary", "off", "--", "curl", "-sS", "--noproxy", "*", "http://web.example/a"); stderr != "" {
			t.Errorf("with --log FILE, standard error has %q", stderr)
		}
		if text, err := os.ReadFile(file); err != nil || strings.Count(string(text), "\n") != 1 || !strings.Contains(string(text), "200 GET web.example/a ") {
			t.Errorf("the log has %q, %v", text, err)
		}
		if _, stderr, _ := c.run(t, "--log", "off", "--summary", "off", "--", "curl", "-sS", "--noproxy", "*", "http://web.example/a"); stderr != "" {
			t.Errorf("with --log off, standard error has %q", stderr)
		}
	})
}

// The exit status is the command's, whatever ended it, and that of a shell if it cannot be started.
func TestRunHasTheExitStatusOfItsCommand(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		notExecutable := filepath.Join(t.TempDir(), "script")
		if err := os.WriteFile(notExecutable, []byte("echo no"), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct {
			command []string
			want    int
		}{
			{[]string{"true"}, 0},
			{[]string{"sh", "-c", "exit 37"}, 37},
			{[]string{"sh", "-c", "kill -TERM $$"}, 128 + 15},
			{[]string{"sh", "-c", "kill -KILL $$"}, 128 + 9},
			{[]string{"no-such-program"}, 127},
			{[]string{"/no/such/program"}, 127},
			{[]string{notExecutable}, 126},
			{[]string{filepath.Dir(notExecutable)}, 126},
		} {
			stdout, stderr, status := c.run(t, append([]string{"--"}, test.command...)...)
			if status != test.want || stdout != "" {
				t.Errorf("%q: exit status %d, output %q, want %d", test.command, status, stdout, test.want)
			}
			if said := strings.Contains(stderr, "pillion: error: "); said != (test.want == 126 || test.want == 127) {
				t.Errorf("%q: standard error is %q", test.command, stderr)
			}
		}
	})
}

// A command goes on when nobody reads standard error any more, as behind a pipe to head.
func TestRunSurvivesAClosedStandardError(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		c.serve(t, netip.MustParseAddrPort("203.0.113.80:80"))
		reader, writer, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		reader.Close()
		defer writer.Close()
		cmd := c.command("--", "sh", "-c", "for i in 1 2 3; do curl -sS --noproxy '*' http://web.example/$i; done; sh -c 'kill -PIPE $$; echo ignored'; exit 7")
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, writer
		if _, err := c.net.Run(cmd); cmd.ProcessState == nil {
			t.Fatal(err)
		}
		if status := cmd.ProcessState.ExitCode(); status != 7 || strings.Count(out.String(), "web.example/") != 3 || strings.Contains(out.String(), "ignored") {
			t.Errorf("exit status %d, output %q", status, &out)
		}
	})
}

// The command keeps what is its caller's, and has no capability, no way to get one, and no rights over its network.
func TestRunGivesItsCommandTheCallersPlaceAndNoPower(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		stdout, stderr, status := c.run(t, "--", "sh", "-c",
			"id -u; id -g; pwd; echo $HOME; grep -E '^(Cap|NoNewPrivs)' /proc/self/status; ip link set pillion0 down; nft flush ruleset; "+
				"ip route add 203.0.113.0/24 dev lo; unshare --net true; unshare --user --map-root-user ip link set pillion0 down; echo end")
		if status != 0 {
			t.Fatalf("exit status %d\n%s", status, stderr)
		}
		want := []string{fmt.Sprint(c.uid), fmt.Sprint(c.uid), "/", "/nonexistent", "CapInh:0000000000000000", "CapPrm:0000000000000000",
			"CapEff:0000000000000000", "CapBnd:0000000000000000", "CapAmb:0000000000000000", "NoNewPrivs:1", "end"}
		if got := strings.Split(strings.ReplaceAll(strings.TrimSpace(stdout), "\t", ""), "\n"); strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("the command printed %q, want %q", got, want)
		}
		if refused := strings.Count(strings.ToLower(stderr), "not permitted"); refused < 5 {
			t.Errorf("%d of 5 attempts were refused:\n%s", refused, stderr)
		}
	})
}

// BBR, the default of some machines, would pace packets that never leave the kernel.
func TestRunDoesNotPaceTraffic(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		got, stderr, _ := c.run(t, "--", "cat", "/proc/sys/net/ipv4/tcp_congestion_control")
		if strings.TrimSpace(got) != "reno" {
			t.Errorf("the congestion control of the command's connections is %q\n%s", got, stderr)
		}
	})
}

// Datagrams are rejected at once, and that is reported.
func TestRunReportsDatagramsThatItRejects(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		_, stderr, _ := c.run(t, "--log", "json", "--", "python3", "-c", `
import socket
for family, address in ((socket.AF_INET, "203.0.113.7"), (socket.AF_INET6, "2001:db8:2::7")):
    for i in range(3):
        try:
            socket.socket(family, socket.SOCK_DGRAM).sendto(b"x", (address, 443))
            raise SystemExit("a datagram was sent")
        except PermissionError:
            pass`)
		records := recorded(t, stderr)
		if len(records) != 2 {
			t.Fatalf("%d records, want one for each destination:\n%s", len(records), stderr)
		}
		for i, want := range []string{"203.0.113.7:443", "[2001:db8:2::7]:443"} {
			if got := records[i]; got.Protocol != "UDP" || got.Destination != want || !got.Failed {
				t.Errorf("record %d is %+v", i, got)
			}
		}
	})
}

// Queries to any server, also on loopback, are answered by the resolver, and so are the names of /etc/hosts.
func TestRunAnswersQueriesToAnyServer(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		requireProgram(t, "python3")
		stdout, stderr, _ := c.run(t, "--", "python3", "-c", `
import socket, struct
def query(name, server, tcp):
    message = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + b"".join(bytes([len(l)]) + l.encode() for l in name.split(".")) + b"\0\0\1\0\1"
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    s.settimeout(60)
    s.connect((server, 53))
    s.send(struct.pack(">H", len(message)) + message if tcp else message)
    answer = s.recv(4096)
    return ".".join(str(b) for b in answer[-4:] if answer) if answer[-14:-4].startswith(b"\0\1\0\1") else answer[-15:]
for server in "127.0.0.53", "127.0.0.11", "203.0.113.99":
    for tcp in False, True:
        print(query("web.example", server, tcp))`)
		if want := strings.Repeat("203.0.113.80\n", 6); stdout != want {
			t.Errorf("the answers are %q\n%s", stdout, stderr)
		}
	})
}

// Names are those of the caller's /etc/hosts and of the servers in its /etc/resolv.conf, also of one on its loopback, as that of
// systemd-resolved. Programs that read these files and those that send queries get the same answers.
func TestRunResolvesNamesAsItsCaller(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		requireProgram(t, "python3")
		local := startNameServer(t, c.net, netip.MustParseAddr("127.0.0.53"))
		dir := t.TempDir()
		hosts, servers := filepath.Join(dir, "hosts"), filepath.Join(dir, "resolv.conf")
		for name, text := range map[string]string{hosts: "203.0.113.99 listed.example\n", servers: "nameserver 127.0.0.53\n"} {
			if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		uid := fmt.Sprint(c.uid)
		cmd := c.net.Command(0, 0, "unshare", "--mount", "--propagation", "private", "sh", "-c",
			"mount --bind "+hosts+" /etc/hosts && mount --bind "+servers+` /etc/resolv.conf && exec "$@"`, "sh",
			"setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", pillion, "run", "--log", "off", "--", "python3", "-c", `
import socket, struct
def query(name):
    message = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + b"".join(bytes([len(l)]) + l.encode() for l in name.split(".")) + b"\0\0\1\0\1"
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(60)
    s.connect(("203.0.113.98", 53))
    s.send(message)
    return ".".join(str(b) for b in s.recv(4096)[-4:])
for name in "listed.example", "web.example":
    print(socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0], query(name))`)
		cmd.Dir = "/"
		var complaint bytes.Buffer
		cmd.Stderr = &complaint
		stdout, err := c.net.Run(cmd)
		if want := "203.0.113.99 203.0.113.99\n203.0.113.80 203.0.113.80\n"; err != nil || stdout != want {
			t.Errorf("the command printed %q, want %q; %v\n%s", stdout, want, err, &complaint)
		}
		for len(local.queries) > 0 {
			if query := <-local.queries; strings.Contains(query, "listed") {
				t.Errorf("the caller's server was asked for %s", query)
			}
		}
	})
}

// --host-loopback leads to servers on the caller's loopback. Without it, the command's loopback is its own.
func TestRunReachesTheCallersLoopbackIfAsked(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		for _, address := range []string{"127.0.0.1:8099", "[::1]:8099"} {
			serveHTTP(t, c.net.Listen(t, "tcp", address), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.WriteString(w, "the caller's\n")
			}))
		}
		get := []string{"--", "curl", "-sS", "--noproxy", "*", "http://127.0.0.1:8099/", "http://[::1]:8099/"}
		for _, ports := range []string{"8099", "*"} {
			stdout, stderr, status := c.run(t, append([]string{"--host-loopback", ports}, get...)...)
			if status != 0 || stdout != strings.Repeat("the caller's\n", 2) {
				t.Errorf("--host-loopback %s: exit status %d, output %q\n%s", ports, status, stdout, stderr)
			}
		}
		for _, flags := range [][]string{nil, {"--host-loopback", "1-8098"}} {
			if stdout, _, status := c.run(t, append(flags, get...)...); status != 7 || stdout != "" {
				t.Errorf("%q: exit status %d, output %q", flags, status, stdout)
			}
		}
	})
}

// When the command ends, so does everything that it has started; when pillion is killed, so does the command.
func TestRunLeavesNothing(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		mark := fmt.Sprintf("%d.%d", os.Getpid(), 1000+c.uid) // an argument of sleep by which its processes are found
		_, stderr, status := c.run(t, "--", "sh", "-c", "setsid sleep 77"+mark+" & sleep 77"+mark+" & exit 3")
		if status != 3 || len(processes(t, "77"+mark)) > 0 {
			t.Errorf("exit status %d, %q is left\n%s", status, processes(t, "77"+mark), stderr)
		}
		for _, kill := range []string{"pillion", "its helper"} {
			p := c.net.Start(t, c.command("--", "sh", "-c", "setsid sleep 78"+mark+" & exec sleep 78"+mark))
			nettest.Eventually(t, "the command runs", func() bool { return len(processes(t, "78"+mark)) == 2 })
			victim, helper := p.Cmd.Process.Pid, children(t, p.Cmd.Process.Pid)[0]
			network, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", helper))
			if err != nil || len(processesIn(t, network)) < 3 {
				t.Fatalf("the network of the helper is %q, %v, with the processes %q", network, err, processesIn(t, network))
			}
			if kill == "its helper" {
				victim = helper
			}
			syscall.Kill(victim, syscall.SIGKILL)
			if _, err := p.Wait(nettest.Patience); err != nil {
				t.Error(err)
			}
			nettest.Eventually(t, "everything ends after "+kill+" was killed", func() bool {
				return len(processes(t, "78"+mark)) == 0 && len(processesIn(t, network)) == 0
			})
		}
	})
}

// processes returns the processes with an argument.
func processes(t testing.TB, argument string) (found []string) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range lines {
		text, _ := os.ReadFile(name)
		if words := strings.Split(string(text), "\x00"); words[0] == "sleep" && words[1] == argument {
			found = append(found, name)
		}
	}
	return found
}

// processesIn returns the processes in a network namespace.
func processesIn(t testing.TB, network string) (found []string) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range links {
		if of, err := os.Readlink(name); err == nil && of == network {
			found = append(found, name)
		}
	}
	return found
}

// children returns the processes that a process has started.
func children(t testing.TB, pid int) (all []int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range tasks {
		text, _ := os.ReadFile(name)
		for word := range strings.FieldsSeq(string(text)) {
			var child int
			fmt.Sscan(word, &child)
			all = append(all, child)
		}
	}
	return all
}

// A signal to pillion reaches the command, and the command decides.
func TestRunForwardsSignals(t *testing.T) {
	caught := make(chan os.Signal, 1) // nohup has SIGHUP ignored, also for children
	signal.Notify(caught, syscall.SIGHUP)
	defer signal.Stop(caught)
	eachCaller(t, func(t *testing.T, c *caller) {
		for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
			cmd := c.command("--", "sh", "-c", "trap 'echo caught; exit 9' TERM INT HUP USR1; echo ready; while :; do sleep 0.01; done")
			out, in, err := os.Pipe() // StdoutPipe's would be closed when the command ends, with what is in it
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			cmd.Stdout = in
			p := c.net.Start(t, cmd)
			in.Close()
			var ready [6]byte
			if _, err := io.ReadFull(out, ready[:]); err != nil {
				t.Fatal(err)
			}
			p.Signal(s)
			out.SetReadDeadline(time.Now().Add(nettest.Patience))
			rest, _ := io.ReadAll(out)
			if status, err := p.Wait(nettest.Patience); status != 9 || string(rest) != "caught\n" {
				t.Errorf("%v: exit status %d, %v, output %q", s, status, err, rest)
			}
		}
	})
}

// Without the permission to make user namespaces, pillion names the setting that forbids them.
func TestRunNamesTheSettingThatForbidsIt(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	cmd := exec.Command("unshare", "--user", "--map-root-user", "sh", "-c",
		"echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -all --inh-caps -all "+pillion+" run -- true")
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 1 {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"/proc/sys/user/max_user_namespaces is 0", "sysctl user.max_user_namespaces="} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the error lacks %q: %s", want, out)
		}
	}
}

// Inside of pillion run, an ordinary user can run pillion again. Root cannot, and pillion names the cause.
func TestRunInsideOfRun(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		stdout, stderr, status := c.run(t, "--", pillion, "run", "--", "echo", "inside")
		if c.uid != 0 {
			if status != 0 || stdout != "inside\n" {
				t.Errorf("exit status %d, output %q\n%s", status, stdout, stderr)
			}
			return
		}
		if status != 1 || !strings.Contains(stderr, "root without the capability SETFCAP, as inside of another pillion run") {
			t.Errorf("exit status %d\n%s", status, stderr)
		}
	})
}

// --publish and --publish-all make the command's servers reachable from outside, and show what arrives.
func TestRunPublishesPorts(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		const server = `
import http.server, socket, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "6"); self.end_headers(); self.wfile.write(b"inside")
    def log_message(self, *_): pass
class Server6(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
def echo(listener):
    while True:
        conn, _ = listener.accept()
        conn.sendall(b"welcome")
        conn.close()
threading.Thread(target=http.server.ThreadingHTTPServer(("127.0.0.1", 9000), Handler).serve_forever).start()
threading.Thread(target=Server6(("::1", 9001), Handler).serve_forever).start()
echo(socket.create_server(("0.0.0.0", 9002)))`
		for _, flags := range [][]string{
			{"--publish", "198.51.100.2:9000,127.0.0.1:9001", "--publish", "127.0.0.1:9002:9002"},
			{"--publish", "198.51.100.2:9000:9000", "--publish-all"},
		} {
			var log logBook
			cmd := c.command(append(flags, "--", "python3", "-c", server)...)
			cmd.Stderr = &log
			p := c.net.Start(t, cmd)
			log.await(t, "port 9002 is published")
			get := func(from *nettest.Namespace, address string) string {
				client := &http.Client{Timeout: nettest.Patience, Transport: &http.Transport{DisableKeepAlives: true,
					DialContext: func(_ context.Context, network, address string) (net.Conn, error) {
						return from.Dial(network, address, nettest.Patience)
					}}}
				response, err := client.Get("http://" + address + "/path")
				if err != nil {
					return err.Error()
				}
				defer response.Body.Close()
				body, _ := io.ReadAll(response.Body)
				return response.Status + " " + string(body)
			}
			for address, from := range map[string]*nettest.Namespace{"198.51.100.2:9000": c.peer, "127.0.0.1:9001": c.net} {
				nettest.Eventually(t, "the server at "+address+" answers", func() bool { return get(from, address) == "200 OK inside" })
				log.await(t, "200 ← GET "+address+"/path")
			}
			nettest.Eventually(t, "the server that speaks first answers", func() bool {
				conn, err := c.net.Dial("tcp", "127.0.0.1:9002", nettest.Patience)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				text, _ := io.ReadAll(conn)
				return string(text) == "welcome"
			})
			p.Signal(syscall.SIGTERM)
			if status, err := p.Wait(nettest.Patience); status != 128+15 {
				t.Errorf("exit status %d, %v", status, err)
			}
			log.checkHealth(t)
		}
	})
}

// --record writes an HTTP Archive without credentials, or lines of JSON. Only its owner may read it.
func TestRunRecordsRequests(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		listener := c.peer.Listen(t, "tcp", "203.0.113.80:80")
		server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Set-Cookie", "id=geheim")
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, "hello")
		})}
		server.Protocols.SetHTTP1(true)
		server.Protocols.SetUnencryptedHTTP2(true)
		done := make(chan struct{})
		go func() { defer close(done); server.Serve(listener) }()
		t.Cleanup(func() { server.Close(); <-done })

		dir := t.TempDir()
		for _, name := range []string{filepath.Dir(dir), dir} {
			if err := os.Chmod(name, 0o777); err != nil {
				t.Fatal(err)
			}
		}
		archive, lines := filepath.Join(dir, "all.HAR"), filepath.Join(dir, "all.jsonl")
		get := []string{"curl", "-sS", "--noproxy", "*", "-H", "Authorization: Bearer geheim", "-d", "body", "http://web.example/path?a=b&access_token=geheim"}
		script := `"$@"; "$@" --http2-prior-knowledge; true`
		for _, flags := range [][]string{{"--record", archive}, {"--record", archive, "--record-credentials"}, {"--record", lines}} {
			_, stderr, status := c.run(t, append(append(flags, "--log", "off", "--", "sh", "-c", script, "sh"), get...)...)
			if status != 0 {
				t.Fatalf("exit status %d\n%s", status, stderr)
			}
			info, err := os.Stat(flags[1])
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Fatalf("the file has mode %v, %v", info.Mode(), err)
			}
			text, err := os.ReadFile(flags[1])
			if err != nil {
				t.Fatal(err)
			}
			if flags[1] == lines {
				if records := recorded(t, string(text)); len(records) != 2 || records[0].Path != "/path?a=b&access_token=geheim" || records[1].Status != 200 {
					t.Errorf("the records are %+v", records)
				}
				continue
			}
			if shown := strings.Contains(string(text), "geheim"); shown != (len(flags) == 3) {
				t.Errorf("%q: credentials are in clear: %v\n%s", flags, shown, text)
			}
			checkArchive(t, text)
		}
	})
}

func checkArchive(t *testing.T, text []byte) {
	t.Helper()
	type field struct{ Name, Value string }
	type entry struct {
		StartedDateTime string
		Time            float64
		Request         struct {
			Method, URL, HTTPVersion string
			Headers, QueryString     []field
			BodySize                 int
		}
		Response struct {
			Status      int
			HTTPVersion string
			Headers     []field
			Content     struct {
				Size     int
				MimeType string
			}
		}
	}
	var archive struct {
		Log struct {
			Version string
			Creator struct{ Name, Version string }
			Entries []entry
		}
	}
	if err := json.Unmarshal(text, &archive); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	if archive.Log.Version != "1.2" || archive.Log.Creator.Name != "pillion" || len(archive.Log.Entries) != 2 {
		t.Fatalf("the archive is\n%s", text)
	}
	checkMembers(t, text)
	slices.SortStableFunc(archive.Log.Entries, func(a, b entry) int { return strings.Compare(a.StartedDateTime, b.StartedDateTime) })
	for i, version := range []string{"HTTP/1.1", "HTTP/2"} {
		e := archive.Log.Entries[i]
		if _, err := time.Parse(time.RFC3339, e.StartedDateTime); err != nil || e.Time <= 0 {
			t.Errorf("entry %d began at %q, and took %v", i, e.StartedDateTime, e.Time)
		}
		if e.Request.Method != "POST" || !strings.HasPrefix(e.Request.URL, "http://web.example/path?a=b&access_token=") || e.Request.HTTPVersion != version ||
			e.Request.BodySize != 4 || len(e.Request.QueryString) != 2 || len(e.Request.Headers) < 5 {
			t.Errorf("entry %d has the request %+v", i, e.Request)
		}
		if e.Response.Status != 200 || e.Response.Content.Size != 5 || e.Response.Content.MimeType != "text/plain" || len(e.Response.Headers) < 4 {
			t.Errorf("entry %d has the response %+v", i, e.Response)
		}
	}
}

// --ui serves the live page on the caller's loopback while the command runs.
func TestRunServesTheLivePage(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		var log logBook
		requireProgram(t, "python3")
		echoDatagrams(t, c.peer, "203.0.113.7:9000", false)
		cmd := c.command("--ui", "127.0.0.1:0", "--udp", "allow", "--", "python3", "-c", datagramsInPython+`
s = opened()
exchange(s, ("203.0.113.7", 9000), 700)
failure(("224.0.0.251", 5353))
import time
time.sleep(1000)`)
		cmd.Stderr = &log
		p := c.net.Start(t, cmd)
		_, url, _ := strings.Cut(log.await(t, "live page at"), "http://")
		get := func(path string) string {
			conn, err := c.net.Dial("tcp", strings.TrimSuffix(strings.TrimSpace(url), "/"), nettest.Patience)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, "GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n", path)
			text, err := io.ReadAll(conn)
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		}
		nettest.Eventually(t, "a rejected datagram is shown", func() bool {
			text := get("/live/records")
			return strings.Contains(text, `"protocol":"UDP"`) && strings.Contains(text, `"destination":"224.0.0.251:5353"`) && strings.Contains(text, `"udp_rejected"`)
		})
		nettest.Eventually(t, "an open flow of datagrams is shown", func() bool {
			text := get("/live")
			return strings.Contains(text, `"protocol":"UDP"`) && strings.Contains(text, `"destination":"203.0.113.7:9000"`) && strings.Contains(text, `"received":700`)
		})
		p.Signal(syscall.SIGTERM)
		if status, err := p.Wait(nettest.Patience); status != 128+15 {
			t.Errorf("exit status %d, %v", status, err)
		}
	})
}

// archiveMembers are the members that HAR 1.2 requires of each object.
var archiveMembers = map[string]string{
	"entry":    "startedDateTime time request response cache timings",
	"request":  "method url httpVersion cookies headers queryString headersSize bodySize",
	"response": "status statusText httpVersion cookies headers content redirectURL headersSize bodySize",
	"content":  "size mimeType",
	"timings":  "send wait receive",
	"postData": "mimeType params text",
}

// checkMembers fails the test if an entry of an archive lacks a member, or has null for one: the tools of browsers reject these.
func checkMembers(t *testing.T, text []byte) {
	t.Helper()
	var archive struct {
		Log struct{ Entries []map[string]any }
	}
	if err := json.Unmarshal(text, &archive); err != nil {
		t.Fatal(err)
	}
	var check func(of string, object map[string]any)
	check = func(of string, object map[string]any) {
		for name := range strings.FieldsSeq(archiveMembers[of]) {
			if object[name] == nil {
				t.Errorf("%s has no %s: %v", of, name, object)
			}
		}
		for name, value := range object {
			if inner, ok := value.(map[string]any); ok && archiveMembers[name] != "" {
				check(name, inner)
			}
		}
	}
	for _, entry := range archive.Log.Entries {
		check("entry", entry)
	}
}
