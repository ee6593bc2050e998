package controlplane

import (
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	accesslogconfig "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	grpclog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"
	otellog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/open_telemetry/v3"
	als "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	collector "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	_ "google.golang.org/protobuf/types/known/structpb" // of filter states

	"github.com/pillion-proxy/pillion/internal/accesslog"
	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// logReceiver is a service of both protocols. It refuses the first batch or stream.
type logReceiver struct {
	collector.UnimplementedLogsServiceServer
	als.UnimplementedAccessLogServiceServer
	refused  bool
	exported chan *collector.ExportLogsServiceRequest
	streamed chan *als.StreamAccessLogsMessage
	ended    chan error // of a stream: what its client ended it with
}

var errNotYet = status.Error(codes.Unavailable, "not yet")

func (r *logReceiver) Export(_ context.Context, request *collector.ExportLogsServiceRequest) (*collector.ExportLogsServiceResponse, error) {
	if !r.refused {
		r.refused = true
		return nil, errNotYet
	}
	r.exported <- request
	return &collector.ExportLogsServiceResponse{}, nil
}

func (r *logReceiver) StreamAccessLogs(stream als.AccessLogService_StreamAccessLogsServer) error {
	if !r.refused {
		r.refused = true
		return errNotYet
	}
	for {
		message, err := stream.Recv()
		if err != nil {
			r.ended <- err
			return stream.SendAndClose(&als.StreamAccessLogsResponse{})
		}
		r.streamed <- message
	}
}

// serveLogs serves r, and returns access logs of the agent that reach it as the cluster outbound|9090||logs.
func serveLogs(t *testing.T, r *logReceiver) *accesslog.Sinks {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	collector.RegisterLogsServiceServer(server, r)
	als.RegisterAccessLogServiceServer(server, r)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	node, err := proto.Marshal(&core.Node{Id: "sidecar~10.0.0.1~web.shop~shop.svc.cluster.local", Cluster: "web.shop"})
	if err != nil {
		t.Fatal(err)
	}
	sinks := &accesslog.Sinks{
		Noted: flow.NewNoted(flow.Fields{}), Log: slog.New(slog.DiscardHandler), Resource: []export.Resource{{Name: "service.name", Value: "web.shop"}},
		Node: node, NodeID: "sidecar~10.0.0.1~web.shop~shop.svc.cluster.local", Cluster: "web.shop", CloseTime: time.Minute,
		Transport: func(cluster string, http2 bool) http.RoundTripper {
			if cluster != "outbound|9090||logs" || !http2 {
				t.Errorf("cluster %s, HTTP/2 %v", cluster, http2)
			}
			return redirected(t, "http://"+l.Addr().String(), http2)
		},
	}
	return sinks
}

// logsOf returns the sinks of a log as a listener configures it.
func logsOf(t *testing.T, sinks *accesslog.Sinks, config proto.Message) []flow.Sink {
	t.Helper()
	b, err := proto.Marshal(&listener.Listener{
		Name: "l", Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{Address: "192.0.2.1", PortSpecifier: &core.SocketAddress_PortValue{PortValue: 80}}}},
		AccessLog: []*accesslogconfig.AccessLog{{ConfigType: &accesslogconfig.AccessLog_TypedConfig{TypedConfig: packed(config)}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, findings, err := mesh.DecodeListener(b)
	if err != nil || len(findings) > 0 {
		t.Fatalf("error %v, findings %v", err, findings)
	}
	return sinks.Of(l.AccessLogs)
}

// commonLog is a service as istiod configures it.
func commonLog(states ...string) *grpclog.CommonGrpcAccessLogConfig {
	return &grpclog.CommonGrpcAccessLogConfig{
		LogName: "name", TransportApiVersion: core.ApiVersion_V3, FilterStateObjectsToLog: states, BufferFlushInterval: durationpb.New(time.Millisecond),
		GrpcService: &core.GrpcService{TargetSpecifier: &core.GrpcService_EnvoyGrpc_{
			EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: "outbound|9090||logs", Authority: "logs.shop"},
		}},
	}
}

var logTime = time.Unix(1_700_000_000, 5)

// loggedRequest is a record of a request that was received by mutual TLS.
func loggedRequest(noted *flow.Noted) *flow.Record {
	connection := flow.Open(flow.Inbound, netip.MustParseAddrPort("10.0.0.9:40000"))
	r := flow.Open(flow.Inbound, connection.Downstream)
	r.Connection, r.Opened, r.Protocol, r.Cluster, r.Route, r.Attempts = connection, logTime, flow.HTTP2, "inbound|8080||", "default", 2
	r.OriginalDestination, r.Upstream = netip.MustParseAddrPort("[2001:db8::1]:8080"), netip.MustParseAddrPort("127.0.0.1:8080")
	r.Security = &flow.Security{
		Peer: "spiffe://cluster.local/ns/shop/sa/front", Own: "spiffe://cluster.local/ns/shop/sa/web", Mutual: true, Version: "TLSv1.3", Cipher: "TLS_AES_128_GCM_SHA256",
		PeerCertificate: &flow.Certificate{URIs: "spiffe://cluster.local/ns/shop/sa/front", DNS: "a,b", Subject: "O=x", Issuer: "O=ca"},
	}
	r.Workload.Set(&flow.Workload{Name: "front", Namespace: "shop", CanonicalService: "front"})
	r.Received.Add(11)
	r.Sent.Add(22)
	h := &flow.Request{
		Method: []byte("POST"), Path: []byte("/a\xff?q=\"1\""), Authority: []byte("web"), ID: []byte("id"), UserAgent: []byte("curl"), ForwardedFor: []byte("192.0.2.9"),
		Status: 503, Flags: "UAEX,URX", Details: "ext_authz_denied",
		Trace: &flow.Trace{ID: [16]byte{1, 15: 2}, Span: [8]byte{3, 7: 4}},
	}
	set := func(fields *[][]byte, names []string) {
		for _, name := range names {
			*fields = append(*fields, map[string][]byte{"x-tenant": []byte("blue"), "referer": []byte("r"), "x-empty": {}}[name])
		}
	}
	set(&h.Fields, noted.Request())
	set(&h.ResponseFields, noted.Response())
	r.HTTP = h
	return r
}

func closeTo(sinks []flow.Sink, r *flow.Record) {
	for _, s := range sinks {
		s.Closed(r)
	}
}

func next[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(time.Minute):
		t.Fatal("nothing arrived")
	}
	panic("unreachable")
}

func compareMessages(t *testing.T, got proto.Message, want string) {
	t.Helper()
	if err := unknownFields(got.ProtoReflect()); err != nil {
		t.Error(err)
	}
	expected := got.ProtoReflect().New().Interface()
	if err := protojson.Unmarshal([]byte(want), expected); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got, expected) {
		t.Errorf("got  %v\nwant %v", got, expected)
	}
}

