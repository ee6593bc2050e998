package relay

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestRandomConversations makes both sides use TCP in random ways and with random timing: small and large writes, slow
// reads, half-closes, and finally a close or a reset. Each side must observe the same as without the relay.
func TestRandomConversations(t *testing.T) {
	for seed := range uint64(120) {
		random := rand.New(rand.NewPCG(seed, 7))
		r := newRig(t, Options{})
		client, server := newSpeaker(r.client, random), newSpeaker(r.server, random)
		if random.IntN(3) == 0 {
			[]*speaker{client, server}[random.IntN(2)].resets = true
		}
		var both sync.WaitGroup
		both.Go(client.speak)
		both.Go(server.speak)
		both.Wait()

		switch {
		case client.resets:
			server.wantPrefix(t, seed, client)
			r.wantEnd(t, DownReset)
		case server.resets:
			client.wantPrefix(t, seed, server)
			r.wantEnd(t, UpReset)
		default:
			client.wantAll(t, seed, server)
			server.wantAll(t, seed, client)
			r.wantEnd(t, Closed)
		}
		if t.Failed() {
			return
		}
	}
}

// speaker is one side of a conversation.
type speaker struct {
	conn     *net.TCPConn
	says     []byte
	chunk    int
	readSize int
	pause    time.Duration
	resets   bool

	heard    bytes.Buffer
	readErr  error
	writeErr error
}

func newSpeaker(conn *net.TCPConn, random *rand.Rand) *speaker {
	s := &speaker{
		conn:     conn,
		says:     make([]byte, []int{0, 1, 1000, 100_000, 2_000_000}[random.IntN(5)]),
		chunk:    1 + random.IntN(60_000),
		readSize: 1 + random.IntN(60_000),
		pause:    time.Duration(random.IntN(300)) * time.Microsecond,
	}
	for i := range s.says {
		s.says[i] = byte(random.Uint32())
	}
	return s
}

// speak sends and reads at the same time. A side that resets does so after it has sent everything, however much it has read.
func (s *speaker) speak() {
	var reading sync.WaitGroup
	reading.Go(s.listen)
	for rest := s.says; len(rest) > 0; {
		n, err := s.conn.Write(rest[:min(len(rest), s.chunk)])
		if err != nil {
			s.writeErr = err
			break
		}
		rest = rest[n:]
		if s.pause > 200*time.Microsecond {
			time.Sleep(s.pause)
		}
	}
	if s.resets {
		reset(s.conn)
	} else if err := s.conn.CloseWrite(); err != nil {
		s.writeErr = err
	}
	reading.Wait()
	s.conn.Close()
}

func (s *speaker) listen() {
	buf := make([]byte, s.readSize)
	for {
		n, err := s.conn.Read(buf)
		s.heard.Write(buf[:n])
		if err != nil {
			s.readErr = err
			return
		}
	}
}

func (s *speaker) wantAll(t *testing.T, seed uint64, other *speaker) {
	t.Helper()
	if s.readErr != io.EOF || !bytes.Equal(s.heard.Bytes(), other.says) {
		t.Errorf("seed %d: received %d of %d bytes, or changed ones, and then %v; want EOF", seed, s.heard.Len(), len(other.says), s.readErr)
	}
}

// wantPrefix checks a side whose peer has reset: bytes in flight may be lost, but must not be changed, and the connection
// must not end with EOF.
func (s *speaker) wantPrefix(t *testing.T, seed uint64, other *speaker) {
	t.Helper()
	reported := false // by the first call after the reset: the kernel reports it once, and the next read returns EOF
	for _, errno := range []error{syscall.ECONNRESET, syscall.EPIPE, syscall.ENOTCONN} {
		reported = reported || errors.Is(s.readErr, errno) || errors.Is(s.writeErr, errno)
	}
	if !reported {
		t.Errorf("seed %d: received %d of %d bytes and then %v and %v; want a reset", seed, s.heard.Len(), len(other.says), s.readErr, s.writeErr)
	}
	if !bytes.HasPrefix(other.says, s.heard.Bytes()) {
		t.Errorf("seed %d: received %d bytes that are not what was sent", seed, s.heard.Len())
	}
}
