package controlplane

import (
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	udpa "github.com/cncf/xds/go/udpa/type/v1"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httpauthz "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	fault "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/grpc_web/v3"
	jwt "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/jwt_authn/v3"
	httprbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	networkauthz "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/ext_authz/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// alpnConfig is the descriptor of istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig, after
// envoy/config/filter/http/alpn/v2alpha1/config.proto of istio.io/api.
var alpnConfig = func() protoreflect.MessageDescriptor {
	const name = "istio.envoy.config.filter.http.alpn.v2alpha1"
	field := func(number int32, name string, label descriptorpb.FieldDescriptorProto_Label, typ descriptorpb.FieldDescriptorProto_Type, typeName *string) *descriptorpb.FieldDescriptorProto {
		return &descriptorpb.FieldDescriptorProto{Name: &name, Number: &number, Label: &label, Type: &typ, TypeName: typeName}
	}
	repeated, single := descriptorpb.FieldDescriptorProto_LABEL_REPEATED, descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL
	config := register(&descriptorpb.FileDescriptorProto{
		Name: new("envoy/config/filter/http/alpn/v2alpha1/config.proto"), Package: new(name), Syntax: new("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{{
			Name:  new("FilterConfig"),
			Field: []*descriptorpb.FieldDescriptorProto{field(1, "alpn_override", repeated, descriptorpb.FieldDescriptorProto_TYPE_MESSAGE, new("."+name+".FilterConfig.AlpnOverride"))},
			NestedType: []*descriptorpb.DescriptorProto{{Name: new("AlpnOverride"), Field: []*descriptorpb.FieldDescriptorProto{
				field(1, "upstream_protocol", single, descriptorpb.FieldDescriptorProto_TYPE_ENUM, new("."+name+".FilterConfig.Protocol")),
				field(2, "alpn_override", repeated, descriptorpb.FieldDescriptorProto_TYPE_STRING, nil),
			}}},
			EnumType: []*descriptorpb.EnumDescriptorProto{{Name: new("Protocol"), Value: []*descriptorpb.EnumValueDescriptorProto{
				{Name: new("HTTP10"), Number: new(int32(0))}, {Name: new("HTTP11"), Number: new(int32(1))}, {Name: new("HTTP2"), Number: new(int32(2))}}}},
		}},
	})
	if err := protoregistry.GlobalTypes.RegisterMessage(dynamicpb.NewMessageType(config)); err != nil {
		panic(err)
	}
	return config
}()

// misdirectedConfig is the descriptor of istio.envoy.config.filter.http.misdirected_request.v1alpha1.FilterConfig, after
// source/extensions/filters/http/misdirected_request/config.proto of istio/proxy.
var misdirectedConfig = register(&descriptorpb.FileDescriptorProto{
	Name: new("source/extensions/filters/http/misdirected_request/config.proto"), Package: new("istio.envoy.config.filter.http.misdirected_request.v1alpha1"), Syntax: new("proto3"),
	MessageType: []*descriptorpb.DescriptorProto{{Name: new("FilterConfig"), Field: []*descriptorpb.FieldDescriptorProto{
		{Name: new("own_hostnames"), Number: new(int32(1)), Label: descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum(), Type: descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum()},
		{Name: new("listener_metadata_namespace"), Number: new(int32(2)), Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(), Type: descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum()},
		{Name: new("hosts_field"), Number: new(int32(3)), Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(), Type: descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum()},
	}}},
})

