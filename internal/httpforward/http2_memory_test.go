package httpforward

import (
	"runtime"
	"strings"
	"testing"
	"time"
)

// inUse is how much memory is reachable.
func inUse() int {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int(stats.HeapAlloc)
}

// A reference to a table entry is a few bytes long, and can stand for thousands. The re-encoded fields must not
// accumulate before an upstream that does not read.
func TestHeaderBlocksThatGrowAreNotHeldInMemory(t *testing.T) {
	_, client, server := meet(t, func(c *Config) { c.Fields = Fields{ForwardedFor: ForwardedForAppend} })
	const get = "\x82\x86\x84\x01\x01a"
	large := strings.Repeat("~", 4000) // a name that the tables keep
	send(t, client.conn, rawFrame(1, 5, 1, get+"\x40\x7f\xa1\x1e"+large+"\x00"))
	if got := server.next(); !strings.Contains(got, large) {
		t.Fatalf("read %.100s", got)
	}
	before := inUse()
	var bomb strings.Builder
	last := uint32(1)
	for id := uint32(3); bomb.Len() < 100<<10; id += 2 {
		last = id
		bomb.WriteString(rawFrame(1, 5, id, get+strings.Repeat("\x1f\x2f\x00", 15))) // never indexed, with that name
	}
	client.conn.SetWriteDeadline(time.Now().Add(time.Second))
	client.conn.Write([]byte(bomb.String()))
	client.conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	client.next()
	if grown := inUse() - before; grown > 4<<20 {
		t.Errorf("%d KiB are held for a connection that sent %d KiB", grown>>10, bomb.Len()>>10)
	}
	for heard := uint32(1); heard < last; { // they all arrive in the end
		frame, err := server.framer.ReadFrame()
		if err != nil {
			t.Fatalf("after request %d of %d: %v", heard, last, err)
		}
		heard = frame.Header().StreamID
	}
}

func TestRequestsThatWereAnsweredAreNotWaitedForInMemory(t *testing.T) {
	m := &multiplex{settings: &Settings{RequestTimeout: time.Hour}}
	slow := &stream{id: 1}
	m.streams.add(slow)
	m.awaitHead(slow)
	for i := range uint32(100_000) {
		s := &stream{id: 2*i + 3}
		m.streams.add(s)
		m.awaitHead(s)
		m.streams.remove(s)
	}
	if n := cap(m.waiting); n > 1000 {
		t.Errorf("%d requests are waited for", n)
	}
	if s, _ := m.longestWait(); s != slow {
		t.Errorf("%v waits longest", s)
	}
}
