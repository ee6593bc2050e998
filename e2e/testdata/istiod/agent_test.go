package istiod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/miekg/dns"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	prometheus "github.com/prometheus/common/model"

	"istio.io/istio/pilot/pkg/xds"

	"github.com/pillion-proxy/pillion/internal/nettest"
	pillionxds "github.com/pillion-proxy/pillion/internal/xds"
)

const (
	agentUID  = 1337
	adminPort = 15000
)

// directory is where the built program is. TestMain removes it.
var directory string

// buildPillion builds the program and returns its path.
var buildPillion = sync.OnceValues(func() (string, error) {
	path := filepath.Join(directory, "pillion")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", path, "./cmd/pillion")
	cmd.Dir = "../../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building pillion: %w\n%s", err, out)
	}
	return path, nil
})

// workload is a pod of the cluster, as the injector describes it to its agent.
type workload struct{ pod, ip, account, name, app string }

// nginx is the workload of sidecar.
func nginx() workload {
	return workload{pod: sidecarPod, ip: sidecar().IP, account: "nginx", name: "nginx-deployment", app: "nginx"}
}

// pod is an injected pod of the cluster: a network namespace with pillion's rules. istiod is on its loopback interface.
type pod struct {
	*nettest.Namespace
	workload
	program string
	client  *http.Client
	kept    string   // directory for what an agent keeps
	command []string // of the agent
	log     *output
	records *receiver // of the workload
}

func newPod(t *testing.T) *pod {
	t.Helper()
	return newPodOf(t, nginx())
}

func newPodOf(t *testing.T, w workload) *pod {
	t.Helper()
	d := newPodWithoutRules(t, w)
	// Without iptables, pillion programs the rules itself.
	d.MustRun(t, "env", "PATH="+t.TempDir(), d.program, "init", "-p", "15001", "-z", "15006", "-u", strconv.Itoa(agentUID), "-m", "REDIRECT", "-i", "*", "-b", "*", "-d", "15090,15021,15020")
	return d
}

// newPodWithoutRules returns a pod that captures nothing.
func newPodWithoutRules(t *testing.T, w workload) *pod {
	t.Helper()
	nettest.RequireRoot(t)
	program, err := buildPillion()
	if err != nil {
		t.Fatal(err)
	}
	d := &pod{Namespace: nettest.New(t, "pod"), workload: w, program: program, kept: keptDirectory(t), command: []string{"agent"}, log: &output{}}
	d.AddAddress(t, "lo", netip.PrefixFrom(netip.MustParseAddr(w.ip), 32))
	transport := &http.Transport{DialContext: func(_ context.Context, network, address string) (net.Conn, error) {
		return d.Dial(network, address, patience)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	d.client = &http.Client{Transport: transport, Timeout: patience}
	return d
}

// keptDirectory returns an empty directory of the agent's. It is in memory, or the agent would not keep its key.
func keptDirectory(t *testing.T) string {
	t.Helper()
	kept, err := os.MkdirTemp("/dev/shm", "pillion-kept-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(kept) })
	if err := os.Chown(kept, agentUID, agentUID); err != nil {
		t.Fatal(err)
	}
	return kept
}

// output collects what a process writes.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// startPlaneIn starts an istiod that the pod's agent reaches, too.
func startPlaneIn(t *testing.T, d *pod, configs string, objects ...string) *plane {
	t.Helper()
	return startPlaneOf(t, []*pod{d}, configs, objects...)
}

// startPlaneOf is startPlaneIn for several pods.
func startPlaneOf(t *testing.T, pods []*pod, configs string, objects ...string) *plane {
	t.Helper()
	p := newPlane(t, configs, objects...)
	for _, d := range pods {
		p.local = append(p.local, func() net.Listener { return d.Listen(t, "tcp", "127.0.0.1:15012") })
	}
	p.start()
	t.Cleanup(p.stop)
	return p
}

// launch starts the pod's agent as Istio's injector does, with further variables as NAME=value. It does not wait for
// readiness.
func (d *pod) launch(t *testing.T, p *plane, variables ...string) *nettest.Process {
	t.Helper()
	words := append([]string{"env",
		"POD_NAME=" + d.workload.pod, "POD_NAMESPACE=default", "SERVICE_ACCOUNT=" + d.account, "INSTANCE_IP=" + d.ip, "ISTIOD_SAN=" + istiodName,
		"ISTIO_META_CLUSTER_ID=" + clusterID, "ISTIO_META_WORKLOAD_NAME=" + d.name, "ISTIO_META_INTERCEPTION_MODE=REDIRECT",
		"ISTIO_META_MESH_ID=cluster.local", "ISTIO_META_ISTIO_VERSION=" + istioVersion, "ISTIO_META_DNS_CAPTURE=true",
		`PROXY_CONFIG={"discoveryAddress":"127.0.0.1:15012"}`}, variables...)
	mount := "mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/tokens /run/secrets/istio && printf " + d.account + "-token > /run/secrets/tokens/istio-token" +
		" && cp " + p.roots + " /run/secrets/istio/root-cert.pem && chmod 0644 /run/secrets/istio/root-cert.pem && exec \"$@\""
	id := strconv.Itoa(agentUID)
	words = append(words, "unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh",
		"setpriv", "--reuid", id, "--regid", id, "--clear-groups", "--bounding-set", "-all", "--inh-caps=-all", "--no-new-privs",
		d.program)
	words = append(append(words, d.command...), "--control-plane", "auto", "--kept-configuration", d.kept, "--drain-delay", "0s")
	cmd := d.Command(0, 0, words[0], words[1:]...)
	cmd.Stdout, cmd.Stderr = d.log, d.log
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent:\n%s", d.log)
		}
	})
	return d.Start(t, cmd)
}

