package admin

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"iter"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/pillion-proxy/pillion/internal/configdump"
)

// configured is a control plane that has configured these resources.
type configured struct {
	resources []configdump.Resource
	clusters  []Cluster
	identity  *Identity
}

func (c configured) Resources() iter.Seq[configdump.Resource] { return slices.Values(c.resources) }
func (c configured) Clusters() iter.Seq[Cluster]              { return slices.Values(c.clusters) }
func (c configured) Identity() *Identity                      { return c.identity }

// message returns a protobuf message of strings and messages: a number, then its value.
func message(fields ...any) (b []byte) {
	for i := 0; i < len(fields); i += 2 {
		b = protowire.AppendTag(b, protowire.Number(fields[i].(int)), protowire.BytesType)
		switch v := fields[i+1].(type) {
		case string:
			b = protowire.AppendString(b, v)
		case []byte:
			b = protowire.AppendBytes(b, v)
		}
	}
	return b
}

func bytesOf(b []byte) func() ([]byte, error) { return func() ([]byte, error) { return b, nil } }

const secretKey = "-----BEGIN PRIVATE KEY-----"

// controlled has a resource of each type in each state.
func controlled() configured {
	at := time.Date(2026, 2, 3, 4, 5, 7, 0, time.UTC)
	address := message(1, append(message(2, "198.51.100.7"), 3<<3, 80))
	refusal := &configdump.Refusal{Reason: "filter_chains[0].filter_chain_match: unknown field 77", At: at.Add(time.Minute),
		Bytes: bytesOf(message(1, "198.51.100.7_80", 2, address, 28, "newer"))}
	in := func(name string, fields ...any) configdump.Resource {
		return configdump.Resource{Name: name, Version: "v-" + name, Updated: at, Bytes: bytesOf(message(fields...))}
	}
	typed := func(kind string, list ...configdump.Resource) []configdump.Resource {
		for i := range list {
			list[i].TypeURL = typePrefix + kind
		}
		return list
	}
	changed := in("198.51.100.7_80", 1, "198.51.100.7_80", 2, address)
	changed.Refusal = refusal
	coming := in("coming", 1, "coming")
	coming.Warming = true
	later := in("198.51.100.7_80", 1, "198.51.100.7_80", 28, "later")
	later.Warming = true
	refused := func(name string) configdump.Resource {
		return configdump.Resource{Name: name, Refusal: &configdump.Refusal{Reason: "why", At: at, Bytes: bytesOf(message(1, name))}}
	}
	return configured{resources: slices.Concat(
		typed(clusterType, in("PassthroughCluster", 1, "PassthroughCluster"), coming, refused("refused"),
			in("outbound|80||web.shop.svc.cluster.local", 1, "outbound|80||web.shop.svc.cluster.local", 36, message(1, "x", 2, message(1, typePrefix+clusterType, 2, message(1, "inner"))))),
		typed(assignmentType, in("outbound|80||web.shop.svc.cluster.local", 1, "outbound|80||web.shop.svc.cluster.local")),
		typed(listenerType, in(VirtualOutbound, 1, VirtualOutbound), changed, later, coming, refused("refused")),
		typed(routesType, in("80", 1, "80", 2, message(1, "web:80", 2, "*")), refused("refused")),
		typed(secretType, in("kubernetes://cert", 1, "kubernetes://cert", 2, message(1, message(2, "chain"), 2, message(2, secretKey))), refused("kubernetes://other")),
		typed(extensionType, in("wasm", 1, "wasm", 2, message(1, typePrefix+secretType, 2, message(1, "inner")))),
	), clusters: []Cluster{{Name: "outbound|80||web.shop.svc.cluster.local", Limits: Limits{100, 20, 300, 4}, Hosts: []Host{
		{Address: "198.51.100.8", Port: 8080, Weight: 3, Health: "HEALTHY", Region: "here", Zone: "a", SubZone: "b"},
		{Address: "name.example", Port: 443, Weight: 1, Priority: 1, Health: "UNHEALTHY"},
		{Address: "198.51.100.9", Port: 8080, Weight: 1, Health: "UNKNOWN", Ejected: true, Use: &Use{Active: 1, Total: 9, Successes: 6, Errors: 2, ConnectFailures: 1, Connections: 3}},
	}}, {Name: "coming"}}}
}

