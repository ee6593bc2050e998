package controlplane

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	udpa "github.com/cncf/xds/go/udpa/type/v1"
	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	logdata "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	filelog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/file/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	celfilter "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	cors "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/cors/v3"
	fault "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	grpcstats "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/grpc_stats/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	session "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/stateful_session/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	originalsrc "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_src/v3"
	proxyprotocol "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/proxy_protocol/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	networkauthz "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/ext_authz/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkrbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	snicluster "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/sni_cluster/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/request_id/uuid/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"istio.io/api/envoy/extensions/stats"

	"github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// expectedFindings has the findings of recorded listeners, and why they are right.
var expectedFindings = map[string]mesh.Class{
	// Case 12-telemetry: a Telemetry resource filters access logs by an expression. It is not evaluated, so all requests are
	// logged.
	// Case 14-envoyfilter-proxyconfig: an EnvoyFilter adds a Lua program. It does not run.
	"the HTTP filter envoy.filters.http.lua of type envoy.extensions.filters.http.lua.v3.Lua is not supported": mesh.Traffic,
}

func TestRecordedListenersAreDecodedAsByGeneratedTypes(t *testing.T) {
	chains, met := 0, map[string]bool{}
	each(t, "lds.json", func(t *testing.T, place string, b []byte) {
		got, findings, err := mesh.DecodeListener(b)
		if err != nil {
			t.Fatalf("%s: %v", place, err)
		}
		for _, finding := range findings {
			expected := false
			for problem, class := range expectedFindings {
				if strings.HasSuffix(finding.String(), problem) && finding.Class == class {
					expected, met[problem] = true, true
				}
			}
			if !expected {
				t.Errorf("%s: %v finding %v", place, finding.Class, finding)
			}
		}
		compareListeners(t, place, got, readListener(unpack(b, &listener.Listener{})))
		chains += len(got.Chains)
	})
	if chains < 500 || len(met) != len(expectedFindings) {
		t.Errorf("%d chains, findings %v", chains, met)
	}
}

// compareListeners compares all exported fields.
func compareListeners(t *testing.T, place string, got, want *mesh.Listener) {
	t.Helper()
	canonical(got)
	for i := range reflect.TypeFor[mesh.Listener]().NumField() {
		field := reflect.TypeFor[mesh.Listener]().Field(i)
		if !field.IsExported() {
			continue
		}
		g, w := reflect.ValueOf(got).Elem().Field(i).Interface(), reflect.ValueOf(want).Elem().Field(i).Interface()
		if !reflect.DeepEqual(g, w) {
			a, _ := json.Marshal(g)
			b, _ := json.Marshal(w)
			t.Errorf("%s: %s of %s: got\n%s\nwant\n%s", place, field.Name, want.Name, a, b)
		}
	}
}

// canonical encodes the structs in l, which are kept as bytes, as the generated types do.
func canonical(l *mesh.Listener) {
	visit := func(logs []mesh.AccessLog) {
		for i := range logs {
			if logs[i].JSON == nil {
				continue
			}
			var value structpb.Struct
			if err := proto.Unmarshal(logs[i].JSON, &value); err == nil {
				logs[i].JSON, _ = proto.Marshal(&value)
			}
		}
	}
	visit(l.AccessLogs)
	for _, chain := range append(l.Chains, l.Default) {
		if chain != nil && chain.TCP != nil {
			visit(chain.TCP.AccessLogs)
		}
		if chain != nil && chain.HTTP != nil {
			visit(chain.HTTP.AccessLogs)
		}
	}
}

// wideListenerFile has wideListener. The tests of internal/mesh, where there are no generated types, decode it as well.
const wideListenerFile = "../../../internal/mesh/testdata/listener.pb"

// Fields that the recorded listeners do not have are decoded as by the generated types as well.
func TestOtherListenersAreDecodedAsByGeneratedTypes(t *testing.T) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(wideListener())
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(wideListenerFile, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := os.ReadFile(wideListenerFile)
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(unpack(kept, &listener.Listener{}), wideListener()) {
		t.Errorf("%s has another listener; use -update", wideListenerFile)
	}
	got, findings, err := mesh.DecodeListener(b)
	if err != nil || len(understood(findings)) > 0 {
		t.Fatalf("error %v, findings %v", err, findings)
	}
	compareListeners(t, "made here", got, readListener(wideListener()))
}

func packed(m proto.Message) *anypb.Any {
	var a anypb.Any
	if err := anypb.MarshalFrom(&a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		panic(err)
	}
	return &a
}

