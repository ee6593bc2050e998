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
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/netutil"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// The bounds of the webhook, whoever asks.
const (
	maxReview      = 4 << 20   // of a request: an API server takes objects of 3 MiB at most
	smallReview    = 256 << 10 // and nearly all are smaller than this
	maxLarge       = 4         // that are larger, at the same time, from their first byte to the answer
	maxReviews     = 16        // that are worked on at the same time
	maxConnections = 512
	reviewTime     = 10 * time.Second // for all of a request; the API server waits for as long
	stopTime       = 10 * time.Second // for requests that are under way when the webhook ends
	maxWarning     = 200              // bytes of a warning: kubectl shows little more
)

// WebhookConfig says where and how pods are injected as they are created. All of it must be set.
type WebhookConfig struct {
	Listener          net.Listener
	CertFile, KeyFile string // PEM; read anew when they change
	Options           Options
	Log               *slog.Logger
}

// Serve answers an API server's questions at /inject, and probes at /healthz, by TLS, until ctx ends. Then it finishes
// what is under way. It closes the listener. Options must be valid.
func Serve(ctx context.Context, config WebhookConfig) error {
	certificates := &certificates{cert: config.CertFile, key: config.KeyFile, log: config.Log}
	if _, err := certificates.get(nil); err != nil {
		config.Listener.Close()
		return fmt.Errorf("--tls-cert %s, --tls-key %s: %w", config.CertFile, config.KeyFile, err)
	}
	server := &http.Server{
		Handler:           NewWebhook(config.Options, config.Log),
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: certificates.get},
		ReadHeaderTimeout: reviewTime, ReadTimeout: reviewTime, WriteTimeout: 2 * reviewTime, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       slog.NewLogLogger(config.Log.Handler(), slog.LevelDebug), // strangers' handshakes
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		within, cancel := context.WithTimeout(context.Background(), stopTime)
		defer cancel()
		stopped <- server.Shutdown(within)
	})
	err := server.ServeTLS(netutil.LimitListener(config.Listener, maxConnections), "", "")
	if stop() { // it has failed by itself
		return fmt.Errorf("serving the webhook at %v: %w", config.Listener.Addr(), err)
	}
	if err := <-stopped; err != nil {
		server.Close()
		return fmt.Errorf("ending the webhook: requests were still under way after %v: %w", stopTime, err)
	}
	return nil
}

// certificates are a pair of files, looked at in each handshake: that costs two calls, and no goroutine has to watch.
type certificates struct {
	cert, key string
	log       *slog.Logger

	mu     sync.Mutex
	tried  [2]stamp
	loaded *tls.Certificate
}

// stamp tells one content of a file from the next.
type stamp struct {
	changed time.Time
	size    int64
}

// get returns what the files have, or what they last had when it was in order.
func (c *certificates) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var now [2]stamp
	for i, name := range []string{c.cert, c.key} {
		if info, err := os.Stat(name); err == nil {
			now[i] = stamp{info.ModTime(), info.Size()}
		}
	}
	if c.loaded != nil && now == c.tried {
		return c.loaded, nil
	}
	c.tried = now
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	switch {
	case err == nil:
		c.log.Info("the certificate is read", "file", c.cert, "until", pair.Leaf.NotAfter)
		c.loaded = &pair
	case c.loaded == nil:
		return nil, err
	default: // one file may be new and the other not yet
		c.log.Warn("the new certificate cannot be used, the old one stays", "error", err)
	}
	return c.loaded, nil
}

// What an API server sends and gets, in admission.k8s.io/v1, as far as it matters here.
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

