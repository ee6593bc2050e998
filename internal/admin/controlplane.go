package admin

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/configdump"
)

// ControlPlane returns the configuration of a control plane. Its methods are called from any goroutine. The values that they
// return are not changed afterwards.
type ControlPlane interface {
	// Resources returns all resources, those of each type in the order of their names. Their Bytes are called once in a
	// dump that shows them.
	Resources() iter.Seq[configdump.Resource]

	// Clusters returns the clusters in force with their hosts.
	Clusters() iter.Seq[Cluster]

	// Identity returns the workload's certificate and its roots of trust; nil: it has not been issued yet.
	Identity() *Identity
}

// Cluster is a cluster of the control plane with the hosts that it has now.
type Cluster struct {
	Name   string
	Limits Limits
	Hosts  []Host
}

// Limits are what a cluster carries at a time: connections, requests that wait for one, requests, and retries.
type Limits [4]uint32

// Host is one host of a cluster.
type Host struct {
	Address               string // IP address or name
	Port                  uint16
	Weight, Priority      uint32
	Health                string // as in envoy.config.core.v3.HealthStatus, such as "HEALTHY"
	Ejected               bool   // by outlier detection
	Region, Zone, SubZone string
	Use                   *Use // nil: no request has been sent to the host
}

// Use is what a host has been used for. Connections that are not HTTP count as requests.
type Use struct {
	Active, Total, Successes, Errors uint64
	Connections                      uint64 // open, to the host's address
	ConnectFailures                  uint64 // among Errors
}

// Identity is the workload's certificate and the roots that peers are verified with.
type Identity struct {
	Chain []*x509.Certificate // leaf first
	Roots []byte              // as PEM
	Since time.Time           // when it was received
}

// The types of resources that Envoy shows.
const (
	typePrefix     = "type.googleapis.com/"
	clusterType    = "envoy.config.cluster.v3.Cluster"
	assignmentType = "envoy.config.endpoint.v3.ClusterLoadAssignment"
	listenerType   = "envoy.config.listener.v3.Listener"
	routesType     = "envoy.config.route.v3.RouteConfiguration"
	secretType     = "envoy.extensions.transport_sockets.tls.v3.Secret"
	extensionType  = "envoy.config.core.v3.TypedExtensionConfig"
)

// dump makes the sections of a config dump.
type dump struct {
	*handler
	types     *configdump.Types // nil without a control plane
	resources []configdump.Resource
	text      []byte // memory for printing
}

func (h *handler) newDump(ctx context.Context) (*dump, error) {
	d := &dump{handler: h}
	if h.ControlPlane == nil {
		return d, nil
	}
	var err error
	if d.types, err = configdump.Load(); err != nil {
		return nil, err
	}
	d.resources = slices.Collect(h.ControlPlane.Resources())
	return d, ctx.Err()
}

// of returns the resources of a type that are wanted.
func (d *dump) of(name string, wanted func(*configdump.Resource) bool) iter.Seq[*configdump.Resource] {
	return func(yield func(*configdump.Resource) bool) {
		for i := range d.resources {
			if r := &d.resources[i]; r.TypeURL == typePrefix+name && wanted(r) && !yield(r) {
				return
			}
		}
	}
}

func active(r *configdump.Resource) bool  { return r.Bytes != nil && !r.Warming }
func warming(r *configdump.Resource) bool { return !active(r) }

// known has resources in force, and those of which every version was refused.
func known(r *configdump.Resource) bool { return !r.Warming }

// static returns the list of the agent's own resources of a type. A resource of the control plane replaces the agent's own
// of the same name, as it does where connections are treated.
func (d *dump) static(name, message, field, kind string, resources []object) resourceList {
	replaced := make(map[string]bool)
	for r := range d.of(kind, active) {
		replaced[r.Name] = true
	}
	return resourceList{name, message, func(yield func(item) bool) {
		for _, resource := range resources {
			name, ok := resource["name"].(string)
			if !ok {
				name, _ = resource["cluster_name"].(string)
			}
			value := func() object {
				o := object{field: typed(kind, resource)}
				if kind != assignmentType { // connections come and go
					o["last_updated"] = d.updated()
				}
				return o
			}
			if !replaced[name] && !yield(item{name, value}) {
				return
			}
		}
	}}
}

// dynamic adds lists of the control plane's resources, if there is a control plane. Their names precede those of static lists.
func (d *dump) dynamic(s section, lists ...resourceList) section {
	if d.types == nil {
		return s
	}
	s.lists = append(lists, s.lists...)
	return s
}