// wideListener has fields that istiod sends and that the recorded listeners do not have.
func wideListener() *listener.Listener {
	address := func(ip string, port uint32) *core.Address {
		return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{Address: ip, PortSpecifier: &core.SocketAddress_PortValue{PortValue: port}}}}
	}
	rangeOf := func(start, end int32) *listener.ListenerFilterChainMatchPredicate {
		return &listener.ListenerFilterChainMatchPredicate{Rule: &listener.ListenerFilterChainMatchPredicate_DestinationPortRange{DestinationPortRange: &typev3.Int32Range{Start: start, End: end}}}
	}
	set := &listener.ListenerFilterChainMatchPredicate_MatchSet{Rules: []*listener.ListenerFilterChainMatchPredicate{rangeOf(1, 2), rangeOf(3, 65536)}}
	cidrs := func(prefixes ...string) (ranges []*core.CidrRange) {
		for _, text := range prefixes {
			prefix := netip.MustParsePrefix(text)
			ranges = append(ranges, &core.CidrRange{AddressPrefix: prefix.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(prefix.Bits()))})
		}
		return ranges
	}
	seconds := func(n float64) *durationpb.Duration { return durationpb.New(time.Duration(n * float64(time.Second))) }
	yes := wrapperspb.Bool(true)
	regex := &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: &matcher.RegexMatcher{Regex: "a.*"}}}
	downstream := &tlsv3.DownstreamTlsContext{
		CommonTlsContext: &tlsv3.CommonTlsContext{
			AlpnProtocols: []string{"h2", "http/1.1"},
			TlsParams: &tlsv3.TlsParameters{TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
				CipherSuites: []string{"ECDHE-RSA-CHACHA20-POLY1305", "AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-SHA"}},
			TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{Name: "rsa"}, {Name: "ecdsa"}},
			ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext: &tlsv3.CertificateValidationContext{
					Crl: &core.DataSource{Specifier: &core.DataSource_Filename{Filename: "/crl.pem"}}, OnlyVerifyLeafCertCrl: true,
					VerifyCertificateHash:     []string{strings.Repeat("0a", 32), strings.Repeat(":0B", 32)[1:]},
					VerifyCertificateSpki:     []string{base64.StdEncoding.EncodeToString(make([]byte, 32))},
					MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{SanType: tlsv3.SubjectAltNameMatcher_URI, Matcher: regex}, {SanType: tlsv3.SubjectAltNameMatcher_DNS, Matcher: regex}},
				},
				ValidationContextSdsSecretConfig: &tlsv3.SdsSecretConfig{Name: "roots"},
			}},
		},
		RequireClientCertificate: yes,
		SessionTicketKeysType:    &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
	}
	return &listener.Listener{
		Name: "wide", Address: address("192.0.2.1", 15006),
		AdditionalAddresses: []*listener.AdditionalAddress{{Address: address("2001:db8::1", 15006)}},
		BindToPort:          wrapperspb.Bool(false), UseOriginalDst: yes, ListenerFiltersTimeout: seconds(2), ContinueOnListenerFiltersTimeout: true,
		AccessLog: []*accesslog.AccessLog{{
			Filter:     &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_ResponseFlagFilter{ResponseFlagFilter: &accesslog.ResponseFlagFilter{Flags: []string{"NR", "UF"}}}},
			ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: packed(&filelog.FileAccessLog{Path: "l", AccessLogFormat: &filelog.FileAccessLog_Format{Format: "f"}})},
		}, {
			Filter:     wideLogFilter(),
			ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: packed(&filelog.FileAccessLog{Path: "m"})},
		}},
		DefaultFilterChain: &listener.FilterChain{
			Name: "default", TransportSocketConnectTimeout: seconds(15),
			Metadata: &core.Metadata{FilterMetadata: map[string]*structpb.Struct{"istio": {Fields: map[string]*structpb.Value{"config": structpb.NewStringValue("/apis/x")}}}},
			Filters: []*listener.Filter{
				{Name: "rbac", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(wideNetworkRBAC())}},
				{Name: "mx", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&udpa.TypedStruct{TypeUrl: "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange"})}},
				{Name: "hcm", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&hcm.HttpConnectionManager{
					RouteSpecifier:              &hcm.HttpConnectionManager_RouteConfig{RouteConfig: &route.RouteConfiguration{Name: "inline"}},
					HttpFilters:                 []*hcm.HttpFilter{{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: &anypb.Any{TypeUrl: "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router", Value: []byte{8, 1}}}}},
					NormalizePath:               yes,
					ServerName:                  "istio-envoy",
					SetCurrentClientCertDetails: &hcm.HttpConnectionManager_SetCurrentClientCertDetails{Subject: yes, Dns: true, Uri: true},
				})}},
			},
		},
		Transparent: yes, TrafficDirection: core.TrafficDirection_INBOUND,
		ListenerFilters: []*listener.ListenerFilter{
			{Name: "src", ConfigType: &listener.ListenerFilter_TypedConfig{TypedConfig: packed(&originalsrc.OriginalSrc{Mark: 1337})}},
			{Name: "pp", ConfigType: &listener.ListenerFilter_TypedConfig{TypedConfig: packed(&proxyprotocol.ProxyProtocol{AllowRequestsWithoutProxyProtocol: true})},
				FilterDisabled: &listener.ListenerFilterChainMatchPredicate{Rule: &listener.ListenerFilterChainMatchPredicate_NotMatch{NotMatch: rangeOf(-5, 80)}}},
			{Name: "and", ConfigType: &listener.ListenerFilter_TypedConfig{TypedConfig: packed(&originalsrc.OriginalSrc{})},
				FilterDisabled: &listener.ListenerFilterChainMatchPredicate{Rule: &listener.ListenerFilterChainMatchPredicate_AndMatch{AndMatch: set}}},
			{Name: "any", ConfigType: &listener.ListenerFilter_TypedConfig{TypedConfig: packed(&originalsrc.OriginalSrc{})},
				FilterDisabled: &listener.ListenerFilterChainMatchPredicate{Rule: &listener.ListenerFilterChainMatchPredicate_AnyMatch{AnyMatch: true}}},
		},
		FilterChains: []*listener.FilterChain{
			{
				FilterChainMatch: &listener.FilterChainMatch{
					DestinationPort: wrapperspb.UInt32(443), PrefixRanges: cidrs("192.0.2.0/24", "2001:db8::/32"), ServerNames: []string{"WWW.example.com", "*.example.com"},
					TransportProtocol: "tls", ApplicationProtocols: []string{"h2"}, DirectSourcePrefixRanges: cidrs("198.51.100.0/24"),
					SourceType: listener.FilterChainMatch_EXTERNAL, SourcePrefixRanges: cidrs("0.0.0.0/0", "203.0.113.7/32"), SourcePorts: []uint32{1, 65535},
				},
				TransportSocket: &core.TransportSocket{Name: "tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: packed(downstream)}},
				Filters: []*listener.Filter{{Name: "hcm", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&hcm.HttpConnectionManager{
					CodecType:      hcm.HttpConnectionManager_HTTP2,
					RouteSpecifier: &hcm.HttpConnectionManager_Rds{Rds: &hcm.Rds{RouteConfigName: "routes"}},
					HttpFilters: []*hcm.HttpFilter{
						{Name: "optional", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&udpa.TypedStruct{TypeUrl: "type.googleapis.com/stats.PluginConfig"})}, IsOptional: true, Disabled: true},
						{Name: "rbac", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(wideHTTPRBAC())}},
						{Name: "jwt", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(wideJWT())}, Disabled: true},
						{Name: "grpc", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(wideGRPCAuthz())}},
						{Name: "http", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(wideHTTPAuthz())}},
						{Name: "fault", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&fault.HTTPFault{UpstreamCluster: "c"})}},
						{Name: "cors", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&cors.Cors{})}},
						{Name: "stats", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&grpcstats.FilterConfig{EmitFilterState: true})}},
						{Name: "alpn", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: wideALPN()}},
						{Name: "session", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&session.StatefulSession{})}},
						{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&router.Router{SuppressEnvoyHeaders: true})}},
					},
					CommonHttpProtocolOptions: &core.HttpProtocolOptions{IdleTimeout: seconds(1), MaxConnectionDuration: seconds(2), MaxStreamDuration: seconds(3.5),
						MaxHeadersCount: wrapperspb.UInt32(7), HeadersWithUnderscoresAction: core.HttpProtocolOptions_REJECT_REQUEST, MaxRequestsPerConnection: wrapperspb.UInt32(8)},
					HttpProtocolOptions:          &core.Http1ProtocolOptions{AcceptHttp_10: true, DefaultHostForHttp_10: "old"},
					Http2ProtocolOptions:         &core.Http2ProtocolOptions{MaxConcurrentStreams: wrapperspb.UInt32(9)},
					ServerHeaderTransformation:   hcm.HttpConnectionManager_PASS_THROUGH,
					MaxRequestHeadersKb:          wrapperspb.UInt32(10),
					StreamIdleTimeout:            seconds(6),
					RequestTimeout:               seconds(7),
					RequestHeadersTimeout:        seconds(8),
					DrainTimeout:                 seconds(9),
					UseRemoteAddress:             yes,
					XffNumTrustedHops:            2,
					SkipXffAppend:                true,
					InternalAddressConfig:        &hcm.HttpConnectionManager_InternalAddressConfig{CidrRanges: cidrs("10.0.0.0/8")},
					GenerateRequestId:            wrapperspb.Bool(false),
					PreserveExternalRequestId:    true,
					AlwaysSetRequestIdInResponse: true,
					ForwardClientCertDetails:     hcm.HttpConnectionManager_ALWAYS_FORWARD_ONLY,
					SetCurrentClientCertDetails:  &hcm.HttpConnectionManager_SetCurrentClientCertDetails{Chain: true, Cert: true},
					UpgradeConfigs:               []*hcm.HttpConnectionManager_UpgradeConfig{{UpgradeType: "CONNECT", Enabled: wrapperspb.Bool(false)}, {UpgradeType: "x", Enabled: yes}},
					MergeSlashes:                 true,
					PathWithEscapedSlashesAction: hcm.HttpConnectionManager_UNESCAPE_AND_FORWARD,
					StripMatchingHostPort:        true,
					StripPortMode:                &hcm.HttpConnectionManager_StripAnyHostPort{StripAnyHostPort: true},
					StripTrailingHostDot:         true,
					AppendXForwardedPort:         true,
					AccessLog: []*accesslog.AccessLog{{ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: packed(&filelog.FileAccessLog{Path: "/dev/stderr",
						AccessLogFormat: &filelog.FileAccessLog_LogFormat{LogFormat: &core.SubstitutionFormatString{OmitEmptyValues: true, Format: &core.SubstitutionFormatString_JsonFormat{JsonFormat: &structpb.Struct{Fields: map[string]*structpb.Value{"a": structpb.NewStringValue("%START_TIME%")}}}}}})}}},
				})}}},
			},
			{
				Filters: []*listener.Filter{
					{Name: "sni", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&snicluster.SniCluster{})}},
					{Name: "authz", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(wideNetworkAuthz())}},
					{Name: "tcp", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&tcpproxy.TcpProxy{
						ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: "c"}, IdleTimeout: seconds(0), MaxDownstreamConnectionDuration: seconds(60), MaxConnectAttempts: wrapperspb.UInt32(3),
						HashPolicy: []*typev3.HashPolicy{{PolicySpecifier: &typev3.HashPolicy_SourceIp_{SourceIp: &typev3.HashPolicy_SourceIp{}}}},
						AccessLog: []*accesslog.AccessLog{{ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: packed(&filelog.FileAccessLog{Path: "p",
							AccessLogFormat: &filelog.FileAccessLog_LogFormat{LogFormat: &core.SubstitutionFormatString{Format: &core.SubstitutionFormatString_TextFormat{TextFormat: "t"}}}})}}},
					})}},
				},
			},
		},
	}
}

