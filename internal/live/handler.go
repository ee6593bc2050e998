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

// Sources are what the handlers show in addition to the View. They are read at each request.
type Sources struct {
	Table *flow.Table          // open connections; optional
	Gates func() []Gate        // conditions of readiness; optional
	Plane func() *ControlPlane // the session with the control plane; may be nil
	Index func() string        // answer of "/" for clients other than browsers, such as a list of paths; nil: empty
}

// Bounds of what is streamed.
const (
	recordsPerSecond = 200 // to a page; more would be unreadable
	writeTimeout     = 10 * time.Second
	heartbeat        = 15 * time.Second // so that each side detects the loss of the other
)

// Handler serves
//
//	GET /              a page for browsers, the index for others
//	GET /live          a Snapshot
//	GET /live/events   server-sent events: "snapshot" each second; "record" for each of the last hundred records and each
//	                   later one; "skipped" with the number of records that were left out, as there were over 200 a second
//	GET /live/records  the last hundred records, the oldest first: {"records": […]}
//	GET /live/tap      records as they close, one line of JSON each; {"skipped": n} if the reader was too slow; an empty
//	                   line as a heartbeat
//
// The last two take a filter: direction, host, path (its beginning), status (404, 5xx) and address (of any side; with a
// port or a prefix length). tap also takes n, the number of records after which it ends.
//
// Live data is for people on this machine only. Listening on loopback excludes other machines, but not web pages that are
// open in a browser on this machine. Such a page can send requests here, and if its own name resolves to 127.0.0.1 (DNS
// rebinding), the browser lets it read the responses. But the request then names that host. So the handler serves only
// requests for localhost or a loopback address, as kubectl port-forward makes them. It sends no CORS fields, and rejects
// requests that a browser attributes to another site before they occupy a stream.
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

// Tapped is a line of /live/tap: a record, or the number of records that the reader was too slow for.
type Tapped struct {
	*Record
	Skipped uint64 `json:"skipped,omitempty"`
}

// local rejects requests for other hosts and by pages of other sites. See Handler.
func local(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		site := r.Header.Get("Sec-Fetch-Site")
		foreign := site != "" && site != "none" && site != "same-origin" && r.URL.Path != "/"
		if foreign || !ownport.NamesLoopback(r.Host) {
			http.Error(w, "Refused: live data is served only to this machine. Use localhost or a loopback address, for example\n"+
				"through kubectl port-forward POD 15000, and not a page of another site.", http.StatusForbidden)
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

// stream is an endless response. Each write has a deadline, so that a stalled reader is dropped.
type stream struct {
	http.ResponseWriter
	control *http.ResponseController
}

func newStream(w http.ResponseWriter, contentType string) *stream {
	w.Header().Set("Content-Type", contentType)
	return &stream{w, http.NewResponseController(w)}
}

// Write sets the deadline as well, because a full buffer is sent before flush.
func (s *stream) Write(text []byte) (int, error) {
	s.control.SetWriteDeadline(time.Now().Add(writeTimeout))
	return s.ResponseWriter.Write(text)
}

// flush sends the buffered bytes and reports whether the reader is still there.
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
			err = fmt.Errorf("n=%.40q: not a count: use a whole number; 0: no limit", text)
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
			for more := true; more; { // send the whole queue in one write
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
	// Records are sent a few times a second, and with every fourth batch a snapshot. It serves as heartbeat.
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
