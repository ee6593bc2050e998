package accesslog

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	chunkBytes   = 64 << 10 // size of one write; at least one line
	flushDelay   = time.Second
	defaultQueue = 1 << 20
	openDelay    = 5 * time.Second        // between attempts to open a sink that could not be opened
	givingUp     = 100 * time.Millisecond // how long Close waits for an interrupted write to return
)

// writer is the queue of lines and the goroutine that writes them: when 64 KiB have gathered, or a second after the first
// line. The goroutine sleeps while the queue is empty.
type writer struct {
	path    string
	log     *slog.Logger
	chunks  int           // maximum number of chunks in the queue
	wake    chan struct{} // capacity 1: a full chunk or a new sink is available
	timer   *time.Timer
	closing chan struct{}
	done    chan struct{}
	written atomic.Uint64
	warning sync.WaitGroup // the goroutine that logs dropped lines
	waits   bool           // the sink takes no write that must not wait; set by the goroutine that writes

	mu      sync.Mutex
	file    *os.File // nil: not opened yet
	next    *os.File // replaces file before the next write
	open    []byte   // the chunk being filled, or nil
	full    [][]byte // chunks to be written, oldest first
	free    [][]byte
	held    int  // number of chunks: open, full, and the one being written
	armed   bool // the timer runs, or its tick has not been received
	running bool // there is the goroutine
	parked  bool // it ends, and the file is closed, whenever all lines are written
	closed  bool
	dropped uint64

	trouble bool   // losing lines or failing writes; already logged
	since   uint64 // value of dropped when trouble began
	looked  uint64 // value of dropped at the last check whether trouble is over
}

func newWriter(path string, queueBytes int, log *slog.Logger) (*writer, error) {
	file, err := openSink(path)
	if err != nil {
		return nil, fmt.Errorf("opening the access log: %w", err)
	}
	return startWriter(path, queueBytes, log, file), nil
}

// startWriter begins a writer. If file is nil its goroutine opens path, and lines are queued meanwhile.
func startWriter(path string, queueBytes int, log *slog.Logger, file *os.File) *writer {
	if queueBytes == 0 {
		queueBytes = defaultQueue
	}
	w := &writer{
		path: path, log: log, chunks: max(queueBytes/chunkBytes, 2), file: file, timer: time.NewTimer(time.Hour),
		wake: make(chan struct{}, 1), closing: make(chan struct{}), done: make(chan struct{}),
	}
	w.timer.Stop()
	w.running = true
	go w.run()
	return w
}

// park sets whether the file is closed when all lines are written: it is not configured any more. Lines of connections that
// began before open it again.
func (w *writer) park(parked bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.parked = parked; !parked {
		w.ensure()
	}
	w.nudge()
}

// ensure starts the goroutine again. w.mu is held.
func (w *writer) ensure() {
	if !w.running && !w.closed {
		w.running = true
		go w.run()
	}
}

// forget reports whether a parked writer has written all its lines.
func (w *writer) forget() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.running
}

// rest reports whether the goroutine is to end until there is another line.
func (w *writer) rest() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.parked || w.closed || w.armed || w.open != nil || len(w.full) > 0 {
		return false
	}
	w.running, w.free = false, nil
	w.leave()
	return true
}

// leave closes the file. w.mu is held.
func (w *writer) leave() {
	if w.next != nil {
		w.next.Close()
	}
	if w.file != nil {
		w.file.Close()
	}
	w.file, w.next = nil, nil
}

// openSink opens path for appending. Our own descriptors are not opened by path, since /proc may be hidden or belong to
// another user. They are duplicated, because Go ends a process that writes to a broken pipe as descriptor 1 or 2; their
// blocking mode stays, because other processes share it. Files are opened so that a write does not block a thread. A FIFO
// is opened for reading as well: then opening it needs no reader, and it does not break while no reader is there (fifo(7)).
func openSink(path string) (*os.File, error) {
	switch path {
	case "/dev/stdout":
		return duplicate(1, path)
	case "/dev/stderr":
		return duplicate(2, path)
	}
	mode := os.O_WRONLY | os.O_APPEND | os.O_CREATE
	if info, err := os.Stat(path); err == nil && info.Mode().Type() == fs.ModeNamedPipe {
		mode = os.O_RDWR
	}
	return os.OpenFile(path, mode|syscall.O_NONBLOCK, 0o640)
}