func readListener(l *listener.Listener) *mesh.Listener {
	want := &mesh.Listener{Name: l.Name, Virtual: l.BindToPort != nil && !l.BindToPort.Value, UseOriginalDst: l.GetUseOriginalDst().GetValue(), Transparent: l.GetTransparent().GetValue(),
		Direction: mesh.Direction(l.TrafficDirection), FiltersTimeout: absentDuration(l.ListenerFiltersTimeout, 15*time.Second), ContinueOnTimeout: l.ContinueOnListenerFiltersTimeout,
		AccessLogs: readLogs(l.AccessLog)}
	want.Addresses = append(want.Addresses, readAddress(l.Address))
	for _, more := range l.AdditionalAddresses {
		want.Addresses = append(want.Addresses, readAddress(more.Address))
	}
	for _, filter := range l.ListenerFilters {
		f := mesh.ListenerFilter{}
		switch config := filter.GetTypedConfig(); path.Ext(config.TypeUrl) {
		case ".OriginalDst":
			f.Kind = mesh.OriginalDst
		case ".OriginalSrc":
			f.Kind, f.Mark = mesh.OriginalSource, unpack(config.Value, &originalsrc.OriginalSrc{}).Mark
		case ".TlsInspector":
			f.Kind = mesh.TLSInspector
		case ".HttpInspector":
			f.Kind = mesh.HTTPInspector
		case ".ProxyProtocol":
			f.Kind, f.AllowWithout = mesh.ProxyProtocol, unpack(config.Value, &proxyprotocol.ProxyProtocol{}).AllowRequestsWithoutProxyProtocol
		}
		if filter.FilterDisabled != nil {
			predicate := readPredicate(filter.FilterDisabled)
			f.Disabled = &predicate
		}
		want.Filters = append(want.Filters, f)
	}
	for _, chain := range l.FilterChains {
		want.Chains = append(want.Chains, readChain(chain))
	}
	if l.DefaultFilterChain != nil {
		want.Default = readChain(l.DefaultFilterChain)
	}
	return want
}