func withControlPlane(c ControlPlane) Config {
	var told commanded
	config := sample(&told)
	config.ControlPlane = c
	return config
}

func selfSigned(t *testing.T, uri string) *Identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spiffe, _ := url.Parse(uri)
	template := &x509.Certificate{SerialNumber: big.NewInt(0xabc), Subject: pkix.Name{CommonName: "x"}, URIs: []*url.URL{spiffe},
		NotBefore: time.Date(2026, 2, 3, 4, 5, 0, 0, time.UTC), NotAfter: time.Now().Add(36 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &Identity{Chain: []*x509.Certificate{certificate}, Roots: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), Since: template.NotBefore}
}

func TestTheIdentityIsShownAsTwoSecretsWithoutAKey(t *testing.T) {
	c := controlled()
	c.identity = selfSigned(t, "spiffe://cluster.local/ns/shop/sa/web")
	handler := NewHandler(withControlPlane(c))
	var dump struct {
		Configs []struct {
			Name   string
			Secret struct {
				Certificate struct {
					Chain struct {
						Bytes []byte `json:"inline_bytes"`
					} `json:"certificate_chain"`
					Key struct {
						Bytes []byte `json:"inline_bytes"`
					} `json:"private_key"`
				} `json:"tls_certificate"`
				Context struct {
					CA struct {
						Bytes []byte `json:"inline_bytes"`
					} `json:"trusted_ca"`
				} `json:"validation_context"`
			}
		}
	}
	body := ask(handler, "GET", "/config_dump?resource=dynamic_active_secrets").Body.String()
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		t.Fatal(err)
	}
	if len(dump.Configs) != 3 || dump.Configs[0].Name != "default" || dump.Configs[1].Name != "ROOTCA" {
		t.Fatalf("secrets: %s", body)
	}
	certificate := dump.Configs[0].Secret.Certificate
	if block, _ := pem.Decode(certificate.Chain.Bytes); block == nil || string(block.Bytes) != string(c.identity.Chain[0].Raw) {
		t.Errorf("another chain: %q", certificate.Chain.Bytes)
	}
	if string(certificate.Key.Bytes) != "[redacted]" || string(dump.Configs[1].Secret.Context.CA.Bytes) != string(c.identity.Roots) {
		t.Errorf("key %q, roots %q", certificate.Key.Bytes, dump.Configs[1].Secret.Context.CA.Bytes)
	}
}

func TestCertificatesAreDescribed(t *testing.T) {
	c := controlled()
	c.identity = selfSigned(t, "spiffe://cluster.local/ns/shop/sa/web")
	root := selfSigned(t, "spiffe://cluster.local/root").Roots
	c.resources = append(c.resources, configdump.Resource{TypeURL: typePrefix + secretType, Name: "kubernetes://cert-cacert",
		Bytes: bytesOf(message(1, "kubernetes://cert-cacert", 4, message(1, message(2, append(root, "no certificate"...)))))})
	var got struct {
		Certificates []struct {
			CA    []map[string]any `json:"ca_cert"`
			Chain []map[string]any `json:"cert_chain"`
		}
	}
	body := ask(NewHandler(withControlPlane(c)), "GET", "/certs").Body.String()
	if err := json.Unmarshal([]byte(body), &got); err != nil || len(got.Certificates) != 2 {
		t.Fatalf("error %v: %s", err, body)
	}
	own, other := got.Certificates[0], got.Certificates[1]
	if len(own.CA) != 1 || len(own.Chain) != 1 || len(other.CA) != 1 || len(other.Chain) != 0 || other.CA[0]["path"] != "kubernetes://cert-cacert" {
		t.Fatalf("certificates: %s", body)
	}
	want := map[string]any{"path": "<inline>", "serial_number": "abc", "days_until_expiration": "1", "valid_from": "2026-02-03T04:05:00Z",
		"expiration_time": timestamp(c.identity.Chain[0].NotAfter), "subject_alt_names": []any{map[string]any{"uri": "spiffe://cluster.local/ns/shop/sa/web"}}}
	if asText(own.Chain[0]) != asText(want) {
		t.Errorf("got %s, want %s", asText(own.Chain[0]), asText(want))
	}
}

