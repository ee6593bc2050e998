package accesslog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Sinks has the access logs that a control plane configures. Logs with the same path share its queue. It is safe for
// concurrent use.
type Sinks struct {
	Noted *flow.Noted  // gets the fields that formats and filters look at
	Log   *slog.Logger // of what cannot be carried out

	// Of services, and set before anything is recorded: what sends requests to the endpoints of a cluster, the attributes of
	// this process, and the node as the control plane has it, a message envoy.config.core.v3.Node.
	Transport       func(cluster string, http2 bool) http.RoundTripper
	Resource        []export.Resource
	Node            []byte
	NodeID, Cluster string // of the node

	CloseTime time.Duration // as in export.Config

	counts export.Counts // of all services

	mu       sync.Mutex
	files    map[string]*writer
	services map[string]*export.Exporter
	kept     map[string]bool // what is configured, by the keys of files and services; nil: not known yet
	closed   bool

	goneWritten, goneDropped uint64 // of files that were forgotten
}

// maxFiles bounds the files of access logs, each of which has a queue and a goroutine, and likewise the services. Records for
// others are not written.
const maxFiles = 8

// envoyFormat is the format of a log without one.
const envoyFormat = `[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% ` +
	`%BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" ` +
	`"%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%"`

// Of returns the sinks of logs. They are compiled once, and kept with their configuration. s may be nil: there are no sinks.
func (s *Sinks) Of(logs []mesh.AccessLog) (sinks []flow.Sink) {
	if s == nil {
		return nil
	}
	for i := range logs {
		compiled, ok := logs[i].Compiled.Load().(*Log)
		if !ok {
			compiled = s.compile(&logs[i])
			if !logs[i].Compiled.CompareAndSwap(nil, compiled) {
				compiled = logs[i].Compiled.Load().(*Log)
			}
		}
		if compiled.writer != nil || compiled.service != nil {
			sinks = append(sinks, compiled)
		}
	}
	return sinks
}

// compile returns the log that c configures. An operator that is not understood is logged, and has no value.
func (s *Sinks) compile(c *mesh.AccessLog) *Log {
	l := &Log{lines: sync.Pool{New: func() any { return new(line) }}, looked: time.Now()}
	to, problems := c.Path, []error(nil)
	if c.Service != nil {
		to, problems = s.serve(l, c.Service)
	} else {
		l.writer = s.writer(c.Path)
		l.format, problems = s.format(c)
	}
	for _, problem := range problems {
		s.Log.Warn("access log format not honoured", "path", to, "error", problem)
	}
	if c.Filter != nil {
		l.when = s.bind(c.Filter)
	}
	return l
}

// format compiles the format of a log.
func (s *Sinks) format(c *mesh.AccessLog) (*Format, []error) {
	compiler := compiler{lenient: true}
	compiler.omits = c.OmitEmpty
	var err error
	if c.JSON != nil {
		var text []byte
		if text, err = appendStruct(nil, c.JSON); err == nil {
			err = compiler.object(string(text))
		}
	} else {
		text := c.Text
		if text == "" {
			text = envoyFormat
		}
		err = compiler.template(oneLine(text), bare)
	}
	var f *Format
	if err == nil {
		f, err = compiler.finish()
	}
	problems := compiler.problems
	if err != nil {
		problems = append(problems, err)
		f, _ = ParseFormat(Default)
	}
	return f, append(problems, s.note(f)...)
}

// oneLine returns a format without the newline at its end, because each line gets one. Other newlines become spaces.
func oneLine(text string) string {
	text = strings.ToValidUTF8(strings.TrimSuffix(text, "\n"), "?")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
}

// note asks for the fields of a format, and puts their places in records into it. An operator with a field that is not
// recorded has no value, and is a problem.
func (s *Sinks) note(f *Format) (problems []error) {
	if f.fields.Certificates {
		s.Noted.AddCertificates()
	}
	for i := range f.pieces {
		p := &f.pieces[i]
		for j, from := range p.from {
			names, base := f.fields.Request, fromRequest
			switch {
			case from >= fromResponse:
				names, base = f.fields.Response, fromResponse
			case from < fromRequest:
				continue
			}
			name := names[from-base]
			place, err := s.Noted.Add(name, base == fromResponse)
			if err != nil {
				problems = append(problems, notRecorded(name, err))
				p.does = verbMissing
				break
			}
			p.from[j] = base + source(place)
		}
	}
	return problems
}

