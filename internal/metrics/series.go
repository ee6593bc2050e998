package metrics

import (
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/promtext"
)

// Limits of the number of series. Options.MaxSeries bounds them all.
//
// Clients can send any Host field. So a host gets series of its own only after a response below 400: names that are not
// served take no place from those that are. The number of such hosts is limited for each direction; outbound, hosts that
// are not Services of the cluster have a lower limit of their own. All other hosts are counted as "unknown". A server that
// answers every name can still be made to use up the places, so the workload's own service always has one.
//
// Clients can also make some servers return any status. The number of combinations of labels is limited for each
// direction. Further combinations are folded into few: the host "unknown", no flags, the first code of the status class,
// and 2 for all errors of gRPC, so that error rates remain correct.
const (
	DefaultMaxSeries = 10_000
	MinMaxSeries     = 5_000
	MaxMaxSeries     = 100_000 // package scrape takes as much

	seriesPerSet = 1 + 3*(len(buckets)+1+2) // a counter, and three histograms with +Inf, sum and count
	foldedSets   = 6 + 3 + 5                // status classes of HTTP; of gRPC, with 200 and without
	otherSeries  = 1000                     // all others, with a margin
)

// budget bounds the series of one direction.
type budget struct {
	sets       int // combinations of labels
	services   int // hosts with series of their own
	otherHosts int // those of them that are not Services

	// Combinations of principals and workloads of peers; half of them for those that TLS has not verified, because anyone
	// may make them up. Peers beyond them are counted as unknown ones.
	peers int
}

// budgetOf divides the series that are left after all others between the directions: outbound has more destinations.
func budgetOf(maxSeries int, direction flow.Direction) budget {
	sets := (maxSeries-otherSeries)/seriesPerSet - 2*foldedSets
	if direction == flow.Inbound {
		sets = sets * 2 / 5
		return budget{sets, sets / 2, sets / 2, sets / 2}
	}
	sets -= sets * 2 / 5
	return budget{sets, sets, sets / 3, sets / 2}
}

// direction holds the counters of one direction. A series whose labels come from traffic is created when it is first needed
// and stays.
type direction struct {
	reporter, security string
	cluster            string // Envoy's name of the cluster of all traffic
	pod                *podinfo.Pod
	naming             naming
	ownService         string // name of the service that the pod most likely belongs to
	budget             budget
	peersOf

	ends        map[flow.Reason]*end // one for each of flow.Explanations; immutable after init
	tcp         []*tcpSet            // each once, in the order of flow.Explanations; immutable after init
	connections [len(protocols)]atomic.Uint64
	downstream  [6]atomic.Uint64 // requests by status class; 0: no response
	upstream    [6]atomic.Uint64 // those of them that had an upstream connection
	unnamed     atomic.Uint64    // requests whose host has no place
	folded      atomic.Uint64    // requests whose combination has no place

	dryRuns dryRuns

	mu          sync.RWMutex        // over what follows
	dryRunPorts map[uint16]*dryRuns // of inbound requests
	services    map[string]*service // by destination
	clusters    map[string]*service // of a control plane, by their names

	ofCluster func(cluster string) (host, name, namespace string) // nil: there is no control plane

	others  int // services that are not of the cluster
	sets    map[setKey]*requestSet
	inTurn  []*requestSet
	unknown *service // for requests without a host, and for hosts without series of their own
}

// service is the destination of requests or connections, with the labels that it gives to all series.
type service struct {
	labels           []promtext.Label
	grpc             atomic.Bool
	requestMessages  atomic.Uint64
	responseMessages atomic.Uint64
}

type setKey struct {
	service    *service
	status     int
	grpcStatus int
	flags      string
	peer       *peerLabels // of peerOf
	plan       *plan       // nil: the labels are the usual ones
	values     string      // of the labels that plan adds
}

// requestSet holds the counters of requests with the same labels. The number of requests is that of the observed durations.
type requestSet struct {
	setKey
	labels                   []promtext.Label
	duration, received, sent histogram
	exemplar                 atomic.Pointer[exemplar] // nil: no request was part of a sampled trace
}

