package e2e

import (
	"archive/tar"
	"archive/zip"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha1"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// home returns a directory that the caller may write to.
func (c *caller) home(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{filepath.Dir(dir), dir} {
		if err := os.Chmod(name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(dir, int(c.uid), int(c.uid)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// program runs a program in a home directory, with records as JSON, and fails the test if it fails.
func (c *caller) program(t testing.TB, home string, environment []string, command ...string) (output string, records []live.Record) {
	t.Helper()
	file := filepath.Join(home, fmt.Sprintf("records-%d.jsonl", time.Now().UnixNano()))
	var out bytes.Buffer
	cmd := c.command(append([]string{"--log", "off", "--record", file, "--"}, command...)...)
	cmd.Dir = home
	cmd.Env = append(append(os.Environ(), "HOME="+home, "TMPDIR="+home, "NO_PROXY=*", "no_proxy=*"), environment...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if _, err := c.net.Run(cmd); err != nil {
		t.Fatalf("%s: %v\n%s", command[0], err, &out)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return out.String(), recorded(t, string(text))
}

// requests are the methods and paths of records, and fails the test for a record that is not a request that succeeded.
func requests(t testing.TB, records []live.Record) (all []string) {
	t.Helper()
	for _, r := range records {
		if !r.Request || r.Failed || r.Status != 200 {
			t.Errorf("the record is %+v", r)
		}
		all = append(all, r.Method+" "+r.Path)
	}
	return all
}

func contains(t testing.TB, program string, all []string, wanted ...string) {
	t.Helper()
	for _, want := range wanted {
		if !slices.Contains(all, want) {
			t.Errorf("%s: the records %q lack %q", program, all, want)
		}
	}
}

func (c *caller) web(t testing.TB, handler http.Handler) {
	t.Helper()
	serveHTTP(t, c.peer.Listen(t, "tcp", "203.0.113.80:80"), handler)
}

func TestRunCarriesGit(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		source := t.TempDir()
		script := `git init -q "$1" && cd "$1" && echo content >file && git add file && git -c user.name=a -c user.email=a@b commit -qm one && git update-server-info`
		if out, err := exec.Command("sh", "-c", script, "sh", source).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		c.web(t, http.StripPrefix("/repo.git", http.FileServer(http.Dir(filepath.Join(source, ".git")))))
		home := c.home(t)
		_, records := c.program(t, home, nil, "git", "clone", "-q", "http://web.example/repo.git", "copy")
		if text, err := os.ReadFile(filepath.Join(home, "copy", "file")); err != nil || string(text) != "content\n" {
			t.Errorf("the clone has %q, %v", text, err)
		}
		var all []string
		for _, r := range records {
			all = append(all, r.Method+" "+r.Path)
		}
		contains(t, "git", all, "GET /repo.git/info/refs?service=git-upload-pack", "GET /repo.git/HEAD")
	})
}

func TestRunCarriesGoModDownload(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		var archive bytes.Buffer
		z := zip.NewWriter(&archive)
		for name, text := range map[string]string{"go.mod": "module example.com/m\n", "m.go": "package m\n"} {
			file, err := z.Create("example.com/m@v1.0.0/" + name)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(file, text)
		}
		z.Close()
		c.web(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch strings.TrimPrefix(r.URL.Path, "/proxy/example.com/m/@v/") {
			case "v1.0.0.info":
				io.WriteString(w, `{"Version":"v1.0.0","Time":"2020-01-01T00:00:00Z"}`)
			case "v1.0.0.mod":
				io.WriteString(w, "module example.com/m\n")
			case "v1.0.0.zip":
				w.Write(archive.Bytes())
			default:
				http.NotFound(w, r)
			}
		}))
		environment := []string{"GOPROXY=http://web.example/proxy", "GONOSUMDB=*", "GONOSUMCHECK=1", "GOFLAGS=-modcacherw", "GOTOOLCHAIN=local", "GOSUMDB=off"}
		goroot, err := exec.Command("go", "env", "GOROOT").Output()
		if err != nil {
			t.Fatal(err)
		}
		home := c.home(t)
		environment = append(environment, "GOPATH="+home+"/go", "GOCACHE="+home+"/cache")
		_, records := c.program(t, home, environment, filepath.Join(strings.TrimSpace(string(goroot)), "bin", "go"), "mod", "download", "example.com/m@v1.0.0")
		contains(t, "go", requests(t, records), "GET /proxy/example.com/m/@v/v1.0.0.info", "GET /proxy/example.com/m/@v/v1.0.0.mod", "GET /proxy/example.com/m/@v/v1.0.0.zip")
	})
}

func TestRunCarriesNPM(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		var tarball bytes.Buffer
		gz := gzip.NewWriter(&tarball)
		tw := tar.NewWriter(gz)
		text := `{"name":"tiny","version":"1.0.0"}`
		tw.WriteHeader(&tar.Header{Name: "package/package.json", Mode: 0o644, Size: int64(len(text))})
		io.WriteString(tw, text)
		tw.Close()
		gz.Close()
		sum1, sum512 := sha1.Sum(tarball.Bytes()), sha512.Sum512(tarball.Bytes())
		c.web(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/npm/tiny":
				w.Header().Set("Content-Type", "application/json")
				json.NewEncoder(w).Encode(map[string]any{"name": "tiny", "dist-tags": map[string]string{"latest": "1.0.0"},
					"versions": map[string]any{"1.0.0": map[string]any{"name": "tiny", "version": "1.0.0", "dist": map[string]string{
						"tarball": "http://web.example/npm/tiny.tgz", "shasum": hex.EncodeToString(sum1[:]),
						"integrity": "sha512-" + base64.StdEncoding.EncodeToString(sum512[:])}}}})
			case "/npm/tiny.tgz":
				w.Write(tarball.Bytes())
			default:
				http.NotFound(w, r)
			}
		}))
		home := c.home(t)
		_, records := c.program(t, home, nil, "npm", "install", "--no-audit", "--no-fund", "--no-update-notifier", "--registry", "http://web.example/npm/", "tiny")
		if _, err := os.Stat(filepath.Join(home, "node_modules", "tiny", "package.json")); err != nil {
			t.Error(err)
		}
		contains(t, "npm", requests(t, records), "GET /npm/tiny", "GET /npm/tiny.tgz")
	})
}

