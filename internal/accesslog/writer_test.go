package accesslog

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// logBuffer collects the output of a logger.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *logBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *logBuffer) count(text string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.buf.String(), text)
}

func (s *logBuffer) logger() *slog.Logger { return slog.New(slog.NewTextHandler(s, nil)) }

// of returns a request whose line, in the format of these tests, is text.
func of(text string) *flow.Record {
	r := request(flow.Inbound, flow.Completed)
	r.HTTP.Path = []byte(text)
	return r
}

// numbered returns a request whose line is a number and a kilobyte.
func numbered(i int) *flow.Record { return of(fmt.Sprintf("%08d", i) + strings.Repeat("x", 1000)) }

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// fifo creates a FIFO and returns its path.
func fifo(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// fill logs numbered lines until one is dropped, and returns the number of calls.
func fill(l *Log) (calls int) {
	for l.Dropped() == 0 {
		l.Closed(numbered(calls))
		calls++
	}
	return calls
}

func TestLinesAreAppendedToAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for _, text := range []string{"one", "two"} {
		l := begin(t, Config{Path: path})
		l.Closed(of(text))
		if err := end(l, nettest.Patience); err != nil || l.Written() != 1 || l.Dropped() != 0 {
			t.Errorf("%v, %d written, %d dropped", err, l.Written(), l.Dropped())
		}
		l.Closed(of("late"))
		l.Reopen()
		if err := end(l, nettest.Patience); err != nil || l.Dropped() != 1 {
			t.Errorf("after the end: %v, %d dropped", err, l.Dropped())
		}
	}
	if got := read(t, path); got != "one\ntwo\n" {
		t.Errorf("%q", got)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&^0o640 != 0 {
		t.Error(info.Mode(), err)
	}
}

func TestLinesAreWrittenWithinASecondAndTheTimerStops(t *testing.T) {
	l := begin(t, Config{Path: filepath.Join(t.TempDir(), "log")})
	l.Closed(of("one"))
	nettest.Eventually(t, "the line is written", func() bool { return l.Written() == 1 })
	l.writer.mu.Lock()
	defer l.writer.mu.Unlock()
	if l.writer.armed || l.writer.timer.Stop() {
		t.Error("the timer runs although the queue is empty")
	}
}

func TestFullChunkIsWrittenAtOnce(t *testing.T) {
	l := begin(t, Config{Path: filepath.Join(t.TempDir(), "log")})
	l.writer.mu.Lock()
	l.writer.armed = true // as if the timer ran, although it does not
	l.writer.mu.Unlock()
	for i := range 66 {
		l.Closed(numbered(i))
	}
	nettest.Eventually(t, "the first 64 KiB are written", func() bool { return l.Written() == 64 })
}

func TestManyGoroutinesWriteWholeLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := begin(t, Config{Path: path, QueueBytes: 8 << 20})
	var owners sync.WaitGroup
	for owner := range 4 {
		owners.Go(func() {
			for i := range 1000 {
				l.Closed(of(fmt.Sprintf("%d-%d-%s-", owner, i, strings.Repeat("y", i))))
				if i%300 == 0 {
					l.Reopen()
				}
			}
		})
	}
	owners.Wait()
	if err := end(l, nettest.Patience); err != nil || l.Written() != 4000 {
		t.Fatalf("%v, %d written", err, l.Written())
	}
	next := [4]int{}
	for line := range strings.Lines(read(t, path)) {
		owner := int(line[0] - '0')
		i := next[owner]
		next[owner]++
		if want := fmt.Sprintf("%d-%d-%s-\n", owner, i, strings.Repeat("y", i)); line != want {
			t.Fatalf("got %q, want %q", line, want)
		}
	}
	if next != [4]int{1000, 1000, 1000, 1000} {
		t.Error(next)
	}
}

