// Package scrape serves the agent's metrics and the workload's as one exposition.
//
// If a part fails, the scrape still succeeds: pillion_scrape_target_up reports the failure, and each change is logged once.
// The number of concurrent scrapes is bounded, and so are the bytes, samples and duration of each. The workload's series
// cannot replace the agent's. Package promtext describes how parts are merged.
package scrape

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/promtext"
)

const (
	maxScrapes = 2
	maxBytes   = 10 << 20 // of all targets in one scrape, as received and as decompressed
	maxSamples = 100_000  // of all targets in one scrape; parsed, they take about 90 MB

	standardTimeout = 10 * time.Second
	maxTimeout      = time.Minute
	maxMargin       = 500 * time.Millisecond // reserved for sending the answer
	writeTime       = 10 * time.Second       // for the scraper to read the answer
)

// timeoutField is the header field with the scraper's timeout in seconds.
const timeoutField = "X-Prometheus-Scrape-Timeout-Seconds"

// ownLimits apply to the agent's own exposition. Package metrics bounds its size.
var ownLimits = promtext.Limits{Bytes: 100 << 20, Samples: 1_000_000}

// Config is the configuration of a Handler. Own and Log are required.
type Config struct {
	// Own writes the agent's own exposition, in the text format 0.0.4. It is called from several goroutines.
	Own func(io.Writer) error
	// Targets are the places where the workload serves metrics. May be empty.
	Targets []Target
	// Host is the workload's address. Empty: 127.0.0.1, or ::1 if that refuses.
	Host string
	// Dial opens connections to the workload. nil: a net.Dialer does.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	Log  *slog.Logger
}

// NewHandler serves the merged exposition on every path. The format (OpenMetrics or text) and gzip are negotiated. Methods
// other than GET and HEAD are answered 405, and a third concurrent scrape 503.
func NewHandler(config Config) http.Handler {
	if config.Dial == nil {
		config.Dial = new(net.Dialer).DialContext
	}
	return &handler{
		Config: config,
		limits: shareOf(len(config.Targets)),
		slots:  make(chan struct{}, maxScrapes),
		failed: make(map[Target]bool),
		client: newClient(config.Dial),
	}
}

// shareOf returns the limits of each of n targets. The shares are equal, so that the result of a target does not depend on
// which of the others was faster.
func shareOf(targets int) promtext.Limits {
	n := max(1, targets)
	return promtext.Limits{Bytes: maxBytes / n, Samples: maxSamples / n}
}

type handler struct {
	Config
	limits promtext.Limits // for one target
	slots  chan struct{}
	client *http.Client

	mu     sync.Mutex
	failed map[Target]bool // as last logged; the zero Target is the agent's own exposition
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "method not allowed: use GET", http.StatusMethodNotAllowed)
		return
	}
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	default:
		http.Error(w, "too many concurrent scrapes", http.StatusServiceUnavailable)
		return
	}
	format := promtext.Negotiate(strings.Join(r.Header.Values("Accept"), ","))
	zipped := promtext.AcceptsGzip(r.Header.Values("Accept-Encoding"))
	w.Header().Set("Content-Type", format.ContentType())
	w.Header().Set("Vary", "Accept, Accept-Encoding")
	if zipped {
		w.Header().Set("Content-Encoding", "gzip")
	}
	if r.Method == http.MethodHead {
		return
	}
	timeout := timeoutOf(r)
	// The server's own deadline is meant for short answers. A test's recorder does not support deadlines.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(timeout + writeTime))
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	families := h.collect(ctx, r, format)
	if r.Context().Err() != nil {
		return // the scraper has left
	}
	out := io.Writer(w)
	if zipped {
		zip := gzip.NewWriter(w)
		defer zip.Close()
		out = zip
	}
	// An error here means that the scraper has left or reads too slowly.
	_ = promtext.Write(out, format, families)
}

// timeoutOf returns the time for collecting the parts: a little less than the scraper's timeout.
func timeoutOf(r *http.Request) time.Duration {
	timeout := standardTimeout
	if seconds, err := strconv.ParseFloat(r.Header.Get(timeoutField), 64); err == nil && seconds > 0 {
		timeout = time.Duration(math.Min(seconds, maxTimeout.Seconds()) * float64(time.Second))
	}
	return timeout - min(maxMargin, timeout/10)
}

const droppedSeries = "pillion_scrape_dropped_series"

// collect fetches all parts concurrently and merges them with the metrics about the scrape itself.
func (h *handler) collect(ctx context.Context, r *http.Request, format promtext.Format) []promtext.Family {
	parts := make([][]promtext.Family, 2+len(h.Targets))
	errs := make([]error, len(h.Targets))
	var fetching sync.WaitGroup
	for i, target := range h.Targets {
		fetching.Go(func() { parts[2+i], errs[i] = h.fetch(ctx, target, r.Header, format) })
	}
	var err error
	parts[1], err = h.own()
	h.note(Target{}, err)
	fetching.Wait()

	up := promtext.Family{Name: "pillion_scrape_target_up", Type: promtext.Gauge,
		Help: "1 if this scrape of the workload succeeded."}
	for i, target := range h.Targets {
		if r.Context().Err() == nil { // otherwise the scraper may have caused the error by leaving
			h.note(target, errs[i])
		}
		value := "1"
		if errs[i] != nil {
			value = "0"
		}
		up.Samples = append(up.Samples, promtext.Sample{Name: up.Name, Value: value, Labels: []promtext.Label{
			{Name: "port", Value: strconv.Itoa(int(target.Port))}, {Name: "path", Value: target.Path},
		}})
	}
	parts[0] = []promtext.Family{up, {Name: droppedSeries, Type: promtext.Gauge,
		Help:    "Series of the workload dropped from this scrape because of a conflict with other series.",
		Samples: []promtext.Sample{{Name: droppedSeries, Value: "0"}}}}
	families, dropped := promtext.Merge(format, parts...)
	for _, family := range families {
		if family.Name == droppedSeries {
			family.Samples[0].Value = strconv.Itoa(dropped)
		}
	}
	return families
}

func (h *handler) own() ([]promtext.Family, error) {
	var exposition bytes.Buffer
	if err := h.Own(&exposition); err != nil {
		return nil, err
	}
	return promtext.Parse(&exposition, promtext.Text, ownLimits)
}

// note logs when a part begins to fail, and when it works again.
func (h *handler) note(target Target, err error) {
	h.mu.Lock()
	changed := h.failed[target] != (err != nil)
	h.failed[target] = err != nil
	h.mu.Unlock()
	switch {
	case !changed:
	case target == Target{} && err != nil:
		h.Log.Error("gathering the agent's metrics failed", "error", err)
	case target == Target{}:
		h.Log.Info("gathering the agent's metrics works again")
	case err != nil:
		h.Log.Warn("scraping the workload failed", "port", target.Port, "path", target.Path, "error", err)
	default:
		h.Log.Info("scraping the workload works again", "port", target.Port, "path", target.Path)
	}
}
