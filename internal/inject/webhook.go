package inject

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/netutil"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// Bounds of the webhook.
const (
	maxReview      = 4 << 20          // bytes of a request; an API server accepts objects of at most 3 MiB
	smallReview    = 256 << 10        // nearly all requests are smaller
	maxLarge       = 4                // larger requests at a time, from their first byte to the answer
	maxReviews     = 4                // requests answered at a time
	maxValues      = 50_000           // JSON values of a request; a parsed one takes up to 400 bytes
	maxHeld        = 24 << 20         // bytes of all requests up to smallReview, from their first byte to the answer
	maxConnections = 512              // each has one request at a time, as HTTP/2 is not offered
	reviewTime     = 10 * time.Second // for reading a request; the API server's own timeout
	stopTime       = 10 * time.Second // for requests in progress at the end
	maxWarning     = 200              // bytes of a warning; kubectl shows little more
)

// WebhookConfig configures Serve. All fields must be set.
type WebhookConfig struct {
	Listener net.Listener
	// Certificate returns the current certificate, see tls.Config.GetCertificate.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	Options     Options
	Log         *slog.Logger
}

// Serve answers admission reviews at /inject and probes at /healthz over TLS until ctx ends. Then it finishes the requests
// in progress. It closes the listener. Options must be valid.
func Serve(ctx context.Context, config WebhookConfig) error {
	server := &http.Server{
		Handler:           NewWebhook(config.Options, config.Log),
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: config.Certificate},
		Protocols:         new(http.Protocols),
		ReadHeaderTimeout: reviewTime, ReadTimeout: reviewTime, WriteTimeout: 2 * reviewTime, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       slog.NewLogLogger(config.Log.Handler(), slog.LevelDebug), // failed handshakes of any client
	}
	server.Protocols.SetHTTP1(true)
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		within, cancel := context.WithTimeout(context.Background(), stopTime)
		defer cancel()
		stopped <- server.Shutdown(within)
	})
	err := server.ServeTLS(netutil.LimitListener(config.Listener, maxConnections), "", "")
	if stop() { // ctx has not ended: serving failed
		return fmt.Errorf("serving the webhook at %v: %w", config.Listener.Addr(), err)
	}
	if err := <-stopped; err != nil {
		server.Close()
		return fmt.Errorf("stopping the webhook: requests still in progress after %v: %w", stopTime, err)
	}
	return nil
}

// The fields of admission.k8s.io/v1 that are used here.
type (
	review struct {
		APIVersion string    `json:"apiVersion"`
		Kind       string    `json:"kind"`
		Request    *request  `json:"request,omitempty"`
		Response   *response `json:"response,omitempty"`
	}
	request struct {
		UID       string          `json:"uid"`
		Namespace string          `json:"namespace"`
		Operation string          `json:"operation"`
		Object    json.RawMessage `json:"object"`
	}
	response struct {
		UID       string   `json:"uid"`
		Allowed   bool     `json:"allowed"`
		Status    *refusal `json:"status,omitempty"`
		PatchType string   `json:"patchType,omitempty"`
		Patch     []byte   `json:"patch,omitempty"` // base64 in JSON
		Warnings  []string `json:"warnings,omitempty"`
	}
	refusal struct {
		Message string `json:"message"`
		Reason  string `json:"reason"`
		Code    int    `json:"code"`
	}
)

const reviewVersion = "admission.k8s.io/v1"

// NewWebhook returns the handler of /inject and /healthz.
func NewWebhook(options Options, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	running, bodies := make(places, maxReviews), bodies{large: make(places, maxLarge)}
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("POST /inject", func(w http.ResponseWriter, r *http.Request) {
		if form, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); form != "application/json" {
			http.Error(w, "send application/json", http.StatusUnsupportedMediaType)
			return
		}
		body, free := bodies.read(w, r)
		defer free()
		if body == nil {
			return
		}
		if !running.take(w, r) {
			return
		}
		defer running.leave()
		answer, err := Review(body, options, log)
		if err != nil {
			log.Warn("not an AdmissionReview", "from", r.RemoteAddr, "error", err)
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(answer)
	})
	return mux
}

