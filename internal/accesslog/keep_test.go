package accesslog

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// isOpen reports whether this process has a descriptor of a file.
func isOpen(t *testing.T, path string) bool {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		return err == nil && target == path
	})
}

// configured is the configuration of a push.
func configured(logs ...mesh.AccessLog) func(func([]mesh.AccessLog) bool) {
	return func(yield func([]mesh.AccessLog) bool) { yield(logs) }
}

func write(sinks []flow.Sink) {
	for _, s := range sinks {
		s.Closed(request(flow.Inbound, flow.Completed))
	}
}

// A file that is not configured any more is closed when its lines are written, without losing those of connections that began
// before.
func TestFilesThatAreNotConfiguredAnyMoreAreClosed(t *testing.T) {
	directory := t.TempDir()
	old, kept := filepath.Join(directory, "old"), filepath.Join(directory, "kept")
	logs := []mesh.AccessLog{{Path: old, Text: "line"}, {Path: kept, Text: "line"}}
	s := &Sinks{Noted: flow.NewNoted(flow.Fields{}), Log: (&logBuffer{}).logger()}
	sinks := s.Of(logs)
	state := func(path string, open bool, lines int) {
		t.Helper()
		nettest.Eventually(t, fmt.Sprintf("%s: open %v, %d lines", path, open, lines), func() bool {
			text, _ := os.ReadFile(path)
			return isOpen(t, path) == open && strings.Count(string(text), "\n") == lines
		})
	}
	write(sinks)
	s.Keep(configured(logs[1]))
	state(old, false, 1)
	state(kept, true, 1)
	write(sinks) // of a connection that goes on
	state(old, false, 2)
	state(kept, true, 2)
	s.Reopen()
	if isOpen(t, old) {
		t.Error("a file that is not configured is open after SIGHUP")
	}
	s.Keep(configured(logs...)) // again
	state(old, true, 2)
	write(sinks)
	s.Keep(configured())
	state(old, false, 3)
	state(kept, false, 3)
	write(sinks)
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if written, lost := s.Counts(); written != 8 || lost != 0 || isOpen(t, old) || isOpen(t, kept) {
		t.Errorf("%d lines written, %d lost", written, lost)
	}
}

