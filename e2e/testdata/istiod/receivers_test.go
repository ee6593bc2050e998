package istiod

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	als "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	logs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	traces "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/grpc"
)

// receiver keeps the records and spans that agents send, each as a line.
type receiver struct {
	logs.UnimplementedLogsServiceServer
	traces.UnimplementedTraceServiceServer
	als.UnimplementedAccessLogServiceServer

	mu    sync.Mutex
	lines []string
}

func newReceiver(server *grpc.Server) *receiver {
	r := &receiver{}
	logs.RegisterLogsServiceServer(server, r)
	als.RegisterAccessLogServiceServer(server, r)
	traces.RegisterTraceServiceServer(server, traceReceiver{receiver: r})
	return r
}

func (r *receiver) add(format string, arguments ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, fmt.Sprintf(format, arguments...))
}

// with returns the lines that have all of the texts.
func (r *receiver) with(texts ...string) (found []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, line := range r.lines {
		if !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) }) {
			found = append(found, line)
		}
	}
	return found
}

// awaitLine waits for a line with all of the texts.
func (r *receiver) awaitLine(t *testing.T, texts ...string) string {
	t.Helper()
	await(t, func() error {
		if len(r.with(texts...)) == 0 {
			return fmt.Errorf("no line with %q in %q", texts, r.with())
		}
		return nil
	})
	return r.with(texts...)[0]
}

func attributesOf(list []*common.KeyValue) string {
	all := map[string]string{}
	for _, a := range list {
		all[a.Key] = a.Value.GetStringValue()
	}
	var b strings.Builder
	for _, key := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&b, " %s=%s", key, all[key])
	}
	return b.String()
}

func (r *receiver) Export(_ context.Context, request *logs.ExportLogsServiceRequest) (*logs.ExportLogsServiceResponse, error) {
	for _, resource := range request.ResourceLogs {
		for _, scope := range resource.ScopeLogs {
			for _, one := range scope.LogRecords {
				r.add("record %q%s of%s", one.Body.GetStringValue(), attributesOf(one.Attributes), attributesOf(resource.Resource.Attributes))
			}
		}
	}
	return &logs.ExportLogsServiceResponse{}, nil
}

func (r *receiver) StreamAccessLogs(stream als.AccessLogService_StreamAccessLogsServer) error {
	node := ""
	for {
		message, err := stream.Recv()
		if err != nil {
			return err
		}
		if message.Identifier != nil {
			node = message.Identifier.LogName + " of " + message.Identifier.Node.Id
		}
		for _, one := range message.GetHttpLogs().GetLogEntry() {
			c := one.CommonProperties
			r.add("entry %s %d %v %s in %s by %v", one.Request.Path, one.Response.ResponseCode.GetValue(), one.Request.RequestHeaders, node, c.UpstreamCluster,
				c.TlsProperties.GetPeerCertificateProperties().GetSubjectAltName())
		}
		for _, one := range message.GetTcpLogs().GetLogEntry() {
			r.add("connection %d %d %s in %s", one.ConnectionProperties.ReceivedBytes, one.ConnectionProperties.SentBytes, node, one.CommonProperties.UpstreamCluster)
		}
	}
}

type traceReceiver struct {
	traces.UnimplementedTraceServiceServer
	receiver *receiver
}

func (t traceReceiver) Export(_ context.Context, request *traces.ExportTraceServiceRequest) (*traces.ExportTraceServiceResponse, error) {
	for _, resource := range request.ResourceSpans {
		for _, scope := range resource.ScopeSpans {
			for _, span := range scope.Spans {
				t.receiver.add("span %s of%s", attributesOf(span.Attributes), attributesOf(resource.Resource.Attributes))
			}
		}
	}
	return &traces.ExportTraceServiceResponse{}, nil
}

// forNginx returns a Telemetry resource of the first pod. The second one has the receiver.
func forNginx(spec ...string) string {
	return telemetry("default", "nginx", append([]string{"selector: {matchLabels: {app: nginx}}"}, spec...)...)
}