// A FIFO without a reader takes 64 KiB and delays only the log.
func TestStuckSinkLosesWholeLinesAndIsLoggedOnce(t *testing.T) {
	path := fifo(t)
	var log logBuffer
	l := begin(t, Config{Path: path, QueueBytes: 256 << 10, Logger: log.logger()})
	calls := fill(l)
	for range 500 {
		l.Closed(numbered(calls))
		calls++
	}
	if dropped := l.Dropped(); dropped < 400 || dropped > 501 {
		t.Errorf("%d dropped of %d", dropped, calls)
	}
	nettest.Eventually(t, "the problem is logged", func() bool { return log.count("dropping access log lines") == 1 })
	reader, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	lines := make(chan string, 10_000)
	var reads sync.WaitGroup
	defer reads.Wait()
	reads.Go(func() {
		for s := bufio.NewScanner(reader); s.Scan(); {
			lines <- s.Text()
		}
		close(lines)
	})
	lost := l.Dropped()
	nettest.Eventually(t, "the queue is written", func() bool { return l.Written() == uint64(calls)-lost })
	nettest.Eventually(t, "the recovery is logged", func() bool {
		return log.count(fmt.Sprintf(`access log recovered" path=%s lines_dropped=%d`, path, lost)) == 1
	})
	if n := log.count("dropping access log lines"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	l.Closed(of("last"))
	if err := end(l, nettest.Patience); err != nil {
		t.Error(err)
	}
	before, got := -1, ""
	for got = range lines {
		if got == "last" {
			continue
		}
		i, err := strconv.Atoi(got[:8])
		if err != nil || i <= before || len(got) != 1008 {
			t.Fatalf("after %d: %q", before, got)
		}
		before = i
	}
	if got != "last" {
		t.Errorf("the last line is %.20q", got)
	}
}

func TestCloseGivesUpOnAStuckSink(t *testing.T) {
	l := begin(t, Config{Path: fifo(t)})
	fill(l)
	err := end(l, 10*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "lines lost") {
		t.Errorf("%v", err)
	}
	if l.Dropped() < 900 {
		t.Errorf("%d lines counted as dropped", l.Dropped())
	}
}

// The rest of a line that the old sink took in part does not begin the new file.
func TestReopenWhileStuckInTheMiddleOfALine(t *testing.T) {
	path := fifo(t)
	l := begin(t, Config{Path: path, QueueBytes: 256 << 10})
	calls := fill(l)
	nettest.Eventually(t, "the sink is full", func() bool { return l.Written() > 0 }) // one chunk and part of a line
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	l.Reopen()
	if err := end(l, nettest.Patience); err != nil {
		t.Fatal(err)
	}
	first, next := -1, 0
	for line := range strings.Lines(read(t, path)) {
		i, err := strconv.Atoi(line[:8])
		if first < 0 {
			first, next = i, i
		}
		if err != nil || len(line) != 1009 || i != next {
			t.Fatalf("%q, want line %d", line, next)
		}
		next++
	}
	if first < 1 || first > 64 || next != calls-1 || l.Written() != uint64(calls-1) {
		t.Errorf("lines %d to %d of %d; %d written", first, next, calls, l.Written())
	}
}

func TestFullDiskIsLoggedAndRecoveredFrom(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	var log logBuffer
	l := begin(t, Config{Path: path, QueueBytes: 128 << 10, Logger: log.logger()})
	calls := fill(l)
	nettest.Eventually(t, "the problem is logged", func() bool {
		return log.count("no space left on device")+log.count("dropping access log lines") == 1
	})
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l.Reopen()
	nettest.Eventually(t, "the recovery is logged", func() bool { return log.count("access log recovered") == 1 })
	if err := end(l, nettest.Patience); err != nil || l.Written() != uint64(calls)-l.Dropped() {
		t.Errorf("%v, %d written and %d dropped of %d", err, l.Written(), l.Dropped(), calls)
	}
	if n := strings.Count(read(t, path), "\n"); uint64(n) != l.Written() {
		t.Errorf("%d lines", n)
	}
}

func TestEachEpisodeOfTroubleIsLogged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	var log logBuffer
	l := begin(t, Config{Path: path, Logger: log.logger()})
	for episode := range 3 {
		if err := errors.Join(os.Remove(path), os.Symlink("/dev/full", path)); err != nil {
			t.Fatal(err)
		}
		l.Reopen()
		l.Closed(of("one"))
		nettest.Eventually(t, "the problem is logged", func() bool { return log.count("no space left on device") == episode+1 })
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		l.Reopen()
		nettest.Eventually(t, "the recovery is logged", func() bool { return log.count("access log recovered") == episode+1 })
	}
	if l.Written() != 3 || l.Dropped() != 0 {
		t.Errorf("%d written, %d dropped", l.Written(), l.Dropped())
	}
}