func notRecorded(name string, err error) error {
	return fmt.Errorf("the field %s is not recorded: %w", name, err)
}

// place returns where records have a field that an expression reads; negative: they do not.
func (s *Sinks) place(h cel.Header) int {
	place, err := s.Noted.Add(h.Name, h.Response)
	if err != nil {
		s.Log.Warn("header field not recorded", "field", h.Name, "error", err)
	}
	return place
}

// writer returns the queue of a file; nil: there are too many. The file is opened by the goroutine of the queue.
func (s *Sinks) writer(path string) *writer {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w, known := s.files[path]; known || s.closed {
		return w
	}
	if s.files == nil {
		s.files = map[string]*writer{}
	}
	if s.crowded(false, path) {
		return nil
	}
	w := startWriter(path, 0, s.Log, nil)
	w.park(s.gone(path))
	s.files[path] = w
	return w
}

// gone reports whether a file or service is not configured any more. s.mu is held.
func (s *Sinks) gone(key string) bool { return s.kept != nil && !s.kept[key] }

// crowded reports whether there are too many files, or services, for another one. s.mu is held.
func (s *Sinks) crowded(services bool, target string) bool {
	n := 0
	for path := range s.files {
		if !services && !s.gone(path) {
			n++
		}
	}
	for name := range s.services {
		if services && !s.gone(name) {
			n++
		}
	}
	if n < maxFiles {
		return false
	}
	s.Log.Error("too many access logs", "path", target, "limit", maxFiles)
	return true
}

// maxGone bounds the files and services that were configured once: connections that began then may still be logged.
const maxGone = 64

// Keep closes the files and the connections to services that are not configured any more, as soon as what is queued is
// written. They are opened again for connections that began before, and if they are configured again.
func (s *Sinks) Keep(configured iter.Seq[[]mesh.AccessLog]) {
	kept := map[string]bool{}
	seen := map[*mesh.AccessLog]bool{}
	for logs := range configured {
		if len(logs) == 0 || seen[&logs[0]] {
			continue
		}
		seen[&logs[0]] = true
		for i := range logs {
			kept[s.key(&logs[i])] = true
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.kept = kept
	for path, w := range s.files {
		gone := s.gone(path)
		if w.park(gone); gone && len(s.files) > maxGone && w.forget() {
			s.goneWritten += w.written.Load()
			s.goneDropped += w.lost()
			delete(s.files, path)
		}
	}
	for name, e := range s.services {
		gone := s.gone(name)
		if e.Retire(gone); gone && len(s.services) > maxGone && e.Idle() {
			delete(s.services, name)
		}
	}
}

// key returns what distinguishes the file or service of a log from others.
func (s *Sinks) key(c *mesh.AccessLog) string {
	if c.Service == nil {
		return c.Path
	}
	return s.config(c.Service).name
}

// each returns the queues.
func (s *Sinks) each() (all []*writer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.files {
		all = append(all, w)
	}
	return all
}

// Reopen opens the files again; see Log.Reopen.
func (s *Sinks) Reopen() {
	for _, w := range s.each() {
		w.reopen()
	}
}

// Counts returns the numbers of records that were written or sent, and that were lost.
func (s *Sinks) Counts() (written, dropped uint64) {
	s.mu.Lock()
	written, dropped = s.goneWritten, s.goneDropped
	s.mu.Unlock()
	for _, w := range s.each() {
		written += w.written.Load()
		dropped += w.lost()
	}
	return written + s.counts.Exported.Load(), dropped + s.counts.Dropped.Load() + s.counts.Failed.Load()
}

// Close writes and sends what is queued and closes the files, all at the same time; see Log.Close. Later records are lost.
func (s *Sinks) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	services := slices.Collect(maps.Values(s.services))
	s.mu.Unlock()
	files, before := s.each(), s.counts.Failed.Load()
	errs := make([]error, 1+len(files))
	var closing sync.WaitGroup
	for i, w := range files {
		closing.Go(func() { errs[1+i] = w.close(ctx) })
	}
	export.CloseAll(ctx, services)
	if lost := s.counts.Failed.Load() - before; lost > 0 {
		errs[0] = fmt.Errorf("closing access logs: %d records were not sent", lost)
	}
	closing.Wait()
	return errors.Join(errs...)
}