// Records go to the services that Telemetry names, by mutual TLS.
func TestRecordsGoToServicesOfTheMesh(t *testing.T) {
	c := newCoupleWith(t, "STRICT")
	c.plane.apply(forNginx("accessLogging:", "- providers: [{name: records}, {name: entries}, {name: connections}]"))
	got := c.pods[1].records
	await(t, func() error {
		if err := c.ask(1, "/first", "X-Tenant", "blue"); err != nil {
			return err
		}
		if len(got.with("record", "/first")) == 0 || len(got.with("entry", "/first")) == 0 {
			return fmt.Errorf("records %q", got.with())
		}
		return nil
	})
	if err := c.ask(1, "/second", "X-Tenant", "red"); err != nil {
		t.Fatal(err)
	}
	got.awaitLine(t, `record "/second 200" tenant=red of`, "k8s.pod.name=nginx-")
	got.awaitLine(t, "entry /second 200 map[x-tenant:red] http_envoy_accesslog of sidecar~203.0.113.4~nginx-", "in inbound|8080||", "spiffe://cluster.local/ns/default/sa/client")
	await(t, func() error { // a new stream has a second to be refused before its records count
		written, err := c.pods[0].metric("pillion_access_log_written_total")
		if err == nil && written < 4 {
			err = fmt.Errorf("%v records written", written)
		}
		return err
	})
	if dropped, err := c.pods[0].metric("pillion_access_log_dropped_total"); err != nil || dropped > 0 {
		t.Errorf("%v records dropped, error %v", dropped, err)
	}
}

// Sampling, tags and reporting are those of Telemetry: the mesh's, changed by the workload's.
func TestSpansAreAsTelemetryResourcesHaveThem(t *testing.T) {
	c := newCoupleWith(t, "STRICT", "PILLION_ACCESS_LOG=off", "ZONE=east")
	got := c.pods[1].records
	// spanned sends requests of the first pod until a span of one arrives.
	requests := 0
	spanned := func(path string, fields ...string) {
		t.Helper()
		await(t, func() error {
			requests++
			if err := c.ask(0, fmt.Sprintf("%s-%d", path, requests), fields...); err != nil {
				return err
			}
			if len(got.with("span", path+"-")) == 0 {
				return fmt.Errorf("spans %q", got.with("span"))
			}
			return nil
		})
	}
	c.plane.apply(telemetry("istio-system", "mesh", "tracing:", "- providers: [{name: spans}]", "  randomSamplingPercentage: 0"))
	c.plane.apply(forNginx("tracing:", "- randomSamplingPercentage: 100", "  customTags:",
		"    literal: {literal: {value: fixed}}", "    zone: {environment: {name: ZONE, defaultValue: none}}", "    unset: {environment: {name: NO_ZONE, defaultValue: none}}",
		"    tenant: {header: {name: x-tenant, defaultValue: unknown}}", "    missing: {header: {name: x-missing, defaultValue: unknown}}"))
	spanned("/first", "X-Tenant", "blue")
	line := got.awaitLine(t, "span", "/first-", "upstream_cluster=outbound|8080||web.default.svc.cluster.local", "tenant=blue")
	for _, want := range []string{" literal=fixed", " zone=east", " unset=none", " missing=unknown", "k8s.pod.name=nginx-"} {
		if !strings.Contains(line, want) {
			t.Errorf("no %q in %s", want, line)
		}
	}
	if err := c.ask(1, "/unsampled"); err != nil {
		t.Fatal(err)
	}

	// The ID of a request decides, unless that is turned off.
	const above, below = "0000270f-0000-4000-8000-000000000000", "00000000-0000-4000-8000-000000000000" // 99.99 % and 0
	c.plane.apply(forNginx("tracing:", "- randomSamplingPercentage: 50"))
	c.pods[0].awaitGone(t, `x-tenant`)
	for range 3 {
		if err := c.ask(0, "/above", "X-Request-Id", above); err != nil {
			t.Fatal(err)
		}
	}
	spanned("/below", "X-Request-Id", below)
	c.plane.apply(forNginx("tracing:", "- randomSamplingPercentage: 50", "  useRequestIdForTraceSampling: false"))
	spanned("/ignored", "X-Request-Id", above)

	c.plane.apply(forNginx("tracing:", "- disableSpanReporting: true"))
	c.pods[0].awaitGone(t, `use_request_id_for_trace_sampling":\s*false`)
	if err := c.ask(0, "/disabled"); err != nil {
		t.Fatal(err)
	}
	c.plane.apply(forNginx("tracing:", "- randomSamplingPercentage: 100"))
	spanned("/enabled")
	for _, path := range []string{"/unsampled", "/above", "/disabled"} {
		if found := got.with("span", path); len(found) > 0 {
			t.Errorf("spans of requests that are not to be reported: %q", found)
		}
	}
}
