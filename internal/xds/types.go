package xds

import "fmt"

// Type is a type of resource that the control plane serves.
type Type uint8

// The types, in the order in which they are asked for: a cluster comes before the route that names it, so that a change
// is made before what it replaces is broken.
const (
	Clusters Type = iota
	Endpoints
	Listeners
	Routes
	Secrets
	Extensions
	Names        // istiod's table of names for DNS
	ProxyConfigs // istiod's roots of trust

	Types = iota // their number
)

// types describes each Type. A wildcard type is served whole; the others by the names that are asked for.
var types = [Types]struct {
	short, url string
	wildcard   bool
}{
	Clusters:     {"CDS", urlPrefix + "envoy.config.cluster.v3.Cluster", true},
	Endpoints:    {"EDS", urlPrefix + "envoy.config.endpoint.v3.ClusterLoadAssignment", false},
	Listeners:    {"LDS", urlPrefix + "envoy.config.listener.v3.Listener", true},
	Routes:       {"RDS", urlPrefix + "envoy.config.route.v3.RouteConfiguration", false},
	Secrets:      {"SDS", urlPrefix + "envoy.extensions.transport_sockets.tls.v3.Secret", false},
	Extensions:   {"ECDS", urlPrefix + "envoy.config.core.v3.TypedExtensionConfig", false},
	Names:        {"NDS", urlPrefix + "istio.networking.nds.v1.NameTable", true},
	ProxyConfigs: {"PCDS", urlPrefix + "istio.mesh.v1alpha1.ProxyConfig", true},
}

const urlPrefix = "type.googleapis.com/"

// String returns the name that people use, such as "CDS".
func (t Type) String() string { return types[t].short }

// URL returns the type URL, such as "type.googleapis.com/envoy.config.cluster.v3.Cluster".
func (t Type) URL() string { return types[t].url }

// Wildcard reports whether all resources of the type are served, instead of those with given names.
func (t Type) Wildcard() bool { return types[t].wildcard }

// singleton reports whether the type has one resource, without a name.
func (t Type) singleton() bool { return t == Names || t == ProxyConfigs }

func parseType(url string) (Type, error) {
	for t := range Type(Types) {
		if url == t.URL() {
			return t, nil
		}
	}
	return 0, fmt.Errorf("resources of unknown type %.200q", url)
}
