package istiod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

const (
	istioVersion = "1.31.0"
	sidecarPod   = "nginx-deployment-68d4d6fb8c-6gd8s"
	gatewayPod   = "istio-ingressgateway-1"
)

// sidecar and gateway are nodes as the injector describes them.
func sidecar() istiod.Node {
	return istiod.Node{Type: "sidecar", IP: "203.0.113.4", Pod: sidecarPod, Namespace: "default", Cluster: "nginx.default", Metadata: map[string]any{
		"CLUSTER_ID": clusterID, "DNS_CAPTURE": "true", "DNS_AUTO_ALLOCATE": "true", "INSTANCE_IPS": "203.0.113.4", "INTERCEPTION_MODE": "REDIRECT",
		"ISTIO_VERSION": istioVersion, "LABELS": map[string]any{"app": "nginx", "version": "v1"}, "MESH_ID": "cluster.local", "NAMESPACE": "default",
		"NODE_NAME": "node1", "SERVICE_ACCOUNT": "nginx", "WORKLOAD_NAME": "nginx-deployment",
		"PROXY_CONFIG": map[string]any{"concurrency": 2.0, "discoveryAddress": istiodName + ":15012"},
	}}
}

func gateway() istiod.Node {
	return istiod.Node{Type: "router", IP: "203.0.113.250", Pod: gatewayPod, Namespace: "default", Cluster: "istio-ingressgateway.default", Metadata: map[string]any{
		"CLUSTER_ID": clusterID, "INSTANCE_IPS": "203.0.113.250", "ISTIO_VERSION": istioVersion,
		"LABELS": map[string]any{"app": "istio-ingressgateway", "istio": "ingressgateway"}, "MESH_ID": "cluster.local", "NAMESPACE": "default",
		"NODE_NAME": "node1", "SERVICE_ACCOUNT": "ingress", "WORKLOAD_NAME": "istio-ingressgateway",
		"PROXY_CONFIG": map[string]any{"discoveryAddress": istiodName + ":15012"},
	}}
}

// proxy is the agent's client of istiod: its stream, its identity, and a handler that keeps what it is given.
type proxy struct {
	*view
	node   istiod.Node
	server *istiod.Server
	keeper *identity.Keeper
	client *xds.Client
	delta  bool
	stop   func()
}

// startProxy starts a client. Its token is the one of its service account.
func startProxy(t *testing.T, p *plane, node istiod.Node, delta bool) *proxy {
	t.Helper()
	x := newProxy(t, p, node, delta)
	x.start(t)
	return x
}

// newProxy returns a client. Start it.
func newProxy(t *testing.T, p *plane, node istiod.Node, delta bool) *proxy {
	t.Helper()
	account := node.Metadata["SERVICE_ACCOUNT"].(string)
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(account+"-token"), 0o600); err != nil {
		t.Fatal(err)
	}
	encoded, err := node.Encode()
	if err != nil {
		t.Fatal(err)
	}
	x := &proxy{view: newView(), node: node, delta: delta, server: &istiod.Server{
		Address: p.address, ServerName: istiodName, Roots: p.roots, Token: token, Header: http.Header{"Clusterid": {clusterID}},
	}}
	log := slog.New(slog.DiscardHandler)
	x.keeper = identity.NewKeeper(identity.Config{Log: log, Source: &identity.CA{
		Call: x.call, SPIFFE: "spiffe://cluster.local/ns/" + node.Namespace + "/sa/" + account, Lifetime: certificate,
	}})
	x.client = xds.New(xds.Config{Delta: delta, Node: encoded, Connect: x.connect, Handler: x.view, Log: log, MinBackoff: 10 * time.Millisecond, MaxBackoff: 100 * time.Millisecond})
	x.view.anchor = x.keeper.Anchor
	return x
}

// start runs the client until stop is called or the test ends.
func (x *proxy) start(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { x.keeper.Run(ctx) })
	running.Go(func() { x.client.Run(ctx) })
	x.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	t.Cleanup(x.stop)
}

// call makes one call on a connection of its own, as the identity's source does.
func (x *proxy) call(ctx context.Context, method string, message []byte) ([]byte, error) {
	connection, err := x.server.Connect()
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	return connection.Call(ctx, method, message)
}

// stream closes its connection with it.
type stream struct {
	xds.Stream
	connection *istiod.Connection
}

func (s stream) Close() {
	s.Stream.Close()
	s.connection.Close()
}

func (x *proxy) connect(ctx context.Context) (xds.Stream, error) {
	connection, err := x.server.Connect()
	if err != nil {
		return nil, err
	}
	opened, err := connection.Stream(ctx, xds.Method(x.delta))
	if err != nil {
		connection.Close()
		return nil, err
	}
	return stream{opened, connection}, nil
}

// synced returns nil if istiod shows each type that was asked for as acknowledged, and the client holds what it asked for.
func (x *proxy) synced(p *plane) error {
	status, err := p.status(x.node.Pod + "." + x.node.Namespace)
	if err != nil {
		return err
	}
	for t, state := range x.client.Status().Types {
		shown := status.Resources[xds.Type(t).URL()]
		if state.Asked && (shown.LastError != "" || shown.Sent == "" || shown.Sent != shown.Acked) {
			return fmt.Errorf("%v: %+v", xds.Type(t), shown)
		}
	}
	return x.complete()
}

// view is an xds.Handler that keeps what it is given, decodes it, and asks for what it refers to.
type view struct {
	mu       sync.Mutex
	held     [xds.Types]map[string][]byte
	values   [xds.Types]map[string]any
	findings [xds.Types]map[string][]mesh.Finding
	wanted   [xds.Types][]string
	updates  [xds.Types]int // responses
	problems []error
	reject   func(xds.Type, string) string // why a resource is rejected; empty: it is not
	anchor   func(*identity.Roots)
}

