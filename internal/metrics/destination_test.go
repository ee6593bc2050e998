package metrics

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

var (
	clusterIP = netip.MustParseAddrPort("10.96.0.10:9080")
	external  = netip.MustParseAddrPort("203.0.113.7:80")
)

func TestDestinationService(t *testing.T) {
	const passthrough, unknown = "PassthroughCluster", "unknown"
	for _, c := range []struct {
		host, service, name, namespace string
		to                             netip.AddrPort
	}{
		// All spellings of a Service have one name.
		{"ratings.prod.svc.cluster.local", "ratings.prod.svc.cluster.local", "ratings", "prod", external},
		{"ratings.prod.svc.cluster.local:9080", "ratings.prod.svc.cluster.local", "ratings", "prod", external},
		{"Ratings.PROD.svc.Cluster.Local.:80", "ratings.prod.svc.cluster.local", "ratings", "prod", external},
		{"ratings.prod.svc:9080", "ratings.prod.svc.cluster.local", "ratings", "prod", external},
		{"ratings.prod:9080", "ratings.prod.svc.cluster.local", "ratings", "prod", clusterIP},
		{"ratings.prod", "ratings.prod.svc.cluster.local", "ratings", "prod", netip.MustParseAddrPort("100.64.7.7:80")},
		{"ratings.prod", "ratings.prod.svc.cluster.local", "ratings", "prod", netip.MustParseAddrPort("34.118.224.9:80")},
		{"ratings.prod", "ratings.prod.svc.cluster.local", "ratings", "prod", netip.MustParseAddrPort("[fd00::1]:80")},
		{"ratings", "ratings.shop.svc.cluster.local", "ratings", "shop", external},
		{"RATINGS:9080", "ratings.shop.svc.cluster.local", "ratings", "shop", external},
		{"ratings.shop", "ratings.shop.svc.cluster.local", "ratings", "shop", external},
		// Pods of stateful sets.
		{"web-0.web.prod.svc.cluster.local:80", "web.prod.svc.cluster.local", "web", "prod", external},
		{"web-0.web.prod.svc", "web.prod.svc.cluster.local", "web", "prod", external},
		{"web-0.web.shop", "web.shop.svc.cluster.local", "web", "shop", clusterIP},
		{"web1.web", "web1.web.svc.cluster.local", "web1", "web", clusterIP},
		{"web-a.web", "web-a.web.svc.cluster.local", "web-a", "web", clusterIP},
		{"web-10.web", "web.shop.svc.cluster.local", "web", "shop", clusterIP},
		{"x.web-0.web.prod.svc.cluster.local", "x.web-0.web.prod.svc.cluster.local", passthrough, unknown, clusterIP},
		// Services of several clusters.
		{"ratings.prod.svc.clusterset.local", "ratings.prod.svc.clusterset.local", "ratings", "prod", clusterIP},
		// Names outside the cluster.
		{"ratings.prod", "ratings.prod", passthrough, unknown, external},
		{"www.Example.com:8080", "www.example.com", passthrough, unknown, external},
		{"www.example.com", "www.example.com", passthrough, unknown, clusterIP},
		{"printer.local", "printer.local", passthrough, unknown, clusterIP},
		{"wiki.corp", "wiki.corp", passthrough, unknown, clusterIP},
		{"ratings.", "ratings", passthrough, unknown, clusterIP},
		{"ratings.prod.svc.", "ratings.prod.svc", passthrough, unknown, clusterIP},
		{"ratings.prod.svc.other.example", "ratings.prod.svc.other.example", passthrough, unknown, clusterIP},
		{"svc.cluster.local", "svc.cluster.local", passthrough, unknown, clusterIP},
		{"prod.svc.cluster.local", "prod.svc.cluster.local", passthrough, unknown, clusterIP},
		{"my_host", "my_host", passthrough, unknown, clusterIP},
		{"7up", "7up", passthrough, unknown, clusterIP},
		{"-a", "-a", passthrough, unknown, clusterIP},
		{"a-", "a-", passthrough, unknown, clusterIP},
		{"a.-b.svc", "a.-b.svc", passthrough, unknown, clusterIP},
		{strings.Repeat("a", 63), strings.Repeat("a", 63) + ".shop.svc.cluster.local", strings.Repeat("a", 63), "shop", clusterIP},
		{strings.Repeat("a.", 126) + "b", strings.Repeat("a.", 126) + "b", passthrough, unknown, clusterIP},
		{"localhost:8080", "localhost", passthrough, unknown, external},
		// Addresses and invalid hosts.
		{"203.0.113.7:80", unknown, passthrough, unknown, external},
		{"203.0.113.7", unknown, passthrough, unknown, external},
		{"[2001:db8::7]:80", unknown, passthrough, unknown, external},
		{"", unknown, passthrough, unknown, external},
		{".a", unknown, passthrough, unknown, external},
		{"a..b", unknown, passthrough, unknown, external},
		{strings.Repeat("a", 64) + ".example", unknown, passthrough, unknown, external},
		{strings.Repeat("a.", 126) + "bc", unknown, passthrough, unknown, external},
		{"a b", unknown, passthrough, unknown, external},
		{strings.Repeat("a.", 125) + "prod.svc", unknown, passthrough, unknown, external},
	} {
		m := New(pod, Options{})
		r := request(connection(flow.NewTable(m), flow.Outbound, flow.HTTP11), c.host, 200)
		r.OriginalDestination = c.to
		m.Closed(r)
		if got := value(t, m, "istio_requests_total", "destination_service="+c.service, "destination_service_name="+c.name,
			"destination_service_namespace="+c.namespace); got != 1 {
			t.Errorf("%q at %v: %v", c.host, c.to, gathered(t, m)["istio_requests_total"])
		}
	}
}

