package terminal_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/configview"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

var update = flag.Bool("update", false, "write the golden files")

const virtualService = "/apis/networking.istio.io/v1/namespaces/shop/virtual-service/web"

// views has an object of each kind, in each state, with text that must not reach the terminal as it is.
func views() map[string]configview.View {
	at := time.Date(2026, 2, 3, 4, 5, 6, 0, time.Local)
	finding := configview.Finding{Class: "traffic", Type: "RDS", Resource: "80", Path: "virtual_hosts[1].x", Problem: "not supported", Origin: virtualService}
	hosts := []configview.Endpoint{
		{Cluster: "outbound|80||web", Address: "198.51.100.7:8080", Health: "HEALTHY", Usable: true, Weight: 3, MeshTLS: true, Workload: "web-v1.shop"},
		{Cluster: "outbound|80||web", Address: "198.51.100.8:8080", Health: "UNHEALTHY", Weight: 1, Priority: 1, Locality: "here/zone"},
	}
	return map[string]configview.View{
		"clusters": {Kind: configview.Clusters, Clusters: []configview.Cluster{
			{Object: configview.Object{Name: "outbound|80||web", State: configview.Active, Version: "0123", Updated: at, Origin: virtualService},
				Discovery: "EDS", Balancing: "least request", TLS: "mutual TLS in the mesh", HTTP: "HTTP/2", Endpoints: 2, Healthy: 1,
				ConnectTimeout: "10s", Limits: "3 retries", Outliers: "no host is ejected", Hosts: hosts},
			{Object: configview.Object{Name: "Passthrough\x1b[2J", State: configview.Stale, Refusal: "bad\nline", Findings: []configview.Finding{finding, {Class: "security", Problem: "x"}}},
				Discovery: "original destination", Balancing: "original destination", TLS: "plain"},
			{Object: configview.Object{Name: "refused", State: configview.Refused, Refusal: "malformed"}},
		}},
		"listeners": {Kind: configview.Listeners, Listeners: []configview.Listener{
			{Object: configview.Object{Name: "virtualInbound", State: configview.Active}, Addresses: []string{"0.0.0.0:15006", "[::]:15006"}, Direction: "inbound", Bound: true,
				Chains: []configview.Chain{{Name: "http", Match: "port 80, plain HTTP", TLS: "none", To: "routes inbound|80||", Filters: []string{"rbac", "router"}},
					{Match: "others", TLS: "mutual", To: "InboundPassthroughCluster", Origin: virtualService, Refused: true}}},
			{Object: configview.Object{Name: "10.0.0.1_80", State: configview.Warming}, Addresses: []string{"10.0.0.1:80"}},
		}},
		"routes": {Kind: configview.Routes, Routes: []configview.Table{
			{Object: configview.Object{Name: "80", State: configview.Active, Findings: []configview.Finding{finding}}, Hosts: []configview.Host{
				{Name: "web:80", Domains: []string{"web.shop", "web"}, TLS: true, Routes: []configview.Route{
					{Name: "a", Match: "/v2*", To: "v1 (90), v2 (10)", With: "2 retries", Origin: virtualService},
					{Match: "/*", To: "answer 404", Refused: true}}},
				{Name: "any", Domains: []string{"*"}},
			}},
			{Object: configview.Object{Name: "inbound|80||", State: configview.Active}, Listener: "virtualInbound", Hosts: []configview.Host{}},
		}},
		"endpoints": {Kind: configview.Endpoints, Endpoints: hosts},
		"policies": {Kind: configview.Policies, Policies: []configview.Policy{
			{Listener: "virtualInbound", Chain: "port 80", Name: "rbac", Per: "request", Rules: "ALLOW ns[shop]-policy[a]"},
			{Listener: "virtualInbound", Chain: "others", Name: "jwt", Per: "request", Refused: true}}},
		"names": {Kind: configview.Names, Names: []configview.Name{
			{Host: "web.shop.svc.cluster.local", Addresses: []string{"10.0.0.1", "2001:db8::1"}, Registry: "Kubernetes", ShortName: "web", Namespace: "shop"},
			{Host: "a.example", Addresses: []string{"240.240.0.1"}, Registry: "External"}}},
		"no_names": {Kind: configview.Names},
	}
}

func TestConfigAsText(t *testing.T) {
	for name, view := range views() {
		golden(t, name+".txt", terminal.Config(&view, false, false))
		golden(t, name+"_detailed.txt", terminal.Config(&view, true, false))
		golden(t, name+"_colour.txt", terminal.Config(&view, true, true))
	}
	golden(t, "findings.txt", terminal.Findings([]configview.Finding{
		{Class: "security", Type: "LDS", Resource: "virtualInbound", Path: "filter_chains[1]", Problem: "not supported"},
		{Class: "traffic", Type: "RDS", Resource: "80\x07", Problem: "unknown field 7", Origin: virtualService},
	}, false))
	golden(t, "no_findings.txt", terminal.Findings(nil, false))
}