// A listener's filter of misdirected requests has the hosts of its server, and those of the listener's metadata.
func TestMisdirectedRequestsAreDecodedAsByGeneratedTypes(t *testing.T) {
	config := dynamicpb.NewMessage(misdirectedConfig)
	own := config.Mutable(misdirectedConfig.Fields().ByName("own_hostnames")).List()
	own.Append(protoreflect.ValueOfString("a.example"))
	own.Append(protoreflect.ValueOfString("*.b.example"))
	hosts, err := structpb.NewStruct(map[string]any{"hosts": []any{"a.example", "*.b.example", "c.example"}, "other": []any{"x"}})
	if err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(&listener.Listener{
		Name: "l", Metadata: &core.Metadata{FilterMetadata: map[string]*structpb.Struct{"istio.misdirected_request": hosts, "x": hosts}},
		FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{Name: "hcm", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&hcm.HttpConnectionManager{
			RouteSpecifier: &hcm.HttpConnectionManager_Rds{Rds: &hcm.Rds{RouteConfigName: "routes"}},
			HttpFilters: []*hcm.HttpFilter{
				{Name: "misdirected", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(config)}},
				{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&router.Router{})}},
			},
		})}}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, findings, err := mesh.DecodeListener(b)
	if err != nil || len(findings) > 0 {
		t.Fatal(err, findings)
	}
	want := &mesh.Misdirected{Own: []string{"a.example", "*.b.example"}, All: []string{"a.example", "*.b.example", "c.example"}}
	if got := l.Chains[0].HTTP.MisdirectedFilter(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// wideALPN has protocols for two versions of HTTP.
func wideALPN() *anypb.Any {
	config := dynamicpb.NewMessage(alpnConfig)
	overrides := alpnConfig.Fields().ByName("alpn_override")
	for version, protocols := range map[protoreflect.EnumNumber][]string{1: {"istio-http/1.1", "istio"}, 2: {"istio-h2"}} {
		override := config.Mutable(overrides).List().AppendMutable().Message()
		override.Set(overrides.Message().Fields().ByName("upstream_protocol"), protoreflect.ValueOfEnum(version))
		for _, protocol := range protocols {
			override.Mutable(overrides.Message().Fields().ByName("alpn_override")).List().Append(protoreflect.ValueOfString(protocol))
		}
		if version == 1 && config.Get(overrides).List().Len() == 2 { // in a fixed order
			list := config.Mutable(overrides).List()
			first := list.Get(0)
			list.Set(0, list.Get(1))
			list.Set(1, first)
		}
	}
	return packed(config)
}

func readALPN(b []byte) *mesh.ALPN {
	config := unpack(b, dynamicpb.NewMessage(alpnConfig))
	want := &mesh.ALPN{}
	overrides := alpnConfig.Fields().ByName("alpn_override")
	for list, i := config.Get(overrides).List(), 0; i < list.Len(); i++ {
		override := list.Get(i).Message()
		var protocols []string
		for names, j := override.Get(overrides.Message().Fields().ByName("alpn_override")).List(), 0; j < names.Len(); j++ {
			protocols = append(protocols, names.Get(j).String())
		}
		*[]*[]string{&want.HTTP10, &want.HTTP11, &want.HTTP2}[override.Get(overrides.Message().Fields().ByName("upstream_protocol")).Enum()] = protocols
	}
	return want
}

// wideJWT has each field that istiod sends, and others that are decoded. It requires tokens.
func wideJWT() *jwt.JwtAuthentication {
	name := func(s string) *jwt.JwtRequirement {
		return &jwt.JwtRequirement{RequiresType: &jwt.JwtRequirement_ProviderName{ProviderName: s}}
	}
	missing := &jwt.JwtRequirement{RequiresType: &jwt.JwtRequirement_AllowMissing{AllowMissing: &emptypb.Empty{}}}
	failed := &jwt.JwtRequirement{RequiresType: &jwt.JwtRequirement_AllowMissingOrFailed{AllowMissingOrFailed: &emptypb.Empty{}}}
	audiences := &jwt.JwtRequirement{RequiresType: &jwt.JwtRequirement_ProviderAndAudiences{ProviderAndAudiences: &jwt.ProviderWithAudiences{ProviderName: "remote", Audiences: []string{"x", "y"}}}}
	either := func(of ...*jwt.JwtRequirement) *jwt.JwtRequirement {
		return &jwt.JwtRequirement{RequiresType: &jwt.JwtRequirement_RequiresAny{RequiresAny: &jwt.JwtRequirementOrList{Requirements: of}}}
	}
	both := func(of ...*jwt.JwtRequirement) *jwt.JwtRequirement {
		return &jwt.JwtRequirement{RequiresType: &jwt.JwtRequirement_RequiresAll{RequiresAll: &jwt.JwtRequirementAndList{Requirements: of}}}
	}
	match := &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}}
	uri := &core.HttpUri{Uri: "https://issuer.example/keys", HttpUpstreamType: &core.HttpUri_Cluster{Cluster: "c"}, Timeout: durationpb.New(5 * time.Second)}
	return &jwt.JwtAuthentication{
		Providers: map[string]*jwt.JwtProvider{
			"local": {Issuer: "i", Audiences: []string{"a", "b"}, Forward: true, ForwardPayloadHeader: "x-payload", PadForwardPayloadHeader: true, PayloadInMetadata: "payload", ClockSkewSeconds: 5, ClearRouteCache: true,
				JwksSourceSpecifier: &jwt.JwtProvider_LocalJwks{LocalJwks: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: `{"keys": []}`}}},
				FromHeaders:         []*jwt.JwtHeader{{Name: "x-token", ValuePrefix: "Bearer "}, {Name: "y"}}, FromParams: []string{"token"}, FromCookies: []string{"session"},
				NormalizePayloadInMetadata: &jwt.JwtProvider_NormalizePayload{SpaceDelimitedClaims: []string{"scope", "permission"}},
				ClaimToHeaders:             []*jwt.JwtClaimToHeader{{HeaderName: "x-sub", ClaimName: "sub"}}},
			"remote": {JwksSourceSpecifier: &jwt.JwtProvider_RemoteJwks{RemoteJwks: &jwt.RemoteJwks{HttpUri: uri, CacheDuration: durationpb.New(time.Minute), AsyncFetch: &jwt.JwksAsyncFetch{FastListener: true, FailedRefetchDuration: durationpb.New(3 * time.Second)},
				RetryPolicy: &core.RetryPolicy{NumRetries: wrapperspb.UInt32(4), RetryBackOff: &core.BackoffStrategy{BaseInterval: durationpb.New(2 * time.Second)}}}}},
			"empty": {JwksSourceSpecifier: &jwt.JwtProvider_LocalJwks{LocalJwks: &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: []byte{}}}}},
		},
		Rules: []*jwt.RequirementRule{
			{Match: match, RequirementType: &jwt.RequirementRule_Requires{Requires: either(name("local"), name("empty"), both(either(name("local"), missing), either(audiences, failed)))}},
			{Match: match, RequirementType: &jwt.RequirementRule_RequirementName{RequirementName: "n"}},
			{Match: match},
		},
		RequirementMap:      map[string]*jwt.JwtRequirement{"n": name("local"), "m": missing},
		BypassCorsPreflight: true, StripFailureResponse: true, StatPrefix: "s",
	}
}

