package http1

import (
	"math/rand/v2"
	"testing"

	"github.com/pillion-proxy/pillion/internal/http1/http1test"
)

// everyMessage runs test for each message of the tables.
func everyMessage(t *testing.T, test func(t *testing.T, m http1test.Message, response bool)) {
	for _, m := range http1test.Requests {
		t.Run("request: "+m.Name, func(t *testing.T) { test(t, m, false) })
	}
	for _, m := range http1test.Responses {
		t.Run("response: "+m.Name, func(t *testing.T) { test(t, m, true) })
	}
}

func TestAMessageIsReadInOneWay(t *testing.T) {
	everyMessage(t, func(t *testing.T, m http1test.Message, response bool) {
		got := carry(m, response, at(len(m.Bytes)), never)
		if got.want != m.Want {
			t.Fatalf("%q is %s, want %s", m.Bytes, got.want, m.Want)
		}
		head := m.Head
		if head == "" {
			head = got.came
		}
		if got.head != head {
			t.Errorf("the head went on as\n%q, want\n%q", got.head, head)
		}
		if got.rest != m.Rest {
			t.Errorf("behind the message is %q, want %q", got.rest, m.Rest)
		}
	})
}

func TestHowTheBytesComeInMakesNoDifference(t *testing.T) {
	everyMessage(t, func(t *testing.T, m http1test.Message, response bool) {
		want := carry(m, response, at(len(m.Bytes)), never)
		check := func(how string, n int, step func() int, skip func() bool) {
			t.Helper()
			if got := carry(m, response, step, skip); got != want {
				t.Errorf("%s %d: %+v, want %+v", how, n, got, want)
			}
		}
		if len(m.Bytes) > 4<<10 {
			check("by", 997, by(997), never)
			return
		}
		check("by", 1, by(1), never)
		check("skipping, by", 1, by(1), always)
		for n := range len(m.Bytes) {
			check("cut at", n, at(n), never)
			check("skipping, cut at", n, at(n), always)
		}
		for range 20 {
			check("at random", 0, func() int { return 1 + rand.IntN(20) }, func() bool { return rand.IntN(2) == 0 })
		}
	})
}

func TestWhatGoesOnIsReadLikeWhatCame(t *testing.T) {
	everyMessage(t, func(t *testing.T, m http1test.Message, response bool) {
		first := carry(m, response, at(len(m.Bytes)), never)
		if first.head == "" {
			return // refused, or incomplete
		}
		m.Bytes = first.head + first.body + first.rest
		again := carry(m, response, at(len(m.Bytes)), never)
		first.came = first.head
		if again != first {
			t.Errorf("%+v, want %+v", again, first)
		}
	})
}

func TestTheTablesCoverEveryError(t *testing.T) {
	met := make(map[string]bool)
	names := make(map[string]bool)
	for _, table := range [][]http1test.Message{http1test.Requests, http1test.Responses} {
		for _, m := range table {
			met[m.Want] = true
			if names[m.Name] {
				t.Errorf("%q stands twice in the tables", m.Name)
			}
			names[m.Name] = true
		}
	}
	for e := Error(1); e < errorCount; e++ {
		if e.Name() == "" || e.Error() == "" {
			t.Errorf("error %d has no name or no text", e)
		}
		if !met[e.Name()] {
			t.Errorf("no message is %s", e.Name())
		}
	}
	if rows := len(http1test.Requests) + len(http1test.Responses); rows < 150 {
		t.Errorf("%d messages", rows)
	}
}
