package httpforward

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/net/http2"
)

// tally reads until the ping, and adds up the data and the connection credit that a side receives.
func (s *speaker) tally(ping string) (data, credit int) {
	s.t.Helper()
	for {
		frame, err := s.framer.ReadFrame()
		if err != nil {
			s.t.Fatalf("after %d bytes of data and %d of credit: %v", data, credit, err)
		}
		switch f := frame.(type) {
		case *http2.DataFrame:
			data += int(f.Length)
		case *http2.WindowUpdateFrame:
			if f.StreamID == 0 {
				credit += int(f.Increment)
			}
		case *http2.GoAwayFrame:
			s.t.Fatalf("told to go away: %v %s", f.ErrCode, f.DebugData())
		case *http2.PingFrame:
			if string(f.Data[:]) == ping {
				return data, credit
			}
		}
	}
}

// randomBody is frames of data, padded or not, and how many bytes of a window they take.
func randomBody(random *rand.Rand, stream uint32) (frames string, size int) {
	for range 1 + random.IntN(4) {
		data := strings.Repeat("x", random.IntN(1<<random.IntN(15)))
		if padding := random.IntN(256); random.IntN(2) == 0 {
			data = string([]byte{byte(padding)}) + data + strings.Repeat("\x00", padding)
			frames += rawFrame(0, 8, stream, data)
		} else {
			frames += rawFrame(0, 0, stream, data)
		}
		size += len(data)
	}
	return frames, size
}

// Every byte of data uses the window of its connection. Either it is forwarded and the other side returns the credit,
// or the engine returns it at once: if a byte were lost, the connection would stall in the end.
func TestNoByteOfAWindowIsLost(t *testing.T) {
	t.Run("downstream's", func(t *testing.T) {
		_, client, server := meet(t)
		random := rand.New(rand.NewPCG(1, 2))
		total := 0
		for i := range 300 {
			id := uint32(2*i + 1)
			client.sends(fmt.Sprintf("HEADERS %d %s", id, [...]string{
				postFields, postFields + " content-length=1000", postFields + " a=b connection=close", ":method=POST",
			}[random.IntN(4)]))
			frames, size := randomBody(random, id)
			send(t, client.conn, frames)
			if random.IntN(3) == 0 {
				client.sends(fmt.Sprintf("WINDOW %d 0", id)) // for which the stream is reset
				more, moreSize := randomBody(random, id)
				send(t, client.conn, more)
				size += moreSize
			}
			total += size
			client.sends("PING from+end")
			data, _ := server.tally("from+end")
			server.sends("PING ack from+end")
			_, credit := client.tally("from+end")
			if total -= data + credit; total != 0 {
				t.Fatalf("stream %d: %d bytes are missing", id, total)
			}
		}
	})
	t.Run("upstream's", func(t *testing.T) {
		_, client, server := meet(t)
		random := rand.New(rand.NewPCG(3, 4))
		total := 0
		for i := range 300 {
			id := uint32(2*i + 1)
			client.sends(fmt.Sprintf("GET %d", id))
			server.reads(fmt.Sprintf("GET %d", id))
			server.sends(fmt.Sprintf("HEADERS %d %s", id, [...]string{
				":status=200", ":status=200 content-length=1000", "status=200", ":status=204",
			}[random.IntN(4)]))
			frames, size := randomBody(random, id)
			cut := random.IntN(len(frames))
			send(t, server.conn, frames[:cut])
			if random.IntN(3) == 0 {
				client.sends(fmt.Sprintf("RST %d CANCEL", id))
			}
			send(t, server.conn, frames[cut:])
			total += size
			server.sends("PING from+end")
			data, _ := client.tally("from+end")
			client.sends("PING ack from+end")
			_, credit := server.tally("from+end")
			if total -= data + credit; total != 0 {
				t.Fatalf("stream %d: %d bytes are missing", id, total)
			}
		}
	})
}