func readKeyRetry(p *core.RetryPolicy, want *mesh.RemoteKeys) {
	if p == nil {
		return
	}
	want.Retries, want.BackOff = 1, absentDuration(p.GetRetryBackOff().GetBaseInterval(), time.Second)
	want.MaxBackOff = absentDuration(p.GetRetryBackOff().GetMaxInterval(), 10*want.BackOff)
	if p.NumRetries != nil {
		want.Retries = p.NumRetries.Value
	}
}

func readJWT(j *jwt.JwtAuthentication) *mesh.JWT {
	want := &mesh.JWT{AllowPreflight: j.BypassCorsPreflight, TerseFailures: j.StripFailureResponse}
	for name, p := range j.Providers {
		w := mesh.JWTProvider{Name: name, Issuer: p.Issuer, Audiences: p.Audiences, Params: p.FromParams, Cookies: p.FromCookies, Forward: p.Forward,
			PayloadHeader: p.ForwardPayloadHeader, PadPayload: p.PadForwardPayloadHeader, Metadata: p.PayloadInMetadata, SpaceClaims: p.GetNormalizePayloadInMetadata().GetSpaceDelimitedClaims(),
			ClockSkew: time.Minute, Reroute: p.ClearRouteCache}
		if p.ClockSkewSeconds != 0 {
			w.ClockSkew = time.Duration(p.ClockSkewSeconds) * time.Second
		}
		if local := p.GetLocalJwks(); local != nil {
			w.Keys = append([]byte(local.GetInlineString()), local.GetInlineBytes()...)
		}
		if remote := p.GetRemoteJwks(); remote != nil {
			w.Remote = &mesh.RemoteKeys{Service: readURI(remote.HttpUri), CacheFor: absentDuration(remote.CacheDuration, 10*time.Minute), Early: remote.AsyncFetch != nil,
				Pause: absentDuration(remote.AsyncFetch.GetFailedRefetchDuration(), time.Second)}
			readKeyRetry(remote.RetryPolicy, w.Remote)
		}
		for _, h := range p.FromHeaders {
			w.Headers = append(w.Headers, mesh.TokenHeader{Name: h.Name, Prefix: h.ValuePrefix})
		}
		for _, h := range p.ClaimToHeaders {
			w.ClaimHeaders = append(w.ClaimHeaders, mesh.ClaimHeader{Header: h.HeaderName, Claim: h.ClaimName})
		}
		want.Providers = append(want.Providers, w)
	}
	slices.SortFunc(want.Providers, func(a, b mesh.JWTProvider) int { return strings.Compare(a.Name, b.Name) })
	for _, r := range j.Rules {
		w := mesh.JWTRule{Match: readRouteMatch(r.Match), Requires: mesh.JWTRequirement{Kind: mesh.JWTNotRequired}}
		switch requirement := r.RequirementType.(type) {
		case *jwt.RequirementRule_Requires:
			w.Requires = readRequirement(requirement.Requires)
		case *jwt.RequirementRule_RequirementName:
			w.Requires = mesh.JWTRequirement{Kind: mesh.JWTNamed, Name: requirement.RequirementName}
		}
		want.Rules = append(want.Rules, w)
	}
	for name, r := range j.RequirementMap {
		want.Named = append(want.Named, mesh.NamedRequirement{Name: name, JWTRequirement: readRequirement(r)})
	}
	slices.SortFunc(want.Named, func(a, b mesh.NamedRequirement) int { return strings.Compare(a.Name, b.Name) })
	return want
}

