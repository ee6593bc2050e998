package httpforward

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// frames counts frames by the first and the last word of their text: RST REFUSED_STREAM.
type frames struct{ counts map[string]int }

// until reads frames until one has the text.
func (s *speaker) until(text string) (seen frames) {
	s.t.Helper()
	seen.counts = make(map[string]int)
	for {
		got := s.next()
		words := strings.Fields(got)
		seen.counts[words[0]+" "+words[len(words)-1]]++
		switch {
		case got == text:
			return seen
		case got == "the end" || strings.Contains(got, "error") || strings.Contains(got, "timeout"):
			s.t.Fatalf("read %q, want %q", got, text)
		}
	}
}

// Over HTTP/2 a field of 3.9 KB is repeated at the cost of a byte. 300 streams stand for 70 MB.
func TestRepeatedFieldsAreNotHeld(t *testing.T) {
	r, client, server := meet(t, func(c *Config) { c.Budget, c.MaxHeadBytes = budget.New(4<<20), 256<<10 })
	fields := strings.Fields(postFields + strings.Repeat(" x-forwarded-for="+strings.Repeat("203.0.113.7,", 325), 60))
	const streams = 300
	before := inUse()
	go func() {
		for i := range uint32(streams) {
			if client.headers(2*i+1, fields) != nil {
				return
			}
		}
		client.sends("PING 12345678")
	}()
	server.until("PING 12345678")
	if grown := inUse() - before; grown > 4<<20 {
		t.Errorf("%d KiB are held", grown>>10)
	}
	if used := r.engine.config.Budget.Used(); used > 2<<20 || used == 0 {
		t.Errorf("%d KiB are accounted for", used>>10)
	}
	server.sends("PING ack 12345678")
	refused := client.until("PING ack 12345678").counts["RST REFUSED_STREAM"]
	if refused < streams/2 || refused >= streams {
		t.Errorf("%d of %d streams were refused", refused, streams)
	}
	nettest.Eventually(t, "the refusals are recorded", func() bool { return r.records.of(flow.MemoryBudget) == refused })

	// The others are served, and when they have ended there is room again.
	for i := range streams - refused {
		server.sends(fmt.Sprintf("HEADERS %d end :status=200", 2*i+1))
		client.until(fmt.Sprintf("HEADERS %d end :status=200", 2*i+1))
		client.sends(fmt.Sprintf("RST %d NO_ERROR", 2*i+1))
		server.until(fmt.Sprintf("RST %d NO_ERROR", 2*i+1))
	}
	client.sends("GET 1001")
	server.until("HEADERS 1001 end " + getFields)
	if got := r.records.of(flow.MemoryBudget); got != refused {
		t.Errorf("%d streams were refused when there was room", got-refused)
	}
	server.sends("HEADERS 1001 end :status=200")
	client.reads("HEADERS 1001 end :status=200")
	nettest.Eventually(t, "everything is given back", func() bool { return r.engine.config.Budget.Used() == 0 })
}

// A response cannot be refused: its values are cut.
func TestRecordsOfResponsesKeepLittleOnceTheConnectionHoldsTooMuch(t *testing.T) {
	r, client, server := meet(t, func(c *Config) { c.Budget, c.MaxHeadBytes = budget.New(4<<20), 256<<10 })
	const streams = 300
	status := strings.Repeat("1", 8000)
	for i := range streams {
		call := fmt.Sprintf("HEADERS %d %s content-type=application/grpc", 2*i+1, postFields)
		client.sends(call)
		server.until(call)
	}
	for i := range streams {
		server.sends(fmt.Sprintf("HEADERS %d :status=200 grpc-status=%s", 2*i+1, status))
		client.until(fmt.Sprintf("HEADERS %d :status=200 grpc-status=%s", 2*i+1, status))
	}
	nettest.Eventually(t, "the streams are accounted for", func() bool { return r.engine.config.Budget.Used() > 1<<20 })
	if used := r.engine.config.Budget.Used(); used > 1<<20+2*heldStep+streams*streamSize {
		t.Errorf("%d KiB are accounted for", used>>10)
	}
	for i := range streams {
		server.sends(fmt.Sprintf("DATA %d end", 2*i+1))
		client.sends(fmt.Sprintf("RST %d NO_ERROR", 2*i+1))
	}
	whole, marks := 0, 0
	for i := range streams {
		switch r.records.await(t, i).grpc {
		case status:
			whole++
		case flow.CutMark:
			marks++
		default:
			t.Errorf("the record is %+v", r.records.await(t, i))
		}
	}
	if whole < 50 || whole+marks != streams || marks == 0 {
		t.Errorf("%d records have the whole value, and %d a mark", whole, marks)
	}
}

// unfinished sends the beginning of a header block.
func (s *speaker) unfinished(stream uint32, size int) {
	s.t.Helper()
	block := append([]byte(nil), s.encode(append(strings.Fields(getFields), "!x="+strings.Repeat("~", size)))...)
	for first := true; len(block) > 1; first = false {
		n := min(len(block)-1, 16<<10)
		var err error
		if first {
			err = s.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block[:n]})
		} else {
			err = s.framer.WriteContinuation(stream, false, block[:n])
		}
		if err != nil {
			s.t.Fatal(err)
		}
		block = block[n:]
	}
}

func TestUnfinishedHeaderBlocksShareTheBudget(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, true, plain, small)
	connect := func(from string) (client, server *speaker) {
		client = newSpeaker(t, r.dialFrom(t, from))
		send(t, client.conn, http2.ClientPreface)
		client.sends("SETTINGS")
		server = newSpeaker(t, o.accept())
		expect(t, server.conn, http2.ClientPreface)
		server.next()
		server.sends("SETTINGS")
		client.next()
		return client, server
	}
	var clients []*speaker
	for i := range 8 {
		s, _ := connect("127.0.0.1")
		s.unfinished(1, 150<<10)
		clients = append(clients, s)
		nettest.Eventually(t, "the block is accounted for", func() bool {
			return r.engine.config.Budget.Used() > (i+1)*150<<10 || r.engine.config.Budget.Evictions() > 0
		})
	}
	clients[0].until("GOAWAY 0 ENHANCE_YOUR_CALM")
	n := 0
	nettest.Eventually(t, "the evictions are recorded", func() bool {
		n = r.records.of(flow.MemoryBudget)
		return n > 0 && uint64(n) == r.engine.config.Budget.Evictions()
	})
	if n > 6 {
		t.Errorf("%d of 8 connections were evicted", n)
	}
	other, server := connect("127.0.0.2")
	other.sends("GET 1")
	server.until("HEADERS 1 end " + getFields)
	server.sends("HEADERS 1 end :status=200")
	other.until("HEADERS 1 end :status=200")
}

// The client has what it needs when the connection closes in order, and may take its time to close its side.
func TestAConnectionThatLingersHoldsNothing(t *testing.T) {
	nettest.UnderLimit(t, 100*time.Millisecond, func(t testing.TB, limit time.Duration) {
		r, client, _ := meet(t, func(c *Config) { c.HeadTimeout = limit })
		client.unfinished(1, 50<<10)
		if !nettest.Within(limit, func() bool { return r.engine.config.Budget.Used() > 50<<10 }) {
			t.Fatal("the block is not accounted for")
		}
		client.until("GOAWAY 0 ENHANCE_YOUR_CALM")
		if got := client.next(); got != "the end" {
			t.Errorf("after GOAWAY, the client received %q", got)
		}
		if used := r.engine.config.Budget.Used(); used != 0 {
			t.Errorf("%d bytes are held", used)
		}
	})
}