func absentDuration(d *durationpb.Duration, absent time.Duration) time.Duration {
	if d == nil {
		return absent
	}
	return d.AsDuration()
}

func absentNumber(n *wrapperspb.UInt32Value, absent uint32) uint32 {
	if n == nil {
		return absent
	}
	return n.Value
}

func readAddress(a *core.Address) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(a.GetSocketAddress().Address), uint16(a.GetSocketAddress().GetPortValue()))
}

func readPredicate(p *listener.ListenerFilterChainMatchPredicate) mesh.PortPredicate {
	all := func(kind mesh.PredicateKind, rules ...*listener.ListenerFilterChainMatchPredicate) mesh.PortPredicate {
		want := mesh.PortPredicate{Kind: kind}
		for _, rule := range rules {
			want.Of = append(want.Of, readPredicate(rule))
		}
		return want
	}
	switch rule := p.Rule.(type) {
	case *listener.ListenerFilterChainMatchPredicate_OrMatch:
		return all(mesh.PortOr, rule.OrMatch.Rules...)
	case *listener.ListenerFilterChainMatchPredicate_AndMatch:
		return all(mesh.PortAnd, rule.AndMatch.Rules...)
	case *listener.ListenerFilterChainMatchPredicate_NotMatch:
		return all(mesh.PortNot, rule.NotMatch)
	case *listener.ListenerFilterChainMatchPredicate_AnyMatch:
		return mesh.PortPredicate{Kind: mesh.PortAny}
	case *listener.ListenerFilterChainMatchPredicate_DestinationPortRange:
		return mesh.PortPredicate{Kind: mesh.PortRange, Start: rule.DestinationPortRange.Start, End: rule.DestinationPortRange.End}
	}
	panic("no rule")
}

func readRanges(ranges []*core.CidrRange) (want []netip.Prefix) {
	for _, r := range ranges {
		want = append(want, netip.PrefixFrom(netip.MustParseAddr(r.AddressPrefix), int(r.GetPrefixLen().GetValue())).Masked())
	}
	return want
}

func readChain(c *listener.FilterChain) *mesh.FilterChain {
	want := &mesh.FilterChain{Name: c.Name, HandshakeTimeout: c.GetTransportSocketConnectTimeout().AsDuration(),
		Origin: c.GetMetadata().GetFilterMetadata()["istio"].GetFields()["config"].GetStringValue()}
	if m := c.FilterChainMatch; m != nil {
		want.Match = mesh.ChainMatch{Port: uint16(m.GetDestinationPort().GetValue()), Destinations: readRanges(m.PrefixRanges), Transport: m.TransportProtocol,
			Protocols: m.ApplicationProtocols, DirectSources: readRanges(m.DirectSourcePrefixRanges), SourceType: mesh.SourceType(m.SourceType), Sources: readRanges(m.SourcePrefixRanges)}
		for _, name := range m.ServerNames {
			want.Match.ServerNames = append(want.Match.ServerNames, strings.ToLower(name))
		}
		for _, port := range m.SourcePorts {
			want.Match.SourcePorts = append(want.Match.SourcePorts, uint16(port))
		}
	}
	if c.TransportSocket != nil {
		want.TLS = readDownstream(unpack(c.TransportSocket.GetTypedConfig().Value, &tlsv3.DownstreamTlsContext{}))
	}
	for _, filter := range c.Filters {
		switch config := filter.GetTypedConfig(); path.Ext(config.TypeUrl) {
		case ".TcpProxy":
			want.TCP = readTCP(unpack(config.Value, &tcpproxy.TcpProxy{}))
		case ".PluginConfig":
			want.Stats = readStats(config.Value)
		case ".HttpConnectionManager":
			want.HTTP = readHTTP(unpack(config.Value, &hcm.HttpConnectionManager{}))
			for _, f := range want.HTTP.Filters {
				want.Refused = want.Refused || f.Refused
			}
		case ".RBAC":
			policy := readNetworkRBAC(unpack(config.Value, &networkrbac.RBAC{}))
			want.Policies = append(want.Policies, mesh.NetworkFilter{Name: filter.Name, Type: strings.TrimPrefix(config.TypeUrl, "type.googleapis.com/"), RBAC: policy})
		case ".ExtAuthz":
			policy := readNetworkAuthz(unpack(config.Value, &networkauthz.ExtAuthz{}))
			want.Policies = append(want.Policies, mesh.NetworkFilter{Name: filter.Name, Type: strings.TrimPrefix(config.TypeUrl, "type.googleapis.com/"), ExtAuthz: policy})
		case ".SniCluster":
			want.ClusterIsSNI = true
		case ".MetadataExchange":
			want.HasMetadata = true
		case ".TypedStruct":
			want.HasMetadata = want.HasMetadata || strings.HasSuffix(unpack(config.Value, &udpa.TypedStruct{}).TypeUrl, ".MetadataExchange")
		}
	}
	return want
}

func readDownstream(c *tlsv3.DownstreamTlsContext) *mesh.DownstreamTLS {
	common := c.CommonTlsContext
	want := &mesh.DownstreamTLS{ALPN: common.AlpnProtocols, RequireClient: c.GetRequireClientCertificate().GetValue(),
		Roots:      common.GetCombinedValidationContext().GetValidationContextSdsSecretConfig().GetName(),
		MinVersion: mesh.TLSVersion(common.GetTlsParams().GetTlsMinimumProtocolVersion()), MaxVersion: mesh.TLSVersion(common.GetTlsParams().GetTlsMaximumProtocolVersion())}
	if direct := common.GetValidationContextSdsSecretConfig(); direct != nil {
		want.Roots = direct.Name
	}
	for _, secret := range common.TlsCertificateSdsSecretConfigs {
		want.Certificates = append(want.Certificates, secret.Name)
	}
	validation := common.GetCombinedValidationContext().GetDefaultValidationContext()
	want.Pins, want.Suites = readPins(validation), readSuites(common)
	want.CRL = mesh.CRL{Path: validation.GetCrl().GetFilename(), LeafOnly: validation.GetOnlyVerifyLeafCertCrl()}
	for _, name := range validation.GetMatchSubjectAltNames() {
		want.Names = append(want.Names, mesh.NameMatcher{StringMatcher: readMatcher(name)})
	}
	for _, name := range validation.GetMatchTypedSubjectAltNames() {
		want.Names = append(want.Names, mesh.NameMatcher{Type: mesh.NameType(name.SanType), StringMatcher: readMatcher(name.Matcher)})
	}
	return want
}

