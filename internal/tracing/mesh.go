package tracing

import (
	"iter"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Exporters has an exporter for each receiver that a control plane names. It is safe for concurrent use.
type Exporters struct {
	Transport func(cluster string, http2 bool) http.RoundTripper // to the endpoints of a cluster
	Resource  []export.Resource                                  // attributes of all spans; the service's name may be replaced
	Counts    *export.Counts
	Log       *slog.Logger

	kept atomic.Int64 // calls of Keep: a policy that is older may have got another exporter, or lack one

	mu         sync.Mutex
	byName     map[string]*export.Exporter
	configured map[string]bool // names of receivers: whether spans are sent to them; nil: not known yet
	closed     bool
}

// maxExporters bounds the receivers of a configuration: each of them has a queue, and a goroutine at times. istiod configures one
// or two. Spans for the receivers beyond it are not made.
const maxExporters = 8

// maxGone bounds the exporters for receivers that were configured once, or will be: requests with an older or a newer
// configuration than that of Keep need them.
const maxGone = 64

// Policy returns the policy that a listener configures. Equal configurations are the same value, and so are their policies
// until the next call of Keep.
func (e *Exporters) Policy(t *mesh.Tracing) *Policy {
	kept := e.kept.Load()
	if p, ok := t.Compiled.Load().(*Policy); ok && p.kept == kept {
		return p
	}
	p := &Policy{
		kept:  kept,
		Forms: W3C, Local: t.NoPropagation, MaxPath: int(t.MaxPath), Tags: tagsOf(t.Tags), Exporter: e.exporter(&t.Receiver),
		RequestIDs: &RequestIDs{
			Client: ofTenThousand(t.Client), Random: ofTenThousand(t.Random), Overall: ofTenThousand(t.Overall),
			Ignored: t.IgnoresIDs, Kept: t.KeepsIDs,
		},
	}
	t.Compiled.Store(p)
	return p
}

func ofTenThousand(percent float64) uint32 {
	return uint32(max(0, min(percent, 100))*100 + 0.5)
}

// tagsOf returns tags with the values of this process's variables.
func tagsOf(tags []mesh.TraceTag) (to []Tag) {
	for i := range tags {
		t := &tags[i]
		tag := Tag{Name: t.Name, Value: t.Value, Field: strings.ToLower(t.Field), DryRun: t.DryRun}
		if t.Variable != "" {
			if value, set := os.LookupEnv(t.Variable); set {
				tag.Value = value
			}
		}
		if tag.Name != "" && (tag.Field != "" || tag.DryRun != "" || tag.Value != "") {
			to = append(to, tag)
		}
	}
	return to
}

// exporter returns the exporter for a receiver; nil: there are too many.
func (e *Exporters) exporter(to *mesh.Receiver) *export.Exporter {
	name, cluster, sender := export.To(to, exportMethod, e.Transport)
	e.mu.Lock()
	defer e.mu.Unlock()
	used, known := e.configured[name]
	if known && !used {
		return nil // Keep has logged it
	}
	if made := e.byName[name]; made != nil {
		return made
	}
	if e.closed || !known && len(e.byName) >= maxGone+maxExporters {
		e.Log.Warn("too many receivers of spans", "target", cluster, "limit", maxGone+maxExporters)
		return nil
	}
	resource := e.Resource
	if to.Service != "" {
		resource = export.WithDefaults([]export.Resource{{Name: serviceName, Value: to.Service}}, resource)
	}
	made := newExporter(sender, cluster, resource, e.Counts, e.Log)
	made.Retire(e.gone(name))
	if e.byName == nil {
		e.byName = map[string]*export.Exporter{}
	}
	e.byName[name] = made
	return made
}

// gone reports whether spans are not sent to a receiver any more, by the last call of Keep. e.mu is held.
func (e *Exporters) gone(name string) bool { return e.configured != nil && !e.configured[name] }

// Keep sets the receivers that are configured. The limit is that of one configuration: those that had a place before keep it,
// the others are taken in their order, and the log names those without a place. They get one as soon as it is free. Keep closes
// the connections to receivers that are not configured any more, as soon as what is queued is sent. They are opened again for
// requests that began before, and if the receivers are configured again.
func (e *Exporters) Keep(configured iter.Seq[*mesh.Tracing]) {
	names, clusters := e.names(configured)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	before := e.configured
	e.configured = make(map[string]bool, len(names))
	used := 0
	for _, newcomers := range [...]bool{false, true} {
		for i, name := range names {
			if before[name] == newcomers {
				continue
			}
			fits := used < maxExporters
			if fits {
				used++
			} else if had, known := before[name]; had || !known {
				e.Log.Warn("too many receivers of spans", "target", clusters[i], "limit", maxExporters)
			}
			e.configured[name] = fits
		}
	}
	for name, made := range e.byName {
		gone := e.gone(name)
		if made.Retire(gone); gone && len(e.byName) > maxGone && made.Idle() {
			delete(e.byName, name)
		}
	}
	e.kept.Add(1)
}

// names returns the receivers of a configuration, each once, and their clusters.
func (e *Exporters) names(configured iter.Seq[*mesh.Tracing]) (names, clusters []string) {
	type receiver struct { // a copy of a Tracing shares them
		grpc    *mesh.GRPCService
		http    *mesh.HTTPService
		service string
	}
	seen, known := map[receiver]bool{}, map[string]bool{}
	for t := range configured {
		r := receiver{t.Receiver.GRPC, t.Receiver.HTTP, t.Receiver.Service}
		if seen[r] {
			continue
		}
		seen[r] = true
		if name, cluster, _ := export.To(&t.Receiver, exportMethod, e.Transport); !known[name] {
			known[name] = true
			names, clusters = append(names, name), append(clusters, cluster)
		}
	}
	return names, clusters
}

// All returns the exporters, and prevents that others are made.
func (e *Exporters) All() (all []*export.Exporter) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	for _, made := range e.byName {
		all = append(all, made)
	}
	return all
}