// Records go to the receiver of OpenTelemetry's logs that istiod configures, with its texts and attributes.
func TestRecordsGoToAReceiverOfOpenTelemetry(t *testing.T) {
	r := &logReceiver{exported: make(chan *collector.ExportLogsServiceRequest, 1)}
	sinks := serveLogs(t, r)
	text := func(s string) *common.AnyValue {
		return &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: s}}
	}
	list := &common.AnyValue{Value: &common.AnyValue_ArrayValue{ArrayValue: &common.ArrayValue{Values: []*common.AnyValue{text("%ROUTE_NAME%"), text("b")}}}}
	logs := logsOf(t, sinks, &otellog.OpenTelemetryAccessLogConfig{
		CommonConfig: commonLog("upstream_peer", "wasm.upstream_peer"), DisableBuiltinLabels: true, StatPrefix: "p",
		Body: text("%REQ(:METHOD)% \"%REQ(:PATH)%\" %RESPONSE_CODE% %RESPONSE_FLAGS% %REQ(X-NONE)%\n"),
		Attributes: &common.KeyValueList{Values: []*common.KeyValue{
			{Key: "tenant", Value: text("%REQ(X-TENANT)%")}, {Key: "constant", Value: text("100%%")}, {Key: "list", Value: list},
			{Key: "inner", Value: &common.AnyValue{Value: &common.AnyValue_KvlistValue{KvlistValue: &common.KeyValueList{Values: []*common.KeyValue{{Key: "k", Value: text("%PROTOCOL%")}}}}}},
		}},
		ResourceAttributes: &common.KeyValueList{Values: []*common.KeyValue{{Key: "team", Value: text("x")}}},
	})
	closeTo(logs, loggedRequest(sinks.Noted))
	got := next(t, r.exported)
	compareMessages(t, got, `{"resourceLogs": [{
		"resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "web.shop"}}, {"key": "team", "value": {"stringValue": "x"}}]},
		"scopeLogs": [{"scope": {"name": "pillion"}, "logRecords": [{
			"timeUnixNano": "1700000000000000005",
			"body": {"stringValue": "POST \"/a??q=\"1\"\" 503 UAEX,URX -\n"},
			"attributes": [
				{"key": "tenant", "value": {"stringValue": "blue"}}, {"key": "constant", "value": {"stringValue": "100%"}},
				{"key": "list", "value": {"arrayValue": {"values": [{"stringValue": "default"}, {"stringValue": "b"}]}}},
				{"key": "inner", "value": {"kvlistValue": {"values": [{"key": "k", "value": {"stringValue": "HTTP/2"}}]}}}],
			"traceId": "AQAAAAAAAAAAAAAAAAAAAg==", "spanId": "AwAAAAAAAAQ="}]}]}]}`)
	if got := hex.EncodeToString(got.ResourceLogs[0].ScopeLogs[0].LogRecords[0].TraceId); got != "01000000000000000000000000000002" {
		t.Errorf("trace %s", got)
	}
	if err := sinks.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if sent, lost := sinks.Counts(); sent != 1 || lost != 0 {
		t.Errorf("%d records sent, %d lost", sent, lost)
	}
}

