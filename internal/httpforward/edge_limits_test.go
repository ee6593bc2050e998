package httpforward

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// slowEdge starts an engine behind an edge, with a client of it. The server does what the path asks for.
func slowEdge(t testing.TB, edge *Edge, two bool) (*rig, *http.Client) {
	t.Helper()
	server := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/never":
			<-r.Context().Done()
		case "/begin":
			io.WriteString(w, "part")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case "/echo":
			http.NewResponseController(w).EnableFullDuplex()
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			buf := make([]byte, 1)
			for n, err := r.Body.Read(buf); n > 0 && err == nil; n, err = r.Body.Read(buf) {
				w.Write(buf[:n])
				w.(http.Flusher).Flush()
			}
		default:
			io.Copy(io.Discard, r.Body)
			io.WriteString(w, "ok")
		}
	})
	r, _ := newEdgeTo(t, server, edge, two, two)
	client := http2Client(t)
	if !two {
		client = &http.Client{Transport: &http.Transport{}, Timeout: nettest.Patience}
		t.Cleanup(client.CloseIdleConnections)
	}
	return r, client
}

// silence and wholeRequest return an edge with a limit.
func silence(limit time.Duration) *Edge      { return &Edge{SilenceTimeout: limit} }
func wholeRequest(limit time.Duration) *Edge { return &Edge{RequestTimeout: limit} }

// limitCase is a request that exceeds a limit of the edge, and how it ends.
type limitCase struct {
	edge   func(limit time.Duration) *Edge
	path   string
	body   func(io.Writer) // nil: the request has no body; it is left unfinished
	status int
	text   string
	want   recorded

	collect bool // the decision needs the body
	ask     bool // the decision needs an answer, and gets no answer
}

// asking is an atEdge whose decisions need the answer to a question, until that is given up.
type asking struct {
	*atEdge
	*question
}

func (a asking) Route(r *Request) Decision {
	if r.Check == nil && a.canceled.Load() == 0 {
		return Decision{Check: a.question}
	}
	return a.atEdge.Route(r)
}

// A request of which no byte moves, or that does not arrive in time, is answered as Envoy answers it, and a response that has
// begun is cut off. A connection of HTTP/2 and its other streams go on.
func TestRequestsThatExceedTheLimitsOfTheEdgeAreAnswered(t *testing.T) {
	t.Parallel()
	silent := recorded{reason: flow.IdleTimeout, flags: "SI", details: "stream_idle_timeout"}
	late := recorded{reason: flow.HeadTimeout, details: "request_overall_timeout"}
	part := func(w io.Writer) { io.WriteString(w, "part") }
	large := func(w io.Writer) { w.Write(make([]byte, 1<<20)) }
	slowly := func(w io.Writer) {
		ticker := time.NewTicker(time.Millisecond)
		defer ticker.Stop()
		for range ticker.C {
			if _, err := io.WriteString(w, "a"); err != nil {
				return
			}
		}
	}
	for name, c := range map[string]limitCase{
		"no response":               {silence, "/never", nil, 504, "stream timeout", silent, false, false},
		"unfinished":                {silence, "/", part, 408, "stream timeout", silent, false, false},
		"unfinished, collected":     {silence, "/", part, 408, "stream timeout", silent, true, false},
		"an unfinished response":    {silence, "/begin", nil, 200, "part", silent, false, false},
		"a slow request":            {wholeRequest, "/", slowly, 408, "request timeout", late, false, false},
		"a slow request, collected": {wholeRequest, "/", slowly, 408, "request timeout", late, true, false},
		"asked":                     {silence, "/", nil, 504, "stream timeout", silent, false, true},
		"unfinished, asked":         {silence, "/", part, 408, "stream timeout", silent, false, true},
		"more than is kept, asked":  {silence, "/", large, 504, "stream timeout", silent, false, true},
		"a slow request, asked":     {wholeRequest, "/", slowly, 408, "request timeout", late, false, true},
	} {
		for _, two := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, HTTP/2 %v", name, two), func(t *testing.T) {
				t.Parallel()
				nettest.UnderLimit(t, 100*time.Millisecond, func(t testing.TB, limit time.Duration) {
					if err := c.run(t, limit, two); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}

// run sends the request, and over HTTP/2 another one on the same connection.
func (c *limitCase) run(t testing.TB, limit time.Duration, two bool) error {
	t.Helper()
	r, client := slowEdge(t, c.edge(limit), two)
	defer client.CloseIdleConnections()
	q := new(question)
	switch {
	case c.collect:
		r.set(func() { r.router = collecting{r.router.(*atEdge)} })
	case c.ask:
		r.set(func() { r.router = asking{r.router.(*atEdge), q} })
	}
	method, body := "GET", io.Reader(nil)
	if c.body != nil {
		from, to := io.Pipe()
		defer to.Close()
		go c.body(to)
		method, body = "POST", from
	}
	request, _ := http.NewRequestWithContext(t.Context(), method, "http://"+r.address+c.path, body)
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(response.Body)
	response.Body.Close()
	if response.StatusCode != c.status || string(text) != c.text || (err != nil) != (c.status == 200) {
		return fmt.Errorf("%d, %q, %v; want %d, %q", response.StatusCode, text, err, c.status, c.text)
	}
	got := r.records.await(t, 0)
	if got.reason != c.want.reason || got.flags != c.want.flags || got.details != c.want.details || got.status != c.status {
		return fmt.Errorf("the record is %+v, want %+v", got, c.want)
	}
	if n := q.canceled.Load(); (n == 1) != c.ask {
		return fmt.Errorf("the question was given up %d times", n)
	}
	if !two {
		return nil
	}
	reused := false
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { reused = info.Reused }}
	request, _ = http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), trace), "GET", "http://"+r.address, nil)
	response, err = client.Do(request)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != 200 || !reused {
		return fmt.Errorf("the next request: %s, on the same connection: %v", response.Status, reused)
	}
	return nil
}