// get returns what the agent answers at an address of its own.
func (d *pod) get(port int, path string) (string, error) { return d.ask(http.MethodGet, port, path) }

// ask is get with another method.
func (d *pod) ask(method string, port int, path string) (string, error) {
	request, err := http.NewRequest(method, fmt.Sprintf("http://127.0.0.1:%d/%s", port, path), nil)
	if err != nil {
		return "", err
	}
	response, err := d.client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: status %d: %s", path, response.StatusCode, body)
	}
	return string(body), err
}

func (d *pod) awaitReady(t *testing.T) {
	t.Helper()
	await(t, func() error {
		_, err := d.get(15021, "healthz/ready")
		return err
	})
}

// end ends an agent in order, so that it keeps what it has.
func end(t *testing.T, agent *nettest.Process) {
	t.Helper()
	if err := agent.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code, err := agent.Wait(patience); code != 0 || err != nil {
		t.Fatalf("the agent ended with %d, error %v", code, err)
	}
}

// agentStatus returns what istiod shows of the pod, or an error if that is not SYNCED for every type.
func agentStatus(p *plane) (xds.SyncStatus, error) {
	status, err := p.status(sidecarPod + ".default")
	if err != nil {
		return status, err
	}
	for _, kind := range []pillionxds.Type{pillionxds.Clusters, pillionxds.Endpoints, pillionxds.Listeners, pillionxds.Routes, pillionxds.Names, pillionxds.ProxyConfigs} {
		if of := status.Resources[kind.URL()]; of.Sent == "" || of.Sent != of.Acked || of.LastError != "" {
			return status, fmt.Errorf("%v: %+v", kind, of)
		}
	}
	return status, nil
}

// awaitConverged waits until istiod shows the agent as SYNCED, and proxy-status finds no difference between what the two
// have.
func (d *pod) awaitConverged(t *testing.T, p *plane) {
	t.Helper()
	await(t, func() error {
		if _, err := agentStatus(p); err != nil {
			return err
		}
		return d.sameAsDump(p)
	})
}

// awaitGone waits until a change has taken out of the configuration in force what matches pattern. Before istiod has noticed the
// change, awaitConverged finds no difference.
func (d *pod) awaitGone(t *testing.T, pattern string) {
	t.Helper()
	gone := regexp.MustCompile(pattern)
	await(t, func() error {
		dump, err := d.get(adminPort, "config_dump")
		if err == nil && gone.MatchString(dump) {
			err = fmt.Errorf("%s is still configured", pattern)
		}
		return err
	})
}

