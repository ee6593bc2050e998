// Package istiod holds the agent's client of a control plane to a real istiod: its discovery server, its CA and its
// authentication run in this process, over a cluster in memory. It is a module of its own, because istiod has a thousand
// packages.
package istiod

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	authentication "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	ktesting "k8s.io/client-go/testing"

	"istio.io/istio/pilot/pkg/config/kube/crd"
	"istio.io/istio/pilot/pkg/features"
	istiogrpc "istio.io/istio/pilot/pkg/grpc"
	"istio.io/istio/pilot/pkg/model"
	"istio.io/istio/pilot/pkg/trustbundle"
	"istio.io/istio/pilot/pkg/xds"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
	xdstest "istio.io/istio/pilot/test/xds"
	"istio.io/istio/pkg/config"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/config/schema/kind"
	"istio.io/istio/pkg/keepalive"
	kubelib "istio.io/istio/pkg/kube"
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/security"
	"istio.io/istio/pkg/util/sets"
	"istio.io/istio/security/pkg/pki/ca"
	"istio.io/istio/security/pkg/pki/util"
	caserver "istio.io/istio/security/pkg/server/ca"
	"istio.io/istio/security/pkg/server/ca/authenticate"
	"istio.io/istio/security/pkg/server/ca/authenticate/kubeauth"
)

// patience is how long a test waits for what must happen.
const patience = time.Minute

// debounce is how long istiod waits for further changes before a push. It is istiod's default: without it, a push for the
// first of several removed services forgets the others, and its delta protocol never names their clusters as removed.
const debounce = 100 * time.Millisecond

const (
	istiodName  = "istiod.istio-system.svc"
	clusterID   = "Kubernetes"
	certificate = 24 * time.Hour // lifetime
)

