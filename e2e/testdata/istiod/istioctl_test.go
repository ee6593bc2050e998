package istiod

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	admin "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protojson"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"istio.io/istio/istioctl/pkg/authz"
	"istio.io/istio/istioctl/pkg/cli"
	"istio.io/istio/istioctl/pkg/describe"
	"istio.io/istio/istioctl/pkg/proxyconfig"
	"istio.io/istio/istioctl/pkg/proxystatus"
	"istio.io/istio/istioctl/pkg/util/configdump"
	"istio.io/istio/istioctl/pkg/writer/compare"
	kubelib "istio.io/istio/pkg/kube"
)

// istioctl runs a command of istioctl in a cluster in memory, against the pod's agent and istiod.
func (d *pod) istioctl(p *plane, command func(cli.Context) *cobra.Command, arguments ...string) (string, error) {
	cluster := &operator{Context: cli.NewFakeContext(&cli.NewFakeContextOption{Namespace: "default", IstioNamespace: "istio-system"}), pod: d, plane: p}
	c := command(cluster)
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&out)
	c.SetArgs(arguments)
	c.SilenceUsage = true
	err := c.Execute()
	return out.String(), err
}

// operator is the context of istioctl's commands.
type operator struct {
	cli.Context
	pod   *pod
	plane *plane
}

func (o *operator) CLIClient() (kubelib.CLIClient, error) { return o.CLIClientWithRevision("") }

func (o *operator) CLIClientWithRevision(revision string) (kubelib.CLIClient, error) {
	return &cluster{CLIClient: o.plane.KubeClient().(kubelib.CLIClient), pod: o.pod}, nil
}

// cluster is the API server, which forwards to the pod's ports.
type cluster struct {
	kubelib.CLIClient
	pod *pod
}

func (c *cluster) EnvoyDoWithPort(_ context.Context, _, _, method, path string, port int) ([]byte, error) {
	text, err := c.pod.ask(method, port, path)
	return []byte(text), err
}

func (c *cluster) CreatePerRPCCredentials(context.Context, string, string, []string, int64) (credentials.PerRPCCredentials, error) {
	return bearer("istioctl-token"), nil
}

// GetIstioPods honours the selector by name, unlike the API server in memory.
func (c *cluster) GetIstioPods(ctx context.Context, namespace string, options meta.ListOptions) ([]core.Pod, error) {
	name, ok := strings.CutPrefix(options.FieldSelector, "metadata.name=")
	if !ok {
		return c.CLIClient.GetIstioPods(ctx, namespace, options)
	}
	pod, err := c.Kube().CoreV1().Pods(namespace).Get(ctx, name, meta.GetOptions{})
	if err != nil {
		return nil, err
	}
	return []core.Pod{*pod}, nil
}

// bearer is a token for each call.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (b bearer) RequireTransportSecurity() bool { return true }

// sameAsDump returns an error if istioctl's comparison finds a difference between the agent's dump and istiod's.
func (d *pod) sameAsDump(p *plane) error {
	mine, err := d.get(adminPort, "config_dump")
	if err != nil {
		return err
	}
	var theirs json.RawMessage
	if err := p.debug("/debug/config_dump?proxyID="+sidecarPod+".default", &theirs); err != nil {
		return err
	}
	var out strings.Builder
	comparator, err := compare.NewComparator(&out, map[string][]byte{"istiod": theirs}, []byte(mine))
	if err != nil {
		return err
	}
	if err := comparator.Diff(); err != nil {
		return err
	}
	for _, kind := range []string{"Clusters", "Listeners", "Routes"} {
		if !strings.Contains(out.String(), kind+" Match") {
			return fmt.Errorf("istioctl proxy-status: %s", out.String())
		}
	}
	return nil
}

// sameResources returns an error if two dumps differ in their clusters, listeners or routes.
func sameResources(a, b string) error {
	var out strings.Builder
	comparator, err := compare.NewComparator(&out, map[string][]byte{"": []byte(a)}, []byte(b))
	if err != nil {
		return err
	}
	if err := comparator.Diff(); err != nil {
		return err
	}
	for _, kind := range []string{"Clusters", "Listeners", "Routes"} {
		if !strings.Contains(out.String(), kind+" Match") {
			return fmt.Errorf("the dumps differ: %s", out.String())
		}
	}
	return nil
}

