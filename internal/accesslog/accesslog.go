// Package accesslog writes one line for each flow.Record, as Envoy's access log does. It never blocks the data path: lines
// go into a bounded queue, which one goroutine writes out. What a slow, full or broken sink does not take is dropped as
// whole lines, counted, and said in the log.
//
// Nothing that a stranger sends can end a field or a line, or make one longer than 32 KiB: in text, a line of the default
// format has 22 fields, split at the spaces outside of quotation marks, whatever the request was; in JSON, it is valid.
package accesslog

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Config selects the records, their format and the sink.
type Config struct {
	// Path is a file or a FIFO, or /dev/stdout or /dev/stderr, which mean this process's own descriptors. A file is made
	// with mode 0640 when there is none, and appended to. A FIFO need not have a reader yet.
	Path string

	Format *Format // whose Fields the engines note
	Filter Filter

	TCPStart   bool          // a line also when an opaque or TLS connection begins to be carried
	Interval   time.Duration // how often an open connection is logged; 0: never
	QueueBytes int           // the memory for lines that wait; 0 for 1 MiB, and never less than 128 KiB

	Logger *slog.Logger // nil for none
}

// Log is an access log: a flow.Opener, safe for use from anywhere. Make it with New, and end it with Close.
type Log struct {
	format   *Format
	filter   Filter
	tcpStart bool
	interval time.Duration
	lines    sync.Pool // *line
	writer   *writer

	looked time.Time // when Progress was last called; only Progress uses it
}

// New opens the sink, and starts the goroutine that writes to it.
func New(c Config) (*Log, error) {
	if c.Interval < 0 || c.QueueBytes < 0 {
		return nil, fmt.Errorf("access log: interval %v and queue of %d bytes must not be negative", c.Interval, c.QueueBytes)
	}
	if c.Format == nil {
		return nil, errors.New("access log: there is no format")
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

// Closed writes the record's line, if the filter takes it.
func (l *Log) Closed(r *flow.Record) { l.write(r, r.Duration) }

// Opened writes a line about a connection that begins, when Config.TCPStart asks for it: an ordinary line with duration 0,
// and the bytes that moved by then.
func (l *Log) Opened(r *flow.Record) {
	if l.tcpStart && r.Protocol <= flow.TLS {
		l.write(r, 0)
	}
}

// Progress writes a line for each opaque or TLS connection in the table that has been open for another Config.Interval
// since Progress was last called: an ordinary line, with the counts so far. Call it from one goroutine, at least once
// in an interval; nobody opens or closes a connection meanwhile.
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
	if !l.filter.takes(r, lasted) {
		return
	}
	one := l.lines.Get().(*line)
	l.format.build(one, r, lasted)
	l.writer.put(one.buf)
	l.lines.Put(one)
}