func readURI(u *core.HttpUri) mesh.HTTPService {
	return mesh.HTTPService{URI: u.GetUri(), Cluster: u.GetCluster(), Timeout: u.GetTimeout().AsDuration()}
}

func readRequirement(r *jwt.JwtRequirement) (want mesh.JWTRequirement) {
	all := func(kind mesh.JWTRequirementKind, of []*jwt.JwtRequirement) {
		want.Kind = kind
		for _, part := range of {
			want.Of = append(want.Of, readRequirement(part))
		}
	}
	switch requirement := r.RequiresType.(type) {
	case *jwt.JwtRequirement_ProviderName:
		want.Kind, want.Name = mesh.JWTProvided, requirement.ProviderName
	case *jwt.JwtRequirement_ProviderAndAudiences:
		want.Kind, want.Name, want.Audiences = mesh.JWTProvided, requirement.ProviderAndAudiences.ProviderName, requirement.ProviderAndAudiences.Audiences
	case *jwt.JwtRequirement_RequiresAny:
		all(mesh.JWTAny, requirement.RequiresAny.Requirements)
	case *jwt.JwtRequirement_RequiresAll:
		all(mesh.JWTAll, requirement.RequiresAll.Requirements)
	case *jwt.JwtRequirement_AllowMissing:
		want.Kind = mesh.JWTAllowMissing
	case *jwt.JwtRequirement_AllowMissingOrFailed:
		want.Kind = mesh.JWTAllowMissingOrFailed
	default:
		panic(r)
	}
	return want
}

func exactly(text string) *matcher.StringMatcher {
	return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: text}, IgnoreCase: true}
}

func exactlyOne(texts ...string) *matcher.ListStringMatcher {
	list := &matcher.ListStringMatcher{}
	for _, text := range texts {
		list.Patterns = append(list.Patterns, exactly(text))
	}
	return list
}

func extAuthzMetadata(filter string) *matcher.MetadataMatcher {
	return &matcher.MetadataMatcher{Filter: filter, Path: []*matcher.MetadataMatcher_PathSegment{{Segment: &matcher.MetadataMatcher_PathSegment_Key{Key: "istio_ext_authz_shadow_effective_policy_id"}}},
		Value: &matcher.ValueMatcher{MatchPattern: &matcher.ValueMatcher_StringMatch{StringMatch: &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Prefix{Prefix: "istio-ext-authz"}}}}}
}