// metric returns the sum of the samples of a metric.
func (d *pod) metric(name string) (float64, error) {
	text, err := d.get(15090, "stats/prometheus")
	if err != nil {
		return 0, err
	}
	parser := expfmt.NewTextParser(prometheus.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		return 0, err
	}
	family, ok := families[name]
	if !ok {
		return 0, fmt.Errorf("no metric %s", name)
	}
	sum := 0.0
	for _, m := range family.Metric {
		switch family.GetType() {
		case dto.MetricType_COUNTER:
			sum += m.Counter.GetValue()
		default:
			sum += m.Gauge.GetValue()
		}
	}
	return sum, nil
}

func TestTheAgentIsSynced(t *testing.T) {
	for name, variable := range map[string]string{"delta": "ISTIO_DELTA_XDS=true", "state of the world": "ISTIO_DELTA_XDS=false"} {
		t.Run(name, func(t *testing.T) {
			d := newPod(t)
			p := startPlaneIn(t, d, readCase(t, "01-weighted"))
			d.launch(t, p, variable)
			d.awaitReady(t)
			d.awaitConverged(t, p)
			status, err := agentStatus(p)
			if err != nil || status.IstioVersion != istioVersion || status.ProxyID != sidecarPod+".default" || status.ProxyType != "sidecar" {
				t.Errorf("istiod shows %+v, error %v", status, err)
			}
			await(t, func() error {
				expiry, err := d.metric("istio_agent_cert_expiry_seconds")
				if err == nil && expiry <= 0 {
					err = fmt.Errorf("the certificate expires in %v s", expiry)
				}
				return err
			})
			for name, want := range map[string]func(float64) bool{
				"pillion_mesh_connected":                     func(v float64) bool { return v == 1 },
				"pillion_mesh_rejected_total":                func(v float64) bool { return v == 0 },
				"pillion_mesh_resources":                     func(v float64) bool { return v > 20 },
				"envoy_cluster_manager_cds_update_success":   func(v float64) bool { return v > 0 },
				"envoy_listener_manager_lds_update_success":  func(v float64) bool { return v > 0 },
				"envoy_cluster_manager_cds_update_rejected":  func(v float64) bool { return v == 0 },
				"envoy_listener_manager_lds_update_rejected": func(v float64) bool { return v == 0 },
			} {
				if v, err := d.metric(name); err != nil || !want(v) {
					t.Errorf("%s %v, error %v", name, v, err)
				}
			}
			explanation, err := d.get(15000, "explain?url=http://reviews:9080/x")
			for _, part := range []string{`"destination":"198.51.100.200:9080"`, `"name":"reviews.default.svc.cluster.local:9080"`, `"share":"90%"`, `"share":"10%"`,
				`"origin":"/apis/networking.istio.io/v1/namespaces/default/virtual-service/reviews"`, `"result":"sent to outbound|9080|v1|reviews`} {
				if err != nil || !strings.Contains(explanation, part) {
					t.Errorf("%s is not in %s, error %v", part, explanation, err)
				}
			}
		})
	}
}

func TestARestartedAgentIsReadyWhileIstiodIsAway(t *testing.T) {
	d := newPod(t)
	p := startPlaneIn(t, d, readCase(t, "01-weighted"))
	first := d.launch(t, p)
	d.awaitReady(t)
	d.awaitConverged(t, p)
	before, err := d.get(adminPort, "config_dump")
	if err != nil {
		t.Fatal(err)
	}
	end(t, first)
	p.stop()

	second := d.launch(t, p)
	d.awaitReady(t) // with what was kept
	after, err := d.get(adminPort, "config_dump")
	if err != nil {
		t.Fatal(err)
	}
	if err := sameResources(before, after); err != nil {
		t.Error(err)
	}
	p.apply(readCase(t, "08-serviceentry"))
	p.start()
	d.awaitConverged(t, p)
	end(t, second)
	p.stop()

	d.kept = keptDirectory(t) // an agent that kept nothing waits
	d.launch(t, p)
	await(t, func() error {
		if _, err := d.get(15021, "healthz/ready"); err == nil || !strings.Contains(err.Error(), "configuration") {
			return fmt.Errorf("readiness without a configuration: %v", err)
		}
		return nil
	})
	p.start()
	d.awaitReady(t)
}