func TestMain(m *testing.M) {
	options := log.DefaultOptions()
	options.SetDefaultOutputLevel(log.OverrideScopeName, log.NoneLevel)
	if err := log.Configure(options); err != nil {
		panic(err)
	}
	features.MultiRootMesh = true // istiod pushes its roots
	// A configuration dump during a push fills the cache with what was before, and istiod pushes that.
	features.EnableXDSCaching = false
	var err error
	if directory, err = os.MkdirTemp("", "pillion-istiod-"); err != nil {
		panic(err)
	}
	if err := os.Chmod(directory, 0o755); err != nil { // the agent has a user of its own
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(directory)
	os.Exit(code)
}

// meshConfig is the configuration of the mesh. The cases name its providers.
const meshConfig = `
accessLogFile: /dev/stdout
extensionProviders:
- name: checker-http
  envoyExtAuthzHttp:
    {service: nginx-service.default.svc.cluster.local, port: 80, pathPrefix: /check, includeRequestHeadersInCheck: [x-a], headersToUpstreamOnAllow: [x-b], includeRequestBodyInCheck: {maxRequestBytes: 1000}}
- name: checker-grpc
  envoyExtAuthzGrpc: {service: reviews.default.svc.cluster.local, port: 9090, failOpen: true, statusOnError: "503"}
- name: zipkin
  zipkin: {service: nginx-service.default.svc.cluster.local, port: 80}
- name: als
  envoyHttpAls: {service: reviews.default.svc.cluster.local, port: 9090}
- name: otel-log
  envoyOtelAls: {service: reviews.default.svc.cluster.local, port: 9090}
- name: records
  envoyOtelAls: {service: web.default.svc.cluster.local, port: 8081, logFormat: {text: "%REQ(:PATH)% %RESPONSE_CODE%", labels: {tenant: "%REQ(X-TENANT)%"}}}
- name: entries
  envoyHttpAls: {service: web.default.svc.cluster.local, port: 8081, additionalRequestHeadersToLog: [x-tenant]}
- name: connections
  envoyTcpAls: {service: web.default.svc.cluster.local, port: 8081}
- name: spans
  opentelemetry: {service: web.default.svc.cluster.local, port: 8081}
- name: lines
  envoyFileAccessLog: {path: /dev/stdout, logFormat: {text: "LINE %TRAFFIC_DIRECTION% %REQ(:PATH)% %RESPONSE_CODE% %REQ(X-TENANT)%\n"}}
- name: json
  envoyFileAccessLog: {path: /dev/stdout, logFormat: {labels: {status: "%RESPONSE_CODE%"}}}
`

// plane is an istiod that can be restarted. Its address, its CA and its cluster survive that.
type plane struct {
	t       *testing.T
	address string
	local   []func() net.Listener // further places to listen at
	roots   string                // path of the file that the ConfigMap istio-ca-root-cert becomes in a pod
	ca      *ca.IstioCA

	mu     sync.Mutex
	tokens map[string]string // tokens that the API server accepts, and their user "system:serviceaccount:NAMESPACE:NAME"

	cluster string          // Kubernetes objects as YAML
	configs []config.Config // objects of Istio's types

	*run // nil while it is stopped
}

// run is one life of an istiod.
type run struct {
	*xdstest.FakeDiscoveryServer
	anchors *trustbundle.TrustBundle
	scope   *scope
}

// scope is a test whose cleanups can be run before it ends.
type scope struct {
	*testing.T
	mu       sync.Mutex
	cleanups []func()
}

func (s *scope) Cleanup(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cleanups = append(s.cleanups, f)
}

func (s *scope) end() {
	s.mu.Lock()
	cleanups := s.cleanups
	s.cleanups = nil
	s.mu.Unlock()
	for _, f := range slices.Backward(cleanups) {
		f()
	}
}

// startPlane starts an istiod.
func startPlane(t *testing.T, configs string, objects ...string) *plane {
	t.Helper()
	p := newPlane(t, configs, objects...)
	p.start()
	t.Cleanup(p.stop)
	return p
}

// newPlane returns an istiod over the cluster of testdata and further objects of Kubernetes, with objects of Istio's types.
// All are YAML.
func newPlane(t *testing.T, configs string, objects ...string) *plane {
	t.Helper()
	cluster, err := os.ReadFile("testdata/cluster.yaml")
	if err != nil {
		t.Fatal(err)
	}
	options, err := ca.NewSelfSignedDebugIstioCAOptions("", 10*certificate, certificate, 2*certificate, "cluster.local", 2048)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := ca.NewIstioCA(options)
	if err != nil {
		t.Fatal(err)
	}
	p := &plane{t: t, address: "127.0.0.1:0", roots: filepath.Join(t.TempDir(), "root-cert.pem"), ca: authority, cluster: strings.Join(append([]string{string(cluster)}, objects...), "\n---\n"),
		tokens: map[string]string{"nginx-token": "default:nginx", "client-token": "default:client", "ingress-token": "default:ingress", "istioctl-token": "istio-system:default"}}
	p.configs = parse(t, configs)
	p.publishRoots()
	return p
}

// publishRoots writes the CA's roots where pods see them.
func (p *plane) publishRoots() {
	if err := os.WriteFile(p.roots, p.ca.GetCAKeyCertBundle().GetRootCertPem(), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// start begins another life with the present cluster and configuration.
func (p *plane) start() {
	p.t.Helper()
	scope := &scope{T: p.t}
	p.run = &run{scope: scope}
	settings, err := mesh.ApplyMeshConfigDefaults(meshConfig)
	if err != nil {
		p.t.Fatal(err)
	}
	p.FakeDiscoveryServer = xdstest.NewFakeDiscoveryServer(scope, xdstest.FakeOptions{
		KubernetesObjectString:     p.cluster,
		Configs:                    p.configs,
		MeshConfig:                 settings,
		DisableSecretAuthorization: true,
		DebounceTime:               debounce,
		KubeClientModifier:         p.reviewTokens,
	})
	p.pushRoots()
	authenticators := []security.Authenticator{
		&authenticate.ClientCertAuthenticator{},
		kubeauth.NewKubeJWTAuthenticator(p.Env().Watcher, p.KubeClient().Kube(), clusterID, nil, nil),
	}
	p.Discovery.Authenticators = authenticators
	p.listen(authenticators)
}

// pushRoots makes the discovery server push the roots of trust.
func (p *plane) pushRoots() {
	p.t.Helper()
	p.anchors = trustbundle.NewTrustBundle(nil, p.Env().Watcher)
	discovery := p.Discovery
	p.anchors.UpdateCb(func() { discovery.ConfigUpdate(&model.PushRequest{Forced: true}) })
	discovery.Generators[v3.ProxyConfigType] = &xds.PcdsGenerator{TrustBundle: p.anchors}
	p.anchor()
}

// anchor adds the CA's roots to those that the discovery server pushes.
func (p *plane) anchor() {
	p.t.Helper()
	roots := trustbundle.TrustAnchorConfig{Certs: util.PemCertBytestoString(p.ca.GetCAKeyCertBundle().GetRootCertPem())}
	if err := p.anchors.UpdateTrustAnchor(&trustbundle.TrustAnchorUpdate{TrustAnchorConfig: roots, Source: trustbundle.SourceIstioCA}); err != nil {
		p.t.Fatal(err)
	}
}

// listen serves discovery and the CA over TLS, as istiod's port 15012 does.
func (p *plane) listen(authenticators []security.Authenticator) {
	p.t.Helper()
	socket, err := net.Listen("tcp", p.address)
	if err != nil {
		p.t.Fatal(err)
	}
	p.address = socket.Addr().String()
	serving, err := p.servingCertificate()
	if err != nil {
		p.t.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(p.ca.GetCAKeyCertBundle().GetRootCertPem())
	server := grpc.NewServer(append(istiogrpc.ServerOptions(keepalive.DefaultOption(), func(int64) {}), grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{serving}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: clients, MinVersion: tls.VersionTLS12,
	})))...)
	p.Discovery.Register(server)
	signer, err := caserver.New(p.ca, certificate, authenticators, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	signer.Register(server)
	sockets := []net.Listener{socket}
	for _, listen := range p.local {
		sockets = append(sockets, listen())
	}
	var served sync.WaitGroup
	for _, socket := range sockets {
		served.Go(func() { server.Serve(socket) })
	}
	p.scope.Cleanup(func() {
		server.Stop()
		served.Wait()
	})
}

// servingCertificate is istiod's own.
func (p *plane) servingCertificate() (tls.Certificate, error) {
	chain, key, err := p.ca.GenKeyCert([]string{istiodName}, certificate, false)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(chain, key)
}

// stop ends the present life, if there is one.
func (p *plane) stop() {
	if p.run != nil {
		p.scope.end()
		p.run = nil
	}
}

// reviewTokens makes the API server in memory answer reviews of tokens.
func (p *plane) reviewTokens(client kubelib.Client) {
	client.Kube().(*fake.Clientset).PrependReactor("create", "tokenreviews", func(action ktesting.Action) (bool, runtime.Object, error) {
		review := action.(ktesting.CreateAction).GetObject().(*authentication.TokenReview).DeepCopy()
		p.mu.Lock()
		user, ok := p.tokens[review.Spec.Token]
		p.mu.Unlock()
		review.Status.Authenticated = ok && slices.Contains(review.Spec.Audiences, "istio-ca")
		review.Status.User = authentication.UserInfo{Username: "system:serviceaccount:" + user, Groups: []string{"system:serviceaccounts"}}
		return true, review, nil
	})
}

// parse returns the objects in YAML of Istio's types.
func parse(t *testing.T, text string) []config.Config {
	t.Helper()
	parsed, rest, err := crd.ParseInputs(text)
	if err != nil || len(rest) > 0 {
		t.Fatalf("%v: %v", rest, err)
	}
	return parsed
}

// apply creates or replaces objects of Istio's types.
func (p *plane) apply(text string) {
	p.t.Helper()
	for _, object := range parse(p.t, text) {
		known := p.forget(object)
		p.configs = append(p.configs, object)
		if p.run == nil {
			continue
		}
		change := p.Store().Create
		if known {
			change = p.Store().Update
		}
		if _, err := change(object); err != nil {
			p.t.Fatal(err)
		}
	}
}

// remove deletes the objects of Istio's types that have the kinds and names of those in text.
func (p *plane) remove(text string) {
	p.t.Helper()
	for _, object := range parse(p.t, text) {
		if !p.forget(object) {
			p.t.Fatalf("no %s %s", object.GroupVersionKind.Kind, object.Name)
		}
		if p.run == nil {
			continue
		}
		if err := p.Store().Delete(object.GroupVersionKind, object.Name, object.Namespace, nil); err != nil {
			p.t.Fatal(err)
		}
	}
}

// forget removes an object from the configuration of later lives. It reports whether it was there.
func (p *plane) forget(object config.Config) bool {
	before := len(p.configs)
	p.configs = slices.DeleteFunc(p.configs, func(c config.Config) bool { return c.Key() == object.Key() })
	return len(p.configs) < before
}

// rotate replaces the CA's key. Its old and its new roots are trusted.
func (p *plane) rotate() {
	p.t.Helper()
	cert, key, err := util.GenCertKeyFromOptions(util.CertOptions{TTL: 10 * certificate, Org: "cluster.local", IsCA: true, IsSelfSigned: true, RSAKeySize: 2048, IsDualUse: true})
	if err != nil {
		p.t.Fatal(err)
	}
	roots := slices.Concat(p.ca.GetCAKeyCertBundle().GetRootCertPem(), cert)
	if err := p.ca.GetCAKeyCertBundle().VerifyAndSetAll(cert, key, nil, roots, nil); err != nil {
		p.t.Fatal(err)
	}
}

// secretChanged makes the discovery server push a Secret of the cluster, as a handler of istiod's bootstrap does.
func (p *plane) secretChanged(namespace, name string) {
	p.Discovery.ConfigUpdate(&model.PushRequest{ConfigsUpdated: sets.New(model.ConfigKey{Kind: kind.Secret, Name: name, Namespace: namespace})})
}

// debug returns what istiod's debugging interface answers to path.
func (p *plane) debug(path string, answer any) error {
	recorder := httptest.NewRecorder()
	p.DiscoveryDebug.ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, path, nil))
	if recorder.Code != http.StatusOK {
		return fmt.Errorf("%s: status %d: %s", path, recorder.Code, recorder.Body)
	}
	return json.Unmarshal(recorder.Body.Bytes(), answer)
}

var errNotConnected = errors.New("istiod does not list the node")

// status returns what istiod shows of a node.
func (p *plane) status(node string) (xds.SyncStatus, error) {
	var all []xds.SyncStatus
	if err := p.debug("/debug/syncz", &all); err != nil {
		return xds.SyncStatus{}, err
	}
	for _, status := range all {
		if strings.HasPrefix(status.ProxyID, node) {
			return status, nil
		}
	}
	return xds.SyncStatus{}, errNotConnected
}

// await calls condition until it returns nil. It fails the test with the last error when patience ends.
func await(t *testing.T, condition func() error) {
	t.Helper()
	if err := until(condition); err != nil {
		t.Fatal(err)
	}
}

// until calls condition until it returns nil, and returns its last error when patience ends.
func until(condition func() error) (err error) {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = condition(); err == nil {
			return nil
		}
	}
	return fmt.Errorf("after %v: %w", patience, err)
}
