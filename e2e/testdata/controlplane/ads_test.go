// Package controlplane holds the agent's control plane client to go-control-plane's server: a module of its own, because
// its types are 16 MB of binary that pillion does without.
package controlplane

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1alpha1"

	"github.com/pillion-proxy/pillion/e2e/testdata/controlplane/ca"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// plane is a control plane: go-control-plane's server at an address that it keeps when it is restarted.
type plane struct {
	cache   cache.SnapshotCache
	address string
	server  *grpc.Server
	ca      *ca.Authority // nil: without TLS and a CA

	mu       sync.Mutex
	nodes    []*core.Node
	headers  metadata.MD
	rejected []string // messages of rejections
	wake     chan struct{}
}

func startPlane(t *testing.T) *plane {
	t.Helper()
	p := &plane{cache: cache.NewSnapshotCache(true, cache.IDHash{}, nil), address: "127.0.0.1:0", wake: make(chan struct{}, 1)}
	p.start(t)
	t.Cleanup(func() { p.server.Stop() })
	return p
}

func (p *plane) start(t *testing.T) {
	t.Helper()
	socket, err := net.Listen("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	p.address = socket.Addr().String()
	if p.ca == nil {
		p.server = grpc.NewServer()
	} else {
		p.server = grpc.NewServer(grpc.Creds(p.ca.Credentials(net.IPv4(127, 0, 0, 1))))
		security.RegisterIstioCertificateServiceServer(p.server, p.ca)
	}
	discovery.RegisterAggregatedDiscoveryServiceServer(p.server, server.NewServer(context.Background(), p.cache, server.CallbackFuncs{
		StreamOpenFunc:      func(ctx context.Context, _ int64, _ string) error { return p.opened(ctx) },
		DeltaStreamOpenFunc: func(ctx context.Context, _ int64, _ string) error { return p.opened(ctx) },
		StreamRequestFunc: func(_ int64, r *discovery.DiscoveryRequest) error {
			p.note(r.Node, r.ErrorDetail.GetMessage())
			return nil
		},
		StreamDeltaRequestFunc: func(_ int64, r *discovery.DeltaDiscoveryRequest) error {
			p.note(r.Node, r.ErrorDetail.GetMessage())
			return nil
		},
	}))
	go p.server.Serve(socket)
}

func (p *plane) opened(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.headers, _ = metadata.FromIncomingContext(ctx)
	return nil
}

func (p *plane) note(node *core.Node, rejection string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if node.GetUserAgentName() != "" {
		p.nodes = append(p.nodes, node)
	}
	if rejection != "" {
		p.rejected = append(p.rejected, rejection)
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
}

func (p *plane) awaitRejection(t *testing.T) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	select {
	case <-p.wake:
	case <-deadline.C:
		t.Fatal("no rejection arrived")
	}
}

// serve publishes services: each has a cluster with endpoints; and one listener with a route.
func (p *plane) serve(t *testing.T, version string, services ...string) {
	t.Helper()
	contents := map[resource.Type][]types.Resource{}
	ads := &core.ConfigSource{ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}}}
	for _, name := range services {
		contents[resource.ClusterType] = append(contents[resource.ClusterType], &cluster.Cluster{
			Name: name, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS}, EdsClusterConfig: &cluster.Cluster_EdsClusterConfig{EdsConfig: ads},
		})
		contents[resource.EndpointType] = append(contents[resource.EndpointType], &endpoint.ClusterLoadAssignment{ClusterName: name})
	}
	contents[resource.ListenerType] = []types.Resource{&listener.Listener{Name: "0.0.0.0_80", StatPrefix: version}}
	contents[resource.RouteType] = []types.Resource{&route.RouteConfiguration{Name: "80"}}
	snapshot, err := cache.NewSnapshot(version, contents)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cache.SetSnapshot(t.Context(), nodeID, snapshot); err != nil {
		t.Fatal(err)
	}
}

var node = istiod.Node{Type: "sidecar", IP: "192.0.2.1", Pod: "web-1", Namespace: "shop", Metadata: map[string]any{"NAMESPACE": "shop"}}

var nodeID = node.ID()

// mirror is a Handler that keeps the names of what it is given, and asks for what it refers to.
type mirror struct {
	mu      sync.Mutex
	changed chan struct{}
	held    map[string]bool // "CDS web"
	reject  string          // a version of the listener that is rejected
	problem error
}

func newMirror() *mirror { return &mirror{changed: make(chan struct{}, 1), held: map[string]bool{}} }

func (m *mirror) Update(u xds.Update) xds.Outcome {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer func() {
		select {
		case m.changed <- struct{}{}:
		default:
		}
	}()
	outcome := xds.Outcome{Wanted: map[xds.Type][]string{}}
	for _, r := range u.Resources {
		if r.TypeURL != u.Type.URL() {
			m.problem = fmt.Errorf("%v with type %s", u.Type, r.TypeURL)
		}
		if u.Type == xds.Listeners {
			var l listener.Listener
			if err := proto.Unmarshal(r.Value, &l); err != nil {
				m.problem = err
			}
			if l.StatPrefix == m.reject {
				outcome.Rejected = append(outcome.Rejected, xds.Rejected{Name: r.Name, Reason: "a filter that is not supported"})
				continue
			}
		}
		m.held[u.Type.String()+" "+r.Name] = true
	}
	for _, name := range u.Removed {
		delete(m.held, u.Type.String()+" "+name)
	}
	switch u.Type {
	case xds.Clusters: // endpoints go with the cluster that names them
		maps.DeleteFunc(m.held, func(held string, _ bool) bool {
			name, ok := strings.CutPrefix(held, "EDS ")
			return ok && !m.held["CDS "+name]
		})
		var names []string
		for held := range m.held {
			if name, ok := strings.CutPrefix(held, "CDS "); ok {
				names = append(names, name)
			}
		}
		outcome.Wanted[xds.Endpoints], outcome.Wanted[xds.Listeners] = names, nil
	case xds.Listeners:
		outcome.Wanted[xds.Routes] = []string{"80"}
	}
	return outcome
}