// PostgreSQL's client speaks first, with a request for TLS that is not TLS.
func TestRunCarriesPostgreSQL(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		found, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
		if len(found) == 0 {
			t.Fatal("postgresql is missing; make test installs it")
		}
		account, err := user.Lookup("postgres") // PostgreSQL does not run as root
		if err != nil {
			t.Fatal(err)
		}
		number, err := strconv.ParseUint(account.Uid, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		postgres := uint32(number)
		owner := &caller{uid: postgres}
		data := filepath.Join(owner.home(t), "data")
		run := func(name string, arguments ...string) *exec.Cmd {
			cmd := c.peer.Command(postgres, postgres, filepath.Join(found[len(found)-1], name), arguments...)
			cmd.Env = append(os.Environ(), "LC_ALL=C")
			cmd.Dir = "/"
			return cmd
		}
		if out, err := c.peer.Run(run("initdb", "-D", data, "-A", "trust", "-U", "shop", "--no-sync")); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if err := os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte("host all all 0.0.0.0/0 trust\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		c.peer.Start(t, run("postgres", "-D", data, "-h", "203.0.113.80", "-p", "5432", "-k", "", "-c", "fsync=off"))
		nettest.Eventually(t, "PostgreSQL answers", func() bool {
			return tryConnectionOpens(c.peer, "203.0.113.80:5432")
		})
		var output string
		var records []live.Record
		nettest.Eventually(t, "PostgreSQL accepts queries", func() bool {
			var stderr string
			var status int
			output, stderr, status = c.run(t, "--log", "json", "--", "psql", "-h", "web.example", "-U", "shop", "-d", "postgres", "-Atc", "select 6*7")
			if status == 0 {
				records = recorded(t, stderr)
			}
			return status == 0
		})
		if output != "42\n" || len(records) != 1 || records[0].Protocol != "opaque" || records[0].Destination != "203.0.113.80:5432" || records[0].Failed {
			t.Errorf("psql printed %q, the records are %+v", output, records)
		}
	})
}