func readPins(c *tlsv3.CertificateValidationContext) (pins []mesh.Pin) {
	for _, text := range c.GetVerifyCertificateHash() {
		hash, _ := hex.DecodeString(strings.ReplaceAll(text, ":", ""))
		pins = append(pins, mesh.Pin{Hash: [32]byte(hash)})
	}
	for _, text := range c.GetVerifyCertificateSpki() {
		hash, _ := base64.StdEncoding.DecodeString(text)
		pins = append(pins, mesh.Pin{Key: true, Hash: [32]byte(hash)})
	}
	return pins
}

// suites are those of mesh.Suites, with the numbers of crypto/tls.
var suites = map[string]uint16{
	"ECDHE-ECDSA-AES256-GCM-SHA384": tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	"ECDHE-RSA-AES256-GCM-SHA384":   tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	"ECDHE-ECDSA-AES128-GCM-SHA256": tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	"ECDHE-RSA-AES128-GCM-SHA256":   tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	"ECDHE-ECDSA-CHACHA20-POLY1305": tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	"ECDHE-RSA-CHACHA20-POLY1305":   tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	"ECDHE-ECDSA-AES128-SHA":        tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA,
	"ECDHE-RSA-AES128-SHA":          tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA,
	"ECDHE-ECDSA-AES256-SHA":        tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA,
	"ECDHE-RSA-AES256-SHA":          tls.TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA,
}

func TestCipherSuitesHaveTheirNumbers(t *testing.T) {
	for _, s := range mesh.Suites {
		if suites[s.Name] != s.Number {
			t.Errorf("%s has the number %#x, want %#x", s.Name, s.Number, suites[s.Name])
		}
	}
	if len(mesh.Suites) != len(suites) {
		t.Errorf("%d suites, want %d", len(mesh.Suites), len(suites))
	}
}

func readSuites(c *tlsv3.CommonTlsContext) (numbers []uint16) {
	for _, name := range c.GetTlsParams().GetCipherSuites() {
		if number := suites[name]; number != 0 {
			numbers = append(numbers, number)
		}
	}
	return numbers
}

func readTCP(p *tcpproxy.TcpProxy) *mesh.TCPProxy {
	want := &mesh.TCPProxy{IdleTimeout: absentDuration(p.IdleTimeout, time.Hour), MaxDuration: p.GetMaxDownstreamConnectionDuration().AsDuration(),
		ConnectAttempts: absentNumber(p.MaxConnectAttempts, 1), AccessLogs: readLogs(p.AccessLog)}
	if p.GetWeightedClusters() == nil {
		want.Clusters = []mesh.TCPCluster{{Name: p.GetCluster(), Weight: 1}}
	}
	for _, c := range p.GetWeightedClusters().GetClusters() {
		want.Clusters = append(want.Clusters, mesh.TCPCluster{Name: c.Name, Weight: c.Weight})
	}
	for _, policy := range p.HashPolicy {
		want.HashSource = want.HashSource || policy.GetSourceIp() != nil
	}
	return want
}

func readHTTP(h *hcm.HttpConnectionManager) *mesh.HTTPManager {
	want := &mesh.HTTPManager{
		Codec: mesh.HTTPCodec(h.CodecType), RouteName: h.GetRds().GetRouteConfigName(),
		UseRemoteAddress: h.GetUseRemoteAddress().GetValue(), TrustedHops: h.XffNumTrustedHops, SkipXFFAppend: h.SkipXffAppend,
		Internal: readRanges(h.GetInternalAddressConfig().GetCidrRanges()), ClientCert: mesh.ClientCertAction(h.ForwardClientCertDetails),
		NormalizePath: h.GetNormalizePath().GetValue(), MergeSlashes: h.MergeSlashes, EscapedSlashes: mesh.EscapedSlashes(h.PathWithEscapedSlashesAction),
		StripMatchingPort: h.StripMatchingHostPort, StripPort: h.GetStripAnyHostPort(), StripTrailingDot: h.StripTrailingHostDot, AppendPort: h.AppendXForwardedPort,
		ServerName: h.ServerName, ServerHeader: mesh.ServerHeader(h.ServerHeaderTransformation), GenerateRequestID: h.GenerateRequestId == nil || h.GenerateRequestId.Value,
		KeepRequestID: h.PreserveExternalRequestId, RequestIDInReply: h.AlwaysSetRequestIdInResponse,
		MaxHeaderKiB: absentNumber(h.MaxRequestHeadersKb, 60), MaxHeaders: absentNumber(h.GetCommonHttpProtocolOptions().GetMaxHeadersCount(), 100),
		Underscores:  mesh.Underscores(h.GetCommonHttpProtocolOptions().GetHeadersWithUnderscoresAction()),
		AcceptHTTP10: h.GetHttpProtocolOptions().GetAcceptHttp_10(), DefaultHostHTTP10: h.GetHttpProtocolOptions().GetDefaultHostForHttp_10(),
		MaxStreams: h.GetHttp2ProtocolOptions().GetMaxConcurrentStreams().GetValue(), MaxRequests: h.GetCommonHttpProtocolOptions().GetMaxRequestsPerConnection().GetValue(),
		IdleTimeout: absentDuration(h.GetCommonHttpProtocolOptions().GetIdleTimeout(), time.Hour), MaxLifetime: h.GetCommonHttpProtocolOptions().GetMaxConnectionDuration().AsDuration(),
		MaxStreamDuration: h.GetCommonHttpProtocolOptions().GetMaxStreamDuration().AsDuration(), StreamIdleTimeout: absentDuration(h.StreamIdleTimeout, 5*time.Minute),
		RequestTimeout: h.GetRequestTimeout().AsDuration(), HeadersTimeout: h.GetRequestHeadersTimeout().AsDuration(), DrainTimeout: absentDuration(h.DrainTimeout, 5*time.Second),
		AccessLogs: readLogs(h.AccessLog),
	}
	if h.GetRouteConfig() != nil {
		want.Routes = readRoutes(h.GetRouteConfig())
	}
	if c := h.SetCurrentClientCertDetails; c != nil {
		want.ClientCertDetails = mesh.ClientCertDetails{Subject: c.GetSubject().GetValue(), Cert: c.Cert, Chain: c.Chain, DNS: c.Dns, URI: c.Uri}
	}
	for _, upgrade := range h.UpgradeConfigs {
		want.Upgrades = append(want.Upgrades, mesh.Upgrade{Protocol: upgrade.UpgradeType, Disabled: upgrade.Enabled != nil && !upgrade.Enabled.Value})
	}
	lastPolicy := -1
	for i, filter := range h.HttpFilters {
		if url := path.Ext(filter.GetTypedConfig().GetTypeUrl()); url == ".RBAC" || url == ".JwtAuthentication" || url == ".ExtAuthz" {
			lastPolicy = i
		}
	}
	for i, filter := range h.HttpFilters {
		f := readHTTPFilter(filter.GetTypedConfig())
		f.Name, f.Optional, f.Disabled = filter.Name, filter.IsOptional, filter.Disabled
		f.Refused = f.Refused && !f.Disabled
		f.BeforePolicy = i < lastPolicy
		want.Filters = append(want.Filters, f)
	}
	return want
}