// places bounds concurrent work.
type places chan struct{}

// take waits for a place and reports whether it got one. If not, it has answered 503.
func (p places) take(w http.ResponseWriter, r *http.Request) bool {
	timer := time.NewTimer(reviewTime / 2)
	defer timer.Stop()
	select {
	case p <- struct{}{}:
		return true
	case <-r.Context().Done():
	case <-timer.C:
		http.Error(w, fmt.Sprintf("too many reviews: %d in progress", cap(p)), http.StatusServiceUnavailable)
	}
	return false
}

func (p places) leave() { <-p }

// bodies bounds the memory of requests.
type bodies struct {
	large places // larger requests than smallReview. A client that sends one slowly delays only other large ones

	mu      sync.Mutex
	held    int64     // bytes of buffers of at most smallReview
	reading []*upload // those not read to their end, oldest first
}

// upload is a request whose body is read.
type upload struct {
	held    int64  // its part of bodies.held
	stop    func() // ends the reading
	evicted bool
}

// take reserves n bytes for u and reports whether it could. Without free bytes it evicts the oldest uploads: an API server
// sends a review at once, so these are the slow ones.
func (b *bodies) take(u *upload, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !u.evicted && b.held+n > maxHeld {
		i := slices.IndexFunc(b.reading, func(other *upload) bool { return other != u })
		if i < 0 {
			return false
		}
		oldest := b.reading[i]
		b.reading = slices.Delete(b.reading, i, i+1)
		b.held -= oldest.held
		oldest.held, oldest.evicted = 0, true
		oldest.stop()
	}
	if u.evicted {
		return false
	}
	b.held += n
	u.held += n
	return true
}

// finish protects u from eviction and reports whether it has not been evicted.
func (b *bodies) finish(u *upload) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reading = slices.DeleteFunc(b.reading, func(other *upload) bool { return other == u })
	return !u.evicted
}

func (b *bodies) free(u *upload) {
	b.finish(u)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held -= u.held
	u.held = 0
}

// firstRead is the first size of a buffer. It grows as bytes arrive, so that an announced length costs nothing.
const firstRead = 4 << 10

// read returns the body, or nil after an error that it has answered. The body may be used until free is called.
func (b *bodies) read(w http.ResponseWriter, r *http.Request) (body []byte, free func()) {
	sent := http.MaxBytesReader(w, r.Body, maxReview)
	ctx, cancel := context.WithCancel(r.Context())
	u := &upload{stop: func() {
		cancel()
		http.NewResponseController(w).SetReadDeadline(time.Unix(1, 0))
	}}
	b.mu.Lock()
	b.reading = append(b.reading, u)
	b.mu.Unlock()
	isLarge := false
	free = func() {
		cancel()
		b.free(u)
		if isLarge {
			b.large.leave()
		}
	}
	busy := func() ([]byte, func()) {
		http.Error(w, fmt.Sprintf("too many reviews: %d bytes in progress", maxHeld), http.StatusServiceUnavailable)
		return nil, free
	}
	body = []byte{}
	for {
		if len(body) == cap(body) {
			size := max(firstRead, 4*cap(body))
			switch {
			case size <= smallReview:
				if !b.take(u, int64(size-cap(body))) {
					return busy()
				}
			case !isLarge:
				isLarge = b.large.take(w, r.WithContext(ctx))
				if !b.finish(u) {
					return busy()
				} else if !isLarge {
					return nil, free
				}
				size = maxReview + 1 // a Reader reports the end only if there is room
			}
			body = append(make([]byte, 0, size), body...)
			if isLarge {
				b.free(u) // the small buffer
			}
		}
		n, err := sent.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		if err == nil {
			continue
		}
		tooLarge := new(http.MaxBytesError)
		switch {
		case !b.finish(u):
			return busy()
		case err == io.EOF:
			return body, free
		case errors.As(err, &tooLarge):
			http.Error(w, fmt.Sprintf("a review has at most %d bytes", maxReview), http.StatusRequestEntityTooLarge)
		}
		return nil, free // otherwise the connection is closed or the time is over
	}
}