// await waits until the mirror holds what is wanted.
func (m *mirror) await(t *testing.T, want ...string) {
	t.Helper()
	slices.Sort(want)
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		m.mu.Lock()
		got, problem := slices.Sorted(maps.Keys(m.held)), m.problem
		m.mu.Unlock()
		if problem != nil {
			t.Fatal(problem)
		}
		if slices.Equal(got, want) {
			return
		}
		select {
		case <-m.changed:
		case <-deadline.C:
			t.Fatalf("held %q, want %q", got, want)
		}
	}
}

func bothProtocols(t *testing.T, test func(t *testing.T, delta bool)) {
	for _, delta := range []bool{true, false} {
		t.Run(map[bool]string{true: "delta", false: "state of the world"}[delta], func(t *testing.T) { test(t, delta) })
	}
}

// run starts a client of p, and returns it.
func run(t *testing.T, p *plane, delta bool, h xds.Handler) *xds.Client {
	t.Helper()
	encoded, err := node.Encode()
	if err != nil {
		t.Fatal(err)
	}
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	peer := &istiod.Server{Address: p.address, Plaintext: true, Token: token, Header: map[string][]string{"Clusterid": {"Kubernetes"}}}
	client := xds.New(xds.Config{
		Delta: delta, Node: encoded, Handler: h, Log: slog.New(slog.DiscardHandler), MinBackoff: time.Millisecond, MaxBackoff: 50 * time.Millisecond,
		Connect: func(ctx context.Context) (xds.Stream, error) {
			connection, err := peer.Connect()
			if err != nil {
				return nil, err
			}
			return connection.Stream(ctx, xds.Method(delta))
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { client.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return client
}

func TestResourcesArriveChangeAndGo(t *testing.T) {
	bothProtocols(t, func(t *testing.T, delta bool) {
		p, m := startPlane(t), newMirror()
		p.serve(t, "1", "cart", "web")
		run(t, p, delta, m)
		m.await(t, "CDS cart", "CDS web", "EDS cart", "EDS web", "LDS 0.0.0.0_80", "RDS 80")
		p.serve(t, "2", "pay", "web")
		m.await(t, "CDS pay", "CDS web", "EDS pay", "EDS web", "LDS 0.0.0.0_80", "RDS 80")

		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.nodes) == 0 || p.nodes[0].Id != nodeID || p.nodes[0].Metadata.Fields["NAMESPACE"].GetStringValue() != "shop" {
			t.Errorf("nodes %v", p.nodes)
		}
		if got := p.headers.Get("authorization"); !slices.Equal(got, []string{"Bearer secret"}) {
			t.Errorf("authorization %q", got)
		}
		if got := p.headers.Get("clusterid"); !slices.Equal(got, []string{"Kubernetes"}) {
			t.Errorf("clusterid %q", got)
		}
		if len(p.rejected) > 0 {
			t.Errorf("rejected: %q", p.rejected)
		}
	})
}

func TestARejectionReachesTheControlPlaneByName(t *testing.T) {
	bothProtocols(t, func(t *testing.T, delta bool) {
		p, m := startPlane(t), newMirror()
		m.reject = "2"
		p.serve(t, "1", "web")
		client := run(t, p, delta, m)
		m.await(t, "CDS web", "EDS web", "LDS 0.0.0.0_80", "RDS 80")
		p.serve(t, "2", "web")
		p.awaitRejection(t)
		p.serve(t, "3", "cart", "web") // the stream goes on
		m.await(t, "CDS cart", "CDS web", "EDS cart", "EDS web", "LDS 0.0.0.0_80", "RDS 80")
		p.mu.Lock()
		defer p.mu.Unlock()
		if client.Status().Types[xds.Listeners].Rejected == 0 {
			t.Error("the client counted no rejection")
		}
		for _, text := range p.rejected {
			if text != "0.0.0.0_80: a filter that is not supported" {
				t.Errorf("rejected: %q", text)
			}
		}
	})
}

func TestAClientResumesAfterTheControlPlaneWasAway(t *testing.T) {
	bothProtocols(t, func(t *testing.T, delta bool) {
		p, m := startPlane(t), newMirror()
		p.serve(t, "1", "cart", "web")
		client := run(t, p, delta, m)
		m.await(t, "CDS cart", "CDS web", "EDS cart", "EDS web", "LDS 0.0.0.0_80", "RDS 80")
		p.server.Stop()
		p.serve(t, "2", "pay", "web")
		m.await(t, "CDS cart", "CDS web", "EDS cart", "EDS web", "LDS 0.0.0.0_80", "RDS 80")
		p.start(t)
		m.await(t, "CDS pay", "CDS web", "EDS pay", "EDS web", "LDS 0.0.0.0_80", "RDS 80")
		if status := client.Status(); !status.Connected {
			t.Errorf("status %+v", status)
		}
	})
}
