package run

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

// queueLength is the number of records that wait for the log and the file of records.
const queueLength = 16 << 10

// records receives closed records, writes them out in a goroutine of its own, and sums them up.
type records struct {
	config Config
	view   *live.View // of the page; nil without --ui
	sum    summary

	decryption *decryption // nil: TLS passes

	queue   chan *event // of pointers: the collector would touch the memory of all places before the command starts
	written sync.WaitGroup
	ending  sync.Once
	outputs []output

	mu     sync.Mutex
	number uint64
	lost   uint64
	seen   map[string]bool // destinations and names that were recorded
}

// event is a record as outputs take it.
type event struct {
	live.Record
	har    *harEntry // of a request, if there is an archive
	bodies bodies
}

// output writes records somewhere. It is used by one goroutine.
type output interface {
	write(*event) error
	close() error
}

func openRecords(config Config) (*records, error) {
	r := &records{config: config, queue: make(chan *event, queueLength), seen: make(map[string]bool)}
	if config.UI != "" {
		r.view = live.New(live.Config{Version: config.Version})
	}
	if err := r.openLog(); err != nil {
		r.closeOutputs()
		return nil, err
	}
	if err := r.openRecord(); err != nil {
		r.closeOutputs()
		return nil, err
	}
	r.written.Go(r.writeAll)
	return r, nil
}

// openLog opens the output of Config.Log.
func (r *records) openLog() error {
	switch r.config.Log {
	case "off":
	case "text":
		r.outputs = append(r.outputs, &textOutput{out: r.config.Errors, prefix: "pillion: ", file: nopCloser{}})
	case "json":
		r.outputs = append(r.outputs, newJSONOutput(r.config.Errors, nopCloser{}))
	default:
		return r.openFile("log", r.config.Log, hasSuffix(r.config.Log, ".json") || hasSuffix(r.config.Log, ".jsonl"))
	}
	return nil
}

// openRecord opens the output of Config.Record.
func (r *records) openRecord() error {
	switch {
	case r.config.Record == "":
		return nil
	case !r.config.Archives():
		return r.openFile("record", r.config.Record, true)
	}
	archive, err := openHAR(r.config.Record, r.config.Version, r.config.Bodies, !r.config.Credentials)
	if err == nil {
		r.outputs = append(r.outputs, archive)
	}
	return err
}

// createPrivate makes the file of a flag. It belongs to the caller alone, because paths and names may be secret.
func createPrivate(flag, path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the file of --%s: %w", flag, err)
	}
	return file, nil
}

// openFile adds an output to a new file.
func (r *records) openFile(flag, path string, asJSON bool) error {
	file, err := createPrivate(flag, path)
	if err != nil {
		return err
	}
	if asJSON {
		r.outputs = append(r.outputs, newJSONOutput(file, file))
	} else {
		r.outputs = append(r.outputs, &textOutput{out: file, file: file})
	}
	return nil
}

// sinks are the sinks of the flow table.
func (r *records) sinks() []flow.Sink {
	if r.view != nil {
		return []flow.Sink{r.view, r}
	}
	return []flow.Sink{r}
}

// Closed implements flow.Sink. A record that finds the queue full is not written, but summed up.
func (r *records) Closed(record *flow.Record) {
	e := &event{Record: live.Of(record)}
	if r.config.Archives() {
		e.har = harOf(record, &e.Record, !r.config.Credentials)
	}
	if r.decryption != nil {
		r.decryption.closed(record, e.Method)
	}
	if record.IsRequest() {
		e.bodies = bodies{record.HTTP.Body, record.HTTP.ResponseBody}
	}
	r.add(e)
}

// note adds a record of the command's that is not of a connection.
func (r *records) note(protocol flow.Protocol, record live.Record) {
	record.Time, record.Direction, record.Protocol = time.Now().Round(0), flow.Outbound.String(), protocol.String()
	if r.view != nil {
		r.view.Note(protocol, &record)
	}
	r.add(&event{Record: record})
}

func (r *records) add(record *event) {
	r.sum.add(&record.Record)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.number++
	record.Number = r.number
	select {
	case r.queue <- record:
	default:
		r.lost++
		record.bodies.release()
	}
}

// maxSeen bounds the destinations of datagrams and names of queries that are remembered.
const maxSeen = 1000

// queried records a query that was refused, once for each name.
func (r *records) queried(q dns.Query) {
	if name := strings.TrimSuffix(q.Name, "."); q.Refused && r.first("dns "+name) {
		r.note(flow.DNS, live.Record{
			Authority: name, Reason: string(flow.Denied), Failed: true, Failure: "no rule allows a connection to this name",
		})
	}
}

// first reports whether something is seen for the first time.
func (r *records) first(what string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen[what] || len(r.seen) >= maxSeen {
		return false
	}
	r.seen[what] = true
	return true
}

// writeAll writes records until the queue is closed. An output that fails is not used any more.
func (r *records) writeAll() {
	for record := range r.queue {
		for i, o := range r.outputs {
			if o == nil {
				continue
			}
			if err := o.write(record); err != nil {
				r.config.Logger.Warn("cannot write records", "error", err)
				_ = o.close()
				r.outputs[i] = nil
			}
		}
		record.bodies.release()
	}
}

// end writes what is queued and the summary. No record may follow. A second call does nothing.
func (r *records) end() {
	r.ending.Do(func() {
		if r.view != nil {
			r.view.Close()
		}
		close(r.queue)
		r.written.Wait()
		r.closeOutputs()
		if r.lost > 0 {
			r.config.Logger.Warn("records were not written, because their output was too slow", "count", r.lost)
		}
		if r.config.Summary {
			r.sum.print(r.config.Errors)
		}
	})
}

func (r *records) closeOutputs() {
	for _, o := range r.outputs {
		if o == nil {
			continue
		}
		if err := o.close(); err != nil {
			r.config.Logger.Warn("cannot write records", "error", err)
		}
	}
	r.outputs = nil
}

type nopCloser struct{}

func (nopCloser) Close() error { return nil }

// textOutput writes a line for people. Lines on a terminal end with a carriage return, because the command may have
// switched off its translation of line feeds.
type textOutput struct {
	out    io.Writer
	prefix string
	file   io.Closer
}

func (o *textOutput) write(e *event) error {
	r := &e.Record
	if !terminal.IsTerminal(o.out) {
		_, err := fmt.Fprintln(o.out, o.prefix+r.Time.Local().Format("15:04:05.000")+" "+terminal.Brief(r, terminal.Painter(false), 0))
		return err
	}
	columns, _ := terminal.Size(o.out)
	paint := terminal.NewPainter(o.out)
	line := terminal.Brief(r, paint, max(0, columns-len(o.prefix)))
	_, err := io.WriteString(o.out, paint.Paint(terminal.Faint, o.prefix)+line+"\r\n")
	return err
}

func (o *textOutput) close() error { return o.file.Close() }

// jsonOutput writes a line of JSON.
type jsonOutput struct {
	buffer  *bufio.Writer
	encoder *json.Encoder
	file    io.Closer
}

func newJSONOutput(out io.Writer, file io.Closer) *jsonOutput {
	o := &jsonOutput{buffer: bufio.NewWriter(out), file: file}
	o.encoder = json.NewEncoder(o.buffer)
	o.encoder.SetEscapeHTML(false)
	return o
}

func (o *jsonOutput) write(e *event) error {
	if err := o.encoder.Encode(&e.Record); err != nil {
		return err
	}
	return o.buffer.Flush()
}

func (o *jsonOutput) close() error { return o.file.Close() }
