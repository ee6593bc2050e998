package metrics

import (
	"bytes"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	dto "github.com/prometheus/client_model/go"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

// The bounds, for each direction.
//
// Anybody can write anything into a Host field. So only the host of a request that upstream answered below 400 gets a
// place among maxServices: whoever tries names that nobody serves takes no place from those that are served. All others
// are counted under the host "unknown". Where upstream answers every name, the first ones have the places.
//
// Only upstream can make many status codes, but what a downstream asks of it may decide that. When there are maxSets
// combinations, each of which is 67 lines of exposition, further ones are counted under the host "unknown", no flags, the
// first code of their class, and gRPC's errors as 2, so that rates of errors stay right.
const (
	maxServices = 100
	maxSets     = 500
)

// direction holds the counters of one direction. A series whose labels come from traffic is created when it is first needed
// and stays.
type direction struct {
	reporter, security string
	cluster            string // Envoy's name of the cluster of all traffic
	pod                *podinfo.Pod

	ends        map[flow.Reason]*end // one for each of flow.Explanations; immutable after init
	tcp         []*tcpSet            // each once, in the order of flow.Explanations; immutable after init
	connections [len(protocols)]atomic.Uint64
	upstream    [6]atomic.Uint64 // requests that had an upstream connection, by status class
	unnamed     atomic.Uint64    // requests whose host has no place
	folded      atomic.Uint64    // requests whose combination has no place

	mu       sync.RWMutex // over what follows
	services map[string]*service
	sets     map[setKey]*requestSet
	inTurn   []*requestSet
	unknown  *service // without a host, or whose host has no place
}

// service is what is known of where a request or connection went: the labels that it gives to all series.
type service struct {
	host             string // as the header has it, in lower case; empty for none
	labels           []*dto.LabelPair
	grpc             atomic.Bool
	requestMessages  atomic.Uint64
	responseMessages atomic.Uint64
}

type setKey struct {
	service    *service
	status     int
	grpcStatus int
	flags      string
}

// requestSet holds the counters of requests with the same labels. The number of requests is that of the observed durations.
type requestSet struct {
	setKey
	labels                   []*dto.LabelPair
	duration, received, sent histogram
}

// end holds the counters of flows that ended with one reason.
type end struct {
	flows atomic.Uint64
	tcp   *tcpSet // for connections; shared by reasons with the same flags
}

// tcpSet holds the counters of opaque connections with the same labels.
type tcpSet struct {
	labels                         []*dto.LabelPair
	opened, closed, received, sent atomic.Uint64
}

func (d *direction) init(direction flow.Direction, pod *podinfo.Pod) {
	d.reporter, d.security, d.cluster = "destination", "none", direction.Passthrough()
	if direction == flow.Outbound {
		d.reporter, d.security = "source", podinfo.Unknown
	}
	d.pod = pod
	d.services = make(map[string]*service)
	d.sets = make(map[setKey]*requestSet)
	d.unknown = d.newService("")
	loop := d.serviceLabels(podinfo.Unknown, envoy.BlackHoleCluster, podinfo.Unknown)
	d.ends = make(map[flow.Reason]*end)
	sets := make(map[string]*tcpSet)
	for _, e := range flow.Explanations {
		place, of := e.Flags, d.unknown.labels
		if e.Reason == flow.Loop {
			place, of = "loop", loop
		}
		set := sets[place]
		if set == nil {
			set = &tcpSet{labels: append(of[:len(of):len(of)],
				label("request_protocol", "tcp"),
				label("response_flags", orDash(e.Flags)),
				label("connection_security_policy", d.security))}
			sets[place] = set
			d.tcp = append(d.tcp, set)
		}
		d.ends[e.Reason] = &end{tcp: set}
	}
}

// end returns the counters of a reason. An unknown reason counts as flow.Closed, so that it cannot crash the agent; tests
// of package flow ensure that all reasons have an explanation.
func (d *direction) end(reason flow.Reason) *end {
	if e := d.ends[reason]; e != nil {
		return e
	}
	return d.ends[flow.Closed]
}

// requestSet finds or makes the set of a request. named is false when another request of the same kind may find another
// set, because the host or the combination had no place.
func (d *direction) requestSet(r *flow.Record) (set *requestSet, named bool) {
	of, named := d.service(r)
	key := setKey{of, r.HTTP.Status, notGRPC, orDash(r.Flags())}
	if statusClass(key.status) == 0 {
		key.status = 0
	}
	if r.HTTP.GRPC {
		key.grpcStatus = grpcStatus(r.HTTP.GRPCStatus)
	}
	d.mu.RLock()
	set = d.sets[key]
	d.mu.RUnlock()
	if set != nil {
		return set, named
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if set = d.sets[key]; set != nil {
		return set, named
	}
	if len(d.sets) >= maxSets {
		d.folded.Add(1)
		key.service, key.status, key.flags, named = d.unknown, statusClass(key.status)*100, "-", false
		if key.grpcStatus != int(envoy.GRPCOK) && key.grpcStatus < noGRPCStatus {
			key.grpcStatus = int(envoy.GRPCUnknown)
		}
		if set = d.sets[key]; set != nil {
			return set, false
		}
	}
	set = d.newRequestSet(key)
	d.sets[key] = set
	d.inTurn = append(d.inTurn, set)
	return set, named
}

func (d *direction) newRequestSet(key setKey) *requestSet {
	protocol := "grpc"
	if key.grpcStatus == notGRPC {
		protocol = "http"
	}
	shared := key.service.labels
	return &requestSet{setKey: key, labels: append(shared[:len(shared):len(shared)],
		label("request_protocol", protocol),
		label("response_code", strconv.Itoa(key.status)),
		label("grpc_response_status", grpcStatuses[key.grpcStatus]),
		label("response_flags", key.flags),
		label("connection_security_policy", d.security))}
}

// service finds the place of a request's host, or gives it one. It is the unknown one when the host gets none, which named
// tells.
func (d *direction) service(r *flow.Record) (of *service, named bool) {
	host := r.HTTP.Authority
	if len(host) == 0 {
		return d.unknown, true
	}
	var lowered [maxHost]byte
	if !validHost(host) {
		d.unnamed.Add(1)
		return d.unknown, false
	}
	if host = lowered[:copy(lowered[:], host)]; bytes.ContainsFunc(host, isUpper) {
		for i, c := range host {
			if isUpper(rune(c)) {
				host[i] = c + 'a' - 'A'
			}
		}
	}
	d.mu.RLock()
	of = d.services[string(host)]
	full := len(d.services) >= maxServices
	d.mu.RUnlock()
	switch {
	case of != nil:
		return of, true
	case full || statusClass(r.HTTP.Status) == 0 || r.HTTP.Status >= 400:
		d.unnamed.Add(1)
		return d.unknown, false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if of = d.services[string(host)]; of != nil {
		return of, true
	}
	if len(d.services) >= maxServices {
		d.unnamed.Add(1)
		return d.unknown, false
	}
	of = d.newService(string(host))
	d.services[of.host] = of
	return of, true
}

func isUpper(c rune) bool { return 'A' <= c && c <= 'Z' }

// newService decides what Istio says of a host. destination_service is the host as it stands in the header, with its port,
// as Istio has it where it knows no better. The name of the service and its namespace are read from a name of Kubernetes';
// all others are passed through, and bear the name of the cluster that does so.
func (d *direction) newService(host string) *service {
	name, namespace := kubernetesService(host, d.pod.Namespace)
	if name == "" {
		name, namespace = d.cluster, podinfo.Unknown
	}
	destination := host
	if host == "" {
		destination = podinfo.Unknown
	}
	return &service{host: host, labels: d.serviceLabels(destination, name, namespace)}
}

// kubernetesService takes reviews.prod.svc.cluster.local:9080 apart. Of the shorter names that a resolver in a pod
// completes, it takes those that mean the own namespace: reviews and, in prod, reviews.prod.
func kubernetesService(host, own string) (name, namespace string) {
	host, _, _ = strings.Cut(host, ":")
	parts := strings.SplitN(strings.TrimSuffix(host, "."), ".", 4)
	switch {
	case parts[0] == "" || parts[0][0] == '[':
	case len(parts) == 1:
		return parts[0], own
	case len(parts) == 2 && parts[1] == own, len(parts) > 2 && parts[2] == "svc":
		return parts[0], parts[1]
	}
	return "", ""
}

// serviceLabels returns the labels that all of Istio's metrics have, in Istio's order.
func (d *direction) serviceLabels(destination, name, namespace string) []*dto.LabelPair {
	own := d.pod
	peer := podinfo.Pod{Namespace: podinfo.Unknown, Workload: podinfo.Unknown, App: podinfo.Unknown, Version: podinfo.Unknown,
		CanonicalService: podinfo.Unknown, CanonicalRevision: podinfo.Latest, Cluster: podinfo.Unknown}
	from, to := &peer, own
	if d.reporter == "source" {
		from, to = own, &peer
	} else {
		namespace = own.Namespace // inbound, the destination is this pod
	}
	return []*dto.LabelPair{
		label("reporter", d.reporter),
		label("source_workload", from.Workload),
		label("source_canonical_service", from.CanonicalService),
		label("source_canonical_revision", from.CanonicalRevision),
		label("source_workload_namespace", from.Namespace),
		label("source_principal", podinfo.Unknown),
		label("source_app", from.App),
		label("source_version", from.Version),
		label("source_cluster", from.Cluster),
		label("destination_workload", to.Workload),
		label("destination_workload_namespace", to.Namespace),
		label("destination_principal", podinfo.Unknown),
		label("destination_app", to.App),
		label("destination_version", to.Version),
		label("destination_service", destination),
		label("destination_canonical_service", to.CanonicalService),
		label("destination_canonical_revision", to.CanonicalRevision),
		label("destination_service_name", name),
		label("destination_service_namespace", namespace),
		label("destination_cluster", to.Cluster),
	}
}

func label(name, value string) *dto.LabelPair { return &dto.LabelPair{Name: &name, Value: &value} }

func orDash(flags string) string {
	if flags == "" {
		return "-"
	}
	return flags
}

// maxHost is the length of a name of 253 bytes with a port.
const maxHost = 253 + len(":65535")

// validHost reports whether host consists of the characters of a name or an address, with or without a port.
func validHost(host []byte) bool {
	if len(host) > maxHost {
		return false
	}
	name := host
	if i := bytes.LastIndexByte(host, ':'); i >= 0 && host[len(host)-1] != ']' {
		port, err := strconv.ParseUint(string(host[i+1:]), 10, 16)
		if name = host[:i]; err != nil || port == 0 {
			return false
		}
	}
	inBrackets := len(name) > 2 && name[0] == '[' && name[len(name)-1] == ']'
	if inBrackets {
		name = name[1 : len(name)-1]
	}
	for _, c := range name {
		switch {
		case '0' <= c && c <= '9', c == '.', inBrackets && c == ':', 'a' <= c|0x20 && c|0x20 <= 'f':
		case !inBrackets && ('a' <= c|0x20 && c|0x20 <= 'z' || c == '-' || c == '_'):
		default:
			return false
		}
	}
	return len(name) > 0
}

// Indices into grpcStatuses after the codes of gRPC.
const (
	oddGRPCStatus = envoy.GRPCCodes + iota
	noGRPCStatus
	notGRPC
)

var grpcStatuses = func() (text [notGRPC + 1]string) {
	for i := range envoy.GRPCCodes {
		text[i] = envoy.GRPCCode(i).Number()
	}
	text[oddGRPCStatus] = podinfo.Unknown
	return text
}()

func grpcStatus(text []byte) int {
	if len(text) == 0 {
		return noGRPCStatus
	}
	if code, ok := envoy.ParseGRPCCode(text); ok {
		return int(code)
	}
	return oddGRPCStatus
}
