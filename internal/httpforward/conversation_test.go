package httpforward

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A conversation is what a client and an upstream say through the engine, one step a line:
//
//	> text     the client sends it
//	>> text    upstream reads exactly that, on the connection that it has; the first time it accepts one
//	< text     upstream sends it
//	<< text    the client reads exactly that
//	other      a deed, see below
//
// In the texts, \r and \n are written so, and $ stands for \r\n.
type conversation struct {
	name   string
	script string
	want   []recorded // the expected records: only reason, status, flags, received and sent are looked at
}

// deeds are the steps that send or read no text.
var deeds = map[string]func(t testing.TB, s *stage){
	"client closes its half": func(t testing.TB, s *stage) { s.client.CloseWrite() },
	"client closes":          func(t testing.TB, s *stage) { s.client.Close() },
	"client resets":          func(t testing.TB, s *stage) { s.client.SetLinger(0); s.client.Close() },
	"client reads a message that ends the connection": func(t testing.TB, s *stage) {
		rest, err := io.ReadAll(s.client)
		if err != nil || !strings.Contains(string(rest), "\r\nConnection: close\r\n") {
			t.Fatalf("the client reads %q and %v", rest, err)
		}
	},
	"client reads the end":        func(t testing.TB, s *stage) { readsEnd(t, s.client, "the client") },
	"client is reset":             func(t testing.TB, s *stage) { readsReset(t, s.client, "the client") },
	"client connects again":       func(t testing.TB, s *stage) { s.client = s.rig.dial(t) },
	"upstream closes its half":    func(t testing.TB, s *stage) { s.upstream().CloseWrite() },
	"upstream closes":             func(t testing.TB, s *stage) { s.upstream().Close() },
	"upstream resets":             func(t testing.TB, s *stage) { s.upstream().SetLinger(0); s.upstream().Close() },
	"upstream reads the end":      func(t testing.TB, s *stage) { readsEnd(t, s.upstream(), "upstream") },
	"upstream is reset":           func(t testing.TB, s *stage) { readsReset(t, s.upstream(), "upstream") },
	"upstream is gone":            func(t testing.TB, s *stage) { s.server = nil }, // the next step is about another connection
	"some time passes":            func(t testing.TB, s *stage) { time.Sleep(3 * s.limit) },
	"a longer time passes":        func(t testing.TB, s *stage) { time.Sleep(16 * s.limit) },
	"upstream gets a connection":  func(t testing.TB, s *stage) { s.server = s.origin.accept() },
	"upstream listens no more":    func(t testing.TB, s *stage) { s.origin.listener.Close() },
	"the end is announced":        func(t testing.TB, s *stage) { s.rig.engine.Announce() },
	"the agent drains":            func(t testing.TB, s *stage) { s.rig.engine.Drain(); s.rig.poller.WakeAll() },
	"the pool was not asked":      func(t testing.TB, s *stage) { s.unasked(t) },
	"nothing is left in the pool": func(t testing.TB, s *stage) { s.pooled(t, 0) },
	"the pool has a connection":   func(t testing.TB, s *stage) { s.pooled(t, 1) },
}

// stage is where a conversation takes place.
type stage struct {
	t      testing.TB
	rig    *rig
	origin *origin
	client *net.TCPConn
	server *net.TCPConn
	limit  time.Duration // the short limit of this run
}

func (s *stage) upstream() *net.TCPConn {
	if s.server == nil {
		s.server = s.origin.accept()
	}
	return s.server
}

func (s *stage) pooled(t testing.TB, want int) {
	t.Helper()
	within(t, "the pool is right", func() bool { return s.rig.pool.Idle() == want })
}

func (s *stage) unasked(t testing.TB) {
	t.Helper()
	if stats := &s.rig.pool.Stats; stats.Missed.Load()+stats.Reused.Load() != 0 {
		t.Errorf("the pool was asked %d times", stats.Missed.Load()+stats.Reused.Load())
	}
}

func readsEnd(t testing.TB, conn net.Conn, who string) {
	t.Helper()
	rest, err := io.ReadAll(conn)
	if len(rest) > 0 || err != nil {
		t.Fatalf("%s reads %q and %v, want the end", who, rest, err)
	}
}

func readsReset(t testing.TB, conn net.Conn, who string) {
	t.Helper()
	rest, err := io.ReadAll(conn)
	if len(rest) > 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("%s reads %q and %v, want a reset", who, rest, err)
	}
}

var escapes = strings.NewReplacer(`\r`, "\r", `\n`, "\n", `\0`, "\x00", `\t`, "\t", "$", "\r\n")

// long is a limit within which upstream responds also on a slow machine, and which a longer time exceeds.
func long(limit time.Duration) time.Duration { return 13 * limit }

// play acts a conversation out.
func (c conversation) play(t testing.TB, configure ...func(*Config)) {
	c.playOn(t, func(*rig) {}, configure...)
}

// playOn acts a conversation out on a rig that prepare has changed.
func (c conversation) playOn(t testing.TB, prepare func(*rig), configure ...func(*Config)) {
	t.Helper()
	c.playUnder(t, 30*time.Millisecond, prepare, configure...)
}

// playUnder is playOn with limits of time: in texts, SHORT stands for limit in milliseconds, and LONG and HALF for long(limit)
// and the half of it.
func (c conversation) playUnder(t testing.TB, limit time.Duration, prepare func(*rig), configure ...func(*Config)) {
	t.Helper()
	limits := strings.NewReplacer("SHORT", fmt.Sprint(limit.Milliseconds()), "LONG", fmt.Sprint(long(limit).Milliseconds()), "HALF", fmt.Sprint(long(limit).Milliseconds()/2))
	o := newOrigin(t)
	s := &stage{t: t, limit: limit, origin: o, rig: newRig(t, o.address, false, append([]func(*Config){plain}, configure...)...)}
	s.rig.set(func() { prepare(s.rig) })
	s.client = s.rig.dial(t)
	for line := range strings.Lines(c.script) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		t.Log(line)
		verb, text, _ := strings.Cut(line, " ")
		text = limits.Replace(escapes.Replace(text))
		switch verb {
		case ">":
			send(t, s.client, text)
		case ">>":
			expect(t, s.upstream(), text)
		case "<":
			send(t, s.upstream(), text)
		case "<<":
			expect(t, s.client, text)
		default:
			deed := deeds[line]
			if deed == nil {
				t.Fatalf("%q is an unknown step", line)
			}
			deed(t, s)
		}
	}
	s.client.Close()
	for i, want := range c.want {
		got := s.rig.records.await(t, i)
		if got.reason != want.reason || got.status != want.status || got.flags != want.flags ||
			got.received != want.received || got.sent != want.sent {
			t.Errorf("record %d is %+v, want %+v", i, got, want)
		}
	}
	if n := s.rig.records.count(); n > len(c.want) {
		t.Errorf("%d records, want %d", n, len(c.want))
	}
}