func grpcService() *core.GrpcService {
	return &core.GrpcService{TargetSpecifier: &core.GrpcService_EnvoyGrpc_{EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: "c", Authority: "a"}},
		Timeout: durationpb.New(600 * time.Second), InitialMetadata: []*core.HeaderValue{{Key: "x", Value: "y"}}}
}

// The policies below are in shadow mode, so they are not findings.

func wideGRPCAuthz() *httpauthz.ExtAuthz {
	return &httpauthz.ExtAuthz{Services: &httpauthz.ExtAuthz_GrpcService{GrpcService: grpcService()}, TransportApiVersion: core.ApiVersion_V3, FailureModeAllow: true, FailureModeAllowHeaderAdd: true,
		WithRequestBody: &httpauthz.BufferSettings{MaxRequestBytes: 4096, AllowPartialMessage: true, PackAsBytes: true}, ClearRouteCache: true, StatusOnError: &typev3.HttpStatus{Code: typev3.StatusCode_ServiceUnavailable},
		FilterEnabled: &core.RuntimeFractionalPercent{DefaultValue: &typev3.FractionalPercent{Numerator: 3, Denominator: 1}}, FilterEnabledMetadata: extAuthzMetadata("envoy.filters.http.rbac"),
		IncludePeerCertificate: true, AllowedHeaders: exactlyOne("a", "b"), DisallowedHeaders: exactlyOne("b"), EncodeRawHeaders: true, ShadowMode: true,
		IncludeTlsSession: true, ValidateMutations: true, EnableDynamicMetadataIngestion: wrapperspb.Bool(false)}
}

func wideHTTPAuthz() *httpauthz.ExtAuthz {
	return &httpauthz.ExtAuthz{ShadowMode: true, Services: &httpauthz.ExtAuthz_HttpService{HttpService: &httpauthz.HttpService{
		ServerUri: &core.HttpUri{Uri: "http://authz", HttpUpstreamType: &core.HttpUri_Cluster{Cluster: "c"}, Timeout: durationpb.New(time.Second)}, PathPrefix: "/check",
		AuthorizationRequest: &httpauthz.AuthorizationRequest{AllowedHeaders: exactlyOne("h"), HeadersToAdd: []*core.HeaderValue{{Key: "x", Value: "y"}, {Key: "z"}}},
		AuthorizationResponse: &httpauthz.AuthorizationResponse{AllowedUpstreamHeaders: exactlyOne("1"), AllowedClientHeaders: exactlyOne("2"),
			AllowedUpstreamHeadersToAppend: exactlyOne("3"), AllowedClientHeadersOnSuccess: exactlyOne()},
	}}}
}

func wideNetworkAuthz() *networkauthz.ExtAuthz {
	return &networkauthz.ExtAuthz{StatPrefix: "tcp.", GrpcService: grpcService(), FailureModeAllow: true, IncludePeerCertificate: true, IncludeTlsSession: true, TransportApiVersion: core.ApiVersion_V3,
		FilterEnabledMetadata: extAuthzMetadata("envoy.filters.network.rbac"), ShadowMode: true}
}

func readNetworkAuthz(e *networkauthz.ExtAuthz) *mesh.ExtAuthz {
	want := &mesh.ExtAuthz{Enabled: mesh.Fraction{Numerator: 100, Denominator: 100}, StatusOnError: 403, AllowFailure: e.FailureModeAllow, PeerCert: e.IncludePeerCertificate, TLSSession: e.IncludeTlsSession, Shadow: e.ShadowMode,
		GRPC: readGRPC(e.GrpcService)}
	if e.FilterEnabledMetadata != nil {
		want.When = readMetadata(e.FilterEnabledMetadata)
	}
	return want
}