// A request whose body arrives while it waits for an answer does not exceed the limit of its arrival, however long it waits.
func TestAnArrivedRequestWaitsForItsAnswer(t *testing.T) {
	t.Parallel()
	const large = 1 << 20 // more than is kept while the request waits
	for _, c := range []struct {
		length int64
		body   int
		want   string
	}{
		{-1, 5, "200 OK"}, {5, 5, "200 OK"},
		{-1, large, "200 OK"}, {large, large, "200 OK"},
		{2 * large, large, "408 Request Timeout"}, // it does not arrive behind the answer either
	} {
		for _, two := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d bytes, length %d, HTTP/2 %v", c.body, c.length, two), func(t *testing.T) {
				t.Parallel()
				nettest.UnderLimit(t, 100*time.Millisecond, func(t testing.TB, limit time.Duration) {
					if err := waitBeyond(t, limit, c.length, c.body, two, c.want); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}

// waitBeyond sends two requests that wait for an answer, of which the second does not arrive. It answers the first after the
// second has exceeded the limit.
func waitBeyond(t testing.TB, limit time.Duration, length int64, body int, two bool, want string) error {
	t.Helper()
	r, client := slowEdge(t, wholeRequest(limit), two)
	defer client.CloseIdleConnections()
	first, second := new(question), new(question)
	edge := r.router.(*atEdge)
	r.set(func() {
		r.router = limitedPlan{&planned{decide: func(r *Request, d *Decision) {
			switch d.Target = edge.to; {
			case r.Check != nil:
			case string(r.Path) == "/first":
				d.Check = first
			default:
				d.Check = second
			}
		}}, edge.edge}
	})
	post := func(path string, body io.Reader) <-chan string {
		answer := make(chan string, 1)
		go func() {
			request, _ := http.NewRequestWithContext(t.Context(), "POST", "http://"+r.address+path, body)
			if path == "/first" {
				request.ContentLength = length
			}
			response, err := client.Do(request)
			if err != nil {
				answer <- err.Error()
				return
			}
			response.Body.Close()
			answer <- response.Status
		}()
		return answer
	}
	from, to := io.Pipe()
	defer to.Close()
	passed := post("/first", from)
	nettest.Eventually(t, "the first request waits for its answer", func() bool {
		first.mu.Lock()
		defer first.mu.Unlock()
		return first.ready != nil
	})
	go func() {
		to.Write(make([]byte, body))
		if length < 0 || length == int64(body) {
			to.Close()
		}
	}()
	never, hold := io.Pipe()
	defer hold.Close()
	if late := <-post("/second", never); late != "408 Request Timeout" {
		return fmt.Errorf("the second request: %s", late)
	}
	first.answer()
	if got := <-passed; got != want || first.canceled.Load() != 0 {
		return fmt.Errorf("the first request: %s", got)
	}
	return nil
}

// A stream that moves is not ended by a limit of silence, and does not keep a silent one of its connection.
func TestTheLimitOfSilenceIsThatOfEachStream(t *testing.T) {
	t.Parallel()
	nettest.UnderLimit(t, 100*time.Millisecond, func(t testing.TB, limit time.Duration) {
		if err := moveBesideSilence(t, limit); err != nil {
			t.Error(err)
		}
	})
}

// moveBesideSilence keeps a stream moving until a silent one of the same connection is answered.
func moveBesideSilence(t testing.TB, limit time.Duration) error {
	t.Helper()
	r, client := slowEdge(t, silence(limit), true)
	from, to := io.Pipe()
	defer to.Close()
	request, _ := http.NewRequestWithContext(t.Context(), "POST", "http://"+r.address+"/echo", from)
	moving, err := client.Do(request)
	if err != nil {
		return err
	}
	defer moving.Body.Close()
	silent := make(chan error, 1)
	go func() {
		response, err := client.Get("http://" + r.address + "/never")
		if err == nil {
			response.Body.Close()
			if response.StatusCode != 504 {
				err = fmt.Errorf("the silent stream: %s", response.Status)
			}
		}
		silent <- err
	}()
	for buf := []byte{0}; ; {
		to.Write([]byte("a"))
		if _, err := io.ReadFull(moving.Body, buf); err != nil {
			return fmt.Errorf("the moving stream: %w", err)
		}
		select {
		case err := <-silent:
			return err
		default:
		}
	}
}

// A head that does not come to its end is answered by the limit that passes first.
func TestUnfinishedHeadsAreAnsweredAtTheEdge(t *testing.T) {
	t.Parallel()
	const long = time.Hour
	for text, edge := range map[string]func(limit time.Duration) *Edge{
		"stream timeout": func(limit time.Duration) *Edge {
			return &Edge{SilenceTimeout: limit, RequestTimeout: long, HeadTimeout: long}
		},
		"request timeout": func(limit time.Duration) *Edge {
			return &Edge{SilenceTimeout: long, RequestTimeout: limit, HeadTimeout: long}
		},
		"request header timeout": func(limit time.Duration) *Edge {
			return &Edge{SilenceTimeout: long, RequestTimeout: long, HeadTimeout: limit}
		},
	} {
		nettest.UnderLimit(t, 50*time.Millisecond, func(t testing.TB, limit time.Duration) {
			r, _ := slowEdge(t, edge(limit), false)
			client := r.dial(t)
			send(t, client, "GET / HTTP/1.1\r\nHost: ")
			response, err := http.ReadResponse(bufio.NewReader(client), nil)
			if err != nil {
				t.Fatalf("%s: %v", text, err)
			}
			body, err := io.ReadAll(response.Body)
			if err != nil || response.StatusCode != 408 || string(body) != text {
				t.Errorf("%d, %q, %v; want 408, %q", response.StatusCode, body, err, text)
			}
		})
	}
}

// Ports and the dot at the end of hosts are removed before anything else sees the request.
func TestTheEdgeStripsHosts(t *testing.T) {
	for _, c := range []struct {
		edge       *Edge
		host, want string
	}{
		{&Edge{StripPort: StripEach}, "a.example:8443", "a.example"},
		{&Edge{StripPort: StripEach}, "a.example", "a.example"},
		{&Edge{StripPort: StripEach}, "a.example:", "a.example:"},
		{&Edge{StripPort: StripEach}, "a.example:x", "a.example:x"},
		{&Edge{StripPort: StripEach}, "[2001:db8::1]:80", "[2001:db8::1]"},
		{&Edge{StripPort: StripEach}, "[2001:db8::80]", "[2001:db8::80]"},
		{&Edge{StripPort: StripOwn}, "a.example:8443", "a.example:8443"},
		{&Edge{StripPort: StripOwn}, "a.example:PORT", "a.example"},
		{&Edge{StripDot: true}, "a.example.", "a.example"},
		{&Edge{StripDot: true}, "a.example.:81", "a.example:81"},
		{&Edge{StripDot: true, StripPort: StripEach}, "a.example.:81", "a.example"},
		{&Edge{StripDot: true}, "a.example..", "a.example."},
		{&Edge{}, "a.example.:81", "a.example.:81"},
	} {
		for _, two := range []bool{false, true} {
			r, router := newEdge(t, c.edge, two, two)
			client := http2Client(t)
			if !two {
				client = &http.Client{Transport: &http.Transport{}, Timeout: nettest.Patience}
			}
			request, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+r.address+"/x", nil)
			request.Host = strings.ReplaceAll(c.host, "PORT", fmt.Sprint(router.to.Address.Port())) // the original destination's
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			client.CloseIdleConnections()
			if got := r.records.await(t, 0); got.authority != c.want || response.Header.Get("Saw-Host") != c.want {
				t.Errorf("%s, HTTP/2 %v: the record has %q, the server %q, want %q", c.host, two, got.authority, response.Header.Get("Saw-Host"), c.want)
			}
		}
	}
}

// The host of a target in absolute form is changed as well, and that of CONNECT is not.
func TestTheEdgeStripsHostsInEachForm(t *testing.T) {
	o := newOrigin(t)
	r, _ := newEdgeTo(t, o.address, &Edge{StripPort: StripEach, KeepFor: true}, false, false)
	const added = "x-forwarded-proto: http\r\nx-envoy-external-address: 127.0.0.1\r\n\r\n"
	for request, want := range map[string]string{
		"GET http://b.example:81/x HTTP/1.1\r\nX-A: 1\r\nHost: a.example:80\r\n": "GET http://b.example/x HTTP/1.1\r\nX-A: 1\r\nHost: a.example\r\n",
		"GET /:80 HTTP/1.1\r\nHost: a.example:80\r\nX-A: a.example:80\r\n":       "GET /:80 HTTP/1.1\r\nHost: a.example\r\nX-A: a.example:80\r\n",
		"CONNECT a.example:80 HTTP/1.1\r\nHost: a.example:80\r\n":                "CONNECT a.example:80 HTTP/1.1\r\nHost: a.example:80\r\n",
	} {
		client := r.dial(t)
		send(t, client, request+"\r\n")
		server := o.accept()
		expect(t, server, want+added)
		send(t, server, ok("1"))
		client.Close()
		server.Close()
	}
}

// Responses, and replies of the gateway's own, get the request's ID if that is configured.
func TestResponsesHaveTheRequestID(t *testing.T) {
	for _, always := range []bool{false, true} {
		for _, two := range []bool{false, true} {
			r, client := slowEdge(t, &Edge{AlwaysReplyToID: always, KeepID: true, ID: true, SilenceTimeout: 50 * time.Millisecond}, two)
			for _, path := range []string{"/", "/never"} {
				request, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+r.address+path, nil)
				request.Header.Set("X-Request-Id", "the-id")
				response, err := client.Do(request)
				if err != nil {
					t.Fatal(err)
				}
				response.Body.Close()
				if got := strings.Join(response.Header["X-Request-Id"], "|"); got != map[bool]string{true: "the-id"}[always] {
					t.Errorf("%s, HTTP/2 %v, always %v: x-request-id is %q", path, two, always, got)
				}
			}
		}
	}
}
