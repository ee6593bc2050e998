package controlplane

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tracev3 "github.com/envoyproxy/go-control-plane/envoy/config/trace/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	metadatav3 "github.com/envoyproxy/go-control-plane/envoy/type/metadata/v3"
	tracingv3 "github.com/envoyproxy/go-control-plane/envoy/type/tracing/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/tracing"
)

// received is a batch that a receiver of OTLP got, read with OpenTelemetry's own types.
type received struct {
	*collector.ExportTraceServiceRequest
	header http.Header
}

// receiver answers the first batch "unavailable", and takes the others.
type receiver struct {
	collector.UnimplementedTraceServiceServer
	batches chan received
	refused bool
}

func (r *receiver) take(b received) (*collector.ExportTraceServiceResponse, bool) {
	if !r.refused {
		r.refused = true
		return nil, false
	}
	r.batches <- b
	return &collector.ExportTraceServiceResponse{PartialSuccess: &collector.ExportTracePartialSuccess{RejectedSpans: 1, ErrorMessage: "one is bad"}}, true
}

func (r *receiver) Export(ctx context.Context, request *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	m, _ := metadata.FromIncomingContext(ctx)
	if response, ok := r.take(received{request, http.Header{"Tenant": m.Get("tenant")}}); ok {
		return response, nil
	}
	return nil, status.Error(codes.Unavailable, "not yet")
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	body, _ := io.ReadAll(q.Body)
	var request collector.ExportTraceServiceRequest
	if err := proto.Unmarshal(body, &request); err != nil || q.Header.Get("Content-Type") != "application/x-protobuf" || q.URL.Path != "/v1/traces" {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	response, ok := r.take(received{&request, q.Header})
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	b, _ := proto.Marshal(response)
	w.Write(b)
}

// TestSpansAreThoseOfOpenTelemetry exports records by both protocols, and reads what arrives with OpenTelemetry's types.
func TestSpansAreThoseOfOpenTelemetry(t *testing.T) {
	for _, protocol := range []string{"http/protobuf", "grpc"} {
		t.Run(protocol, func(t *testing.T) {
			r := &receiver{batches: make(chan received, 1)}
			endpoint := serveOTLP(t, r, protocol)
			variables := map[string]string{
				"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_EXPORTER_OTLP_HEADERS": "tenant=a%20b",
				"OTEL_RESOURCE_ATTRIBUTES": "team=x",
			}
			options, err := tracing.FromEnvironment(func(name string) string { return variables[name] })
			if err != nil {
				t.Fatal(err)
			}
			var counts export.Counts
			policy := options.Start([]export.Resource{{Name: "service.name", Value: "shop.default"}}, &counts, slog.New(slog.DiscardHandler))
			policy.Tags = []tracing.Tag{{Name: "zone", Value: "a"}, {Name: "user", Field: "x-user"}, {Name: "none", Field: "x-none"}, {Name: "or", Field: "x-none", Value: "default"}}
			opened := time.Unix(1_700_000_000, 5)
			exportRecord(outboundRecord(policy, opened))
			exportRecord(inboundRecord(policy, opened))
			batch := await(t, r.batches)
			policy.Exporter.Close(t.Context())
			if e, f := counts.Exported.Load(), counts.Failed.Load(); e != 1 || f != 1 {
				t.Errorf("%d spans exported, %d failed, want one each", e, f)
			}
			if got := batch.header.Get("Tenant"); got != "a b" {
				t.Errorf("header tenant %q", got)
			}
			judgeBatch(t, batch.ExportTraceServiceRequest, opened)
		})
	}
}

func serveOTLP(t *testing.T, r *receiver, protocol string) string {
	if protocol != "grpc" {
		server := httptest.NewServer(r)
		t.Cleanup(server.Close)
		return server.URL
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	collector.RegisterTraceServiceServer(server, r)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return "http://" + listener.Addr().String()
}

// A listener of istiod's with a provider of OpenTelemetry sends spans to its cluster, with its sampling, name and tags.
func TestSpansGoWhereTheControlPlaneSays(t *testing.T) {
	t.Setenv("PILLION_TEST_ZONE", "east")
	for _, protocol := range []string{"http/protobuf", "grpc"} {
		r := &receiver{batches: make(chan received, 1), refused: true}
		endpoint := serveOTLP(t, r, protocol)
		var counts export.Counts
		exporters := &tracing.Exporters{
			Counts: &counts, Log: slog.New(slog.DiscardHandler), Resource: []export.Resource{{Name: "service.name", Value: "default"}, {Name: "pod", Value: "p"}},
			Transport: func(cluster string, http2 bool) http.RoundTripper {
				if cluster != "outbound|4317||otel" || http2 != (protocol == "grpc") {
					t.Errorf("cluster %s, HTTP/2 %v", cluster, http2)
				}
				return redirected(t, endpoint, http2)
			},
		}
		policy := exporters.Policy(tracingOf(t, providerOf(protocol)))
		if again := exporters.Policy(tracingOf(t, providerOf(protocol))); again.Exporter != policy.Exporter {
			t.Error("the same receiver has two exporters")
		}
		if *policy.RequestIDs != (tracing.RequestIDs{Client: 10000, Random: 150, Overall: 10000}) || policy.MaxPath != 5 {
			t.Errorf("%+v, paths of %d", policy.RequestIDs, policy.MaxPath)
		}
		record := inboundRecord(policy, time.Unix(1_700_000_000, 0))
		record.HTTP.Path = []byte("/abcdefgh")
		record.HTTP.Trace = policy.Begin(&tracing.Request{Fields: header{"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "x-tenant", "t1"}})
		record.HTTP.DryRun = &flow.DryRun{Prefix: "istio_dry_run_deny_", Policy: "ns[shop]-policy[p]-rule[0]", Denied: true}
		exportRecord(record)
		batch := await(t, r.batches)
		if err := unknownFields(batch.ProtoReflect()); err != nil || batch.header.Get("Tenant") != "b" {
			t.Errorf("error %v, header %v", err, batch.header)
		}
		if got := batch.ResourceSpans[0].Resource.String(); !strings.Contains(got, `"web.shop"`) || !strings.Contains(got, `"p"`) || strings.Contains(got, "default") {
			t.Errorf("resource %s", got)
		}
		compareTags(t, batch.ResourceSpans[0].ScopeSpans[0].Spans[0], map[string]string{
			"component": "proxy", "http.method": "POST", "http.url": "https://me/abcd", "http.protocol": "HTTP/2", "peer.address": "2001:db8::1",
			"request_size": "0", "response_size": "0", "http.status_code": "200", "response_flags": "-",
			"istio.mesh_id": "m", "zone": "east", "tenant": "t1", "absent": "d",
			"dry run": "ns[shop]-policy[p]-rule[0]", "result": "denied",
		})
		for _, e := range exporters.All() {
			e.Close(t.Context())
		}
	}
}

// redirected sends requests for any host to an endpoint.
func redirected(t *testing.T, endpoint string, http2 bool) http.RoundTripper {
	transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, strings.TrimPrefix(endpoint, "http://"))
	}}
	transport.Protocols.SetHTTP1(!http2)
	transport.Protocols.SetUnencryptedHTTP2(http2)
	t.Cleanup(transport.CloseIdleConnections)
	return transport
}

// providerOf is a provider as istiod configures it.
func providerOf(protocol string) *tracev3.OpenTelemetryConfig {
	c := &tracev3.OpenTelemetryConfig{ServiceName: "web.shop"}
	if protocol == "grpc" {
		c.GrpcService = &core.GrpcService{
			TargetSpecifier: &core.GrpcService_EnvoyGrpc_{EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: "outbound|4317||otel", Authority: "otel"}},
			InitialMetadata: []*core.HeaderValue{{Key: "tenant", Value: "b"}},
		}
		return c
	}
	c.HttpService = &core.HttpService{
		HttpUri:             &core.HttpUri{Uri: "otel/v1/traces", HttpUpstreamType: &core.HttpUri_Cluster{Cluster: "outbound|4317||otel"}, Timeout: durationpb.New(3 * time.Second)},
		RequestHeadersToAdd: []*core.HeaderValueOption{{Header: &core.HeaderValue{Key: "tenant", Value: "b"}}},
	}
	return c
}

// tracingOf decodes the tracing of a listener that has the provider.
func tracingOf(t *testing.T, provider proto.Message) *mesh.Tracing {
	t.Helper()
	manager := &hcm.HttpConnectionManager{
		RouteSpecifier: &hcm.HttpConnectionManager_Rds{Rds: &hcm.Rds{RouteConfigName: "r"}},
		HttpFilters:    []*hcm.HttpFilter{{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&router.Router{})}}},
		Tracing: &hcm.HttpConnectionManager_Tracing{
			ClientSampling: &typev3.Percent{Value: 100}, RandomSampling: &typev3.Percent{Value: 1.5}, OverallSampling: &typev3.Percent{Value: 100},
			MaxPathTagLength: wrapperspb.UInt32(5),
			Provider:         &tracev3.Tracing_Http{Name: "envoy.tracers.opentelemetry", ConfigType: &tracev3.Tracing_Http_TypedConfig{TypedConfig: packed(provider)}},
			CustomTags: []*tracingv3.CustomTag{
				{Tag: "istio.mesh_id", Type: &tracingv3.CustomTag_Literal_{Literal: &tracingv3.CustomTag_Literal{Value: "m"}}},
				{Tag: "zone", Type: &tracingv3.CustomTag_Environment_{Environment: &tracingv3.CustomTag_Environment{Name: "PILLION_TEST_ZONE", DefaultValue: "d"}}},
				{Tag: "tenant", Type: &tracingv3.CustomTag_RequestHeader{RequestHeader: &tracingv3.CustomTag_Header{Name: "X-Tenant"}}},
				{Tag: "absent", Type: &tracingv3.CustomTag_RequestHeader{RequestHeader: &tracingv3.CustomTag_Header{Name: "x-none", DefaultValue: "d"}}},
				dryRunTag("dry run", "istio_dry_run_deny_shadow_effective_policy_id"), dryRunTag("result", "istio_dry_run_deny_shadow_engine_result"),
				dryRunTag("no dry run", "istio_dry_run_allow_shadow_engine_result"),
			},
		},
	}
	filter := &listener.Filter{Name: "hcm", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(manager)}}
	b, err := proto.Marshal(&listener.Listener{
		Name:         "l",
		Address:      &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{Address: "192.0.2.1", PortSpecifier: &core.SocketAddress_PortValue{PortValue: 80}}}},
		FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{filter}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, findings, err := mesh.DecodeListener(b)
	if err != nil || len(findings) > 0 || l.Chains[0].HTTP == nil || l.Chains[0].HTTP.Tracing == nil {
		t.Fatalf("error %v, findings %v", err, findings)
	}
	return l.Chains[0].HTTP.Tracing
}