func TestKeysAreNeverShown(t *testing.T) {
	c := controlled()
	broken := c.resources[0]
	broken.TypeURL, broken.Name, broken.Bytes = typePrefix+secretType, "broken", bytesOf(append(message(2, message(2, message(2, secretKey))), 0xff))
	broken.Refusal = &configdump.Refusal{Bytes: broken.Bytes}
	c.resources = append(c.resources, broken)
	handler := NewHandler(withControlPlane(c))
	for _, target := range []string{"/config_dump?include_eds", "/config_dump?resource=dynamic_active_secrets&mask=secret", "/certs", "/config_dump?name_regex=broken"} {
		body := ask(handler, "GET", target).Body.String()
		for i := range 3 { // base64 of the key at any offset
			text := base64.RawStdEncoding.EncodeToString([]byte(strings.Repeat(" ", i) + secretKey))
			if text = text[4:24]; strings.Contains(body, text) {
				t.Errorf("%s shows a key: %s", target, body)
			}
		}
		if strings.Contains(body, "PRIVATE KEY") {
			t.Errorf("%s shows a key: %s", target, body)
		}
	}
}

func TestAPartOfTheControlPlanesResourcesIsDumped(t *testing.T) {
	handler := NewHandler(withControlPlane(controlled()))
	for target, want := range map[string]string{
		"resource=dynamic_active_clusters&mask=cluster.name&name_regex=out.*": `[{"@type":"type.googleapis.com/envoy.admin.v3.ClustersConfigDump.DynamicCluster",` +
			`"cluster":{"@type":"type.googleapis.com/envoy.config.cluster.v3.Cluster","name":"outbound|80||web.shop.svc.cluster.local"}}]`,
		"resource=dynamic_route_configs&mask=route_config.virtual_hosts.domains&name_regex=80": `[{"@type":"type.googleapis.com/envoy.admin.v3.RoutesConfigDump.DynamicRouteConfig",` +
			`"route_config":{"@type":"type.googleapis.com/envoy.config.route.v3.RouteConfiguration","virtual_hosts":[{"domains":["*"]}]}}]`,
		"resource=static_clusters&mask=cluster.name&name_regex=Pass.*": `[]`, // the control plane's replaces it
		"resource=static_route_configs&mask=route_config.name": `[{"@type":"type.googleapis.com/envoy.admin.v3.RoutesConfigDump.StaticRouteConfig","route_config":` +
			`{"@type":"type.googleapis.com/envoy.config.route.v3.RouteConfiguration","name":"virtualInbound"}},` +
			`{"@type":"type.googleapis.com/envoy.admin.v3.RoutesConfigDump.StaticRouteConfig","route_config":` +
			`{"@type":"type.googleapis.com/envoy.config.route.v3.RouteConfiguration","name":"readiness"}}]`, // virtualOutbound's has gone with its listener
		"resource=ecds_filters&mask=version_info": `[{"@type":"type.googleapis.com/envoy.admin.v3.EcdsConfigDump.EcdsFilterConfig","version_info":"v-wasm"}]`,
	} {
		var dump struct{ Configs json.RawMessage }
		body := ask(handler, "GET", "/config_dump?"+target).Body
		if err := json.Unmarshal(body.Bytes(), &dump); err != nil {
			t.Fatal(err)
		}
		var got, wanted any
		json.Unmarshal(dump.Configs, &got)
		json.Unmarshal([]byte(want), &wanted)
		if g, w := asText(got), asText(wanted); g != w {
			t.Errorf("%s: got\n%s\nwant\n%s", target, g, w)
		}
	}
}

func asText(v any) string {
	text, _ := json.Marshal(v)
	return string(text)
}

// A resource whose bytes are gone does not take the others with it.
func TestAnUnreadableResourceIsLeftOut(t *testing.T) {
	c := controlled()
	c.resources[0].Bytes = func() ([]byte, error) { return nil, errors.New("corrupt") }
	body := ask(NewHandler(withControlPlane(c)), "GET", "/config_dump").Body.Bytes()
	if !json.Valid(body) || !strings.Contains(string(body), "outbound|80||web") {
		t.Errorf("dump: %s", body)
	}
}