// end holds the counters of flows that ended with one reason.
type end struct {
	reason flow.Reason
	flows  atomic.Uint64
	tcp    *tcpSet // for connections; shared by reasons with the same flags
}

// tcpSet holds the counters of opaque connections with the same labels.
type tcpSet struct {
	labels                         []promtext.Label
	flags                          string
	service                        []promtext.Label // the first of labels, of an unknown peer
	plan                           *plan            // nil: the labels are the usual ones
	opened, closed, received, sent atomic.Uint64
}

func (d *direction) init(direction flow.Direction, pod *podinfo.Pod, o Options) {
	d.reporter, d.security, d.cluster = "destination", "none", direction.Passthrough()
	if direction == flow.Outbound {
		d.reporter, d.security = "source", podinfo.Unknown
	}
	d.pod = pod
	d.budget = budgetOf(o.MaxSeries, direction)
	d.naming = naming{inbound: direction == flow.Inbound, domain: o.ClusterDomain}
	if pod.Namespace != podinfo.Unknown {
		d.naming.namespace = []byte(pod.Namespace)
		d.ownService = kubernetesName(pod.CanonicalService, pod.Namespace, o.ClusterDomain)
	}
	d.services, d.clusters = make(map[string]*service), make(map[string]*service)
	if direction == flow.Outbound {
		d.ofCluster = o.Service
	}
	d.sets = make(map[setKey]*requestSet)
	d.initPeers()
	d.unknown = d.newService("", noHost)
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
			set = d.newTCPSet(of, e.Flags, nil)
			sets[place] = set
			d.tcp = append(d.tcp, set)
		}
		d.ends[e.Reason] = &end{reason: e.Reason, tcp: set}
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

// requestSet finds or creates the set of a request. named is false if another request with the same labels may get another
// set, because its host or its combination of labels exceeds a limit.
func (d *direction) requestSet(r *flow.Record) (set *requestSet, named bool) {
	of, named := d.service(r)
	return d.setOf(r, of, named)
}

// setOf is requestSet for a service. It has a frame of its own: with that of service it would double the stack of a
// connection, which stays while the connection is idle.
func (d *direction) setOf(r *flow.Record, of *service, named bool) (*requestSet, bool) {
	var set *requestSet
	key := setKey{of, r.HTTP.Status, notGRPC, orDash(r.Flags()), d.peerOf(r), planOf(r), ""}
	key.values = key.plan.values(r, d.budget.sets)
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
	if len(d.sets) >= d.budget.sets {
		d.folded.Add(1)
		key, named = d.fold(key), false
		if set = d.sets[key]; set != nil {
			return set, false
		}
	}
	set = d.newRequestSet(key)
	d.sets[key] = set
	d.inTurn = append(d.inTurn, set)
	return set, named
}

// fold maps a combination of labels to one of foldedSets.
func (d *direction) fold(key setKey) setKey {
	class := statusClass(key.status)
	key.service, key.status, key.flags = d.unknown, class*100, "-"
	key.peer, key.plan, key.values = d.foldedPeer, nil, ""
	switch {
	case key.grpcStatus == notGRPC:
	case class != 2 || key.grpcStatus != int(envoy.GRPCOK) && key.grpcStatus != noGRPCStatus:
		key.grpcStatus = int(envoy.GRPCUnknown)
	}
	return key
}

func (d *direction) newRequestSet(key setKey) *requestSet {
	protocol := "grpc"
	if key.grpcStatus == notGRPC {
		protocol = "http"
	}
	shared := d.named(key.service.labels, key.peer)
	return &requestSet{setKey: key, labels: append(shared[:len(shared):len(shared)],
		label("request_protocol", protocol),
		label("response_code", strconv.Itoa(key.status)),
		label("grpc_response_status", grpcStatuses[key.grpcStatus]),
		label("response_flags", key.flags),
		label("connection_security_policy", d.policy(key.peer)))}
}