func TestCloseReportsLinesLostToAFullDisk(t *testing.T) {
	l := begin(t, Config{Path: "/dev/full"})
	l.Closed(of("one"))
	if err := end(l, nettest.Patience); err == nil || !strings.Contains(err.Error(), "1 lines lost") || l.Dropped() != 1 {
		t.Errorf("%v, %d dropped", err, l.Dropped())
	}
}

func TestReopenForRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	var log logBuffer
	l := begin(t, Config{Path: path, Logger: log.logger()})
	l.Closed(of("one"))
	nettest.Eventually(t, "the line is written", func() bool { return l.Written() == 1 })
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	l.Reopen()
	l.Closed(of("two"))
	nettest.Eventually(t, "the line is written", func() bool { return l.Written() == 2 })
	if err := os.Rename(path, path+".2"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	l.Reopen()
	l.Closed(of("three"))
	if err := end(l, nettest.Patience); err != nil {
		t.Fatal(err)
	}
	if one, two := read(t, path+".1"), read(t, path+".2"); one != "one\n" || two != "two\nthree\n" {
		t.Errorf("%q, %q", one, two)
	}
	if log.count("is a directory") != 1 {
		t.Error("the failure to reopen was not logged")
	}
}

func TestReopenTwiceClosesTheFileInBetween(t *testing.T) {
	dir := t.TempDir()
	l := begin(t, Config{Path: filepath.Join(dir, "log")})
	between, err := os.Create(filepath.Join(dir, "between"))
	if err != nil {
		t.Fatal(err)
	}
	l.writer.mu.Lock()
	l.writer.next = between // as after a Reopen that the writer has not seen yet
	l.writer.mu.Unlock()
	l.Reopen()
	if _, err := between.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the file is not closed: %v", err)
	}
}

func TestErrorsOfInvalidConfigurations(t *testing.T) {
	f := mustParse(t, ParseFormat, "")
	for _, c := range []struct {
		Config
		want string
	}{
		{Config{Path: "/nowhere/log", Format: f}, "opening the access log: open /nowhere/log: no such file"},
		{Config{Format: f}, "opening the access log"},
		{Config{Path: "/dev/null"}, "no format given"},
		{Config{Path: "/dev/null", Format: f, Interval: -1}, "must not be negative"},
	} {
		if _, err := New(c.Config); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v; want %s", c.Config, err, c.want)
		}
	}
	if _, err := New(Config{Path: "/nowhere/log", Format: f}); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// asChild is the environment variable that makes this test binary run one of the children.
const asChild = "ACCESSLOG_CHILD"

// children are processes that log to standard output.
var children = map[string]func(*Log, *logBuffer) error{"broken": untilItBreaks, "stuck": untilItIsStuck}

func child(what string) error {
	f, err := ParseFormat("%REQ(:PATH)%")
	if err != nil {
		return err
	}
	var log logBuffer
	l, err := New(Config{Path: "/dev/stdout", Format: f, Logger: log.logger()})
	if err != nil {
		return err
	}
	return children[what](l, &log)
}

func untilItBreaks(l *Log, log *logBuffer) error {
	l.Closed(of("whole"))
	io.Copy(io.Discard, os.Stdin)
	l.Closed(of("broken"))
	if !nettest.Within(nettest.Patience, func() bool { return log.count("broken pipe") == 1 }) {
		return errors.New("the broken pipe was not logged")
	}
	if err := end(l, nettest.Patience); err == nil || !strings.Contains(err.Error(), "1 lines lost") {
		return fmt.Errorf("closing: %v", err)
	}
	return nil
}

func untilItIsStuck(l *Log, _ *logBuffer) error {
	fill(l)
	if err := end(l, 10*time.Millisecond); err == nil || !strings.Contains(err.Error(), "a write does not return: time is up") {
		return fmt.Errorf("closing: %v", err)
	}
	return nil
}