func (d *dump) clusters() section {
	const static, dynamic = "envoy.admin.v3.ClustersConfigDump.StaticCluster", "envoy.admin.v3.ClustersConfigDump.DynamicCluster"
	return d.dynamic(section{message: "envoy.admin.v3.ClustersConfigDump",
		lists: []resourceList{d.static("static_clusters", static, "cluster", clusterType, d.staticClusters())}},
		resourceList{"dynamic_active_clusters", dynamic, d.items(clusterType, "cluster", active)},
		resourceList{"dynamic_warming_clusters", dynamic, d.items(clusterType, "cluster", warming)})
}

func (d *dump) endpoints() section {
	const static, dynamic = "envoy.admin.v3.EndpointsConfigDump.StaticEndpointConfig", "envoy.admin.v3.EndpointsConfigDump.DynamicEndpointConfig"
	own := d.static("static_endpoint_configs", static, "endpoint_config", assignmentType, d.staticEndpoints())
	return d.dynamic(section{message: "envoy.admin.v3.EndpointsConfigDump", lists: []resourceList{own}},
		resourceList{"dynamic_endpoint_configs", dynamic, d.items(assignmentType, "endpoint_config", known)})
}

func (d *dump) routes() section {
	const static, dynamic = "envoy.admin.v3.RoutesConfigDump.StaticRouteConfig", "envoy.admin.v3.RoutesConfigDump.DynamicRouteConfig"
	own := d.static("static_route_configs", static, "route_config", routesType, d.routesInForce())
	return d.dynamic(section{message: "envoy.admin.v3.RoutesConfigDump", lists: []resourceList{own}},
		resourceList{"dynamic_route_configs", dynamic, d.items(routesType, "route_config", known)})
}

// routesInForce returns the agent's own routes, without those of listeners that the control plane's replace.
func (d *dump) routesInForce() []object {
	replaced := make(map[string]bool)
	for r := range d.of(listenerType, active) {
		replaced[r.Name] = true
	}
	return d.staticRoutes(func(l Listener) bool { return !replaced[l.Name] })
}

func (d *dump) extensions() section {
	return d.dynamic(section{message: "envoy.admin.v3.EcdsConfigDump"},
		resourceList{"ecds_filters", "envoy.admin.v3.EcdsConfigDump.EcdsFilterConfig", d.items(extensionType, "ecds_filter", known)})
}

func (d *dump) listeners() section {
	const static, dynamic = "envoy.admin.v3.ListenersConfigDump.StaticListener", "envoy.admin.v3.ListenersConfigDump.DynamicListener"
	return d.dynamic(section{message: "envoy.admin.v3.ListenersConfigDump",
		lists: []resourceList{d.static("static_listeners", static, "listener", listenerType, d.staticListeners())}},
		resourceList{"dynamic_listeners", dynamic, d.listenerItems()})
}

// listenerItems returns the listeners. One of which a version is in force and another one waits has both.
func (d *dump) listenerItems() iter.Seq[item] {
	return func(yield func(item) bool) {
		all := slices.Collect(d.of(listenerType, func(*configdump.Resource) bool { return true }))
		for len(all) > 0 {
			n := 1
			for n < len(all) && all[n].Name == all[0].Name {
				n++
			}
			versions := all[:n]
			all = all[n:]
			value := func() object {
				d.begin()
				o := object{"name": versions[0].Name}
				for _, r := range versions {
					d.addListener(o, r)
				}
				return o
			}
			if !yield(item{versions[0].Name, value}) {
				return
			}
		}
	}
}

// addListener adds the states of a listener to an item.
func (d *dump) addListener(o object, r *configdump.Resource) {
	if r.Bytes != nil {
		state := version(r)
		state["listener"] = d.print(r.TypeURL, r.Bytes)
		if r.Warming {
			o["warming_state"] = state
		} else {
			o["active_state"] = state
		}
	}
	if r.Refusal != nil {
		o["error_state"] = d.refusal(r)
	}
}

// items returns the resources of a type, each in the field of an item.
func (d *dump) items(kind, field string, wanted func(*configdump.Resource) bool) iter.Seq[item] {
	return d.each(kind, wanted, func(r *configdump.Resource) object {
		o := version(r)
		switch {
		case r.Bytes != nil:
			o[field] = d.print(r.TypeURL, r.Bytes)
		case kind == assignmentType:
			o[field] = typed(kind, object{"cluster_name": r.Name})
		default: // istioctl requires a resource
			o[field] = typed(kind, object{"name": r.Name})
		}
		if r.Refusal != nil && kind != extensionType { // their message has it as well, but newer than istioctl's
			o["error_state"] = d.refusal(r)
		}
		return o
	})
}

