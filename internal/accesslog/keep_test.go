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
		if len(s.Of([]mesh.AccessLog{one})) != 1 {
			t.Fatalf("file %d is refused: %s", i, log.buf.String())
		}
		s.Keep(configured())
		nettest.Eventually(t, "the file is closed", func() bool { return !isOpen(t, one.Path) })
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
	log := func(name string) mesh.AccessLog {
		return mesh.AccessLog{Service: &mesh.LogService{Kind: mesh.HTTPLogs, Name: name, To: mesh.Receiver{GRPC: &mesh.GRPCService{Cluster: "c"}}}}
	}
	problems := &logBuffer{}
	s := &Sinks{
		Noted: flow.NewNoted(flow.Fields{}), Log: problems.logger(),
		Transport: func(string, bool) http.RoundTripper { return refusing{} },
	}
	for i := range 3 * maxGone {
		name := fmt.Sprint(i)
		s.Keep(configured(log(name)))
		for range 2 {
			if sinks := s.Of([]mesh.AccessLog{log(name)}); len(sinks) != 1 {
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