func TestDestinationServiceInbound(t *testing.T) {
	const passthrough = "InboundPassthroughCluster"
	for _, c := range []struct{ host, service, name string }{
		{"reviews:9080", "reviews.shop.svc.cluster.local", "reviews"},
		{"reviews.shop", "reviews.shop.svc.cluster.local", "reviews"},
		{"reviews.shop.svc", "reviews.shop.svc.cluster.local", "reviews"},
		{"reviews.shop.svc.cluster.local:80", "reviews.shop.svc.cluster.local", "reviews"},
		{"example.com", "example.com", passthrough}, // at the workload's own address, although that is private
		{"198.51.100.7:9080", "unknown", passthrough},
	} {
		m := New(pod, Options{})
		r := request(connection(flow.NewTable(m), flow.Inbound, flow.HTTP11), c.host, 200)
		r.OriginalDestination = clusterIP
		m.Closed(r)
		if got := value(t, m, "istio_requests_total", "destination_service="+c.service, "destination_service_name="+c.name,
			"destination_service_namespace=shop"); got != 1 {
			t.Errorf("%q: %v", c.host, gathered(t, m)["istio_requests_total"])
		}
	}
}

// A cluster may have another domain, and an agent outside a cluster has no namespace.
func TestDestinationServiceInOtherEnvironments(t *testing.T) {
	laptop := pod
	laptop.Namespace = podinfo.Unknown
	for _, c := range []struct {
		pod                   podinfo.Pod
		domain, host, service string
	}{
		{pod, "k8s.example", "ratings", "ratings.shop.svc.k8s.example"},
		{pod, "k8s.example", "ratings.prod.svc.k8s.example:80", "ratings.prod.svc.k8s.example"},
		{pod, "k8s.example", "web-0.web.prod.svc", "web.prod.svc.k8s.example"},
		{pod, "k8s.example", "ratings.prod.svc.cluster.local", "ratings.prod.svc.cluster.local"},
		{laptop, "", "ratings", "ratings"},
		{laptop, "", "ratings.prod", "ratings.prod"},
		{laptop, "", "ratings.prod.svc", "ratings.prod.svc.cluster.local"},
	} {
		m := New(c.pod, Options{ClusterDomain: c.domain})
		r := request(connection(flow.NewTable(m), flow.Outbound, flow.HTTP11), c.host, 200)
		r.OriginalDestination = clusterIP
		m.Closed(r)
		if got := value(t, m, "istio_requests_total", "destination_service="+c.service); got != 1 {
			t.Errorf("%q: %v", c.host, gathered(t, m)["istio_requests_total"])
		}
	}
}

// The series of a Service do not depend on how its clients spell it.
func TestSpellingsOfAServiceShareItsSeries(t *testing.T) {
	m := New(pod, Options{})
	c := connection(flow.NewTable(m), flow.Outbound, flow.HTTP11)
	c.OriginalDestination = clusterIP
	for _, host := range []string{"ratings", "ratings:9080", "Ratings.shop", "ratings.shop.svc", "ratings.shop.svc.cluster.local.", "ratings"} {
		r := request(c, host, 200)
		r.OriginalDestination = clusterIP
		m.Closed(r)
	}
	family := gathered(t, m)["istio_requests_total"]
	if len(family.Metric) != 1 || family.Metric[0].GetCounter().GetValue() != 6 {
		t.Errorf("%v", family)
	}
}

func TestValidHosts(t *testing.T) {
	n := naming{namespace: []byte("shop"), domain: "cluster.local"}
	for _, host := range []string{"a", "a.example", "A.Example:80", "x_y-z.example.", "203.0.113.7", "203.0.113.7:65535", "1:1",
		"[2001:db8::7]", "[::ffff:203.0.113.7]:8080", "[::]", strings.Repeat("a.", 126) + "b.:65535"} {
		if _, kind := n.destination(nil, []byte(host), clusterIP.Addr()); kind == invalidHost {
			t.Errorf("%q is rejected", host)
		}
	}
	for _, host := range []string{":80", "a:", "a:0", "a:65536", "a:99999999999999999999", "a:b", "a:-1", "a b", "a/b", `a"b`, "a\nb",
		"a\x00", "é.example", "a@b", "2001:db8::7", "[]:80", "[:]", "[", "[a", "a]", "[g::]", "[::1]x", "[fe80::1%eth0]", "a,b", ".", "..", "a..b",
		".a", strings.Repeat("a", 64), strings.Repeat("a.", 126) + "bc", strings.Repeat("a.", 126) + "b..", strings.Repeat("a", 300)} {
		if name, kind := n.destination(nil, []byte(host), clusterIP.Addr()); kind != invalidHost || len(name) > 0 {
			t.Errorf("%q is accepted as %q, kind %d", host, name, kind)
		}
	}
}