// NewWebhook is the handler of /inject and /healthz.
func NewWebhook(options Options, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	running, large := make(places, maxReviews), make(places, maxLarge)
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("POST /inject", func(w http.ResponseWriter, r *http.Request) {
		if form, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); form != "application/json" {
			http.Error(w, "send application/json", http.StatusUnsupportedMediaType)
			return
		}
		// Nobody who sends slowly is in the way of others, but of those that send as much.
		sent := http.MaxBytesReader(w, r.Body, maxReview)
		body, err := io.ReadAll(io.LimitReader(sent, smallReview))
		if err == nil && len(body) == smallReview {
			if !large.take(w, r) {
				return
			}
			defer large.leave()
			var rest []byte
			rest, err = io.ReadAll(sent)
			body = append(body, rest...)
		}
		if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
			http.Error(w, fmt.Sprintf("a review has %d bytes at most", maxReview), http.StatusRequestEntityTooLarge)
			return
		} else if err != nil {
			return // the connection is gone, or the time is up
		}
		if !running.take(w, r) {
			return
		}
		defer running.leave()
		answer, err := Review(body, options, log)
		if err != nil {
			log.Warn("a request that is no review", "from", r.RemoteAddr, "error", err)
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(answer)
	})
	return mux
}

// places bound what is done at the same time.
type places chan struct{}

// take waits for a place, or answers that there is none.
func (p places) take(w http.ResponseWriter, r *http.Request) bool {
	timer := time.NewTimer(reviewTime / 2)
	defer timer.Stop()
	select {
	case p <- struct{}{}:
		return true
	case <-r.Context().Done():
	case <-timer.C:
		http.Error(w, fmt.Sprintf("%d such reviews are under way, which is as many as may", cap(p)), http.StatusServiceUnavailable)
	}
	return false
}

func (p places) leave() { <-p }

// Review answers an AdmissionReview. A pod that cannot be injected as its annotations ask is refused with the reason, and
// so is one at which we fail: it would run without its sidecar, and nobody would see that.
func Review(body []byte, options Options, log *slog.Logger) ([]byte, error) {
	var asked review
	if err := json.Unmarshal(body, &asked); err != nil {
		return nil, fmt.Errorf("it is no JSON of an AdmissionReview: %w", err)
	}
	if asked.APIVersion != reviewVersion || asked.Kind != "AdmissionReview" || asked.Request == nil {
		return nil, fmt.Errorf("%.100q %.100q is no request: send an AdmissionReview of %s", asked.APIVersion, asked.Kind, reviewVersion)
	}
	answer := asked.Request.answer(options, log)
	answer.UID = asked.Request.UID
	return json.Marshal(review{APIVersion: reviewVersion, Kind: "AdmissionReview", Response: answer})
}

func (r *request) answer(options Options, log *slog.Logger) (answer *response) {
	defer func() {
		if failed := recover(); failed != nil {
			log.Error("a pod could not be injected", "namespace", r.Namespace, "panic", failed)
			answer = &response{Status: &refusal{"pillion: the injection failed; its log says more", "InternalError", http.StatusInternalServerError}}
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
		return &response{Status: &refusal{"pillion: the object is no JSON", "BadRequest", http.StatusBadRequest}}
	}
	var changes []yamledit.Change
	for _, o := range objects(tree, nil) {
		o.record = func(path []string, key string) (yamledit.Source, error) {
			holder := tree
			for _, k := range path {
				if list, isList := holder.([]any); isList {
					i, _ := strconv.Atoi(k)
					holder = list[i]
					continue
				}
				holder = yamledit.Get(holder, k)
			}
			text := yamledit.JSON(object{{key, yamledit.Get(holder, key)}})
			return yamledit.Source{Text: text[1 : len(text)-1], Column: -1}, nil
		}
		o.warn = func(format string, arguments ...any) {
			warning := "pillion: " + fmt.Sprintf(format, arguments...)
			answer.Warnings = append(answer.Warnings, strings.ToValidUTF8(warning[:min(len(warning), maxWarning)], ""))
		}
		changed, err := o.inject(options)
		if err != nil {
			log.Warn("a pod is refused", "namespace", options.Namespace, "pod", o.String(), "error", err)
			return &response{Status: &refusal{"pillion: " + err.Error(), "Invalid", http.StatusUnprocessableEntity}}
		}
		log.Info("a pod", "namespace", options.Namespace, "pod", o.String(), "injected", len(changed) > 0)
		changes = append(changes, changed...)
	}
	if len(changes) > 0 {
		answer.PatchType, answer.Patch = "JSONPatch", []byte(yamledit.JSON(yamledit.Patch(changes)))
	}
	return answer
}