// Resources take memory while they are decoded and printed, so one request at a time does that, and a resource is read when
// it is written.
func TestResourcesAreShownToOneClientAtATime(t *testing.T) {
	for _, second := range []string{"/config_dump", "/certs", "/config/cluster"} {
		started, release := make(chan bool, 2), make(chan bool)
		wait := func() {
			started <- true
			<-release
		}
		c := controlled()
		c.resources = []configdump.Resource{{TypeURL: typePrefix + secretType, Name: "s", Bytes: func() ([]byte, error) {
			wait()
			return message(1, "s"), nil
		}}}
		config := withControlPlane(c)
		config.View = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { wait() })
		handler := NewHandler(config)
		var done sync.WaitGroup
		done.Go(func() { ask(handler, "GET", "/config_dump") })
		<-started
		done.Go(func() { ask(handler, "GET", second) })
		for range 100 {
			runtime.Gosched()
		}
		select {
		case <-started:
			t.Errorf("%s is answered during a dump", second)
		default:
		}
		close(release)
		done.Wait()
	}
}

// A client that leaves ends its dump, and does not keep the next from being made.
func TestADumpEndsWithItsClient(t *testing.T) {
	c := controlled()
	c.resources = slices.Repeat(c.resources[:1], 1000)
	count := 0
	for i := range c.resources {
		c.resources[i].Bytes = func() ([]byte, error) { count++; return message(1, "c"), nil }
	}
	handler := NewHandler(withControlPlane(c))
	request := httptest.NewRequest("GET", "/config_dump", nil)
	request.Host, request.RemoteAddr = "localhost:15000", "127.0.0.1:4711"
	handler.ServeHTTP(&leaving{ResponseRecorder: httptest.NewRecorder(), after: 5000}, request)
	if count == 0 || count == 1000 {
		t.Errorf("%d resources were printed", count)
	}
	if got := ask(handler, "GET", "/config_dump"); got.Code != http.StatusOK {
		t.Errorf("the next dump: %d", got.Code)
	}
}

// leaving fails writes after some bytes.
type leaving struct {
	*httptest.ResponseRecorder
	after int
}

func (l *leaving) Write(b []byte) (int, error) {
	if l.after -= len(b); l.after < 0 {
		return 0, errors.New("broken pipe")
	}
	return l.ResponseRecorder.Write(b)
}

func (l *leaving) WriteString(s string) (int, error) { return l.Write([]byte(s)) }

// A bundle for a support case has the configuration, and no values of header fields.
func TestValuesOfHeadersCanBeLeftOut(t *testing.T) {
	add := func(key, value string) []byte { return message(1, message(1, key, 2, value)) }
	matcher := func(name, text string) []byte { return message(1, name, 13, message(1, text)) }
	route := message(1, message(1, "/shown-path", 6, matcher("x-key", "matched-secret"), 6, matcher(":authority", "shown-host")), 2, message(1, "shown-cluster"),
		9, add("authorization", "added-secret"))
	c := configured{resources: []configdump.Resource{{TypeURL: typePrefix + routesType, Name: "80",
		Bytes: bytesOf(message(1, "80", 2, message(1, "web", 2, "*", 3, route), 4, add("x-answer", "answer-secret")))}}}
	handler := NewHandler(withControlPlane(c))
	all := ask(handler, "GET", "/config_dump").Body.String()
	some := ask(handler, "GET", "/config_dump?redact=headers").Body.String()
	if !json.Valid([]byte(some)) {
		t.Errorf("not JSON: %s", some)
	}
	for _, secret := range []string{"matched-secret", "added-secret", "answer-secret"} {
		if !strings.Contains(all, secret) || strings.Contains(some, secret) {
			t.Errorf("%s: in the whole dump %t, in the other %t", secret, strings.Contains(all, secret), strings.Contains(some, secret))
		}
	}
	for _, shown := range []string{"x-key", "authorization", "x-answer", "shown-path", "shown-host", "shown-cluster"} {
		if !strings.Contains(some, shown) {
			t.Errorf("%s is left out: %s", shown, some)
		}
	}
	if got := ask(handler, "GET", "/config_dump?redact=all"); got.Code != http.StatusBadRequest {
		t.Errorf("another redaction: %d", got.Code)
	}
}