func TestExplanationsAsText(t *testing.T) {
	web := configview.Route{Name: "main", Match: "/*", To: "web-v1 (90), web-v2 (10)", With: "timeout 3s", Origin: virtualService}
	routed := configview.Explanation{
		Request: "GET http://web/\x1b[2J", Direction: "outbound", Destination: "10.0.0.1:80", Result: "sent to web-v1 (90), web-v2 (10)",
		Listener: &configview.Found{Name: "0.0.0.0_80", Why: "it is for 0.0.0.0:80"},
		Chain:    &configview.Chain{Match: "plain HTTP", TLS: "none", To: "routes 80"},
		Table:    "80", VirtualHost: &configview.Found{Name: "web:80", Why: "its domain is web"}, Route: &web,
		Tried: []configview.Tried{
			{Route: configview.Route{Name: "canary", Match: "/*, x-canary"}, Close: true, Why: "header x-canary is absent, must be present"},
			{Route: configview.Route{Match: "/a*"}, Why: "path / does not begin with /a"},
			{Route: configview.Route{Match: "/b*"}, Why: "path / does not begin with /b"},
		},
		SentAs: "http://internal/", Timeouts: "3s, 1s for each try", Retries: "2, on 5xx",
		Clusters: []configview.Target{
			{Cluster: views()["clusters"].Clusters[0], Share: "90%", SNI: "outbound_.80_._.web"},
			{Cluster: views()["clusters"].Clusters[2], Share: "10%"},
		},
	}
	denied := configview.Explanation{
		Request: "POST http://web/", Direction: "inbound", Destination: "10.0.0.1:80", Result: "refused: rbac denies the request",
		Listener: &configview.Found{Name: "virtualInbound", Why: "it accepts inbound connections"},
		Verdicts: []configview.Verdict{{Name: "jwt", Per: "request", Verdict: "not known: it verifies tokens of issuer"}, {Name: "rbac", Per: "request", Verdict: "denied", Reasons: []string{"a: does not apply, since path"}}},
		Tried:    []configview.Tried{{Route: configview.Route{Match: "/a*"}, Why: "path / does not begin with /a"}},
	}
	golden(t, "explain.txt", terminal.Explanation(&routed, false, false))
	golden(t, "explain_all.txt", terminal.Explanation(&routed, true, false))
	golden(t, "explain_colour.txt", terminal.Explanation(&routed, false, true))
	golden(t, "explain_denied.txt", terminal.Explanation(&denied, false, true))
	used := configview.Explanation{Request: "GET http://web/", Direction: "outbound", Destination: "10.0.0.1:80", Result: "sent to web", Clusters: []configview.Target{{Cluster: configview.Cluster{
		Object: configview.Object{Name: "web", State: configview.Active}, Endpoints: 3, Healthy: 1, Hosts: []configview.Endpoint{
			{Address: "198.51.100.7:80", Health: configview.Ejected, Weight: 1, Load: "39%", Panic: true},
			{Address: "198.51.100.8:80", Health: "HEALTHY", Usable: true, Weight: 1, Priority: 1, Load: "61%"},
			{Address: "198.51.100.9:80", Health: configview.Ejected, Weight: 1, Priority: 1, Load: "61%"},
		}}}, {Cluster: configview.Cluster{
		Object: configview.Object{Name: "other", State: configview.Active}, Endpoints: 1, Hosts: []configview.Endpoint{
			{Address: "198.51.100.7:80", Health: configview.Ejected, Weight: 1, Load: "100%", Panic: true},
		}}}}}
	golden(t, "explain_used.txt", terminal.Explanation(&used, false, true))
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || got != string(want) {
		t.Errorf("%s (%v): got\n%s\nwant\n%s", name, err, got, want)
	}
}

func TestARecordNamesTheClusterOfAMesh(t *testing.T) {
	const cluster = "outbound|9080|v2|reviews.default.svc.cluster.local"
	whole := live.Record{Direction: "outbound", Request: true, Method: "GET", Path: "/x", Cluster: cluster, Route: "jason", Upstream: "203.0.113.7:8080"}
	if line := terminal.Record(&whole, false, false, 0); !strings.HasSuffix(line, "GET /x → "+cluster+", route jason, 203.0.113.7:8080") {
		t.Errorf("%q", line)
	}
	for _, r := range []live.Record{
		{Direction: "outbound", Request: true, Method: "GET", Path: "/x", Cluster: cluster},
		{Direction: "outbound", Request: true, Method: "GET", Path: "/x", Cluster: "PassthroughCluster"},
		{Direction: "inbound", Request: true, Method: "GET", Path: "/x", Cluster: "inbound|8080||"},
	} {
		line := terminal.Record(&r, false, false, 0)
		if got := strings.HasSuffix(line, "GET /x → "+cluster); got != (r.Cluster == cluster) || !got && !strings.HasSuffix(line, "GET /x") {
			t.Errorf("%q", line)
		}
	}
}