// For any Host field, the labels consist of plain characters, and a name is one that DNS could have.
func FuzzDestinationService(f *testing.F) {
	for _, host := range []string{"reviews.shop.svc.cluster.local:9080", "[2001:db8::7]:80", "a:b:c", ".", "[]", "A\xffb", "-.svc",
		"web-0.web", "a.b.svc", strings.Repeat("a", 63) + "." + strings.Repeat("b", 63) + ".svc:1"} {
		f.Add([]byte(host), true)
		f.Add([]byte(host), false)
	}
	plain := regexp.MustCompile(`^[a-z0-9_-]+(\.[a-z0-9_-]+)*$`)
	domains := []string{"cluster.local", strings.Repeat("long.", 30) + "example"}
	f.Fuzz(func(t *testing.T, host []byte, inbound bool) {
		for _, domain := range domains {
			n := naming{inbound: inbound, namespace: []byte("shop"), domain: domain}
			before := string(host)
			name, kind := n.destination([]byte("kept:"), host, clusterIP.Addr())
			text, found := strings.CutPrefix(string(name), "kept:")
			named := kind == otherHost || kind == kubernetesService
			if !found || string(host) != before || named != (text != "") || named && (!plain.MatchString(text) || len(text) > maxDestination) {
				t.Errorf("%q becomes %q, kind %d", host, name, kind)
			}
			if kind == kubernetesService {
				again, second := n.destination(nil, []byte(text+":80"), external.Addr())
				if string(again) != text || second != kubernetesService {
					t.Errorf("%q becomes %q, and then %q", host, text, again)
				}
			}
		}
	})
}

// labelsOf returns the values of a label in the series of a metric.
func labelsOf(family *dto.MetricFamily, name string) map[string]bool {
	values := make(map[string]bool)
	for _, metric := range family.GetMetric() {
		for _, l := range metric.Label {
			if l.GetName() == name {
				values[l.GetValue()] = true
			}
		}
	}
	return values
}

// 1,200 Host fields that a server answers are what one client can send in a second. They take a small part of the series,
// and the series of the workload's own service are counted even if the others came first.
func TestJunkHostsTakeFewSeries(t *testing.T) {
	for _, junk := range []string{"junk%d.example", "junk%d", "junk%d.shop.svc.cluster.local"} {
		m := New(pod, Options{})
		in := connection(flow.NewTable(m), flow.Inbound, flow.HTTP11)
		for i := range 1200 {
			m.Closed(request(in, fmt.Sprintf(junk, i), 200))
		}
		m.Closed(request(in, "reviews:9080", 200))
		out := text(t, m)
		if n := strings.Count(out, "\n"); n > 2500 || len(out) > 2<<20 {
			t.Errorf("%s: %d lines, %d bytes", junk, n, len(out))
		}
		if hosts := labelsOf(gathered(t, m)["istio_requests_total"], "destination_service"); len(hosts) > 30 || !hosts["reviews.shop.svc.cluster.local"] || !hosts["unknown"] {
			t.Errorf("%s: %d hosts", junk, len(hosts))
		}
	}
}

// Names outside the cluster do not take the places of Services.
func TestOtherHostsLeaveRoomForServices(t *testing.T) {
	m := New(pod, Options{})
	c := connection(flow.NewTable(m), flow.Outbound, flow.HTTP11)
	for i := range 100 {
		m.Closed(request(c, fmt.Sprintf("host%d.example", i), 200))
	}
	for i := range 30 {
		m.Closed(request(c, fmt.Sprintf("service%d", i), 200))
	}
	hosts := labelsOf(gathered(t, m)["istio_requests_total"], "destination_service")
	for i := range 30 {
		if name := fmt.Sprintf("service%d.shop.svc.cluster.local", i); !hosts[name] {
			t.Errorf("no series of %s", name)
		}
	}
	if others := len(hosts) - 31; others < 10 || others > 30 {
		t.Errorf("%d hosts that are not Services", others)
	}
}

// docs/observability.md has these numbers.
func TestDefaultBudget(t *testing.T) {
	if got, want := budgetOf(DefaultMaxSeries, flow.Inbound), (budget{42, 21, 21, 21}); got != want {
		t.Errorf("inbound: %+v, want %+v", got, want)
	}
	if got, want := budgetOf(DefaultMaxSeries, flow.Outbound), (budget{64, 64, 21, 32}); got != want {
		t.Errorf("outbound: %+v, want %+v", got, want)
	}
}