// version returns what an item has of the version in force, besides the resource.
func version(r *configdump.Resource) object {
	if r.Bytes == nil {
		return object{}
	}
	return object{"version_info": r.Version, "last_updated": timestamp(r.Updated)}
}

func (d *dump) each(kind string, wanted func(*configdump.Resource) bool, show func(*configdump.Resource) object) iter.Seq[item] {
	return func(yield func(item) bool) {
		for r := range d.of(kind, wanted) {
			if !yield(item{r.Name, func() object { d.begin(); return show(r) }}) {
				return
			}
		}
	}
}

func (d *dump) secrets() section {
	const message = "envoy.admin.v3.SecretsConfigDump.DynamicSecret"
	if d.types == nil {
		return section{message: "envoy.admin.v3.SecretsConfigDump"}
	}
	identity := d.ControlPlane.Identity()
	own := func(wanted bool, more iter.Seq[item]) iter.Seq[item] {
		return func(yield func(item) bool) {
			if wanted && (!yield(item{"default", func() object { return identity.secret("default") }}) ||
				!yield(item{"ROOTCA", func() object { return identity.secret("ROOTCA") }})) {
				return
			}
			more(yield)
		}
	}
	return d.dynamic(section{message: "envoy.admin.v3.SecretsConfigDump"},
		resourceList{"dynamic_active_secrets", message, own(identity != nil, d.each(secretType, active, d.secret))},
		resourceList{"dynamic_warming_secrets", message, own(identity == nil, d.each(secretType, warming, d.secret))})
}

func (d *dump) secret(r *configdump.Resource) object {
	o := version(r)
	o["name"] = r.Name
	if r.Bytes != nil {
		o["secret"] = d.print(r.TypeURL, r.Bytes)
	} else {
		o["version_info"], o["secret"] = uninitialized, typed(secretType, object{"name": r.Name})
	}
	if r.Refusal != nil {
		o["error_state"] = d.refusal(r)
	}
	return o
}

// uninitialized is the version of a secret that has not come yet.
const uninitialized = "uninitialized"

// secret returns one of the two secrets that Envoy has from its agent. A nil identity has not come yet.
func (i *Identity) secret(name string) object {
	o := object{"name": name, "version_info": uninitialized, "secret": typed(secretType, object{"name": name})}
	if i == nil {
		return o
	}
	o["version_info"], o["last_updated"] = timestamp(i.Since), timestamp(i.Since)
	inline := func(b []byte) object { return object{"inline_bytes": base64.StdEncoding.EncodeToString(b)} }
	kind := object{"validation_context": object{"trusted_ca": inline(i.Roots)}}
	if name == "default" {
		var chain []byte
		for _, certificate := range i.Chain {
			chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw})...)
		}
		kind = object{"tls_certificate": object{"certificate_chain": inline(chain), "private_key": inline([]byte("[redacted]"))}}
	}
	kind["name"] = name
	o["secret"] = typed(secretType, kind)
	return o
}

// refusal describes the version of a resource that was refused.
func (d *dump) refusal(r *configdump.Resource) object {
	o := object{"details": r.Refusal.Reason, "last_update_attempt": timestamp(r.Refusal.At)}
	if r.Refusal.Bytes != nil {
		o["failed_configuration"] = d.print(r.TypeURL, r.Refusal.Bytes)
	}
	return o
}

// print returns a resource as JSON. The result is valid until a later item is printed.
func (d *dump) print(url string, read func() ([]byte, error)) any {
	b, err := read()
	if err != nil {
		d.Log.Warn("cannot read a kept resource", "type", url, "err", err)
		return object{"@type": url}
	}
	start := len(d.text)
	d.text, _ = d.types.Append(d.text, url, b) // a malformed resource is shown as such
	return json.RawMessage(d.text[start:])
}

// maxReused bounds the memory that is kept for printing.
const maxReused = 1 << 20

// begin lets print use the memory of earlier results again.
func (d *dump) begin() {
	if d.text = d.text[:0]; cap(d.text) > maxReused {
		d.text = nil
	}
}

func timestamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// warmingTargets returns the resources that wait for others, by type.
func warmingTargets(resources iter.Seq[configdump.Resource]) (dumps []object) {
	waiting := make(map[string][]string)
	for r := range resources {
		if r.Warming {
			waiting[r.TypeURL] = append(waiting[r.TypeURL], r.Name)
		}
	}
	for _, url := range slices.Sorted(maps.Keys(waiting)) {
		dumps = append(dumps, object{"name": strings.TrimPrefix(url, typePrefix), "target_names": waiting[url]})
	}
	return dumps
}