// nameBuffers has memory for names. On the stack of the goroutine that serves a connection it would double that stack, which
// stays while the connection is idle.
var nameBuffers = sync.Pool{New: func() any { return new([maxBuffer]byte) }}

// service finds or creates the service of a request's host. named is false if the host was counted as unknown and may be
// counted by its name later.
func (d *direction) service(r *flow.Record) (of *service, named bool) {
	if d.ofCluster != nil && serviceCluster(r) != "" {
		if of = d.meshService(r.Cluster); of != nil {
			return of, true
		}
	}
	buf := nameBuffers.Get().(*[maxBuffer]byte)
	defer nameBuffers.Put(buf)
	name, kind := d.naming.destination(buf[:0], r.HTTP.Authority, r.OriginalDestination.Addr())
	switch kind {
	case noHost, addressHost:
		return d.unknown, true
	case invalidHost:
		d.unnamed.Add(1)
		return d.unknown, false
	}
	d.mu.RLock()
	of = d.services[string(name)]
	full := d.full(name, kind)
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
	if of = d.services[string(name)]; of != nil {
		return of, true
	}
	if d.full(name, kind) {
		d.unnamed.Add(1)
		return d.unknown, false
	}
	of = d.newService(string(name), kind)
	d.services[string(name)] = of
	if kind == otherHost {
		d.others++
	}
	return of, true
}

// meshCluster begins the names of clusters that belong to a service.
const meshCluster = "outbound|"

// meshService finds or creates the service of a cluster. It returns nil if the service is not known, or one too many.
func (d *direction) meshService(cluster string) *service {
	d.mu.RLock()
	of := d.clusters[cluster]
	d.mu.RUnlock()
	if of != nil {
		return of
	}
	host, name, namespace := d.ofCluster(cluster)
	if host == "" {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if of = d.services[host]; of == nil {
		if d.full([]byte(host), kubernetesService) {
			return nil
		}
		of = &service{labels: d.serviceLabels(host, name, namespace)}
		d.services[host] = of
	}
	if len(d.clusters) < d.budget.services {
		d.clusters[cluster] = of
	}
	return of
}

// full reports whether a new name exceeds the limits, with the lock held.
func (d *direction) full(name []byte, kind kind) bool {
	return len(d.services) >= d.budget.services && string(name) != d.ownService || kind == otherHost && d.others >= d.budget.otherHosts
}

// newService returns a service with Istio's labels. Without a control plane, Istio's labels of a Service are those of its
// name. Other hosts are passed through: the service's name is then that of the cluster that does so.
func (d *direction) newService(destination string, kind kind) *service {
	name, namespace := d.cluster, podinfo.Unknown
	if kind == kubernetesService {
		parts := strings.SplitN(destination, ".", 3)
		name, namespace = parts[0], parts[1]
	}
	if destination == "" {
		destination = podinfo.Unknown
	}
	return &service{labels: d.serviceLabels(destination, name, namespace)}
}

// kubernetesName returns the full name of a Service.
func kubernetesName(service, namespace, domain string) string {
	return service + "." + namespace + ".svc." + domain
}

// serviceLabels returns the labels that all of Istio's metrics have, in Istio's order.
func (d *direction) serviceLabels(destination, name, namespace string) []promtext.Label {
	own := d.pod
	peer := podinfo.Pod{Namespace: podinfo.Unknown, Workload: podinfo.Unknown, App: podinfo.Unknown, Version: podinfo.Unknown,
		CanonicalService: podinfo.Unknown, CanonicalRevision: podinfo.Latest, Cluster: podinfo.Unknown}
	from, to := &peer, own
	if d.reporter == "source" {
		from, to = own, &peer
	} else {
		namespace = own.Namespace // inbound, the destination is this pod
	}
	return []promtext.Label{
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

func label(name, value string) promtext.Label { return promtext.Label{Name: name, Value: value} }

func orDash(flags string) string {
	if flags == "" {
		return "-"
	}
	return flags
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