// dryRunTag is a tag as istiod sends it.
func dryRunTag(name, key string) *tracingv3.CustomTag {
	return &tracingv3.CustomTag{Tag: name, Type: &tracingv3.CustomTag_Metadata_{Metadata: &tracingv3.CustomTag_Metadata{
		Kind: &metadatav3.MetadataKind{Kind: &metadatav3.MetadataKind_Request_{Request: &metadatav3.MetadataKind_Request{}}},
		MetadataKey: &metadatav3.MetadataKey{Key: "envoy.filters.http.rbac", Path: []*metadatav3.MetadataKey_PathSegment{
			{Segment: &metadatav3.MetadataKey_PathSegment_Key{Key: key}},
		}},
	}}}
}

type header []string

func (h header) Len() int { return len(h) / 2 }

func (h header) At(i int) (name, value []byte) { return []byte(h[2*i]), []byte(h[2*i+1]) }

func outboundRecord(p *tracing.Policy, opened time.Time) *flow.Record {
	connection := flow.Open(flow.Outbound, netip.MustParseAddrPort("10.0.0.1:40000"))
	r := flow.Open(flow.Outbound, connection.Downstream)
	r.Connection, r.Opened, r.Protocol, r.Cluster = connection, opened, flow.HTTP11, "outbound|80||web"
	r.Upstream = netip.MustParseAddrPort("10.0.0.2:8080")
	r.HTTP = &flow.Request{
		Method: []byte("GET"), Path: []byte("/" + strings.Repeat("a", 300)), Authority: []byte("web"), ID: []byte("id"), UserAgent: []byte("curl"), Status: 503,
		Details: "via_upstream", GRPC: true, GRPCStatus: []byte("14"),
	}
	r.HTTP.Trace = p.Begin(&tracing.Request{Operation: "web:80/*", Fields: header{
		"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate", "v=1", "X-User", "ann"}})
	return r
}