// Files that come and go do not add up: neither to the limit of files, nor in memory.
func TestChangingFilesStayWithinTheLimit(t *testing.T) {
	directory := t.TempDir()
	log := &logBuffer{}
	s := &Sinks{Noted: flow.NewNoted(flow.Fields{}), Log: log.logger()}
	for i := range 3 * maxGone {
		one := mesh.AccessLog{Path: filepath.Join(directory, fmt.Sprint(i)), Text: "line"}
		s.Keep(configured(one))
		if taken(s.Of([]mesh.AccessLog{one})) != 1 {
			t.Fatalf("file %d is refused: %s", i, log.buf.String())
		}
		w := s.files[one.Path]
		s.Keep(configured()) // which may forget it at once
		nettest.Eventually(t, "the file is closed", func() bool { return w.forget() && !isOpen(t, one.Path) })
	}
	if n := len(s.each()); n > maxGone+1 {
		t.Errorf("%d files are kept", n)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// Services are kept and let go like files. Equal services share an exporter.
func TestServicesThatAreNotConfiguredAnyMoreAreLetGo(t *testing.T) {
	problems := &logBuffer{}
	s := &Sinks{
		Noted: flow.NewNoted(flow.Fields{}), Log: problems.logger(),
		Transport: func(string, bool) http.RoundTripper { return refusing{} },
	}
	for i := range 3 * maxGone {
		name := fmt.Sprint(i)
		s.Keep(configured(serviceLog(name)))
		for range 2 {
			if taken(s.Of([]mesh.AccessLog{serviceLog(name)})) != 1 {
				t.Fatalf("service %d is refused: %s", i, problems.buf.String())
			}
		}
		s.Keep(configured())
	}
	nettest.Eventually(t, "services are forgotten", func() bool {
		s.Keep(configured())
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.services) <= maxGone
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.Close(ctx)
}

// refusing is a service that cannot be reached.
type refusing struct{}

func (refusing) RoundTrip(*http.Request) (*http.Response, error) { return nil, os.ErrPermission }

// after is a service that answers when a channel is closed.
type after <-chan struct{}

func (a after) RoundTrip(r *http.Request) (*http.Response, error) {
	select {
	case <-a:
		return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

// A service that hangs takes no time from files at the end.
func TestFilesAndServicesAreClosedAtTheSameTime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	var written chan struct{}
	s := &Sinks{
		Noted: flow.NewNoted(flow.Fields{}), Log: (&logBuffer{}).logger(), CloseTime: nettest.Patience,
		Transport: func(string, bool) http.RoundTripper { return after(written) },
	}
	s.Of([]mesh.AccessLog{{Path: path, Text: "line"}})
	written = s.files[path].done // closed when the file is
	to := mesh.Receiver{HTTP: &mesh.HTTPService{Cluster: "c", Timeout: nettest.Patience}}
	write(s.Of([]mesh.AccessLog{{Path: path, Text: "line"}, {Service: &mesh.LogService{Kind: mesh.OpenTelemetryLogs, Delay: time.Minute, To: to}}}))
	ctx, cancel := context.WithTimeout(t.Context(), nettest.Patience)
	defer cancel()
	if err := s.Close(ctx); err != nil {
		t.Error(err)
	}
	if written, lost := s.Counts(); written != 2 || lost != 0 {
		t.Errorf("%d records written, %d lost", written, lost)
	}
}

// serviceLog is a log of a service that differs from others by its name.
func serviceLog(name string) mesh.AccessLog {
	return mesh.AccessLog{Service: &mesh.LogService{Kind: mesh.HTTPLogs, Name: name, To: mesh.Receiver{GRPC: &mesh.GRPCService{Cluster: "c"}}}}
}

// Connections that began before pushes cannot open files and services without a limit, nor take the places of those that are
// configured.
func TestWhatIsNotConfiguredAnyMoreIsBounded(t *testing.T) {
	directory := t.TempDir()
	s := &Sinks{
		Noted: flow.NewNoted(flow.Fields{}), Log: (&logBuffer{}).logger(),
		Transport: func(string, bool) http.RoundTripper { return refusing{} },
	}
	both := func(name string) []mesh.AccessLog {
		return []mesh.AccessLog{{Path: filepath.Join(directory, name), Text: "line"}, serviceLog(name)}
	}
	s.Keep(configured(both("kept")...))
	for i := range 2 * maxGone {
		s.Of(both(fmt.Sprint(i)))
	}
	if files, services := len(s.files), len(s.services); files != maxGone || services != maxGone {
		t.Errorf("%d files and %d services, want %d", files, services, maxGone)
	}
	if n := taken(s.Of(both("kept"))); n != 2 {
		t.Errorf("%d of 2 configured logs are taken", n)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// A log that was refused is written as soon as a push has made room.
func TestARefusedLogIsTakenLater(t *testing.T) {
	directory := t.TempDir()
	log := &logBuffer{}
	s := &Sinks{
		Noted: flow.NewNoted(flow.Fields{}), Log: log.logger(),
		Transport: func(string, bool) http.RoundTripper { return refusing{} },
	}
	var logs []mesh.AccessLog
	for i := range maxFiles + 1 {
		logs = append(logs, mesh.AccessLog{Path: filepath.Join(directory, fmt.Sprint(i)), Text: "line"}, serviceLog(fmt.Sprint(i)))
	}
	sinks := s.Of(logs)
	last := len(logs) - 2
	for range 3 {
		s.Of(logs)
		sinks[last].Closed(request(flow.Inbound, flow.Completed))
	}
	if n := log.count("too many access logs"); n != 2 || taken(sinks) != last {
		t.Errorf("%d logs are taken, and %d refusals are logged", taken(sinks), n)
	}
	s.Keep(configured(logs[2:]...))
	sinks[last].Closed(request(flow.Inbound, flow.Completed)) // of a connection that met the listener before
	if n := taken(s.Of(logs[last:])); n != 2 {
		t.Errorf("%d of 2 logs are taken", n)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if got := read(t, logs[last].Path); got != "line\n" {
		t.Errorf("the file has %q", got)
	}
}