// listenersOf returns the names of the listeners in a dump, and of those with a rejected version.
func listenersOf(t *testing.T, dump string) (names, rejected []string) {
	t.Helper()
	var wrapper configdump.Wrapper
	if err := json.Unmarshal([]byte(dump), &wrapper); err != nil {
		t.Fatal(err)
	}
	listeners, err := wrapper.GetListenerConfigDump()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range listeners.DynamicListeners {
		if l.ActiveState != nil {
			names = append(names, l.Name)
		}
		if l.ErrorState != nil {
			rejected = append(rejected, l.Name)
		}
	}
	slices.Sort(names)
	return names, rejected
}

// Texts in the output of istioctl that differ from run to run.
var (
	timePattern   = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ|\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d \w+`)
	serialPattern = regexp.MustCompile(`\b[0-9a-f]{24,40}\b`)
	agePattern    = regexp.MustCompile(`\(\d+s\)`)
	spacePattern  = regexp.MustCompile(`(\S) {2,}`)
)

// steady replaces what differs from run to run.
func steady(text string) string {
	text = timePattern.ReplaceAllString(text, "TIME")
	text = serialPattern.ReplaceAllString(text, "SERIAL")
	text = agePattern.ReplaceAllString(text, "(AGE)")
	// protojson puts one or two spaces after a colon, and describe lists policies in any order.
	text = strings.ReplaceAll(text, ":  ", ": ")
	text = strings.ReplaceAll(text, "ns[default]-policy[deny]-rule[1], ns[default]-policy[deny]-rule[0]", "ns[default]-policy[deny]-rule[0], ns[default]-policy[deny]-rule[1]")
	return spacePattern.ReplaceAllString(text, "$1  ")
}

func TestIstioctlReadsTheAgent(t *testing.T) {
	d := newPod(t)
	configs := readCase(t, "01-weighted") + "\n---\n" + readCase(t, "06-authz")
	p := startPlaneIn(t, d, configs, configs) // istiod's configuration and, for istioctl, that of the API server
	d.launch(t, p)
	d.awaitReady(t)
	d.awaitConverged(t, p)
	var all strings.Builder
	for _, test := range []struct {
		name      string
		command   func(cli.Context) *cobra.Command
		arguments []string
	}{
		{"proxy-config cluster", proxyconfig.ProxyConfig, []string{"cluster", sidecarPod}},
		{"proxy-config listener", proxyconfig.ProxyConfig, []string{"listener", sidecarPod}},
		{"proxy-config route", proxyconfig.ProxyConfig, []string{"route", sidecarPod}},
		{"proxy-config endpoint", proxyconfig.ProxyConfig, []string{"endpoint", sidecarPod}},
		{"proxy-config secret", proxyconfig.ProxyConfig, []string{"secret", sidecarPod}},
		{"proxy-config bootstrap", proxyconfig.ProxyConfig, []string{"bootstrap", sidecarPod}},
		{"proxy-status", proxystatus.StableXdsStatusCommand, []string{"--xds-address", p.address}},
		{"proxy-status -v 1", proxystatus.StableXdsStatusCommand, []string{"-v", "1", "--xds-address", p.address}},
		{"proxy-status POD", proxystatus.StableXdsStatusCommand, []string{sidecarPod, "--xds-address", p.address}},
		{"experimental authz check", authz.AuthZ, []string{"check", sidecarPod}},
		{"experimental describe pod", describe.Cmd, []string{"pod", sidecarPod}},
	} {
		out, err := d.istioctl(p, test.command, test.arguments...)
		if err != nil {
			t.Errorf("istioctl %s: %v", test.name, err)
		}
		fmt.Fprintf(&all, "## %s\n%s", test.name, steady(out))
	}
	compareGolden(t, "testdata/istioctl.golden", all.String())
	out, err := d.istioctl(p, proxyconfig.ProxyConfig, "all", sidecarPod)
	for _, part := range []string{"Istio Version:", "cluster/outbound|", "listener/virtualInbound", "route/9080", "secret/default", "endpoint/203.0.113.4:8080"} {
		if err != nil || !strings.Contains(out, part) {
			t.Errorf("istioctl proxy-config all, error %v: no %q in\n%s", err, part, out)
		}
	}
	d.changeLogLevels(t, p)
}

// istioctl shows the endpoints of routed requests as they are used: one that is ejected, priorities and weights, and what was
// counted for each.
func TestIstioctlShowsTheUseOfEndpoints(t *testing.T) {
	outliers := "trafficPolicy: {outlierDetection: {consecutive5xxErrors: 2, interval: 1s, baseEjectionTime: 300s, maxEjectionPercent: 100}, "
	d, _, p := newReader(t, strings.Replace(bookinfo, "trafficPolicy: {", outliers, 1))
	conn, err := d.Dial("tcp", "198.51.100.200:9080", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	const v1, v2 = "outbound|9080|v1|reviews.default.svc.cluster.local", "outbound|9080|v2|reviews.default.svc.cluster.local"
	for i, q := range []question{{"GET", "http://reviews:9080/x", nil}, {"GET", "http://reviews:9080/reviews/fails", []string{"end-user: jason"}}} {
		if status, _, err := q.send(conn, in, fmt.Sprint(i)); err != nil || status != []string{"200", "503"}[i] {
			t.Fatalf("%v: %s, %v", &q, status, err)
		}
	}
	out, err := d.istioctl(p, proxyconfig.ProxyConfig, "endpoint", sidecarPod, "--port", "8080")
	for _, want := range []string{"203.0.113.6:8080  HEALTHY  OK  " + v1 + "\n", "203.0.113.7:8080  HEALTHY  FAILED  " + v2 + "\n"} {
		if err != nil || !strings.Contains(steady(out), want) {
			t.Errorf("istioctl proxy-config endpoint, %v: %q is not in\n%s", err, want, steady(out))
		}
	}
	text, err := d.get(adminPort, "clusters?format=json")
	var answer admin.Clusters
	if err == nil {
		err = protojson.Unmarshal([]byte(text), &answer)
	}
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{v1: "cx_active=1 cx_connect_fail=0 rq_active=0 rq_error=0 rq_success=1 rq_total=1", v2: "cx_connect_fail=0 rq_active=0 rq_error=2 rq_success=0 rq_total=2"} {
		i := slices.IndexFunc(answer.ClusterStatuses, func(c *admin.ClusterStatus) bool { return c.Name == name })
		if i < 0 || len(answer.ClusterStatuses[i].HostStatuses) != 1 {
			t.Fatalf("no host of %s in %s", name, text)
		}
		h := answer.ClusterStatuses[i].HostStatuses[0]
		var stats []string
		for _, s := range h.Stats {
			if name == v1 || s.Name != "cx_active" { // the connection with the response that was not taken is closed
				stats = append(stats, fmt.Sprint(s.Name, "=", s.Value))
			}
		}
		if got := strings.Join(stats, " "); got != want || h.HealthStatus.FailedOutlierCheck != (name == v2) || h.Weight != 1 || h.Priority != 0 {
			t.Errorf("%s: %s, %v; want %s", name, got, h, want)
		}
	}
}

// places is a service whose endpoints are in other places. Those with the labels of the caller come first.
const places = `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: places, namespace: default}
spec:
  hosts: [places.test]
  ports: [{number: 9080, name: http, protocol: HTTP}]
  resolution: STATIC
  location: MESH_EXTERNAL
  endpoints:
  - {address: 203.0.113.6, ports: {http: 8080}, labels: {app: nginx}, locality: near/a/b}
  - {address: 203.0.113.7, ports: {http: 8080}, labels: {app: other}, locality: far/c, weight: 3}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: places, namespace: default}
