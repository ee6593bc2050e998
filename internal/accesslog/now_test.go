package accesslog

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// blockingPipe returns a pipe in blocking mode, as standard output usually is.
func blockingPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r, w = os.NewFile(uintptr(fds[0]), "reading end"), os.NewFile(uintptr(fds[1]), "writing end")
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// pipesTakeNow reports whether pipes take writes that must not wait. Those of qemu-user, which lacks pwritev2, do not.
func pipesTakeNow(t *testing.T) bool {
	_, w := blockingPipe(t)
	n, able := writeNow(w, []byte("line\n"))
	if able && n != 5 {
		t.Errorf("an empty pipe took %d of 5 bytes", n)
	}
	return able
}

func TestAPipeTakesAtOnceWhatItHasRoomFor(t *testing.T) {
	r, w := blockingPipe(t)
	size, err := unix.FcntlInt(r.Fd(), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		t.Fatal(err)
	}
	chunk := bytes.Repeat([]byte("a line\n"), 2*size/7)
	n, able := writeNow(w, chunk)
	if !able {
		t.Skip("the kernel has no writes to pipes that never wait")
	}
	if n <= 0 || n > size {
		t.Fatalf("a pipe of %d bytes took %d", size, n)
	}
	for range 2 {
		if more, able := writeNow(w, chunk); more != 0 || !able {
			t.Fatalf("a full pipe took %d bytes, able: %v", more, able)
		}
	}
	got := make([]byte, n)
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, chunk[:n]) {
		t.Fatalf("read %d bytes that differ from those written (%v)", len(got), err)
	}
}

func TestOtherSinksTakeWritesAtOnceOrAreWrittenOtherwise(t *testing.T) {
	null, err := os.OpenFile("/dev/null", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if n, able := writeNow(null, []byte("line\n")); able != pipesTakeNow(t) || able && n != 5 {
		t.Errorf("/dev/null took %d of 5 bytes, able: %v", n, able)
	}
	path := filepath.Join(t.TempDir(), "log")
	w := &writer{}
	if w.file, err = openSink(path); err != nil {
		t.Fatal(err)
	}
	defer w.file.Close()
	var want []byte
	for i := range 3 {
		line := bytes.Repeat([]byte{'a' + byte(i)}, 10)
		want = append(want, line...)
		for at := 0; at < len(line); {
			n, err := w.send(line[at:])
			if err != nil || n == 0 {
				t.Fatalf("a file took %d bytes: %v", n, err)
			}
			at += n
		}
	}
	if got := read(t, path); got != string(want) {
		t.Errorf("the file has %q, want %q", got, want)
	}
	r, broken := blockingPipe(t)
	r.Close()
	if n, able := writeNow(broken, []byte("line\n")); n != 0 || able {
		t.Errorf("a broken pipe took %d bytes, able: %v", n, able)
	}
}