func inboundRecord(p *tracing.Policy, opened time.Time) *flow.Record {
	connection := flow.Open(flow.Inbound, netip.MustParseAddrPort("[2001:db8::1]:40000"))
	r := flow.Open(flow.Inbound, connection.Downstream)
	r.Connection, r.Opened, r.Protocol, r.Security = connection, opened, flow.HTTP2, &flow.Security{}
	r.HTTP = &flow.Request{Method: []byte("POST"), Path: []byte("/"), Authority: []byte("me"), Status: 200, Trace: p.Begin(&tracing.Request{Fields: header{}})}
	return r
}

func exportRecord(r *flow.Record) {
	r.Close(tracing.Sink{}, flow.Completed, nil)
}

func await(t *testing.T, batches <-chan received) received {
	t.Helper()
	select {
	case b := <-batches:
		return b
	case <-time.After(time.Minute):
		t.Fatal("no batch")
	}
	panic("unreachable")
}

// judgeBatch compares a batch of the two records with what they say.
func judgeBatch(t *testing.T, request *collector.ExportTraceServiceRequest, opened time.Time) {
	t.Helper()
	if err := unknownFields(request.ProtoReflect()); err != nil {
		t.Error(err)
	}
	if len(request.ResourceSpans) != 1 || len(request.ResourceSpans[0].ScopeSpans) != 1 {
		t.Fatalf("%v", request)
	}
	resource, scope := request.ResourceSpans[0], request.ResourceSpans[0].ScopeSpans[0]
	attributes := map[string]string{}
	for _, a := range resource.Resource.Attributes {
		attributes[a.Key] = a.Value.GetStringValue()
	}
	if attributes["service.name"] != "shop.default" || attributes["team"] != "x" || scope.Scope.Name != "pillion" || len(scope.Spans) != 2 {
		t.Fatalf("resource %v, scope %v, %d spans", attributes, scope.Scope, len(scope.Spans))
	}
	out, in := scope.Spans[0], scope.Spans[1]
	if hex.EncodeToString(out.TraceId) != "4bf92f3577b34da6a3ce929d0e0e4736" || hex.EncodeToString(out.ParentSpanId) != "00f067aa0ba902b7" || out.TraceState != "v=1" || len(out.SpanId) != 8 {
		t.Errorf("context %x %x after %x, state %q", out.TraceId, out.SpanId, out.ParentSpanId, out.TraceState)
	}
	if out.Name != "web:80/*" || out.Kind != trace.Span_SPAN_KIND_CLIENT || in.Name != "ingress" || in.Kind != trace.Span_SPAN_KIND_SERVER || len(in.ParentSpanId) != 0 {
		t.Errorf("names %q, %q, kinds %v, %v, parent %x", out.Name, in.Name, out.Kind, in.Kind, in.ParentSpanId)
	}
	if out.StartTimeUnixNano != uint64(opened.UnixNano()) || out.EndTimeUnixNano < out.StartTimeUnixNano {
		t.Errorf("times %d to %d", out.StartTimeUnixNano, out.EndTimeUnixNano)
	}
	if out.Status.GetCode() != trace.Status_STATUS_CODE_ERROR || out.Status.Message != "via_upstream" || in.Status.GetCode() != trace.Status_STATUS_CODE_UNSET {
		t.Errorf("status %v, %v", out.Status, in.Status)
	}
	compareTags(t, out, map[string]string{
		"component": "proxy", "http.method": "GET", "http.url": "http://web/" + strings.Repeat("a", 255), "http.protocol": "HTTP/1.1", "guid:x-request-id": "id",
		"user_agent": "curl", "peer.address": "10.0.0.1", "upstream_cluster": "outbound|80||web", "upstream_cluster.name": "outbound|80||web",
		"upstream_address": "10.0.0.2:8080", "request_size": "0", "response_size": "0", "http.status_code": "503", "response_flags": "-", "error": "true",
		"grpc.path": "/" + strings.Repeat("a", 300), "grpc.authority": "web", "grpc.status_code": "14", "zone": "a", "user": "ann", "or": "default",
	})
	compareTags(t, in, map[string]string{
		"component": "proxy", "http.method": "POST", "http.url": "https://me/", "http.protocol": "HTTP/2", "peer.address": "2001:db8::1",
		"request_size": "0", "response_size": "0", "http.status_code": "200", "response_flags": "-", "zone": "a", "or": "default",
	})
}

func compareTags(t *testing.T, span *trace.Span, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	for _, a := range span.Attributes {
		if _, twice := got[a.Key]; twice {
			t.Errorf("%s: attribute %s twice", span.Name, a.Key)
		}
		got[a.Key] = a.Value.GetStringValue()
	}
	for key, value := range want {
		if got[key] != value {
			t.Errorf("%s: attribute %s is %q, want %q", span.Name, key, got[key], value)
		}
		delete(got, key)
	}
	if len(got) > 0 {
		t.Errorf("%s: unexpected attributes %v", span.Name, got)
	}
}

// unknownFields reports a field that OpenTelemetry's types do not have.
func unknownFields(m protoreflect.Message) (err error) {
	if len(m.GetUnknown()) > 0 {
		return errors.New("unknown fields in " + string(m.Descriptor().FullName()))
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				err = errors.Join(err, unknownFields(v.List().Get(i).Message()))
			}
		case f.IsMap(): // of texts, or of values that are looked at as they are
		case f.Message() != nil:
			err = errors.Join(err, unknownFields(v.Message()))
		}
		return err == nil
	})
	return err
}