// Without disable_builtin_labels, the resource has Envoy's attributes of the log and the node.
func TestBuiltinLabelsNameTheLogAndTheNode(t *testing.T) {
	r := &logReceiver{exported: make(chan *collector.ExportLogsServiceRequest, 1), refused: true}
	sinks := serveLogs(t, r)
	closeTo(logsOf(t, sinks, &otellog.OpenTelemetryAccessLogConfig{CommonConfig: commonLog()}), loggedRequest(sinks.Noted))
	resource := next(t, r.exported).ResourceLogs[0].Resource.String()
	for _, want := range []string{`"log_name"`, `"name"`, `"node_name"`, `"sidecar~10.0.0.1~web.shop~shop.svc.cluster.local"`, `"cluster_name"`, `"service.name"`} {
		if !strings.Contains(resource, want) {
			t.Errorf("resource %s, want %s", resource, want)
		}
	}
	if err := sinks.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// Envoy's access log service gets the entries of requests, all on one stream that begins with the node.
func TestRequestsGoToAnAccessLogService(t *testing.T) {
	r := &logReceiver{streamed: make(chan *als.StreamAccessLogsMessage, 1), ended: make(chan error, 1)}
	sinks := serveLogs(t, r)
	logs := logsOf(t, sinks, &grpclog.HttpGrpcAccessLogConfig{
		CommonConfig:                  commonLog("upstream_peer", "downstream_peer"),
		AdditionalRequestHeadersToLog: []string{"X-Tenant", "X-Missing", "user-agent"}, AdditionalResponseHeadersToLog: []string{"x-empty"},
	})
	record := loggedRequest(sinks.Noted)
	record.Duration, record.Reason = 1500*time.Millisecond, flow.Completed
	closeTo(logs, record)
	first := next(t, r.streamed)
	compareMessages(t, first, `{"identifier": {"node": {"id": "sidecar~10.0.0.1~web.shop~shop.svc.cluster.local", "cluster": "web.shop"}, "logName": "name"},
		"httpLogs": {"logEntry": [{
		"commonProperties": {
			"sampleRate": 1,
			"downstreamRemoteAddress": {"socketAddress": {"address": "192.0.2.9", "portValue": 0}},
			"downstreamLocalAddress": {"socketAddress": {"address": "2001:db8::1", "portValue": 8080}},
			"downstreamDirectRemoteAddress": {"socketAddress": {"address": "10.0.0.9", "portValue": 40000}},
			"upstreamRemoteAddress": {"socketAddress": {"address": "127.0.0.1", "portValue": 8080}},
			"tlsProperties": {"tlsVersion": "TLSv1_3", "tlsCipherSuite": 4865,
				"localCertificateProperties": {"subjectAltName": [{"uri": "spiffe://cluster.local/ns/shop/sa/web"}]},
				"peerCertificateProperties": {"subjectAltName": [{"uri": "spiffe://cluster.local/ns/shop/sa/front"}, {"dns": "a"}, {"dns": "b"}], "subject": "O=x", "issuer": "O=ca"}},
			"startTime": "2023-11-14T22:13:20.000000005Z", "timeToLastDownstreamTxByte": "1.5s", "duration": "1.5s",
			"upstreamCluster": "inbound|8080||", "routeName": "default", "upstreamRequestAttemptCount": 2, "streamId": "id",
			"responseFlags": {"unauthorizedDetails": {"reason": "EXTERNAL_SERVICE"}, "upstreamRetryLimitExceeded": true},
			"filterStateObjects": {"downstream_peer": {"@type": "type.googleapis.com/google.protobuf.Struct", "value": {"workload": "front", "namespace": "shop", "service": "front"}}},
			"accessLogType": "DownstreamEnd"},
		"protocolVersion": "HTTP2",
		"request": {"requestMethod": "POST", "scheme": "https", "authority": "web", "path": "/a??q=\"1\"", "userAgent": "curl", "referer": "r", "forwardedFor": "192.0.2.9",
			"requestId": "id", "requestBodyBytes": "11", "requestHeaders": {"x-tenant": "blue", "user-agent": "curl"}},
		"response": {"responseCode": 503, "responseBodyBytes": "22", "responseCodeDetails": "ext_authz_denied", "responseHeaders": {"x-empty": ""}}}]}}`)

	closeTo(logs, record)
	if again := next(t, r.streamed); again.Identifier != nil || len(again.GetHttpLogs().GetLogEntry()) != 1 {
		t.Errorf("second message %v", again)
	}
	if err := sinks.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := next(t, r.ended); err.Error() != "EOF" {
		t.Errorf("the stream ended with %v", err)
	}
	if sent, lost := sinks.Counts(); sent != 2 || lost != 0 {
		t.Errorf("%d records sent, %d lost", sent, lost)
	}
}

// A connection has an entry of TCP, and a flush at the end sends it.
func TestConnectionsGoToAnAccessLogService(t *testing.T) {
	r := &logReceiver{streamed: make(chan *als.StreamAccessLogsMessage, 1), ended: make(chan error, 1), refused: true}
	sinks := serveLogs(t, r)
	config := commonLog()
	config.BufferFlushInterval = durationpb.New(time.Hour)
	logs := logsOf(t, sinks, &grpclog.TcpGrpcAccessLogConfig{CommonConfig: config})
	c := flow.Open(flow.Outbound, netip.MustParseAddrPort("10.0.0.1:40000"))
	c.Opened, c.Duration, c.Reason, c.Err = logTime, time.Second, flow.UpstreamUnreachable, errors.New("refused")
	c.OriginalDestination, c.TransportFailure, c.Cluster = netip.MustParseAddrPort("10.96.0.1:443"), "refused", "outbound|443||db"
	c.SetTLS(flow.Hello{ServerName: "db.shop"})
	c.Received.Add(5)
	closeTo(logs, c)
	if err := sinks.Close(t.Context()); err != nil {
		t.Error(err)
	}
	compareMessages(t, next(t, r.streamed).GetTcpLogs().LogEntry[0], `{"commonProperties": {"sampleRate": 1,
		"downstreamRemoteAddress": {"socketAddress": {"address": "10.0.0.1", "portValue": 40000}},
		"downstreamLocalAddress": {"socketAddress": {"address": "10.96.0.1", "portValue": 443}},
		"downstreamDirectRemoteAddress": {"socketAddress": {"address": "10.0.0.1", "portValue": 40000}},
		"tlsProperties": {"tlsSniHostname": "db.shop"}, "startTime": "2023-11-14T22:13:20.000000005Z", "duration": "1s",
		"upstreamCluster": "outbound|443||db", "responseFlags": {"upstreamConnectionFailure": true, "upstreamRetryLimitExceeded": true}, "upstreamTransportFailureReason": "refused", "accessLogType": "TcpConnectionEnd"},
		"connectionProperties": {"receivedBytes": "5"}}`)
	next(t, r.ended)
}