func newView() *view {
	v := &view{reject: func(xds.Type, string) string { return "" }}
	for t := range v.held {
		v.held[t], v.values[t], v.findings[t] = map[string][]byte{}, map[string]any{}, map[string][]mesh.Finding{}
	}
	return v
}

func (v *view) Update(u xds.Update) xds.Outcome {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.updates[u.Type]++
	var outcome xds.Outcome
	for _, r := range u.Resources {
		if r.TypeURL != u.Type.URL() {
			v.problems = append(v.problems, fmt.Errorf("%v %s with type %s", u.Type, r.Name, r.TypeURL))
		}
		if reason := v.reject(u.Type, r.Name); reason != "" {
			outcome.Rejected = append(outcome.Rejected, xds.Rejected{Name: r.Name, Reason: reason})
			continue
		}
		value, findings, err := decode(u.Type, r.Value)
		if err != nil {
			v.problems = append(v.problems, fmt.Errorf("%v %s: %w", u.Type, r.Name, err))
		}
		if u.Type == xds.ProxyConfigs {
			v.trust(r.Value)
		}
		v.held[u.Type][r.Name], v.values[u.Type][r.Name], v.findings[u.Type][r.Name] = slices.Clone(r.Value), value, findings
	}
	for _, name := range u.Removed {
		v.drop(u.Type, name)
	}
	outcome.Wanted = v.follow(u.Type)
	return outcome
}

// trust passes on the roots that istiod pushes.
func (v *view) trust(b []byte) {
	certificates, _, _ := mesh.DecodeTrustBundle(b)
	roots, err := identity.ParseRoots([]byte(strings.Join(certificates, "\n")))
	if err != nil {
		v.problems = append(v.problems, fmt.Errorf("roots: %w", err))
		return
	}
	v.anchor(roots)
}

// decode returns the value and the findings of a resource.
func decode(t xds.Type, b []byte) (value any, findings []mesh.Finding, err error) {
	switch t {
	case xds.Clusters:
		value, findings, err = mesh.DecodeCluster(b)
	case xds.Endpoints:
		value, findings, err = mesh.DecodeAssignment(b)
	case xds.Listeners:
		value, findings, err = mesh.DecodeListener(b)
	case xds.Routes:
		value, findings, err = mesh.DecodeRoutes(b)
	case xds.Secrets:
		value, findings, err = mesh.DecodeSecret(b)
	case xds.Extensions:
		value, findings, err = mesh.DecodeExtension(b)
	case xds.Names:
		value, findings, err = mesh.DecodeNames(b)
	case xds.ProxyConfigs:
		value, findings, err = mesh.DecodeTrustBundle(b)
	}
	return value, findings, err
}

// follow returns the names that the resources of a type refer to, by their types. What is not referred to any more is
// dropped.
func (v *view) follow(t xds.Type) map[xds.Type][]string {
	var endpoints, routes, secrets, extensions []string
	for _, value := range v.values[xds.Clusters] {
		c := value.(*mesh.Cluster)
		if c.Discovery == mesh.ByEDS {
			endpoints = append(endpoints, c.Assignment)
		}
		secrets = slices.AppendSeq(secrets, c.SecretNames())
	}
	for _, value := range v.values[xds.Listeners] {
		l := value.(*mesh.Listener)
		routes = slices.AppendSeq(routes, l.RouteNames())
		secrets = slices.AppendSeq(secrets, l.SecretNames())
		extensions = slices.AppendSeq(extensions, l.ExtensionNames())
	}
	wanted := map[xds.Type][]string{}
	switch t {
	case xds.Clusters:
		wanted[xds.Endpoints], wanted[xds.Listeners] = sorted(endpoints), nil
	case xds.Listeners:
		wanted[xds.Routes], wanted[xds.Secrets], wanted[xds.Extensions] = sorted(routes), fromIstiod(secrets), sorted(extensions)
		wanted[xds.Names], wanted[xds.ProxyConfigs] = nil, nil
	}
	for t, names := range wanted {
		if t.Wildcard() {
			continue
		}
		v.wanted[t] = names
		for name := range v.held[t] {
			if !slices.Contains(names, name) {
				v.drop(t, name)
			}
		}
	}
	return wanted
}

func (v *view) drop(t xds.Type, name string) {
	delete(v.held[t], name)
	delete(v.values[t], name)
	delete(v.findings[t], name)
}

func sorted(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}

// fromIstiod returns the secrets that istiod serves. The others are the workload's own identity and files.
func fromIstiod(secrets []string) []string {
	return slices.DeleteFunc(sorted(secrets), func(name string) bool {
		return name == "" || name == "default" || name == "ROOTCA" || strings.HasPrefix(name, "file-")
	})
}

// complete returns nil if each resource that was asked for by name is here, and clusters and listeners are.
func (v *view) complete() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.updates[xds.Clusters] == 0 || v.updates[xds.Listeners] == 0 {
		return errors.New("neither clusters nor listeners yet")
	}
	for t, names := range v.wanted {
		for _, name := range names {
			if _, ok := v.held[t][name]; !ok {
				return fmt.Errorf("no %v %s", xds.Type(t), name)
			}
		}
	}
	return errors.Join(v.problems...)
}

// names returns the names of the resources that are held of a type.
func (v *view) names(t xds.Type) []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Sorted(maps.Keys(v.held[t]))
}

// get returns the bytes of a resource; nil if it is not held.
func (v *view) get(t xds.Type, name string) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.held[t][name]
}

// rejecting sets which resources are rejected from now on.
func (v *view) rejecting(reject func(xds.Type, string) string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.reject = reject
}
