package export

import (
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// Resource is an attribute of the process.
type Resource struct{ Name, Value string }

// WithDefaults adds the attributes whose names are not in resource. Those without a value are left out.
func WithDefaults(resource, defaults []Resource) []Resource {
	for _, d := range defaults {
		if d.Value != "" && !slices.ContainsFunc(resource, func(r Resource) bool { return r.Name == d.Name }) {
			resource = append(resource, d)
		}
	}
	return resource
}

// OTLPItem is the number of an item in the innermost message of OTLP.
const OTLPItem = 2

// OTLP returns the messages around the items of OTLP: ResourceSpans and ScopeSpans, and ResourceLogs and ScopeLogs have the
// same numbers. more are encoded attributes of the resource, each a field of the number 1.
func OTLP(resource []Resource, more []byte) []Level {
	var attributes []byte
	for _, a := range resource {
		value := wire.AppendString(nil, 1, a.Value)
		attributes = wire.AppendBytes(attributes, 1, wire.AppendBytes(wire.AppendString(nil, 1, a.Name), 2, value))
	}
	scope := wire.AppendString(nil, 1, "pillion")
	return []Level{{1, wire.AppendBytes(nil, 1, append(attributes, more...))}, {2, wire.AppendBytes(nil, 1, scope)}}
}

// To returns a sender to a receiver that a control plane names, its cluster, and a name that differs if anything about it
// does. The name may have secrets. method is that of gRPC. transport returns what sends requests to the endpoints of a cluster.
func To(to *mesh.Receiver, method string, transport func(cluster string, http2 bool) http.RoundTripper) (name, cluster string, s Sender) {
	if g := to.GRPC; g != nil {
		base := url.URL{Scheme: "http", Host: g.Authority}
		if base.Host == "" {
			base.Host = g.Cluster
		}
		header, text := headerOf(g.Metadata)
		timeout := DefaultTimeout
		if g.Timeout > 0 {
			timeout = g.Timeout
		}
		return strings.Join([]string{g.Cluster, method, base.Host, to.Service, timeout.String(), text}, " "), g.Cluster,
			NewGRPCSender(transport(g.Cluster, true), base, header, method, timeout)
	}
	h := to.HTTP
	header, text := headerOf(to.Header)
	host, path := splitURI(h.URI)
	timeout := DefaultTimeout
	if h.Timeout > 0 {
		timeout = h.Timeout
	}
	return strings.Join([]string{h.Cluster, host + path, to.Service, timeout.String(), text}, " "), h.Cluster, &HTTPSender{
		Transport: transport(h.Cluster, false), URL: url.URL{Scheme: "http", Host: host, Path: path}, Header: header, Timeout: timeout,
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
