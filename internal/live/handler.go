package live

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/ownport"
)

// Sources are shown by the handlers in addition to the View. They are read at each request.
type Sources struct {
	Table *flow.Table   // open connections; nil for none
	Gates func() []Gate // conditions of readiness; nil: none
	Index func() string // answer of "/" for clients other than browsers, such as a list of paths; nil: empty
}

// Bounds of what is streamed.
const (
	recordsPerSecond = 200 // to a page: a person reads no more
	writeTimeout     = 10 * time.Second
	heartbeat        = 15 * time.Second // so that both sides notice when the other has gone
)

// Handler serves
//
//	GET /              a page for browsers, the index for others
//	GET /live          a Snapshot
//	GET /live/events   server-sent events: snapshot each second, record for each of the last and the next records, skipped
//	                   with the number of those that are left out because there are more than 200 a second
//	GET /live/records  the last hundred records, the oldest first: {"records": […]}
//	GET /live/tap      records as they close, each on a line of JSON, and {"skipped": n} when the reader was too slow; an
//	                   empty line now and then
//
// The last two take a filter: direction, host, path (its beginning), status (404, 5xx) and address (of any side; with a
// port or a prefix length); tap also n, after how many records it ends.
//
// What traffic carries is for people on this machine only. Listening on loopback keeps other machines out, but not web
// pages that somebody on this machine has open: such a page may send requests here, and when its own name is made to
// resolve to 127.0.0.1 (DNS rebinding) its browser takes the answers for its own. But the request then names that host.
// So only requests for localhost or a loopback address are answered, as kubectl port-forward makes them; there are no
// CORS fields, and what a browser says to come from another site is refused before it can occupy a stream.
func (v *View) Handler(sources Sources) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Vary", "Accept")
		if strings.Contains(r.Header.Get("Accept"), "text/html") {
			servePage(w)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if sources.Index != nil {
			fmt.Fprint(w, sources.Index())
		}
	})
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) {
		serveJSON(w, v.snapshot(&sources))
	})
	mux.HandleFunc("GET /live/records", func(w http.ResponseWriter, r *http.Request) {
		filter, err := ParseFilter(r.URL.Query())
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		serveJSON(w, Records{v.last.records(&filter)})
	})
	mux.HandleFunc("GET /live/tap", v.serveTap)
	mux.HandleFunc("GET /live/events", func(w http.ResponseWriter, r *http.Request) { v.serveEvents(w, r, &sources) })
	return local(mux)
}

// Records is the answer of /live/records.
type Records struct {
	Records []Record `json:"records"`
}

// Tapped is a line of /live/tap: a record, or how many the reader was too slow for.
type Tapped struct {
	*Record
	Skipped uint64 `json:"skipped,omitempty"`
}

// local lets requests through that were made for this machine, and by no other site's page. Handler says why.
func local(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		site := r.Header.Get("Sec-Fetch-Site")
		foreign := site != "" && site != "none" && site != "same-origin" && r.URL.Path != "/"
		if foreign || !ownport.NamesLoopback(r.Host) {
			http.Error(w, "Refused: live data is for this machine only. Ask for localhost or a loopback address, for example by\n"+
				"kubectl port-forward POD 15000, and from no other site's page.", http.StatusForbidden)
			return
		}
		header := w.Header()
		header.Set("Cache-Control", "no-store")
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Cross-Origin-Resource-Policy", "same-origin")
		next.ServeHTTP(w, r)
	})
}

func serveJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(value) // an error means that the client left
}

// stream is a response that goes on. Each write has a deadline, so that a reader who takes nothing is not kept.
type stream struct {
	http.ResponseWriter
	control *http.ResponseController
}

func newStream(w http.ResponseWriter, contentType string) *stream {
	w.Header().Set("Content-Type", contentType)
	return &stream{w, http.NewResponseController(w)}
}

// Write may have to send before flush does.
func (s *stream) Write(text []byte) (int, error) {
	s.control.SetWriteDeadline(time.Now().Add(writeTimeout))
	return s.ResponseWriter.Write(text)
}

// flush sends what was written; false when the reader has gone.
func (s *stream) flush() bool {
	s.control.SetWriteDeadline(time.Now().Add(writeTimeout))
	return s.control.Flush() == nil
}

// event writes one server-sent event. The JSON has no line breaks.
func (s *stream) event(name string, value any) {
	if text, err := json.Marshal(value); err == nil {
		fmt.Fprintf(s, "event: %s\ndata: %s\n\n", name, text)
	}
}

func (v *View) serveTap(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	filter, err := ParseFilter(query, "n")
	left := uint64(0)
	if text := query.Get("n"); err == nil && text != "" {
		if left, err = strconv.ParseUint(text, 10, 32); err != nil {
			err = fmt.Errorf("n=%.40q: not a count: use a whole number, or 0 for no end", text)
		}
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	follower, err := v.following.join(filter, 0)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer v.following.leave(follower)
	s := newStream(w, "application/x-ndjson")
	encoder := json.NewEncoder(s)
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	for s.flush() {
		select {
		case record := <-follower.queue:
			for more := true; more; { // what has come meanwhile goes out with it
				encoder.Encode(Tapped{Record: record})
				if left--; left == 0 {
					s.flush()
					return
				}
				select {
				case record = <-follower.queue:
				default:
					more = false
				}
			}
		case <-beat.C:
			fmt.Fprintln(s)
		case <-v.ended:
			return
		case <-r.Context().Done():
			return
		}
		if missed := follower.missed.Swap(0); missed > 0 {
			encoder.Encode(Tapped{Skipped: missed})
		}
	}
}

func (v *View) serveEvents(w http.ResponseWriter, r *http.Request, sources *Sources) {
	follower, err := v.following.join(Filter{}, recordsPerSecond)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer v.following.leave(follower)
	s := newStream(w, "text/event-stream")
	fmt.Fprint(s, "retry: 1000\n\n")
	s.event("snapshot", v.snapshot(sources))
	newest := uint64(0)
	for _, record := range v.last.records(&Filter{}) {
		s.event("record", record)
		newest = record.Number
	}
	// Records go out a few times a second, and a snapshot with every fourth, which is the heartbeat as well.
	tick := time.NewTicker(time.Second / 4)
	defer tick.Stop()
	for ticks := 1; s.flush(); ticks++ {
		select {
		case <-tick.C:
			if ticks%4 == 0 {
				s.event("snapshot", v.snapshot(sources))
			}
			for n := len(follower.queue); n > 0; n-- {
				if record := <-follower.queue; record.Number > newest {
					s.event("record", record)
				}
			}
			if missed := follower.missed.Swap(0); missed > 0 {
				s.event("skipped", struct {
					Skipped uint64 `json:"skipped"`
				}{missed})
			}
		case <-v.ended:
			return
		case <-r.Context().Done():
			return
		}
	}
}