// tryConnectionOpens reports whether a server accepts connections.
func tryConnectionOpens(from *nettest.Namespace, address string) bool {
	conn, err := from.Dial("tcp", address, nettest.Patience)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// connections counts those over which a server got requests.
type connections struct {
	mu   sync.Mutex
	seen map[string]bool // by the client's address
}

func (c *connections) add(client string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen == nil {
		c.seen = make(map[string]bool)
	}
	c.seen[client] = true
}

// take returns the number and starts from 0 again.
func (c *connections) take() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.seen)
	c.seen = nil
	return n
}

// upgrade answers requests of a kept connection, and echoes what is sent over an upgraded one.
func upgrade(used *connections) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		used.add(r.RemoteAddr)
		if r.Header.Get("Upgrade") == "" {
			io.WriteString(w, r.URL.Path)
			return
		}
		sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		conn, buffered, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintf(buffered, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
			base64.StdEncoding.EncodeToString(sum[:]))
		buffered.Flush()
		io.Copy(conn, buffered)
	})
}

// Programs with kept connections and WebSockets, in Python and Node.
func TestRunCarriesKeptConnectionsAndWebSockets(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		const inPython = `
import http.client
kept = http.client.HTTPConnection("web.example")
for i in range(3):
    kept.request("GET", "/kept/%d" % i)
    print(kept.getresponse().read().decode())
kept.request("GET", "/socket", headers={"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"})
response = kept.response_class(kept.sock, method="GET")
response.begin()
kept.sock.sendall(b"\x81\x85\0\0\0\0hello")
print(response.status, kept.sock.recv(100)[6:].decode())
kept.sock.close()`
		const inNode = `
const http = require("http"), agent = new http.Agent({keepAlive: true, maxSockets: 1});
const get = path => new Promise((done, failed) => http.get({host: "web.example", path, agent}, r => {
  let text = ""; r.on("data", d => text += d); r.on("end", () => { console.log(text); done(); });
}).on("error", failed));
(async () => {
  for (let i = 0; i < 3; i++) await get("/kept/" + i);
  http.get({host: "web.example", path: "/socket", agent, headers: {Connection: "Upgrade", Upgrade: "websocket", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}})
    .on("upgrade", (r, socket) => { socket.on("data", d => { console.log(r.statusCode + " " + d.subarray(6)); process.exit(); }); socket.write("\x81\x85\0\0\0\0hello", "latin1"); });
})();`
		var used connections
		c.web(t, upgrade(&used))
		home := c.home(t)
		for name, command := range map[string][]string{"Python": {"python3", "-c", inPython}, "Node": {"node", "-e", inNode}} {
			output, records := c.program(t, home, nil, command...)
			if want := "/kept/0\n/kept/1\n/kept/2\n101 hello\n"; output != want {
				t.Errorf("%s printed %q, want %q", name, output, want)
			}
			var all []string
			for _, r := range records {
				all = append(all, fmt.Sprint(r.Path, " ", r.Status))
			}
			if want := []string{"/kept/0 200", "/kept/1 200", "/kept/2 200", "/socket 101"}; !slices.Equal(all, want) {
				t.Errorf("%s: the records are %q", name, all)
			}
			if n := used.take(); n != 1 {
				t.Errorf("%s used %d connections", name, n)
			}
		}
	})
}

// screen is the other side of a pseudo-terminal.
type screen struct {
	t    testing.TB
	file *os.File
	text strings.Builder
	from *bufio.Reader
}

// openTerminal opens a pseudo-terminal of a certain size.
func openTerminal(t testing.TB) (s *screen, terminal *os.File) {
	t.Helper()
	file, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	var number int
	raw, _ := file.SyscallConn()
	raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
		if err == nil {
			err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 77})
		}
	})
	if err == nil {
		terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return &screen{t: t, file: file, from: bufio.NewReader(file)}, terminal
}

// enter types text, and waits until the terminal shows want after that.
func (s *screen) enter(text, want string) {
	s.t.Helper()
	s.text.Reset()
	if _, err := io.WriteString(s.file, text); err != nil {
		s.t.Fatal(err)
	}
	s.file.SetReadDeadline(time.Now().Add(nettest.Patience))
	for !strings.Contains(s.text.String(), want) {
		b, err := s.from.ReadByte()
		if err != nil {
			s.t.Fatalf("after %q the terminal shows %q, without %q (%v)", text, &s.text, want, err)
		}
		s.text.WriteByte(b)
	}
}

