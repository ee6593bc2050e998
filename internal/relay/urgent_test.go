package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// splice stops in front of urgent data and then returns the same as for an empty connection, or for EOF. The relay must not
// lose bytes then, whether the sender continues or closes.
func TestUrgentDataWithinBulkLosesNoBytes(t *testing.T) {
	for _, closes := range []bool{true, false} {
		for range 5 {
			r := newRig(t, Options{})
			fill(t, r.client) // now the relay is full and splices
			sent := make(chan int64, 1)
			go func() {
				n, _ := r.client.Write(make([]byte, 1<<20))
				sendUrgent(t, r.client)
				m, _ := r.client.Write([]byte("after"))
				if closes {
					r.client.CloseWrite()
				}
				sent <- int64(n + 1 + m)
			}()
			before := int64(0)
			if closes {
				n, err := io.Copy(io.Discard, r.server)
				if before = n; err != nil {
					t.Fatalf("after %d bytes: %v", n, err)
				}
			} else {
				before = readUntilQuiet(t, r.server)
			}
			<-sent
			awaitCount(t, r, before)
			if counted := int64(r.fromDown.Load()); before != counted || !endsWithEverything(r, counted) {
				t.Errorf("closes=%v: %d bytes arrived, %d were counted; some were lost", closes, before, counted)
			}
		}
	}
}

// awaitCount waits until the relay has counted what has arrived: it counts after it writes.
func awaitCount(t *testing.T, r *rig, arrived int64) {
	t.Helper()
	for deadline := time.Now().Add(nettest.Patience); int64(r.fromDown.Load()) < arrived && time.Now().Before(deadline); {
		runtime.Gosched()
	}
}

// endsWithEverything compares arrived with the number of bytes that the client's kernel has sent (TCP_INFO).
func endsWithEverything(r *rig, arrived int64) bool {
	raw, err := r.client.SyscallConn()
	if err != nil {
		return false
	}
	var info *unix.TCPInfo
	raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err != nil {
		return false
	}
	sent := int64(info.Bytes_sent - info.Bytes_retrans)
	return sent-arrived <= 1 && sent-arrived >= -1 // a FIN may count as one
}

// readUntilQuiet reads until the word "after" has arrived and no bytes follow.
func readUntilQuiet(t *testing.T, conn *net.TCPConn) (total int64) {
	t.Helper()
	buf := make([]byte, 256<<10)
	var tail []byte
	for {
		conn.SetReadDeadline(time.Now().Add(patience))
		n, err := conn.Read(buf)
		total += int64(n)
		tail = append(tail, buf[:n]...)
		tail = tail[max(0, len(tail)-6):]
		if string(tail) == "!after" {
			return total
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("no more bytes after %d, the last are %q", total, tail)
			return total
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func sendUrgent(t *testing.T, conn *net.TCPConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Error(err)
		return
	}
	var sendErr error
	err = raw.Write(func(fd uintptr) bool {
		sendErr = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB|unix.MSG_DONTWAIT, nil)
		return sendErr != unix.EAGAIN
	})
	if err = errors.Join(err, sendErr); err != nil {
		t.Error(err)
	}
}