func readLogs(logs []*accesslog.AccessLog) (want []mesh.AccessLog) {
	for _, log := range logs {
		file := unpack(log.GetTypedConfig().Value, &filelog.FileAccessLog{})
		w := mesh.AccessLog{Path: file.Path}
		if log.Filter != nil {
			w.Filter = readLogFilter(log.Filter)
		}
		var format *structpb.Struct
		switch f := file.AccessLogFormat.(type) {
		case *filelog.FileAccessLog_Format:
			w.Text = f.Format
		case *filelog.FileAccessLog_JsonFormat:
			format = f.JsonFormat
		case *filelog.FileAccessLog_TypedJsonFormat:
			format = f.TypedJsonFormat
		case *filelog.FileAccessLog_LogFormat:
			w.OmitEmpty, w.Text, format = f.LogFormat.OmitEmptyValues, f.LogFormat.GetTextFormat(), f.LogFormat.GetJsonFormat()
			if source := f.LogFormat.GetTextFormatSource(); source != nil {
				w.Text = source.GetInlineString() + string(source.GetInlineBytes())
			}
		}
		if format != nil {
			w.JSON, _ = proto.Marshal(format)
		}
		want = append(want, w)
	}
	return want
}

// wideLogFilter has all filters that are supported.
func wideLogFilter() *accesslog.AccessLogFilter {
	compare := func(op accesslog.ComparisonFilter_Op, value uint32) *accesslog.ComparisonFilter {
		return &accesslog.ComparisonFilter{Op: op, Value: &core.RuntimeUInt32{DefaultValue: value, RuntimeKey: "k"}}
	}
	return &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_OrFilter{OrFilter: &accesslog.OrFilter{Filters: []*accesslog.AccessLogFilter{
		{FilterSpecifier: &accesslog.AccessLogFilter_AndFilter{AndFilter: &accesslog.AndFilter{Filters: []*accesslog.AccessLogFilter{
			{FilterSpecifier: &accesslog.AccessLogFilter_StatusCodeFilter{StatusCodeFilter: &accesslog.StatusCodeFilter{Comparison: compare(accesslog.ComparisonFilter_GE, 400)}}},
			{FilterSpecifier: &accesslog.AccessLogFilter_DurationFilter{DurationFilter: &accesslog.DurationFilter{Comparison: compare(accesslog.ComparisonFilter_LE, 5)}}},
		}}}},
		{FilterSpecifier: &accesslog.AccessLogFilter_TraceableFilter{TraceableFilter: &accesslog.TraceableFilter{}}},
		{FilterSpecifier: &accesslog.AccessLogFilter_NotHealthCheckFilter{NotHealthCheckFilter: &accesslog.NotHealthCheckFilter{}}},
		{FilterSpecifier: &accesslog.AccessLogFilter_RuntimeFilter{RuntimeFilter: &accesslog.RuntimeFilter{
			RuntimeKey: "k", PercentSampled: &typev3.FractionalPercent{Numerator: 7, Denominator: typev3.FractionalPercent_TEN_THOUSAND}, UseIndependentRandomness: true,
		}}},
		{FilterSpecifier: &accesslog.AccessLogFilter_GrpcStatusFilter{GrpcStatusFilter: &accesslog.GrpcStatusFilter{
			Statuses: []accesslog.GrpcStatusFilter_Status{accesslog.GrpcStatusFilter_NOT_FOUND, accesslog.GrpcStatusFilter_INTERNAL}, Exclude: true,
		}}},
		{FilterSpecifier: &accesslog.AccessLogFilter_LogTypeFilter{LogTypeFilter: &accesslog.LogTypeFilter{
			Types: []logdata.AccessLogType{logdata.AccessLogType_DownstreamEnd, logdata.AccessLogType_TcpConnectionEnd}, Exclude: true,
		}}},
		{FilterSpecifier: &accesslog.AccessLogFilter_HeaderFilter{HeaderFilter: &accesslog.HeaderFilter{
			Header: &route.HeaderMatcher{Name: "X-A", HeaderMatchSpecifier: &route.HeaderMatcher_PresentMatch{PresentMatch: true}, InvertMatch: true},
		}}},
		{FilterSpecifier: &accesslog.AccessLogFilter_ExtensionFilter{ExtensionFilter: &accesslog.ExtensionFilter{
			Name: "cel", ConfigType: &accesslog.ExtensionFilter_TypedConfig{TypedConfig: packed(&celfilter.ExpressionFilter{Expression: "response.code >= 400"})},
		}}},
	}}}}
}