func duplicate(fd int, path string) (*os.File, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	copied, err := syscall.Dup(fd)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	syscall.CloseOnExec(copied)
	return os.NewFile(uintptr(copied), path), nil
}

// put queues one line or drops it.
func (w *writer) put(line []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	rotate := w.open == nil || len(w.open)+len(line) > chunkBytes
	if w.closed || rotate && w.held >= w.chunks {
		w.drop()
		return
	}
	if rotate {
		if w.open != nil {
			w.full = append(w.full, w.open)
			w.nudge()
		}
		w.open = w.chunk()
	}
	w.open = append(w.open, line...)
	w.arm()
	w.ensure()
}

// drop counts a lost line. The first one is logged by a separate goroutine, because the writer may be stuck, and the
// logger may write to the same sink.
func (w *writer) drop() {
	w.dropped++
	if w.trouble || w.closed {
		return
	}
	w.trouble, w.since = true, w.dropped-1
	w.warning.Go(func() {
		w.log.Warn("dropping access log lines: the sink is too slow", "path", w.path)
	})
}

// chunk returns an empty chunk.
func (w *writer) chunk() []byte {
	w.held++
	if last := len(w.free) - 1; last >= 0 {
		chunk := w.free[last]
		w.free = w.free[:last]
		return chunk
	}
	return make([]byte, 0, chunkBytes)
}

func (w *writer) arm() {
	if !w.armed {
		w.armed = true
		w.timer.Reset(flushDelay)
	}
}

func (w *writer) nudge() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run is the goroutine that writes.
func (w *writer) run() {
	if w.file == nil {
		if w.rest() {
			return
		}
		if err := w.begin(); err != nil {
			w.failed(err)
		}
	}
	for {
		select {
		case <-w.wake:
			w.drain(false)
		case <-w.timer.C:
			w.drain(true)
			w.settle()
		case <-w.closing:
			w.drain(true)
			w.end()
			return
		}
		if w.rest() {
			return
		}
	}
}

// drain writes the full chunks and, if all is set, the open one. It takes the open one only once: otherwise it would write
// single lines while lines arrive fast.
func (w *writer) drain(all bool) {
	w.swap()
	for last := false; !last; {
		var chunk []byte
		if chunk, last = w.take(all); chunk == nil {
			return
		}
		w.write(chunk)
		w.mu.Lock()
		w.held--
		w.free = append(w.free, chunk[:0])
		w.mu.Unlock()
	}
}

// take returns the next chunk to write, or nil, and whether it is the one that was being filled.
func (w *writer) take(all bool) (chunk []byte, last bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case len(w.full) > 0:
		chunk = w.full[0]
		w.full = append(w.full[:0], w.full[1:]...)
	case all:
		chunk, last, w.open = w.open, true, nil
		w.armed = false
	}
	return chunk, last
}

// write writes a whole chunk. After an error it tries again, until the log is closed.
func (w *writer) write(chunk []byte) {
	for at := 0; at < len(chunk); {
		if w.swap() {
			at = bytes.LastIndexByte(chunk[:at], '\n') + 1 // the new sink begins with a whole line
		}
		var n int
		var err error
		pause := flushDelay
		if w.file == nil {
			pause, err = openDelay, w.begin()
		} else {
			n, err = w.send(chunk[at:])
		}
		w.written.Add(uint64(bytes.Count(chunk[at:at+n], []byte{'\n'})))
		at += n
		if err == nil || w.replaced() {
			continue
		}
		select {
		case <-w.closing:
			w.mu.Lock()
			w.dropped += uint64(bytes.Count(chunk[at:], []byte{'\n'}))
			w.mu.Unlock()
			return
		default:
		}
		w.failed(err)
		again := time.NewTimer(pause)
		select {
		case <-again.C:
		case <-w.wake:
		case <-w.closing:
		}
		again.Stop()
	}
}

// send writes to the sink: what it takes at once or, if that is nothing, as package os does.
func (w *writer) send(chunk []byte) (int, error) {
	if !w.waits {
		n, able := writeNow(w.file, chunk)
		if w.waits = !able; n > 0 {
			return n, nil
		}
	}
	return w.file.Write(chunk)
}

// begin opens a sink that is not open.
func (w *writer) begin() error {
	file, err := openSink(w.path)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.file = file
	return nil
}

