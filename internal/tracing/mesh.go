package tracing

import (
	"iter"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Exporters has an exporter for each receiver that a control plane names. It is safe for concurrent use.
type Exporters struct {
	Transport func(cluster string, http2 bool) http.RoundTripper // to the endpoints of a cluster
	Resource  []export.Resource                                  // attributes of all spans; the service's name may be replaced
	Counts    *export.Counts
	Log       *slog.Logger

	mu     sync.Mutex
	byName map[string]*export.Exporter
	kept   map[string]bool // what is configured, by the keys of byName; nil: not known yet
	closed bool
}

// maxExporters bounds the exporters, each of which has a goroutine and a queue. istiod configures one or two. Spans for other
// receivers are counted as failed.
const maxExporters = 8

// maxGone bounds the exporters for receivers that were configured once: requests that began then may still be exported.
const maxGone = 64

// Policy returns the policy that a listener configures. Equal configurations are the same value, and so are their policies.
func (e *Exporters) Policy(t *mesh.Tracing) *Policy {
	if p, ok := t.Compiled.Load().(*Policy); ok {
		return p
	}
	p := &Policy{
		Forms: W3C, Local: t.NoPropagation, MaxPath: int(t.MaxPath), Tags: tagsOf(t.Tags), Exporter: e.exporter(&t.Receiver),
		RequestIDs: &RequestIDs{
			Client: ofTenThousand(t.Client), Random: ofTenThousand(t.Random), Overall: ofTenThousand(t.Overall),
			Ignored: t.IgnoresIDs, Kept: t.KeepsIDs,
		},
	}
	if !t.Compiled.CompareAndSwap(nil, p) {
		return t.Compiled.Load().(*Policy)
	}
	return p
}

func ofTenThousand(percent float64) uint32 {
	return uint32(max(0, min(percent, 100))*100 + 0.5)
}

// tagsOf returns tags with the values of this process's variables.
func tagsOf(tags []mesh.TraceTag) (to []Tag) {
	for i := range tags {
		t := &tags[i]
		tag := Tag{Name: t.Name, Value: t.Value, Field: strings.ToLower(t.Field)}
		if t.Variable != "" {
			if value, set := os.LookupEnv(t.Variable); set {
				tag.Value = value
			}
		}
		if tag.Name != "" && (tag.Field != "" || tag.Value != "") {
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
	if known := e.byName[name]; known != nil {
		return known
	}
	if e.closed || e.crowded() {
		e.Log.Warn("too many receivers of spans", "target", cluster, "limit", maxExporters)
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

// gone reports whether a receiver is not configured any more. e.mu is held.
func (e *Exporters) gone(name string) bool { return e.kept != nil && !e.kept[name] }

// crowded reports whether there are too many exporters for another one. e.mu is held.
func (e *Exporters) crowded() bool {
	n := 0
	for name := range e.byName {
		if !e.gone(name) {
			n++
		}
	}
	return n >= maxExporters
}

// Keep closes the connections to receivers that are not configured any more, as soon as what is queued is sent. They are opened
// again for requests that began before, and if the receivers are configured again.
func (e *Exporters) Keep(configured iter.Seq[*mesh.Tracing]) {
	type receiver struct { // a copy of a Tracing shares them
		grpc    *mesh.GRPCService
		http    *mesh.HTTPService
		service string
	}
	kept, seen := map[string]bool{}, map[receiver]bool{}
	for t := range configured {
		r := receiver{t.Receiver.GRPC, t.Receiver.HTTP, t.Receiver.Service}
		if !seen[r] {
			seen[r] = true
			name, _, _ := export.To(&t.Receiver, exportMethod, e.Transport)
			kept[name] = true
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	e.kept = kept
	for name, made := range e.byName {
		gone := e.gone(name)
		if made.Retire(gone); gone && len(e.byName) > maxGone && made.Idle() {
			delete(e.byName, name)
		}
	}
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
