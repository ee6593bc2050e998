// Package scrape answers Prometheus with the agent's own exposition and the workload's as one.
//
// A part that fails never fails the scrape: the answer says so in pillion_scrape_target_up, and the log once for each
// change. Everything is bounded: the scrapes at a time, the bytes and samples of all parts of one, and its time. What the
// workload says can never take the place of what the agent says. Package promtext describes how the parts are merged.
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
	maxBytes   = 10 << 20 // of all targets' expositions in one scrape, as they come and as they are without gzip
	maxSamples = 100_000  // of all targets in one scrape: parsed, they take about 90 MB

	standardTimeout = 10 * time.Second
	maxTimeout      = time.Minute
	maxMargin       = 500 * time.Millisecond // kept for the way back to the scraper
	writeTime       = 10 * time.Second       // for a scraper to read the answer
)

// timeoutField is the header field with the timeout of the scraper, in seconds.
const timeoutField = "X-Prometheus-Scrape-Timeout-Seconds"

// ownLimits are for the agent's own exposition, which grows with the traffic and not with a stranger's wish.
var ownLimits = promtext.Limits{Bytes: 100 << 20, Samples: 1_000_000}

// Config is the configuration of a Handler. Own and Log are required.
type Config struct {
	// Own writes the agent's own exposition, in the text format 0.0.4. It is called from several goroutines.
	Own func(io.Writer) error
	// Targets are where the workload serves metrics. There may be none.
	Targets []Target
	// Host is the workload's address. Empty means 127.0.0.1, and ::1 where that refuses.
	Host string
	// Dial opens connections to the workload; nil means those of a net.Dialer.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	Log  *slog.Logger
}

// NewHandler serves merged expositions on whatever path it is put. The answer is OpenMetrics or text, as asked for, and
// gzip when asked for. Methods other than GET and HEAD are 405, more than two at a time 503.
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

// shareOf are the limits of each of so many targets. The parts are equal, so that a target's fate does not hang on which
// of the others was faster.
func shareOf(targets int) promtext.Limits {
	n := max(1, targets)
	return promtext.Limits{Bytes: maxBytes / n, Samples: maxSamples / n}
}

type handler struct {
	Config
	limits promtext.Limits // of one target
	slots  chan struct{}
	client *http.Client

	mu     sync.Mutex
	failed map[Target]bool // as last logged; the zero Target is the own exposition
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "a scrape is a GET", http.StatusMethodNotAllowed)
		return
	}
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	default:
		http.Error(w, "too many scrapes at a time", http.StatusServiceUnavailable)
		return
	}
	format := promtext.Negotiate(strings.Join(r.Header.Values("Accept"), ","))
	zipped := acceptsGzip(r.Header.Values("Accept-Encoding"))
	w.Header().Set("Content-Type", format.ContentType())
	w.Header().Set("Vary", "Accept, Accept-Encoding")
	if zipped {
		w.Header().Set("Content-Encoding", "gzip")
	}
	if r.Method == http.MethodHead {
		return
	}
	timeout := timeoutOf(r)
	// The server's own deadline is for short answers. A recorder in a test has none.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(timeout + writeTime))
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	families := h.collect(ctx, r, format)
	if r.Context().Err() != nil {
		return // the scraper has gone
	}
	out := io.Writer(w)
	if zipped {
		zip := gzip.NewWriter(w)
		defer zip.Close()
		out = zip
	}
	// An error is the scraper's: it has gone, or reads too slowly.
	_ = promtext.Write(out, format, families)
}

// timeoutOf is how long the parts may take: a little less than the scraper waits.
func timeoutOf(r *http.Request) time.Duration {
	timeout := standardTimeout
	if seconds, err := strconv.ParseFloat(r.Header.Get(timeoutField), 64); err == nil && seconds > 0 {
		timeout = time.Duration(math.Min(seconds, maxTimeout.Seconds()) * float64(time.Second))
	}
	return timeout - min(maxMargin, timeout/10)
}

func acceptsGzip(fields []string) bool {
	for coding := range strings.SplitSeq(strings.Join(fields, ","), ",") {
		name, weight, _ := strings.Cut(coding, ";")
		if strings.EqualFold(strings.TrimSpace(name), "gzip") {
			_, q, weighted := strings.Cut(weight, "=")
			number, err := strconv.ParseFloat(strings.TrimSpace(q), 64)
			return !weighted || err == nil && number > 0
		}
	}
	return false
}

const droppedSeries = "pillion_scrape_dropped_series"

// collect fetches all parts at the same time, and merges them with the report on how that went.
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
		Help: "Whether this scrape of the workload gave metrics (1) or not (0)."}
	for i, target := range h.Targets {
		if r.Context().Err() == nil { // else it may have been the scraper who gave up
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
		Help:    "Series of the workload that this scrape left out, because they clash with others.",
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

// note logs when a part fails that did not fail before, or the other way round.
func (h *handler) note(target Target, err error) {
	h.mu.Lock()
	changed := h.failed[target] != (err != nil)
	h.failed[target] = err != nil
	h.mu.Unlock()
	switch {
	case !changed:
	case target == Target{} && err != nil:
		h.Log.Error("own metrics cannot be served", "error", err)
	case target == Target{}:
		h.Log.Info("own metrics are served again")
	case err != nil:
		h.Log.Warn("workload's metrics cannot be scraped", "port", target.Port, "path", target.Path, "error", err)
	default:
		h.Log.Info("workload's metrics are scraped again", "port", target.Port, "path", target.Path)
	}
}