spec:
  host: places.test
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 2, interval: 1s, baseEjectionTime: 300s, maxEjectionPercent: 100}
    loadBalancer: {localityLbSetting: {enabled: true, failoverPriority: [app]}}
    connectionPool: {tcp: {maxConnections: 11}, http: {http1MaxPendingRequests: 12, http2MaxRequests: 13, maxRetries: 14}}
`

// istioctl shows priorities, localities, weights and limits as it shows them of Envoy, and who takes over when the endpoints of the
// first priority are ejected.
func TestIstioctlShowsPrioritiesAndLimits(t *testing.T) {
	d, _, p := newReader(t, places)
	const cluster = "outbound|9080||places.test"
	host := func(address string) *admin.HostStatus {
		out, err := d.istioctl(p, proxyconfig.ProxyConfig, "endpoint", sidecarPod, "--cluster", cluster, "-o", "json")
		if err != nil {
			t.Fatal(err)
		}
		var answer admin.Clusters
		if err := protojson.Unmarshal([]byte(`{"cluster_statuses": `+out+"}"), &answer); err != nil || len(answer.ClusterStatuses) != 1 {
			t.Fatalf("error %v:\n%s", err, out)
		}
		of := answer.ClusterStatuses[0]
		want := "priority:DEFAULT max_connections:11 max_pending_requests:12 max_requests:13 max_retries:14"
		if l := of.CircuitBreakers.GetThresholds(); len(l) != 1 ||
			fmt.Sprintf("priority:%v max_connections:%d max_pending_requests:%d max_requests:%d max_retries:%d", l[0].Priority, l[0].MaxConnections.GetValue(),
				l[0].MaxPendingRequests.GetValue(), l[0].MaxRequests.GetValue(), l[0].MaxRetries.GetValue()) != want {
			t.Fatalf("the limits are %v, want %s", l, want)
		}
		i := slices.IndexFunc(of.HostStatuses, func(h *admin.HostStatus) bool { return h.Address.GetSocketAddress().Address == address })
		if i < 0 || len(of.HostStatuses) != 2 {
			t.Fatalf("no endpoint %s in\n%s", address, out)
		}
		return of.HostStatuses[i]
	}
	near, far := host("203.0.113.6"), host("203.0.113.7")
	if near.Priority != 0 || near.Weight != 1 || near.Locality.Region != "near" || near.Locality.Zone != "a" || near.Locality.SubZone != "b" {
		t.Errorf("the endpoint of the caller's labels is %v", near)
	}
	if far.Priority != 1 || far.Weight != 3 || far.Locality.Region != "far" || far.Locality.Zone != "c" {
		t.Errorf("the other endpoint is %v", far)
	}
	conn, err := d.Dial("tcp", "203.0.113.6:9080", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	for i, want := range []string{"503", "503", "200", "200"} {
		path := map[bool]string{true: "/fails", false: "/"}[want == "503"]
		q := question{"GET", "http://places.test:9080" + path, nil}
		if status, _, err := q.send(conn, in, fmt.Sprint("place-", i)); err != nil || status != want {
			t.Fatalf("request %d: %s, %v; want %s", i, status, err, want)
		}
	}
	if near, far := host("203.0.113.6"), host("203.0.113.7"); !near.HealthStatus.FailedOutlierCheck || far.HealthStatus.FailedOutlierCheck {
		t.Errorf("after failures: %v, %v", near, far)
	}
	await(t, func() error {
		for i, address := range []string{"203.0.113.6", "203.0.113.6", "203.0.113.7", "203.0.113.7"} {
			if want := fmt.Sprintf("place-%d %s %s - %s:8080", i, []string{"503", "200"}[i/2], cluster, address); !strings.Contains(strings.ReplaceAll(d.log.String(), " default ", " - "), want) {
				return fmt.Errorf("the access log has no line with %q", want)
			}
		}
		return nil
	})
}

// changeLogLevels has istioctl change the log levels and restore them.
func (d *pod) changeLogLevels(t *testing.T, p *plane) {
	for _, test := range []struct {
		arguments []string
		want      []string
	}{
		{[]string{"--level", "error"}, []string{"http: error", "router: error"}},
		{[]string{"--level", "http:debug,rbac:debug"}, []string{"http: debug", "rbac: debug"}},
		{[]string{"-r", "--level="}, []string{"http: info", "upstream: info"}}, // istioctl keeps the levels in a variable
	} {
		arguments := append([]string{"log", sidecarPod}, test.arguments...)
		out, err := d.istioctl(p, proxyconfig.ProxyConfig, arguments...)
		for _, part := range test.want {
			if err != nil || !strings.Contains(out, part) {
				t.Errorf("istioctl proxy-config %v, error %v: no %q in\n%s", arguments, err, part, out)
			}
		}
	}
}