// failed logs the first of consecutive errors.
func (w *writer) failed(err error) {
	w.mu.Lock()
	first := !w.trouble
	if first {
		w.trouble, w.since = true, w.dropped
	}
	w.mu.Unlock()
	switch {
	case !first:
	case w.file == nil:
		w.log.Error(notOpened, "path", w.path, "error", err)
	default:
		w.log.Error("writing the access log failed; lines are queued, and dropped when the queue is full", "path", w.path, "error", err)
	}
}

const notOpened = "access log not written: its file cannot be opened; create its directory, or permit the agent to write there; " +
	"it is tried again every 5 s, lines are queued meanwhile, and dropped when the queue is full"

// settle is called when all lines are written. Trouble is over when no line has been lost for a second. Chunks that a burst
// needed are released.
func (w *writer) settle() {
	if lost, over := w.recovered(); over {
		w.warning.Wait() // keeps the messages in order
		w.mu.Lock()
		w.trouble = false
		w.mu.Unlock()
		w.log.Info("access log recovered", "path", w.path, "lines_dropped", lost)
	}
}

// recovered reports whether trouble is over and how many lines it cost.
func (w *writer) recovered() (lost uint64, over bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !w.trouble:
		keep := min(len(w.free), 1)
		clear(w.free[keep:])
		w.free = w.free[:keep]
		return 0, false
	case w.looked != w.dropped:
		w.looked = w.dropped
		w.arm()
		return 0, false
	}
	return w.dropped - w.since, true
}

// swap switches to the sink that Reopen opened, if there is one, and reports whether it did.
func (w *writer) swap() bool {
	w.mu.Lock()
	old, next := w.file, w.next
	if next != nil {
		w.file, w.next = next, nil
	}
	w.mu.Unlock()
	if next == nil {
		return false
	}
	w.waits = false
	if old != nil {
		old.Close() // it may block
	}
	return true
}

// replaced reports whether Reopen opened another sink, and thereby interrupted the write to this one.
func (w *writer) replaced() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.next != nil
}

// Reopen opens Config.Path again, as needed after the file was renamed. If that fails, it logs the error and keeps the old
// file. A partially written line is written to the new file as a whole.
func (l *Log) Reopen() { l.writer.reopen() }

func (w *writer) reopen() {
	w.mu.Lock()
	running := w.running
	w.mu.Unlock()
	if !running {
		return
	}
	file, err := openSink(w.path)
	if err != nil {
		w.mu.Lock()
		message := "reopening the access log failed, keeping the old file"
		if w.file == nil {
			message = notOpened
		}
		w.mu.Unlock()
		w.log.Error(message, "path", w.path, "error", err)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || !w.running {
		file.Close()
		return
	}
	if w.next != nil {
		w.next.Close()
	}
	w.next = file
	if w.file != nil {
		w.file.SetWriteDeadline(time.Now()) // interrupts a stuck write, if the file supports deadlines
	}
	w.nudge()
}

// Dropped returns the number of lines lost because the queue was full or the log closed.
func (l *Log) Dropped() uint64 { return l.writer.lost() }

func (w *writer) lost() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dropped
}

// Written returns the number of lines written.
func (l *Log) Written() uint64 { return l.writer.written.Load() }

// Close writes the queued lines and closes the sink. Later lines are dropped. It gives up when ctx ends or when a write
// fails; the error has the number of lost lines. A stuck write to standard output cannot be interrupted without changing
// the mode that other processes share; its goroutine then stays.
func (l *Log) Close(ctx context.Context) error { return l.writer.close(ctx) }

func (w *writer) close(ctx context.Context) error {
	w.mu.Lock()
	before := w.dropped
	if !w.closed {
		w.closed = true
		close(w.closing)
		if !w.running {
			close(w.done)
		}
	}
	w.mu.Unlock()
	select {
	case <-w.done:
	case <-ctx.Done():
		w.mu.Lock()
		if w.file != nil {
			w.file.SetWriteDeadline(time.Now())
		}
		w.mu.Unlock()
		timer := time.NewTimer(givingUp)
		defer timer.Stop()
		select {
		case <-w.done:
		case <-timer.C:
			return fmt.Errorf("closing the access log %s: a write does not return: %w", w.path, context.Cause(ctx))
		}
	}
	if lost := w.lost() - before; lost > 0 {
		return fmt.Errorf("closing the access log %s: %d lines lost", w.path, lost)
	}
	return nil
}

// end closes the sink.
func (w *writer) end() {
	w.timer.Stop()
	w.mu.Lock()
	w.leave()
	w.mu.Unlock()
	w.warning.Wait()
	close(w.done)
}