func readStats(b []byte) *mesh.Stats {
	want := &mesh.Stats{Key: string(b)}
	for _, m := range unpack(b, &stats.PluginConfig{}).Metrics {
		o := mesh.MetricOverride{Name: m.Name, Drop: m.Drop, Remove: m.TagsToRemove}
		for _, name := range slices.Sorted(maps.Keys(m.Dimensions)) {
			expression, err := cel.Parse(m.Dimensions[name])
			if err != nil {
				panic(err)
			}
			o.Dimensions = append(o.Dimensions, mesh.Dimension{Name: name, Expression: expression})
		}
		want.Overrides = append(want.Overrides, o)
	}
	return want
}

// readLogFilter has the filters of the recorded listeners and of wideListener.
func readLogFilter(f *accesslog.AccessLogFilter) *mesh.LogFilter {
	want := &mesh.LogFilter{}
	compare := func(c *accesslog.ComparisonFilter) {
		want.Compare, want.Value = mesh.Comparison(c.GetOp()), c.GetValue().GetDefaultValue()
	}
	inside := func(filters []*accesslog.AccessLogFilter) {
		for _, inner := range filters {
			want.Filters = append(want.Filters, *readLogFilter(inner))
		}
	}
	switch f := f.FilterSpecifier.(type) {
	case *accesslog.AccessLogFilter_LogTypeFilter:
		want.Kind, want.Exclude = mesh.LogType, f.LogTypeFilter.Exclude
		for _, kind := range f.LogTypeFilter.Types {
			want.Statuses = append(want.Statuses, uint32(kind))
		}
	case *accesslog.AccessLogFilter_HeaderFilter:
		if h := f.HeaderFilter.Header; h != nil {
			want.Kind, want.Header = mesh.LogHeader, &readHeaders([]*route.HeaderMatcher{h})[0]
			want.Header.Name = strings.ToLower(want.Header.Name)
		}
	case *accesslog.AccessLogFilter_ResponseFlagFilter:
		want.Kind, want.Flags = mesh.LogFlags, f.ResponseFlagFilter.Flags
	case *accesslog.AccessLogFilter_AndFilter:
		want.Kind = mesh.LogAnd
		inside(f.AndFilter.Filters)
	case *accesslog.AccessLogFilter_OrFilter:
		want.Kind = mesh.LogOr
		inside(f.OrFilter.Filters)
	case *accesslog.AccessLogFilter_StatusCodeFilter:
		want.Kind = mesh.LogStatus
		compare(f.StatusCodeFilter.Comparison)
	case *accesslog.AccessLogFilter_DurationFilter:
		want.Kind = mesh.LogDuration
		compare(f.DurationFilter.Comparison)
	case *accesslog.AccessLogFilter_TraceableFilter:
		want.Kind = mesh.LogTraced
	case *accesslog.AccessLogFilter_GrpcStatusFilter:
		want.Kind, want.Exclude = mesh.LogGRPCStatus, f.GrpcStatusFilter.Exclude
		for _, status := range f.GrpcStatusFilter.Statuses {
			want.Statuses = append(want.Statuses, uint32(status))
		}
	case *accesslog.AccessLogFilter_RuntimeFilter:
		share := f.RuntimeFilter.PercentSampled
		want.Kind, want.Sample = mesh.LogSample, mesh.Fraction{Numerator: share.GetNumerator(), Denominator: []uint32{100, 10_000, 1_000_000}[share.GetDenominator()]}
	case *accesslog.AccessLogFilter_ExtensionFilter:
		expression, err := cel.Parse(unpack(f.ExtensionFilter.GetTypedConfig().GetValue(), &celfilter.ExpressionFilter{}).Expression)
		if err == nil {
			want.Kind, want.Expression = mesh.LogExpression, expression
		}
	}
	return want
}

// The filter of metadata exchange has its type in a TypedStruct, or by itself.
func TestMetadataExchangeByItsOwnType(t *testing.T) {
	const name = "envoy.tcp.metadataexchange.config.MetadataExchange"
	for _, typed := range []*anypb.Any{packed(&udpa.TypedStruct{TypeUrl: "type.googleapis.com/" + name}), {TypeUrl: "type.googleapis.com/" + name}} {
		l := wideListener()
		l.DefaultFilterChain.Filters[1].ConfigType = &listener.Filter_TypedConfig{TypedConfig: typed}
		b, err := proto.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		got, findings, err := mesh.DecodeListener(b)
		if err != nil || len(understood(findings)) > 0 || !got.Default.HasMetadata {
			t.Errorf("%s: %v, %v", typed.TypeUrl, err, findings)
			continue
		}
		compareListeners(t, typed.TypeUrl, got, readListener(l))
	}
}

// A listener that was changed at random is decoded as by the generated types, has findings, or is an error.
func TestDamagedListenersAreNeverMisread(t *testing.T) {
	random := rand.New(rand.NewPCG(2, 8))
	same, found, failed := 0, 0, 0
	try := func(place string, b []byte) {
		damaged := damage(random, b)
		got, findings, err := mesh.DecodeListener(damaged)
		var judge listener.Listener
		switch problem := proto.Unmarshal(damaged, &judge); {
		case err != nil:
			failed++
		case len(understood(findings)) > 0:
			found++
		case problem != nil: // within a field that is ignored
		default:
			same++
			if want, ok := attempt(readListener, &judge); ok {
				compareListeners(t, place, got, want)
			}
		}
	}
	each(t, "lds.json", func(t *testing.T, place string, b []byte) {
		for range 20 {
			try(place, b)
		}
	})
	wide, err := proto.Marshal(wideListener())
	if err != nil {
		t.Fatal(err)
	}
	for range 10000 {
		try("made here", wide)
	}
	allOccur(t, same, found, failed)
}

// BenchmarkListeners decodes all recorded listeners, by hand and by the generated types.
func BenchmarkListeners(b *testing.B) {
	benchmark(b, "lds.json",
		func(resource []byte) error { _, _, err := mesh.DecodeListener(resource); return err },
		func(resource []byte) { readListener(unpack(resource, &listener.Listener{})) })
}