func TestAnAgentConvergesWhenIstiodRestartsUnderChanges(t *testing.T) {
	d := newPod(t)
	p := startPlaneIn(t, d, "")
	agent := d.launch(t, p)
	d.awaitReady(t)
	var hosts []string
	for range 5 {
		hosts = append(hosts, p.churn(t.Context(), 100)...)
		p.stop()
		for _, host := range hosts[:len(hosts)/2] {
			p.remove(serviceEntry(strings.TrimSuffix(host, ".example.test")))
		}
		hosts = nil
		p.start()
	}
	d.awaitConverged(t, p)
	select {
	case <-agent.Exited():
		t.Error("the agent has ended")
	default:
	}
}

// TestARejectedListenerLeavesTheLastGoodOne uses an EnvoyFilter whose network filter the agent cannot carry out.
func TestARejectedListenerLeavesTheLastGoodOne(t *testing.T) {
	d := newPod(t)
	p := startPlaneIn(t, d, "")
	d.launch(t, p)
	d.awaitReady(t)
	d.awaitConverged(t, p)
	p.apply(rateLimit)
	await(t, func() error {
		status, err := p.status(sidecarPod + ".default")
		if err != nil {
			return err
		}
		if shown := status.Resources[pillionxds.Listeners.URL()].LastError; !strings.Contains(shown, "virtualInbound") || !strings.Contains(shown, "ratelimit") {
			return fmt.Errorf("istiod shows the error %q", shown)
		}
		return nil
	})
	dump, err := d.get(adminPort, "config_dump")
	if err != nil {
		t.Fatal(err)
	}
	names, rejected := listenersOf(t, dump)
	if !slices.Contains(names, "virtualInbound") || !slices.Equal(rejected, []string{"virtualInbound"}) {
		t.Errorf("listeners %q, rejected %q", names, rejected)
	}
	d.awaitReady(t)
	p.remove(rateLimit)
	d.awaitConverged(t, p)
}

const rateLimit = `apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: ratelimit, namespace: default}
spec:
  workloadSelector: {labels: {app: nginx}}
  configPatches:
  - applyTo: NETWORK_FILTER
    match: {context: SIDECAR_INBOUND, listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager}}}}
    patch:
      operation: INSERT_BEFORE
      value:
        name: envoy.filters.network.local_ratelimit
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit
          statPrefix: connections
          tokenBucket: {maxTokens: 1, fillInterval: 1s}
`

// The agent answers istiod's name table, as the workload asks: over the resolver's port, by short and full names. A restarted
// agent does so while istiod is away.
func TestTheAgentResolvesIstiodsHosts(t *testing.T) {
	d := newPod(t)
	p := startPlaneIn(t, d, readCase(t, "01-weighted"))
	variables := []string{"PILLION_DNS_CAPTURE=true", "PILLION_DNS_SERVERS=198.51.100.53", "PILLION_CLUSTER_DOMAIN=cluster.local"}
	first := d.launch(t, p, variables...)
	d.awaitReady(t)
	d.checkNames(t)
	d.awaitConverged(t, p)
	end(t, first)
	p.stop()
	d.launch(t, p, variables...)
	d.awaitReady(t)
	d.checkNames(t)
}

// checkNames asks for names of the service reviews.
func (d *pod) checkNames(t *testing.T) {
	t.Helper()
	await(t, func() error {
		hosts, err := d.metric("pillion_dns_mesh_hosts")
		if err == nil && hosts == 0 {
			err = errors.New("no hosts")
		}
		return err
	})
	for _, name := range []string{"reviews.", "reviews.default.", "reviews.default.svc.", "reviews.default.svc.cluster.local.", "Reviews.default."} {
		for kind, want := range map[uint16]string{dns.TypeA: "198.51.100.200", dns.TypeAAAA: ""} {
			conn, err := d.Dial("tcp", "127.0.0.1:15053", patience)
			if err != nil {
				t.Fatal(err)
			}
			client := dns.Client{Net: "tcp", Timeout: patience}
			answer, _, err := client.ExchangeWithConn(new(dns.Msg).SetQuestion(name, kind), &dns.Conn{Conn: conn})
			conn.Close()
			if err != nil || answer.Rcode != dns.RcodeSuccess || !answer.Authoritative || len(answer.Answer) != min(len(want), 1) ||
				want != "" && !strings.Contains(answer.Answer[0].String(), want) {
				t.Errorf("%s: %v, error %v", name, answer, err)
			}
		}
	}
}
