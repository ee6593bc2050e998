package httpforward

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// question is a Check that a test answers. It counts how often it is given up.
type question struct {
	canceled atomic.Int32
	mu       sync.Mutex
	done     bool
	ready    func()
}

func (q *question) Notify(ready func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ready = ready; q.done {
		ready()
	}
}

func (q *question) Answered() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.done
}

func (q *question) Cancel() { q.canceled.Add(1) }

func (q *question) answer() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.done = true; q.ready != nil {
		q.ready()
	}
}

// asked is a Router that asks the questions of a path, one after the other, before it lets a request pass.
func asked(questions map[string][]*question) *planned {
	return &planned{decide: func(r *Request, d *Decision) {
		d.HTTP2 = true
		list := questions[string(r.Path)]
		next := 0
		for i, q := range list {
			if r.Check == Check(q) {
				next = i + 1
			}
		}
		if next < len(list) {
			d.Target, d.Check = upstream.Target{}, list[next]
		}
	}}
}

// Streams of a hub wait for the answers to questions about them, with their bodies, while others are served. The answers may
// come in any order, and a request may be asked about again.
func TestStreamsOfAHubWaitForAnswers(t *testing.T) {
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	questions := map[string][]*question{"/1": {new(question)}, "/2": {new(question), new(question)}, "/3": {{done: true}}}
	r := newHub(t, origin, asked(questions))
	client := http2Client(t)
	post := func(path, body string) {
		response, err := client.Post("http://"+r.address+path, "text/plain", strings.NewReader(body))
		if err != nil {
			t.Errorf("%s: %v", path, err)
			return
		}
		defer response.Body.Close()
		if got, err := io.ReadAll(response.Body); err != nil || string(got) != body || response.StatusCode != 200 {
			t.Errorf("%s: %s with %d bytes, %v", path, response.Status, len(got), err)
		}
	}
	long := strings.Repeat("a long body\n", 40_000) // more than the windows of the stream
	var first, second sync.WaitGroup
	first.Go(func() { post("/1", long) })
	second.Go(func() { post("/2", long) })
	post("/3", "answered at once")
	for _, q := range []*question{questions["/1"][0], questions["/2"][0]} {
		nettest.Eventually(t, "the question is asked", func() bool {
			q.mu.Lock()
			defer q.mu.Unlock()
			return q.ready != nil
		})
	}
	post("/", long)
	questions["/2"][0].answer()
	post("/", "meanwhile")
	questions["/2"][1].answer()
	second.Wait()
	post("/", "meanwhile")
	questions["/1"][0].answer()
	first.Wait()
	for path, list := range questions {
		for i, q := range list {
			if n := q.canceled.Load(); n != 0 {
				t.Errorf("%s: question %d was given up", path, i)
			}
		}
	}
}

// The question about a stream is given up when its client resets it, or leaves.
func TestAHubGivesUpQuestions(t *testing.T) {
	questions := map[string][]*question{"/reset": {new(question)}, "/left": {new(question)}}
	o := newOrigin(t)
	r := newHub(t, o.address, asked(questions))
	client := greetHub(t, r, "")
	client.sends("HEADERS 1 end :method=GET :scheme=http :authority=a :path=/reset")
	client.sends("HEADERS 3 end :method=GET :scheme=http :authority=a :path=/left")
	client.sends("RST 1 CANCEL")
	if got := r.records.await(t, 0); got.reason != flow.DownstreamLeft || got.path != "/reset" {
		t.Errorf("the record is %+v", got)
	}
	client.conn.SetLinger(0)
	client.conn.Close()
	if got := r.records.await(t, 1); got.reason != flow.DownstreamLeft || got.path != "/left" {
		t.Errorf("the record is %+v", got)
	}
	for path, list := range questions {
		list[0].answer() // too late
		if n := list[0].canceled.Load(); n != 1 {
			t.Errorf("%s: the question was given up %d times", path, n)
		}
	}
}