func readHTTPAuthz(e *httpauthz.ExtAuthz) *mesh.ExtAuthz {
	want := &mesh.ExtAuthz{Enabled: mesh.Fraction{Numerator: 100, Denominator: 100}, StatusOnError: 403, AllowFailure: e.FailureModeAllow, MarkFailure: e.FailureModeAllowHeaderAdd,
		Headers: readMatchers(e.AllowedHeaders), NotHeaders: readMatchers(e.DisallowedHeaders), RawHeaders: e.EncodeRawHeaders, Body: readBody(e.WithRequestBody),
		PeerCert: e.IncludePeerCertificate, TLSSession: e.IncludeTlsSession, Reroute: e.ClearRouteCache, Shadow: e.ShadowMode,
		Validate: e.ValidateMutations, NoMetadata: e.EnableDynamicMetadataIngestion != nil && !e.EnableDynamicMetadataIngestion.Value}
	if e.FilterEnabledMetadata != nil {
		want.When = readMetadata(e.FilterEnabledMetadata)
	}
	if f := e.FilterEnabled; f != nil {
		want.Enabled = mesh.Fraction{Numerator: f.GetDefaultValue().GetNumerator(), Denominator: readFraction(f.GetDefaultValue()).Denominator}
	}
	if e.StatusOnError != nil {
		want.StatusOnError = int(e.StatusOnError.Code)
	}
	switch service := e.Services.(type) {
	case *httpauthz.ExtAuthz_GrpcService:
		want.GRPC = readGRPC(service.GrpcService)
	case *httpauthz.ExtAuthz_HttpService:
		s := service.HttpService
		response := s.GetAuthorizationResponse()
		want.HTTP = &mesh.HTTPAuthz{Service: readURI(s.ServerUri), PathPrefix: s.PathPrefix, Add: readValues(s.GetAuthorizationRequest().GetHeadersToAdd()),
			Upstream: readMatchers(response.GetAllowedUpstreamHeaders()), Denied: readMatchers(response.GetAllowedClientHeaders()),
			UpstreamAppend: readMatchers(response.GetAllowedUpstreamHeadersToAppend()), Allowed: readMatchers(response.GetAllowedClientHeadersOnSuccess())}
		if older := s.GetAuthorizationRequest().GetAllowedHeaders(); older != nil {
			want.Headers = readMatchers(older)
		}
	}
	return want
}

func readBody(b *httpauthz.BufferSettings) *mesh.AuthzBody {
	if b == nil {
		return nil
	}
	return &mesh.AuthzBody{MaxBytes: b.MaxRequestBytes, AllowPartial: b.AllowPartialMessage, Raw: b.PackAsBytes}
}

func readGRPC(s *core.GrpcService) *mesh.GRPCService {
	return &mesh.GRPCService{Cluster: s.GetEnvoyGrpc().GetClusterName(), Authority: s.GetEnvoyGrpc().GetAuthority(), Timeout: absentDuration(s.GetTimeout(), 200*time.Millisecond), Metadata: readValues(s.GetInitialMetadata())}
}

func readValues(values []*core.HeaderValue) (want []mesh.NamedValue) {
	for _, v := range values {
		want = append(want, mesh.NamedValue{Name: v.Key, Value: v.Value + string(v.RawValue)})
	}
	return want
}

// readMatchers returns nil for a list that is absent only.
func readMatchers(list *matcher.ListStringMatcher) (want []mesh.StringMatcher) {
	if list == nil {
		return nil
	}
	want = []mesh.StringMatcher{}
	for _, m := range list.Patterns {
		want = append(want, readMatcher(m))
	}
	return want
}

// readHTTPFilter reads a filter's configuration. A policy that is not carried out is refused.
func readHTTPFilter(config *anypb.Any) mesh.HTTPFilter {
	want := mesh.HTTPFilter{Type: strings.TrimPrefix(config.GetTypeUrl(), "type.googleapis.com/")}
	switch want.Type {
	case "udpa.type.v1.TypedStruct":
		inner := unpack(config.Value, &udpa.TypedStruct{})
		if want.Type = strings.TrimPrefix(inner.TypeUrl, "type.googleapis.com/"); want.Type == "stats.PluginConfig" {
			want.Stats = &mesh.Stats{}
		}
	case "envoy.extensions.filters.http.rbac.v3.RBAC":
		want.RBAC = readHTTPRBAC(unpack(config.Value, &httprbac.RBAC{}))
	case "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication":
		want.JWT = readJWT(unpack(config.Value, &jwt.JwtAuthentication{}))
	case "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz":
		want.ExtAuthz = readHTTPAuthz(unpack(config.Value, &httpauthz.ExtAuthz{}))
	case "envoy.extensions.filters.http.fault.v3.HTTPFault":
		want.Fault = readFault(unpack(config.Value, &fault.HTTPFault{}))
	case "envoy.extensions.filters.http.router.v3.Router":
		want.Router = &mesh.Router{SuppressHeaders: unpack(config.Value, &router.Router{}).SuppressEnvoyHeaders}
	case "stats.PluginConfig":
		want.Stats = readStats(config.Value)
	case string(alpnConfig.FullName()):
		want.ALPN = readALPN(config.Value)
	}
	return want
}