// Review answers an AdmissionReview. A pod that cannot be injected as its annotations request is refused with the reason.
// A pod on which the injection panics is refused too: it would run without its sidecar, unnoticed.
func Review(body []byte, options Options, log *slog.Logger) ([]byte, error) {
	if values(body) > maxValues {
		return nil, fmt.Errorf("a review has at most %d JSON values", maxValues)
	}
	var asked review
	if err := json.Unmarshal(body, &asked); err != nil {
		return nil, fmt.Errorf("parsing an AdmissionReview: %w", err)
	}
	if asked.APIVersion != reviewVersion || asked.Kind != "AdmissionReview" || asked.Request == nil {
		return nil, fmt.Errorf("%.100q %.100q is not a request: send an AdmissionReview of %s", asked.APIVersion, asked.Kind, reviewVersion)
	}
	answer := asked.Request.answer(options, log)
	answer.UID = asked.Request.UID
	return json.Marshal(review{APIVersion: reviewVersion, Kind: "AdmissionReview", Response: answer})
}

// values returns the number of values of a JSON text, or more.
func values(text []byte) int {
	count, quoted := 0, false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ',' || c == '{' || c == '['):
			count++
		}
	}
	return count
}

func (r *request) answer(options Options, log *slog.Logger) (answer *response) {
	defer func() {
		if failed := recover(); failed != nil {
			log.Error("injection failed", "namespace", r.Namespace, "panic", failed)
			answer = &response{Status: &refusal{"pillion: the injection failed; see the log of the webhook", "InternalError", http.StatusInternalServerError}}
		}
	}()
	if r.Namespace != "" {
		options.Namespace = r.Namespace
	}
	answer = &response{Allowed: true}
	if r.Operation != "CREATE" {
		return answer
	}
	tree, err := yamledit.DecodeJSON(r.Object)
	if err != nil {
		return &response{Status: &refusal{"pillion: the object is not JSON", "BadRequest", http.StatusBadRequest}}
	}
	var changes []yamledit.Change
	for _, o := range objects(tree, nil) {
		o.record = func(path []string, key string) (yamledit.Source, error) {
			text := yamledit.JSON(object{{key, yamledit.Get(valueAt(tree, path), key)}})
			return yamledit.Source{Text: text[1 : len(text)-1], Column: -1}, nil
		}
		o.recordItem = func(path []string, index int) (yamledit.Source, error) {
			list, _ := valueAt(tree, path).([]any)
			return yamledit.Source{Text: yamledit.JSON(list[index]), Column: -1}, nil
		}
		changed, err := o.inject(options)
		if err != nil {
			log.Warn("pod refused", "namespace", options.Namespace, "object", o.outcome.Object(), "error", err)
			return &response{Status: &refusal{"pillion: " + err.Error(), "Invalid", http.StatusUnprocessableEntity}}
		}
		log.Info("pod admitted", "namespace", options.Namespace, "object", o.outcome.Object(), "action", o.outcome.Action, "reason", o.outcome.Reason)
		warnings := o.outcome.Warnings
		if o.outcome.Action == LeftAlone && !o.outcome.requested {
			warnings = append(warnings, "left alone: "+o.outcome.Reason)
		}
		for _, text := range warnings {
			text = "pillion: " + text
			answer.Warnings = append(answer.Warnings, strings.ToValidUTF8(text[:min(len(text), maxWarning)], ""))
		}
		changes = append(changes, changed...)
	}
	if len(changes) > 0 {
		answer.PatchType, answer.Patch = "JSONPatch", []byte(yamledit.JSON(yamledit.Patch(changes)))
	}
	return answer
}

// valueAt returns the value at a path, whose keys of lists are indices.
func valueAt(tree any, path []string) any {
	for _, key := range path {
		if list, isList := tree.([]any); isList {
			i, _ := strconv.Atoi(key)
			tree = list[i]
			continue
		}
		tree = yamledit.Get(tree, key)
	}
	return tree
}