// The body of a request that waits for an answer is kept for the attempts and the copies that its route permits then.
func TestRequestsOfAHubAreKeptForTheirRoute(t *testing.T) {
	const size = 20 << 10 // more than is kept without a policy
	var attempts atomic.Int32
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		if n, err := io.Copy(io.Discard, r.Body); n != size || err != nil {
			t.Errorf("the origin reads %d bytes, %v", n, err)
		}
		if attempts.Add(1) == 1 {
			w.WriteHeader(503)
		}
	})
	copied := make(chan int64, 1)
	mirror := serveHTTP2(t, func(_ http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		copied <- n
	})
	held, q := &leases{}, new(question)
	plan := planOf(t, mesh.Forward{Retry: retrying(mesh.Retry5xx, 1)}, mesh.Edits{})
	r := newHub(t, origin, &planned{decide: func(r *Request, d *Decision) {
		if r.Attempt == 0 && r.Check == nil {
			*d = Decision{Check: q}
			return
		}
		d.Plan = plan
		if r.Attempt == 0 {
			d.Mirrors = []Mirror{{Target: upstream.Target{Address: mirror}, Policy: &mesh.Mirror{}, Lease: held.open()}}
		}
	}})
	client := greetHub(t, r, "")
	client.sends("HEADERS 1 :method=POST :scheme=http :authority=a :path=/")
	client.framer.WriteData(1, false, make([]byte, size/2))
	client.framer.WriteData(1, true, make([]byte, size/2))
	client.sends("PING 12345678")
	client.reads("PING ack 12345678") // the hub holds the body
	q.answer()
	if got, n := client.next(), attempts.Load(); !strings.HasPrefix(got, "HEADERS 1 end :status=200") || n != 2 {
		t.Errorf("read %q after %d attempts, want a response after 2", got, n)
	}
	select {
	case n := <-copied:
		if n != size {
			t.Errorf("%d bytes are copied", n)
		}
	case <-time.After(nettest.Patience):
		t.Error("no copy")
	}
	held.check(t, nil)
}

// limitedPlan is a planned Router at an edge.
type limitedPlan struct {
	*planned
	edge *Edge
}

func (l limitedPlan) Edge() *Edge { return l.edge }

// A call of which a limit passes while it waits for an answer is answered, and is not sent upstream by a later answer.
func TestAHubForgetsQuestionsAboutCallsThatItHasAnswered(t *testing.T) {
	q := new(question)
	o := newOrigin(t)
	r := newHub(t, o.address, limitedPlan{asked(map[string][]*question{"/asked": {q}}), silence(50 * time.Millisecond)})
	client := greetHub(t, r, "4=0") // the text of the reply waits for credit
	client.sends("HEADERS 1 end :method=GET :scheme=http :authority=a :path=/asked")
	if got := client.next(); !strings.HasPrefix(got, "HEADERS 1 :status=504") {
		t.Fatalf("read %q", got)
	}
	q.answer() // too late
	for range 2 {
		client.sends("PING 12345678")
		client.reads("PING ack 12345678")
	}
	client.sends("WINDOW 1 100")
	client.reads("DATA 1 end stream_timeout")
	if got := r.records.await(t, 0); got.reason != flow.IdleTimeout || got.details != "stream_idle_timeout" {
		t.Errorf("the record is %+v", got)
	}
	if n := q.canceled.Load(); n != 1 {
		t.Errorf("the question was given up %d times", n)
	}
}

// CONNECT has no body that a decision could wait for.
func TestAHubDoesNotCollectTunnels(t *testing.T) {
	r := newHub(t, newOrigin(t).address, &planned{decide: func(r *Request, d *Decision) {
		*d = Decision{Collect: 10}
		if c := r.Collected; c != nil && c.Whole && len(c.Bytes) == 0 {
			*d = Decision{Reply: &route.Reply{Status: 418}}
		}
	}})
	client := greetHub(t, r, "")
	client.sends("HEADERS 1 :method=CONNECT :authority=a:1")
	if got := client.next(); !strings.HasPrefix(got, "HEADERS 1 end :status=418") {
		t.Errorf("read %q", got)
	}
}