// extension returns the resource of a filter's configuration.
func extension(t *testing.T, config *anypb.Any) []byte {
	t.Helper()
	b, err := proto.Marshal(&core.TypedExtensionConfig{Name: "e", TypedConfig: config})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wideFilters are the filters that have a configuration, with all of its fields.
func wideFilters() []*anypb.Any {
	enforced := wideHTTPRBAC()
	enforced.Rules = wideRules()
	grpc, http := wideGRPCAuthz(), wideHTTPAuthz()
	grpc.ShadowMode, http.ShadowMode = false, false
	return []*anypb.Any{packed(wideHTTPRBAC()), packed(enforced), packed(wideJWT()), packed(wideGRPCAuthz()), packed(grpc), packed(http),
		packed(&fault.HTTPFault{UpstreamCluster: "c", MaxActiveFaults: wrapperspb.UInt32(1)}), packed(&router.Router{SuppressEnvoyHeaders: true}), wideALPN()}
}

// The configuration of a filter may come as a resource.
func TestExtensionsAreDecodedAsByGeneratedTypes(t *testing.T) {
	for _, config := range wideFilters() {
		got, findings, err := mesh.DecodeExtension(extension(t, config))
		want := readHTTPFilter(config)
		want.Name = "e"
		if err != nil || len(understood(findings)) > 0 || len(unenforced(findings)) > 0 || !reflect.DeepEqual(*got, want) {
			t.Errorf("error %v, findings %v, got\n%s\nwant\n%s", err, findings, text(got), text(want))
		}
	}
}

// A configuration that was changed at random is decoded as by the generated types, has findings, or is an error.
func TestDamagedExtensionsAreNeverMisread(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 3))
	for _, config := range wideFilters() {
		same, found, failed := 0, 0, 0
		for range 3000 {
			damaged := &anypb.Any{TypeUrl: config.TypeUrl, Value: damage(random, config.Value)}
			got, findings, err := mesh.DecodeExtension(extension(t, damaged))
			problem := problemOf(damaged)
			switch {
			case err != nil:
				failed++
			case len(understood(findings)) > 0:
				found++
			case problem != nil: // within a field that is ignored
			default:
				same++
				if want, ok := attempt(readHTTPFilter, damaged); ok {
					want.Name = "e"
					if !reflect.DeepEqual(*got, want) {
						t.Fatalf("%s: got\n%s\nwant\n%s", config.TypeUrl, text(got), text(want))
					}
				}
			}
		}
		if len(config.Value) > 20 {
			allOccur(t, same, found, failed)
		}
	}
}

// problemOf returns the error of the generated types.
func problemOf(config *anypb.Any) error {
	_, err := config.UnmarshalNew()
	return err
}

// changedPolicies are changes of policies by routes.
func changedPolicies() []*anypb.Any {
	settings := &httpauthz.CheckSettings{ContextExtensions: map[string]string{"x": "1", "a": "2"}, DisableRequestBodyBuffering: true, WithRequestBody: &httpauthz.BufferSettings{MaxRequestBytes: 5}}
	return []*anypb.Any{
		packed(&httprbac.RBACPerRoute{}),
		packed(&httprbac.RBACPerRoute{Rbac: &httprbac.RBAC{}}),
		packed(&httprbac.RBACPerRoute{Rbac: &httprbac.RBAC{Rules: wideRules()}}),
		packed(&jwt.PerRouteConfig{RequirementSpecifier: &jwt.PerRouteConfig_Disabled{Disabled: true}}),
		packed(&jwt.PerRouteConfig{RequirementSpecifier: &jwt.PerRouteConfig_RequirementName{RequirementName: "n"}}),
		packed(&httpauthz.ExtAuthzPerRoute{Override: &httpauthz.ExtAuthzPerRoute_Disabled{Disabled: true}}),
		packed(&httpauthz.ExtAuthzPerRoute{Override: &httpauthz.ExtAuthzPerRoute_CheckSettings{CheckSettings: settings}}),
		packed(&route.FilterConfig{Disabled: true}),
	}
}