// resize changes the size of the terminal.
func (s *screen) resize(rows, columns uint16) {
	s.t.Helper()
	raw, err := s.file.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) {
			err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns})
		})
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// foreground is the process group to which the terminal sends signals.
func (s *screen) foreground() (group int) {
	raw, err := s.file.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { group, err = unix.IoctlGetInt(int(fd), unix.TIOCGPGRP) })
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return group
}

// A shell in the sandbox has its terminal: size, job control and signals. When it ends, the terminal belongs to its caller again.
func TestRunKeepsTheTerminal(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		s, terminal := openTerminal(t)
		cmd := c.command()
		cmd.Args = []string{"sh", "-c", `"$@"; read line; echo "the caller read $line"; exit 5`, "sh", pillion, "run", "--summary", "off", "--", "bash", "--norc", "--noediting"}
		cmd.Path = requireProgram(t, "sh")
		cmd.Env = append(os.Environ(), "PS1=prompt> ", "HOME=/nonexistent", "HISTFILE=")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Credential: cmd.SysProcAttr.Credential}
		p := c.net.Start(t, cmd)
		terminal.Close()
		s.enter("", "prompt> ")
		s.enter("stty size\r", "33 77\r\n")
		s.enter(`python3 -c 'import signal as s; w = [s.SIGWINCH]; s.pthread_sigmask(s.SIG_BLOCK, w); print("wai" "ting", flush=True); s.sigwait(w); print("res" "ized")'`+"\r", "waiting\r\n")
		s.resize(44, 88)
		s.enter("", "resized\r\n")
		s.enter("stty size\r", "44 88\r\n")
		s.enter("sh -c 'echo sta''rted; exec sleep 1000'\r", "started\r\n")
		s.enter("\x1a", "Stopped")
		s.enter("kill -KILL %1; echo kil''led\r", "killed\r\n")
		s.enter("sh -c 'echo sta''rted; exec sleep 1000'\r", "started\r\n")
		s.enter("\x03", "prompt> ")
		s.enter("echo status=$?\r", "status=130")
		s.enter("exit\r", "exit\r\n")
		s.enter("a line\r", "the caller read a line")
		if status, err := p.Wait(nettest.Patience); status != 5 {
			t.Errorf("exit status %d, %v", status, err)
		}
	})
}

// Ctrl-C and Ctrl-Z reach a command that is not a shell, and pillion with it. Lines on the terminal are in colour, unless NO_COLOR is set.
func TestRunIsAJobOfItsShell(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		c.serve(t, netip.MustParseAddrPort("203.0.113.80:80"))
		s, terminal := openTerminal(t)
		cmd := c.command()
		cmd.Args, cmd.Path = []string{"bash", "--norc", "--noediting"}, requireProgram(t, "bash")
		cmd.Env = append(os.Environ(), "PS1=prompt> ", "TERM=xterm", "HOME=/nonexistent", "HISTFILE=")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Credential: cmd.SysProcAttr.Credential}
		p := c.net.Start(t, cmd)
		terminal.Close()
		s.enter("", "prompt> ")
		get := pillion + " run --summary off -- curl -sS --noproxy '*' -o /dev/null http://203.0.113.80/a\r"
		s.enter(get, "\x1b[2mpillion: \x1b[0m\x1b[32m200\x1b[0m GET 203.0.113.80/a ")
		s.enter("", "prompt> ")
		s.enter("NO_COLOR=1 "+get, "pillion: 200 GET 203.0.113.80/a ")
		s.enter("", "prompt> ")
		s.enter(pillion+" run -- sh -c 'echo sta''rted; exec sleep 1000'\r", "started\r\n")
		s.enter("\x1a", "Stopped")
		s.enter("fg\r", "exec sleep 1000'\r\n")
		nettest.Eventually(t, "the job is in the foreground", func() bool { return s.foreground() != p.Cmd.Process.Pid })
		s.enter("\x03", "prompt> ")
		s.enter("echo status=$?\r", "status=130")
		s.enter("exit 4\r", "exit")
		if status, err := p.Wait(nettest.Patience); status != 4 {
			t.Errorf("exit status %d, %v", status, err)
		}
	})
}
