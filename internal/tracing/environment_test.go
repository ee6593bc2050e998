package tracing

import (
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/export"
)

func fromPairs(pairs string) (*Options, error) {
	variables := map[string]string{}
	for line := range strings.SplitSeq(pairs, "\n") {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		variables["OTEL_"+name] = value
	}
	return FromEnvironment(func(name string) string { return variables[name] })
}

func TestTheEndpointTurnsTracingOn(t *testing.T) {
	for pairs, want := range map[string]string{
		"":                                     "",
		"SERVICE_NAME=a":                       "",
		"TRACES_SAMPLER=no one":                "", // without an endpoint nothing is read
		"EXPORTER_OTLP_ENDPOINT=http://c:4318": "http http://c:4318/v1/traces",
		"EXPORTER_OTLP_ENDPOINT=http://c:4318/otlp/":                                                     "http http://c:4318/otlp/v1/traces",
		"EXPORTER_OTLP_TRACES_ENDPOINT=http://c:4318":                                                    "http http://c:4318/",
		"EXPORTER_OTLP_TRACES_ENDPOINT=https://c/x?y=1\nEXPORTER_OTLP_ENDPOINT=http://d":                 "http https://c/x?y=1",
		"EXPORTER_OTLP_ENDPOINT=http://c:4317\nEXPORTER_OTLP_PROTOCOL=grpc":                              "grpc http://c:4317",
		"EXPORTER_OTLP_ENDPOINT=c:4317\nEXPORTER_OTLP_PROTOCOL=grpc":                                     "grpc https://c:4317",
		"EXPORTER_OTLP_ENDPOINT=c:4317\nEXPORTER_OTLP_TRACES_PROTOCOL=grpc\nEXPORTER_OTLP_INSECURE=true": "grpc http://c:4317",
		"EXPORTER_OTLP_ENDPOINT=http://c\nSDK_DISABLED=true":                                             "",
		"EXPORTER_OTLP_ENDPOINT=http://c\nTRACES_EXPORTER=none":                                          "",
	} {
		o, err := fromPairs(pairs)
		got := ""
		if o != nil {
			got = map[bool]string{true: "grpc ", false: "http "}[o.GRPC] + o.Endpoint.String()
		}
		if err != nil || got != want {
			t.Errorf("%s: %s, error %v, want %s", pairs, got, err, want)
		}
	}
}

func TestTheEnvironmentIsRead(t *testing.T) {
	o, err := fromPairs(`EXPORTER_OTLP_ENDPOINT=http://c:4318
		EXPORTER_OTLP_HEADERS=api-key=a%20b, x-tenant=1
		EXPORTER_OTLP_TIMEOUT=500
		SERVICE_NAME=shop
		RESOURCE_ATTRIBUTES=service.name=other,deployment.environment=test%2C1
		TRACES_SAMPLER=parentbased_traceidratio
		TRACES_SAMPLER_ARG=0.25
		PROPAGATORS=tracecontext,baggage,b3multi`)
	if err != nil {
		t.Fatal(err)
	}
	if o.Header.Get("Api-Key") != "a b" || o.Header.Get("X-Tenant") != "1" || o.Timeout != 500*time.Millisecond {
		t.Errorf("header %v, timeout %v", o.Header, o.Timeout)
	}
	if len(o.Resource) != 2 || o.Resource[0] != (export.Resource{Name: "service.name", Value: "shop"}) || o.Resource[1] != (export.Resource{Name: "deployment.environment", Value: "test,1"}) {
		t.Errorf("resource %v", o.Resource)
	}
	if o.Sampler != (Sampler{Threshold: 1 << 61}) || o.Forms != W3C|B3Multi {
		t.Errorf("sampler %+v, forms %b", o.Sampler, o.Forms)
	}
	got := export.WithDefaults(o.Resource, []export.Resource{{Name: "service.name", Value: "default"}, {Name: "k8s.pod.name", Value: "pod"}, {Name: "k8s.namespace.name", Value: ""}})
	if len(got) != 3 || got[2] != (export.Resource{Name: "k8s.pod.name", Value: "pod"}) {
		t.Errorf("with defaults %v", got)
	}
}

func TestSamplersHaveOpenTelemetrysNames(t *testing.T) {
	for name, want := range map[string]Sampler{
		"": {Threshold: all}, "always_on": {all, true}, "always_off": {0, true}, "traceidratio": {all, true},
		"parentbased_always_on": {Threshold: all}, "parentbased_always_off": {}, "parentbased_traceidratio": {Threshold: all},
	} {
		o, err := fromPairs("EXPORTER_OTLP_ENDPOINT=http://c\nTRACES_SAMPLER=" + name)
		if err != nil || o.Sampler != want {
			t.Errorf("%s: %+v, error %v", name, o, err)
		}
	}
}

func TestAnErrorNamesTheVariable(t *testing.T) {
	for _, pair := range []string{
		"EXPORTER_OTLP_ENDPOINT=c:4318", "EXPORTER_OTLP_TRACES_ENDPOINT=ftp://c", "EXPORTER_OTLP_PROTOCOL=http/json",
		"EXPORTER_OTLP_HEADERS=novalue", "EXPORTER_OTLP_HEADERS=a b=c", "EXPORTER_OTLP_TRACES_HEADERS=a=%0d%0ab", "EXPORTER_OTLP_TIMEOUT=1s",
		"EXPORTER_OTLP_TRACES_TIMEOUT=0", "EXPORTER_OTLP_COMPRESSION=gzip", "EXPORTER_OTLP_CERTIFICATE=/no/such/file", "TRACES_SAMPLER=jaeger_remote",
		"TRACES_SAMPLER=traceidratio\nTRACES_SAMPLER_ARG=2", "PROPAGATORS=jaeger", "RESOURCE_ATTRIBUTES=a", "TRACES_EXPORTER=zipkin",
	} {
		lines := strings.Split(pair, "\n")
		name, _, _ := strings.Cut(lines[len(lines)-1], "=")
		text := pair
		if !strings.Contains(pair, "ENDPOINT") {
			text += "\nEXPORTER_OTLP_ENDPOINT=http://c"
		}
		if _, err := fromPairs(text); err == nil || !strings.Contains(err.Error(), "OTEL_"+name+":") {
			t.Errorf("%s: error %v", pair, err)
		}
	}
}