// readRoutePolicy reads a change of the filter f.
func readRoutePolicy(config *anypb.Any) (want mesh.RoutePolicy) {
	want.Filter = "f"
	switch message, _ := config.UnmarshalNew(); m := message.(type) {
	case *httprbac.RBACPerRoute:
		want.Disabled = m.Rbac == nil
		if m.Rbac != nil {
			want.RBAC = readHTTPRBAC(m.Rbac)
		}
	case *jwt.PerRouteConfig:
		want.Disabled, want.Requirement = m.GetDisabled(), m.GetRequirementName()
	case *httpauthz.ExtAuthzPerRoute:
		want.Disabled = m.GetDisabled()
		if settings := m.GetCheckSettings(); settings != nil {
			want.Check = &mesh.CheckSettings{NoBody: settings.DisableRequestBodyBuffering, Body: readBody(settings.WithRequestBody)}
			for _, name := range slices.Sorted(maps.Keys(settings.ContextExtensions)) {
				want.Check.Context = append(want.Check.Context, mesh.NamedValue{Name: name, Value: settings.ContextExtensions[name]})
			}
		}
	case *route.FilterConfig:
		want.Disabled = m.Disabled
	default:
		panic(message)
	}
	return want
}

// changing returns a table with a route that changes the filter f.
func changing(t *testing.T, config *anypb.Any) []byte {
	t.Helper()
	r := &route.Route{Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}}, TypedPerFilterConfig: map[string]*anypb.Any{"f": config},
		Action: &route.Route_Route{Route: &route.RouteAction{ClusterSpecifier: &route.RouteAction_Cluster{Cluster: "c"}}}}
	b, err := proto.Marshal(&route.RouteConfiguration{Name: "r", VirtualHosts: []*route.VirtualHost{{Name: "h", Domains: []string{"*"}, Routes: []*route.Route{r}}}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Changes of policies by routes are decoded as by the generated types.
func TestPoliciesOfRoutesAreDecodedAsByGeneratedTypes(t *testing.T) {
	for _, config := range changedPolicies() {
		got, findings, err := mesh.DecodeRoutes(changing(t, config))
		want := readRoutePolicy(config)
		if err != nil || len(findings) > 0 {
			t.Errorf("%s: error %v, findings %v", config.TypeUrl, err, findings)
			continue
		}
		if route := got.Hosts[0].Routes[0]; !reflect.DeepEqual(route.Filters.Policies, []mesh.RoutePolicy{want}) || route.Refused {
			t.Errorf("%s: got %s\nwant %s, refused %v", config.TypeUrl, text(route.Filters.Policies), text(want), route.Refused)
		}
	}
}

// A change that was changed at random is decoded as by the generated types, has findings, or is an error.
func TestDamagedPoliciesOfRoutesAreNeverMisread(t *testing.T) {
	random := rand.New(rand.NewPCG(9, 2))
	same, found, failed := 0, 0, 0
	for _, config := range changedPolicies() {
		for range 1000 {
			if len(config.Value) == 0 {
				break
			}
			damaged := &anypb.Any{TypeUrl: config.TypeUrl, Value: damage(random, config.Value)}
			got, findings, err := mesh.DecodeRoutes(changing(t, damaged))
			problem := problemOf(damaged)
			switch {
			case err != nil:
				failed++
			case len(understood(findings)) > 0:
				found++
			case problem != nil: // within a field that is ignored
			default:
				same++
				want, ok := attempt(readRoutePolicy, damaged)
				if ok && !reflect.DeepEqual(got.Hosts[0].Routes[0].Filters.Policies, []mesh.RoutePolicy{want}) {
					t.Fatalf("%s: got %s\nwant %s", config.TypeUrl, text(got.Hosts[0].Routes[0].Filters.Policies), text(want))
				}
			}
		}
	}
	allOccur(t, same, found, failed)
}