// Each mode of mutual TLS, with each way to declare a port's protocol, takes each kind of connection to its chain.
func TestInboundConnectionsMeetTheChainOfTheirMode(t *testing.T) {
	recorded := func(file string) *mesh.Listener {
		all, err := pushes()
		if err != nil {
			t.Fatal(err)
		}
		for _, resource := range all[file] {
			if l, _, err := mesh.DecodeListener(resource.Value); err == nil && l.Name == "virtualInbound" {
				return l
			}
		}
		t.Fatal("no inbound listener in " + file)
		return nil
	}
	// made returns a listener like those for modes and protocols that are not recorded. TLS is inspected if inspect is set.
	made := func(inspect bool, chains ...*listener.FilterChain) *mesh.Listener {
		l := &listener.Listener{Name: "made", FilterChains: chains}
		if inspect {
			l.ListenerFilters = []*listener.ListenerFilter{{ConfigType: &listener.ListenerFilter_TypedConfig{
				TypedConfig: &anypb.Any{TypeUrl: "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"}}}}
		}
		b, err := proto.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		got, findings, err := mesh.DecodeListener(b)
		if err != nil || len(understood(findings)) > 0 {
			t.Fatal(err, findings)
		}
		return got
	}
	wide := wideListener()
	ofHTTP, ofTCP, socket := wide.FilterChains[0].Filters, wide.FilterChains[1].Filters, wide.FilterChains[0].TransportSocket
	match := func(transport string) *listener.FilterChainMatch {
		return &listener.FilterChainMatch{DestinationPort: wrapperspb.UInt32(8080), TransportProtocol: transport}
	}
	plain, strict, dump := recorded("xds-cases/00-plain/lds.json"), recorded("xds-cases/05-mtls-strict/lds.json"), recorded("sidecar/lds.json")

	clients := []struct {
		name  string
		tls   bool
		alpn  []string
		http1 bool
	}{
		{name: "plaintext HTTP", http1: true},
		{name: "plaintext of another protocol"},
		{name: "TLS of a mesh HTTP client", tls: true, alpn: []string{"istio-http/1.1", "istio", "http/1.1"}},
		{name: "TLS of a mesh TCP client", tls: true, alpn: []string{"istio-peer-exchange", "istio"}},
		{name: "TLS from outside", tls: true, alpn: []string{"h2", "http/1.1"}},
		{name: "TLS without ALPN", tls: true},
	}
	for _, test := range []struct {
		name     string
		listener *mesh.Listener
		port     uint16
		want     [6]string // by client
	}{
		{"PERMISSIVE, HTTP port", plain, 8080, [...]string{"HTTP", "HTTP", "mTLS HTTP", "mTLS HTTP", "closed", "closed"}},
		{"PERMISSIVE, HTTP port in a STRICT workload", strict, 8080, [...]string{"HTTP", "HTTP", "mTLS HTTP", "mTLS HTTP", "closed", "closed"}},
		{"PERMISSIVE, gRPC port", dump, 50051, [...]string{"HTTP", "HTTP", "mTLS HTTP", "mTLS HTTP", "closed", "closed"}},
		{"PERMISSIVE, TCP port", dump, 7001, [...]string{"TCP", "TCP", "mTLS TCP", "mTLS TCP", "TCP", "TCP"}},
		{"PERMISSIVE, MySQL port", dump, 3306, [...]string{"TCP", "TCP", "mTLS TCP", "mTLS TCP", "TCP", "TCP"}},
		{"PERMISSIVE, undeclared port", plain, 9999, [...]string{"HTTP", "TCP", "mTLS HTTP", "mTLS TCP", "TCP", "TCP"}},
		{"STRICT, HTTP port", made(true, &listener.FilterChain{FilterChainMatch: match("tls"), TransportSocket: socket, Filters: ofHTTP}), 8080,
			[...]string{"closed", "closed", "mTLS HTTP", "mTLS HTTP", "mTLS HTTP", "mTLS HTTP"}},
		{"STRICT, TCP port", dump, 7000, [...]string{"closed", "closed", "mTLS TCP", "mTLS TCP", "mTLS TCP", "mTLS TCP"}},
		{"STRICT, undeclared port", strict, 9999, [...]string{"closed", "closed", "mTLS HTTP", "mTLS TCP", "mTLS TCP", "mTLS TCP"}},
		{"DISABLE, HTTP port", made(false, &listener.FilterChain{FilterChainMatch: match("raw_buffer"), Filters: ofHTTP}), 8080,
			[...]string{"HTTP", "HTTP", "HTTP", "HTTP", "HTTP", "HTTP"}},
		{"DISABLE, TCP port", made(false, &listener.FilterChain{FilterChainMatch: match("raw_buffer"), Filters: ofTCP}), 8080,
			[...]string{"TCP", "TCP", "TCP", "TCP", "TCP", "TCP"}},
		{"DISABLE, undeclared port", strict, 7000, [...]string{"HTTP", "TCP", "TCP", "TCP", "TCP", "TCP"}},
		{"the listener's own port", plain, 15006, [...]string{"TCP", "TCP", "TCP", "TCP", "TCP", "TCP"}},
	} {
		for i, client := range clients {
			c := mesh.ConnInfo{Destination: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.4"), test.port), Source: netip.MustParseAddrPort("203.0.113.9:40000"), DirectSource: netip.MustParseAddr("203.0.113.9")}
			for _, filter := range test.listener.Filters {
				switch {
				case !filter.Applies(test.port):
				case filter.Kind == mesh.TLSInspector && client.tls:
					c.TLS, c.Protocols, c.ServerName = true, client.alpn, "outbound_.80_._.nginx-service.default.svc.cluster.local"
				case filter.Kind == mesh.HTTPInspector && client.http1:
					c.Protocols = []string{"http/1.1"}
				}
			}
			got := "closed"
			if chain, ok := test.listener.Match(&c); ok {
				got = "TCP"
				if chain.HTTP != nil {
					got = "HTTP"
				}
				if chain.TLS != nil {
					got = "mTLS " + got
				}
			}
			if got != test.want[i] {
				t.Errorf("%s, %s: %s, want %s", test.name, client.name, got, test.want[i])
			}
			if n := testing.AllocsPerRun(10, func() { test.listener.Match(&c) }); n > 0 {
				t.Errorf("%s, %s: a match allocates %v times", test.name, client.name, n)
			}
		}
	}
}