// start runs a child. The test must close its ends of the pipes.
func start(t *testing.T, what string) (c *exec.Cmd, stdin io.WriteCloser, stdout io.ReadCloser) {
	t.Helper()
	c = exec.Command(os.Args[0])
	c.Env = append(os.Environ(), asChild+"="+what)
	c.Stderr = os.Stderr
	stdin, err1 := c.StdinPipe()
	stdout, err2 := c.StdoutPipe()
	if err := errors.Join(err1, err2, c.Start()); err != nil {
		t.Fatal(err)
	}
	return c, stdin, stdout
}

// Go ends a process that writes to a standard output without a reader. The log must not cause that.
func TestStandardOutputMayBreak(t *testing.T) {
	c, stdin, stdout := start(t, "broken")
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "whole\n" {
		t.Errorf("%q, %v", line, err)
	}
	stdout.Close()
	stdin.Close()
	if err := c.Wait(); err != nil {
		t.Errorf("the process ended: %v", err)
	}
}

// A write to a full pipe that is shared blocks. It delays neither the callers nor Close.
func TestStandardOutputMayBeStuck(t *testing.T) {
	c, _, _ := start(t, "stuck")
	state, err := c.Process.Wait() // unlike c.Wait, leaves the pipe open until the process has ended
	if err != nil || !state.Success() {
		t.Errorf("the process ended: %v, %v", state, err)
	}
	c.Wait() // closes the pipes
}

// Other processes share the blocking mode of standard output, so the log must not change it. A blocked write costs a
// goroutine instead.
func TestStandardOutputKeepsItsMode(t *testing.T) {
	flags := func() uintptr {
		f, _, errno := syscall.Syscall(syscall.SYS_FCNTL, 2, syscall.F_GETFL, 0)
		if errno != 0 {
			t.Fatal(errno)
		}
		return f
	}
	before := flags()
	l := begin(t, Config{Path: "/dev/stderr"})
	if err := end(l, nettest.Patience); err != nil || flags() != before {
		t.Errorf("%v, flags %#x became %#x", err, before, flags())
	}
}

func TestOpenConnectionsAreLogged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	filter, err := ParseFilter("direction=outbound")
	if err != nil {
		t.Fatal(err)
	}
	l := begin(t, Config{
		Path: path, Format: mustParse(t, ParseFormat, "%REQUESTED_SERVER_NAME% %DURATION% %BYTES_SENT% %PILLION_REASON%"),
		Filter: filter, TCPStart: true, Interval: time.Hour,
	})
	table := flow.NewTable(l)
	open := func(name string, direction flow.Direction, protocol flow.Protocol, age time.Duration) *flow.Record {
		r := flow.Open(direction, netip.AddrPort{})
		r.Opened = r.Opened.Add(-age)
		table.List(r)
		r.Sent.Store(7)
		table.Carry(r, protocol, flow.Hello{ServerName: name})
		return r
	}
	r := open("tls", flow.Outbound, flow.TLS, 150*time.Minute)
	open("opaque", flow.Outbound, flow.Opaque, 119*time.Minute)
	open("young", flow.Outbound, flow.TLS, time.Minute)
	open("http", flow.Outbound, flow.HTTP11, 150*time.Minute)
	open("inbound", flow.Inbound, flow.TLS, 150*time.Minute)
	table.List(flow.Open(flow.Outbound, netip.AddrPort{})) // protocol not detected yet
	l.Progress(table)                                      // no time has passed
	for range 2 {
		l.looked = l.looked.Add(-40 * time.Minute) // tls was 110 minutes old, opaque 79
		l.Progress(table)
	}
	r.Sent.Store(9)
	r.Opened = time.Now().Add(-4 * time.Hour)
	r.Close(table, flow.Closed, nil)
	if err := end(l, nettest.Patience); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(read(t, path)) {
		fields := strings.Fields(line)
		ms, _ := strconv.Atoi(fields[1])
		got = append(got, fmt.Sprintf("%s %d %s %s", fields[0], ms/60000, fields[2], fields[3]))
	}
	want := "tls 0 7 -;opaque 0 7 -;young 0 7 -;tls 150 7 -;tls 150 7 -;tls 240 9 closed"
	if strings.Join(got, ";") != want {
		t.Errorf("%s; want %s", strings.Join(got, ";"), want)
	}
}
