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
	chunkBytes   = 64 << 10 // what is written at once; a line fits
	flushDelay   = time.Second
	defaultQueue = 1 << 20
	givingUp     = 100 * time.Millisecond // for a write that was interrupted to return
)

// writer is the queue of lines, and the goroutine that writes them out: when there are 64 KiB, or a second after the
// first line. It sleeps when there are none.
type writer struct {
	path    string
	log     *slog.Logger
	chunks  int           // that the queue has at most
	wake    chan struct{} // holds one: there is a full chunk, or another sink
	timer   *time.Timer
	closing chan struct{}
	done    chan struct{}
	written atomic.Uint64
	warning sync.WaitGroup // the goroutine that logs dropped lines

	mu      sync.Mutex
	file    *os.File
	next    *os.File // takes the place of file before the next write
	open    []byte   // the chunk being filled, or nil
	full    [][]byte // chunks that wait, the oldest first
	free    [][]byte
	held    int  // chunks in open, full and the writer's hand
	armed   bool // the timer runs, or has not been listened to
	closed  bool
	dropped uint64

	trouble bool   // lines are lost, or a write failed, and it has been said
	since   uint64 // dropped, when trouble began
	looked  uint64 // dropped, at the last look for the end of trouble
}

func newWriter(path string, queueBytes int, log *slog.Logger) (*writer, error) {
	file, err := openSink(path)
	if err != nil {
		return nil, fmt.Errorf("opening the access log: %w", err)
	}
	if queueBytes == 0 {
		queueBytes = defaultQueue
	}
	w := &writer{
		path: path, log: log, chunks: max(queueBytes/chunkBytes, 2), file: file, timer: time.NewTimer(time.Hour),
		wake: make(chan struct{}, 1), closing: make(chan struct{}), done: make(chan struct{}),
	}
	w.timer.Stop()
	go w.run()
	return w, nil
}

// openSink opens path for appending. Our own descriptors are used and not opened: /proc may be another user's, or hidden.
// They are duplicated, since Go ends a process that writes to a broken pipe as descriptor 1 or 2, and their mode is left
// alone, which others share. All else is opened so that no write blocks a thread; a FIFO also for reading, since it then
// needs no reader to be opened, and does not break when there is none for a while (fifo(7)).
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

// put queues one line, or drops it.
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
}

// drop counts a lost line. The first one is logged from a goroutine of its own, as the writer may be stuck, and the
// logger's sink may be the very one that is.
func (w *writer) drop() {
	w.dropped++
	if w.trouble || w.closed {
		return
	}
	w.trouble, w.since = true, w.dropped-1
	w.warning.Go(func() {
		w.log.Warn("access log lines are dropped: what it is written to does not keep up", "path", w.path)
	})
}

// chunk gives an empty chunk for lines.
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
	defer close(w.done)
	defer w.warning.Wait()
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
	}
}

// drain writes the full chunks, and if all is set then the one that is being filled; once, or it would write single lines
// while they come fast.
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

// take gives the next chunk to write, nil for none, and whether it is the one that was being filled.
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

// write writes a chunk to its end, through whatever errors there are, and gives up only when the log is closed.
func (w *writer) write(chunk []byte) {
	for at := 0; at < len(chunk); {
		if w.swap() {
			at = bytes.LastIndexByte(chunk[:at], '\n') + 1 // the new sink does not begin in the middle of a line
		}
		n, err := w.file.Write(chunk[at:])
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
		again := time.NewTimer(flushDelay)
		select {
		case <-again.C:
		case <-w.wake:
		case <-w.closing:
		}
		again.Stop()
	}
}

// failed logs the first of consecutive errors.
func (w *writer) failed(err error) {
	w.mu.Lock()
	first := !w.trouble
	if first {
		w.trouble, w.since = true, w.dropped
	}
	w.mu.Unlock()
	if first {
		w.log.Error("writing the access log failed; lines wait, and are dropped when too many do", "path", w.path, "error", err)
	}
}

// settle is called when all is written. When there was trouble, and no line has been lost for a second, it is over.
// Chunks that a burst needed go back.
func (w *writer) settle() {
	if lost, over := w.recovered(); over {
		w.warning.Wait() // so that what is said comes in order, and one goroutine says it
		w.mu.Lock()
		w.trouble = false
		w.mu.Unlock()
		w.log.Info("the access log is written again", "path", w.path, "lines_dropped", lost)
	}
}

// recovered reports whether trouble is over, and how many lines were lost in it.
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

// swap takes the sink that Reopen made, if there is one.
func (w *writer) swap() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.next == nil {
		return false
	}
	w.file.Close()
	w.file, w.next = w.next, nil
	return true
}

// replaced reports whether Reopen made another sink, and so ended the write to this one.
func (w *writer) replaced() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.next != nil
}

// Reopen opens Config.Path anew, as after the file was renamed. When that fails it says so in the log, and the old one
// stays in use. A line that was written in part is written to the new one as a whole.
func (l *Log) Reopen() {
	w := l.writer
	file, err := openSink(w.path)
	if err != nil {
		w.log.Error("reopening the access log failed, keeping the old file", "path", w.path, "error", err)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		file.Close()
		return
	}
	if w.next != nil {
		w.next.Close()
	}
	w.next = file
	w.file.SetWriteDeadline(time.Now()) // a write that is stuck ends, where that is possible
	w.nudge()
}

// Dropped is how many lines were lost, because the queue was full or the log closed.
func (l *Log) Dropped() uint64 {
	l.writer.mu.Lock()
	defer l.writer.mu.Unlock()
	return l.writer.dropped
}

// Written is how many lines were written.
func (l *Log) Written() uint64 { return l.writer.written.Load() }

// Close writes what waits, and closes the sink. Lines that come later are dropped. It gives up when ctx ends, or when
// a write fails, and the error says how many lines are lost. A write to standard output that is stuck cannot be
// interrupted without changing what others share; it then keeps its goroutine.
func (l *Log) Close(ctx context.Context) error {
	w := l.writer
	w.mu.Lock()
	before := w.dropped
	if !w.closed {
		w.closed = true
		close(w.closing)
	}
	w.mu.Unlock()
	select {
	case <-w.done:
	case <-ctx.Done():
		w.mu.Lock()
		w.file.SetWriteDeadline(time.Now())
		w.mu.Unlock()
		timer := time.NewTimer(givingUp)
		defer timer.Stop()
		select {
		case <-w.done:
		case <-timer.C:
			return fmt.Errorf("closing the access log %s: a write is stuck: %w", w.path, context.Cause(ctx))
		}
	}
	if lost := l.Dropped() - before; lost > 0 {
		return fmt.Errorf("closing the access log %s: %d lines are lost", w.path, lost)
	}
	return nil
}

// end closes the sink.
func (w *writer) end() {
	w.timer.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.next != nil {
		w.next.Close()
	}
	w.file.Close()
}
