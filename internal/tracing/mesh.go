package tracing

import (
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Exporters has an exporter for each receiver that a control plane names. It is safe for concurrent use.
type Exporters struct {
	Transport func(cluster string, http2 bool) http.RoundTripper // to the endpoints of a cluster
	Resource  []Resource                                         // attributes of all spans; the service's name may be replaced
	Counts    *Counts
	Log       *slog.Logger

	mu     sync.Mutex
	byName map[string]*Exporter
	closed bool
}

// maxExporters bounds the exporters, each of which has a goroutine and a queue. istiod configures one or two. Spans for other
// receivers are counted as failed.
const maxExporters = 8

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
func (e *Exporters) exporter(to *mesh.TraceReceiver) *Exporter {
	name, cluster, sender := e.sender(to)
	e.mu.Lock()
	defer e.mu.Unlock()
	if known := e.byName[name]; known != nil {
		return known
	}
	if e.closed || len(e.byName) >= maxExporters {
		e.Log.Warn("too many receivers of spans", "target", cluster, "limit", maxExporters)
		return nil
	}
	resource := e.Resource
	if to.Service != "" {
		resource = WithDefaults([]Resource{{serviceName, to.Service}}, resource)
	}
	made := NewExporter(ExporterConfig{Sender: sender, Target: cluster, Resource: resource, Counts: e.Counts, Log: e.Log})
	if e.byName == nil {
		e.byName = map[string]*Exporter{}
	}
	e.byName[name] = made
	return made
}

// sender returns a sender, its cluster, and a name that differs if anything about it does. The name may have secrets.
func (e *Exporters) sender(to *mesh.TraceReceiver) (name, cluster string, s Sender) {
	if g := to.GRPC; g != nil {
		base := url.URL{Scheme: "http", Host: g.Authority}
		if base.Host == "" {
			base.Host = g.Cluster
		}
		header, text := headerOf(g.Metadata)
		return strings.Join([]string{g.Cluster, "grpc", base.Host, to.Service, text}, " "), g.Cluster,
			NewGRPCSender(e.Transport(g.Cluster, true), base, header, timeoutOf(g.Timeout))
	}
	h := to.HTTP
	header, text := headerOf(to.Header)
	host, path := splitURI(h.URI)
	return strings.Join([]string{h.Cluster, host + path, to.Service, text}, " "), h.Cluster, &HTTPSender{
		Transport: e.Transport(h.Cluster, false), URL: url.URL{Scheme: "http", Host: host, Path: path}, Header: header, Timeout: timeoutOf(h.Timeout),
	}
}

// splitURI splits a URI that may lack its scheme, as istiod's do.
func splitURI(uri string) (host, path string) {
	if _, rest, found := strings.Cut(uri, "://"); found {
		uri = rest
	}
	host, path, _ = strings.Cut(uri, "/")
	return host, "/" + path
}

func headerOf(values []mesh.NamedValue) (h http.Header, text string) {
	h = make(http.Header, len(values))
	for _, v := range values {
		h.Add(v.Name, v.Value)
		text += v.Name + "=" + v.Value + "\n"
	}
	return h, text
}

func timeoutOf(d time.Duration) time.Duration {
	if d <= 0 {
		return defaultTimeout
	}
	return d
}

// All returns the exporters, and prevents that others are made.
func (e *Exporters) All() (all []*Exporter) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	for _, made := range e.byName {
		all = append(all, made)
	}
	return all
}
