// Package accesslog writes one line for each flow.Record, as Envoy's access log does. It never blocks the data path: one
// goroutine writes the lines from a bounded queue. When the sink is slow, full or broken, whole lines are dropped, counted
// and reported in the agent's log.
//
// Untrusted text cannot end a field or a line, nor make a line longer than 32 KiB. For any request, a text line of the
// default format has 22 fields, split at the spaces outside quotation marks, and a JSON line is valid JSON.
package accesslog

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// Config selects the records, their format and the sink.
type Config struct {
	// Path is a file or a FIFO. The paths /dev/stdout and /dev/stderr mean this process's own descriptors. A missing file
	// is created with mode 0640; an existing one is appended to. A FIFO need not have a reader yet.
	Path string

	Format *Format // the engines must record its Fields
	Filter Filter

	TCPStart   bool          // log a line also when an opaque or TLS connection begins to be carried
	Interval   time.Duration // how often an open connection is logged; 0: never
	QueueBytes int           // memory for queued lines; 0: 1 MiB; at least 128 KiB is used

	Logger *slog.Logger // nil: discard
}

// Log is an access log. It is a flow.Opener and safe for concurrent use. Create it with New and end it with Close.
type Log struct {
	format   *Format
	filter   Filter
	when     *condition // of a control plane; nil: it asks for all
	tcpStart bool
	interval time.Duration
	lines    sync.Pool // *line
	writer   *writer
	entry    encoder          // of a service, instead of format and writer; nil: a file
	service  *export.Exporter // of entry
	pushes   uint64           // of Sinks, when it was compiled

	looked time.Time // time of the last call of Progress; not used elsewhere
}

// New opens the sink and starts the goroutine that writes to it.
func New(c Config) (*Log, error) {
	if c.Interval < 0 || c.QueueBytes < 0 {
		return nil, fmt.Errorf("access log: interval %v and queue of %d bytes must not be negative", c.Interval, c.QueueBytes)
	}
	if c.Format == nil {
		return nil, errors.New("access log: no format given")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	w, err := newWriter(c.Path, c.QueueBytes, c.Logger)
	if err != nil {
		return nil, err
	}
	return &Log{
		format: c.Format, filter: c.Filter, tcpStart: c.TCPStart, interval: c.Interval,
		lines: sync.Pool{New: func() any { return new(line) }}, writer: w, looked: time.Now(),
	}, nil
}

// Fields returns the message fields that the engines must record for the log.
func (l *Log) Fields() flow.Fields { return l.format.Fields() }

// Closed writes the record's line if the filter selects it.
func (l *Log) Closed(r *flow.Record) { l.write(r, r.Duration) }

// Opened writes a line for a new connection if Config.TCPStart is set: an ordinary line with duration 0 and the bytes
// transferred so far.
func (l *Log) Opened(r *flow.Record) {
	if l.tcpStart && r.Protocol <= flow.TLS {
		l.write(r, 0)
	}
}

// Progress writes a line for each opaque or TLS connection in the table that has completed another Config.Interval since
// the last call of Progress: an ordinary line with the counts so far. Call it from one goroutine, at least once per
// interval. The table is locked meanwhile.
func (l *Log) Progress(table *flow.Table) {
	if l.interval == 0 {
		return
	}
	now := time.Now()
	table.Each(func(r *flow.Record) bool {
		age := now.Sub(r.Opened)
		before := max(age-now.Sub(l.looked), 0)
		if r.Carried() && r.Protocol <= flow.TLS && age/l.interval > before/l.interval {
			l.write(r, age)
		}
		return true
	})
	l.looked = now
}

func (l *Log) write(r *flow.Record, lasted time.Duration) {
	if !l.filter.match(r, lasted) || l.when != nil && l.when.judge(r, lasted) == no {
		return
	}
	one := l.lines.Get().(*line)
	if l.entry != nil {
		one.entry = l.entry.append(one.entry[:0], one, r, lasted)
		l.service.Add(one.entry)
	} else {
		l.format.build(one, r, lasted)
		l.writer.put(one.buf)
	}
	l.lines.Put(one)
}
