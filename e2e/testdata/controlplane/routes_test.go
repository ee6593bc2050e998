package controlplane

import (
	"encoding/json"
	"flag"
	"math/rand/v2"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	delay "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/fault/v3"
	cors "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/cors/v3"
	fault "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	priorities "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/priority/previous_priorities/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

func TestRecordedRoutesAreDecodedAsByGeneratedTypes(t *testing.T) {
	each(t, "rds.json", func(t *testing.T, place string, b []byte) {
		got, findings, err := mesh.DecodeRoutes(b)
		want := readRoutes(unpack(b, &route.RouteConfiguration{}))
		if err != nil || len(findings) > 0 || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: error %v, findings %v, got\n%s\nwant\n%s", place, err, findings, text(got), text(want))
		}
	})
}

var update = flag.Bool("update", false, "write the resource that the tests of internal/mesh read")

// wideFile has wideRoutes. The tests of internal/mesh, where there are no generated types, decode it as well.
const wideFile = "../../../internal/mesh/testdata/routes.pb"

// Fields that the recorded resources do not have are decoded as by the generated types as well.
func TestOtherRoutesAreDecodedAsByGeneratedTypes(t *testing.T) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(wideRoutes())
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(wideFile, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := os.ReadFile(wideFile)
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(unpack(kept, &route.RouteConfiguration{}), wideRoutes()) {
		t.Errorf("%s has other routes; use -update", wideFile)
	}
	got, findings, err := mesh.DecodeRoutes(b)
	if want := readRoutes(wideRoutes()); err != nil || len(findings) > 0 || !reflect.DeepEqual(got, want) {
		t.Errorf("error %v, findings %v, got\n%s\nwant\n%s", err, findings, text(got), text(want))
	}
}

// wideRoutes has fields that istiod sends and that the recorded resources do not have.
func wideRoutes() *route.RouteConfiguration {
	exact := func(text string) *matcher.StringMatcher {
		return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: text}}
	}
	regex := func(text string) *matcher.RegexMatcher { return &matcher.RegexMatcher{Regex: text} }
	add := func(name, value string, action core.HeaderValueOption_HeaderAppendAction) []*core.HeaderValueOption {
		return []*core.HeaderValueOption{{Header: &core.HeaderValue{Key: name, Value: value}, AppendAction: action, KeepEmptyValue: true}}
	}
	packed := func(m proto.Message) *anypb.Any {
		a, err := anypb.New(m)
		if err != nil {
			panic(err)
		}
		return a
	}
	fraction := func(n uint32, of typev3.FractionalPercent_DenominatorType) *typev3.FractionalPercent {
		return &typev3.FractionalPercent{Numerator: n, Denominator: of}
	}
	prefix := &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}}
	yes, no := wrapperspb.Bool(true), wrapperspb.Bool(false)
	retry := &route.RetryPolicy{
		RetryOn: "5xx, gateway-error,reset,retriable-4xx,deadline-exceeded,internal,resource-exhausted,retriable-headers", NumRetries: wrapperspb.UInt32(0),
		RetriableStatusCodes: []uint32{503, 429}, RetryBackOff: &route.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(time.Second)},
		RetriableHeaders: []*route.HeaderMatcher{{Name: "x", HeaderMatchSpecifier: &route.HeaderMatcher_PresentMatch{PresentMatch: false}}},
		//lint:ignore SA1019 older configuration has this field
		RetriableRequestHeaders: []*route.HeaderMatcher{{Name: "y", HeaderMatchSpecifier: &route.HeaderMatcher_PrefixMatch{PrefixMatch: "p"}}},
	}
	hash := []*route.RouteAction_HashPolicy{
		{PolicySpecifier: &route.RouteAction_HashPolicy_Cookie_{Cookie: &route.RouteAction_HashPolicy_Cookie{Name: "c", Ttl: durationpb.New(0), Path: "/", Attributes: []*route.RouteAction_HashPolicy_CookieAttribute{{Name: "SameSite", Value: "Lax"}}}}, Terminal: true},
		{PolicySpecifier: &route.RouteAction_HashPolicy_Cookie_{Cookie: &route.RouteAction_HashPolicy_Cookie{Name: "c"}}},
		{PolicySpecifier: &route.RouteAction_HashPolicy_ConnectionProperties_{ConnectionProperties: &route.RouteAction_HashPolicy_ConnectionProperties{SourceIp: true}}},
		{PolicySpecifier: &route.RouteAction_HashPolicy_QueryParameter_{QueryParameter: &route.RouteAction_HashPolicy_QueryParameter{Name: "q"}}},
		{PolicySpecifier: &route.RouteAction_HashPolicy_Header_{Header: &route.RouteAction_HashPolicy_Header{HeaderName: "h", RegexRewrite: &matcher.RegexMatchAndSubstitute{Pattern: regex("a+"), Substitution: `\0`}}}},
	}
	return &route.RouteConfiguration{
		Name: "80", MostSpecificHeaderMutationsWins: true, IgnorePathParametersInPathMatching: true,
		RequestHeadersToAdd: add("a", "%REQ(x?y):5%", 0), RequestHeadersToRemove: []string{"b"}, ResponseHeadersToAdd: add("c", "100%%", 1), ResponseHeadersToRemove: []string{"d"},
		RequestMirrorPolicies:    []*route.RouteAction_RequestMirrorPolicy{{Cluster: "m", HostRewriteLiteral: "host"}},
		IgnorePortInHostMatching: true,
		VirtualHosts: []*route.VirtualHost{
			{Name: "wide", Domains: []string{"Example.com:80", "*.Example.com", "*-x.example.com", "example.*"}, RequireTls: route.VirtualHost_EXTERNAL_ONLY,
				RetryPolicy: retry, IncludeAttemptCountInResponse: true, IncludeRequestAttemptCount: true,
				RequestHeadersToAdd: add("e", "", 2), RequestHeadersToRemove: []string{"f"}, ResponseHeadersToAdd: add("g", "h", 3), ResponseHeadersToRemove: []string{"i"},
				RequestMirrorPolicies: []*route.RouteAction_RequestMirrorPolicy{{Cluster: "m", RuntimeFraction: &core.RuntimeFractionalPercent{}}},
				TypedPerFilterConfig: map[string]*anypb.Any{
					"envoy.filters.http.fault": packed(&route.FilterConfig{Disabled: true}),
					"envoy.filters.http.lua":   packed(&route.FilterConfig{Config: &anypb.Any{TypeUrl: "x"}, IsOptional: true}),
					"envoy.filters.http.cors": packed(&route.FilterConfig{Config: packed(&cors.CorsPolicy{AllowCredentials: no, AllowOriginStringMatch: []*matcher.StringMatcher{exact("https://example.com")}, AllowMethods: "GET", MaxAge: "5", AllowHeaders: "a", ExposeHeaders: "b", AllowPrivateNetworkAccess: yes,
						FilterEnabled: &core.RuntimeFractionalPercent{DefaultValue: fraction(5, 1)}})})},
				Routes: []*route.Route{
					{Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_SafeRegex{SafeRegex: regex("/a/.*")}, CaseSensitive: no,
						Headers: []*route.HeaderMatcher{
							{Name: "a", HeaderMatchSpecifier: &route.HeaderMatcher_RangeMatch{RangeMatch: &typev3.Int64Range{Start: -5, End: 9}}, TreatMissingHeaderAsEmpty: true},
							{Name: "b"}, {Name: "c", HeaderMatchSpecifier: &route.HeaderMatcher_SuffixMatch{SuffixMatch: "s"}},
							{Name: "d", HeaderMatchSpecifier: &route.HeaderMatcher_ContainsMatch{ContainsMatch: "s"}}, {Name: "e", HeaderMatchSpecifier: &route.HeaderMatcher_ExactMatch{ExactMatch: "s"}},
							{Name: "f", HeaderMatchSpecifier: &route.HeaderMatcher_SafeRegexMatch{SafeRegexMatch: regex("s")}}},
						QueryParameters: []*route.QueryParameterMatcher{{Name: "a"}, {Name: "b", QueryParameterMatchSpecifier: &route.QueryParameterMatcher_PresentMatch{PresentMatch: false}}},
						DynamicMetadata: []*matcher.MetadataMatcher{{Filter: "envoy.filters.http.jwt_authn", Path: []*matcher.MetadataMatcher_PathSegment{{Segment: &matcher.MetadataMatcher_PathSegment_Key{Key: "payload"}}, {Segment: &matcher.MetadataMatcher_PathSegment_Key{Key: "sub"}}}, Invert: true,
							Value: &matcher.ValueMatcher{MatchPattern: &matcher.ValueMatcher_OrMatch{OrMatch: &matcher.OrMatcher{ValueMatchers: []*matcher.ValueMatcher{
								{MatchPattern: &matcher.ValueMatcher_StringMatch{StringMatch: exact("a")}}, {MatchPattern: &matcher.ValueMatcher_NullMatch_{NullMatch: &matcher.ValueMatcher_NullMatch{}}},
								{MatchPattern: &matcher.ValueMatcher_BoolMatch{BoolMatch: true}}, {MatchPattern: &matcher.ValueMatcher_PresentMatch{PresentMatch: false}},
								{MatchPattern: &matcher.ValueMatcher_ListMatch{ListMatch: &matcher.ListMatcher{MatchPattern: &matcher.ListMatcher_OneOf{OneOf: &matcher.ValueMatcher{MatchPattern: &matcher.ValueMatcher_StringMatch{StringMatch: exact("b")}}}}}}}}}}}}},
						Action: &route.Route_Route{Route: &route.RouteAction{
							ClusterSpecifier: &route.RouteAction_WeightedClusters{WeightedClusters: &route.WeightedCluster{Clusters: []*route.WeightedCluster_ClusterWeight{
								{Name: "a", Weight: wrapperspb.UInt32(3), RequestHeadersToAdd: add("a", "b", 0), RequestHeadersToRemove: []string{"c"}, ResponseHeadersToAdd: add("d", "e", 2), ResponseHeadersToRemove: []string{"f"},
									HostRewriteSpecifier: &route.WeightedCluster_ClusterWeight_HostRewriteLiteral{HostRewriteLiteral: "h"},
									TypedPerFilterConfig: map[string]*anypb.Any{"envoy.filters.http.fault": packed(&fault.HTTPFault{})}},
								{Name: "b", Weight: wrapperspb.UInt32(0)}}}},
							RegexRewrite: &matcher.RegexMatchAndSubstitute{Pattern: regex("/a/(.*)"), Substitution: `/b/\1`}, AppendXForwardedHost: true, ClusterNotFoundResponseCode: route.RouteAction_INTERNAL_SERVER_ERROR,
							IdleTimeout: durationpb.New(0), MaxStreamDuration: &route.RouteAction_MaxStreamDuration{MaxStreamDuration: durationpb.New(0), GrpcTimeoutHeaderMax: durationpb.New(time.Minute)}, HashPolicy: hash, RetryPolicy: &route.RetryPolicy{}}}},
					{Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: "/a"}, CaseSensitive: no},
						Action: &route.Route_Redirect{Redirect: &route.RedirectAction{SchemeRewriteSpecifier: &route.RedirectAction_HttpsRedirect{HttpsRedirect: true}, PathRewriteSpecifier: &route.RedirectAction_PrefixRewrite{PrefixRewrite: "/b"},
							PortRedirect: 8443, ResponseCode: route.RedirectAction_PERMANENT_REDIRECT, StripQuery: true}}},
					{Match: prefix, Action: &route.Route_Redirect{Redirect: &route.RedirectAction{SchemeRewriteSpecifier: &route.RedirectAction_SchemeRedirect{SchemeRedirect: "http"},
						PathRewriteSpecifier: &route.RedirectAction_RegexRewrite{RegexRewrite: &matcher.RegexMatchAndSubstitute{Pattern: regex("a"), Substitution: "b"}}}}},
					{Match: prefix, Action: &route.Route_DirectResponse{DirectResponse: &route.DirectResponseAction{Status: 200, Body: &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: []byte{0xff}}}}}},
					{Match: prefix, Action: &route.Route_Route{Route: &route.RouteAction{ClusterSpecifier: &route.RouteAction_Cluster{Cluster: "c"}, PrefixRewrite: "/p", HostRewriteSpecifier: &route.RouteAction_HostRewriteLiteral{HostRewriteLiteral: "h"},
						Timeout: durationpb.New(time.Minute), RequestMirrorPolicies: []*route.RouteAction_RequestMirrorPolicy{{Cluster: "m", DisableShadowHostSuffixAppend: true}}}},
						Name: "named", Decorator: &route.Decorator{Operation: "op"}, Metadata: &core.Metadata{FilterMetadata: map[string]*structpb.Struct{"istio": {Fields: map[string]*structpb.Value{"config": structpb.NewStringValue("/apis/a")}}}},
						RequestHeadersToAdd: add("j", "k", 0), RequestHeadersToRemove: []string{"l"}, ResponseHeadersToAdd: add("m", "n", 0), ResponseHeadersToRemove: []string{"o"},
						TypedPerFilterConfig: map[string]*anypb.Any{"envoy.filters.http.fault": packed(&fault.HTTPFault{UpstreamCluster: "c", MaxActiveFaults: wrapperspb.UInt32(0),
							Headers: []*route.HeaderMatcher{{Name: "x"}}, Delay: &delay.FaultDelay{FaultDelaySecifier: &delay.FaultDelay_FixedDelay{FixedDelay: durationpb.New(1500 * time.Millisecond)}, Percentage: fraction(7, 0)}, Abort: &fault.FaultAbort{ErrorType: &fault.FaultAbort_GrpcStatus{GrpcStatus: 14}, Percentage: fraction(1, 2)}})}},
				}},
			{Name: "any", Domains: []string{"*"}},
		},
	}
}

// text shows a value with what its pointers point to.
func text(value any) string {
	b, err := json.Marshal(value)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func readRoutes(c *route.RouteConfiguration) *mesh.Routes {
	want := &mesh.Routes{Name: c.Name, IgnorePort: c.IgnorePortInHostMatching, IgnorePathParameters: c.IgnorePathParametersInPathMatching, SpecificEditsLast: c.MostSpecificHeaderMutationsWins,
		Edits: readEdits(c), Filters: readFilters(c.TypedPerFilterConfig), Mirrors: readMirrors(c.RequestMirrorPolicies)}
	for _, host := range c.VirtualHosts {
		h := mesh.VirtualHost{Name: host.Name, RequireTLS: mesh.RequireTLS(host.RequireTls), CountAttempts: host.IncludeRequestAttemptCount, CountInResponses: host.IncludeAttemptCountInResponse,
			Retry: readRetry(host.RetryPolicy), Edits: readEdits(host), Filters: readFilters(host.TypedPerFilterConfig), Mirrors: readMirrors(host.RequestMirrorPolicies)}
		for _, text := range host.Domains {
			text = strings.ToLower(text)
			domain := mesh.Domain{Text: text}
			switch {
			case text == "*":
				domain = mesh.Domain{Kind: mesh.DomainAny}
			case strings.HasPrefix(text, "*"):
				domain = mesh.Domain{Kind: mesh.DomainSuffix, Text: text[1:]}
			case strings.HasSuffix(text, "*"):
				domain = mesh.Domain{Kind: mesh.DomainPrefix, Text: strings.TrimSuffix(text, "*")}
			}
			h.Domains = append(h.Domains, domain)
		}
		for _, r := range host.Routes {
			h.Routes = append(h.Routes, readRoute(r))
		}
		want.Hosts = append(want.Hosts, h)
	}
	return want
}

func readRoute(r *route.Route) mesh.Route {
	want := mesh.Route{Name: r.Name, Match: readRouteMatch(r.Match), Operation: r.GetDecorator().GetOperation(), Edits: readEdits(r), Filters: readFilters(r.TypedPerFilterConfig),
		Origin: r.GetMetadata().GetFilterMetadata()["istio"].GetFields()["config"].GetStringValue()}
	switch action := r.Action.(type) {
	case *route.Route_Route:
		want.Forward = readForward(action.Route)
	case *route.Route_Redirect:
		redirect := action.Redirect
		want.Redirect = &mesh.Redirect{Scheme: redirect.GetSchemeRedirect(), Host: redirect.HostRedirect, Port: redirect.PortRedirect, Path: redirect.GetPathRedirect(), Prefix: redirect.GetPrefixRewrite(),
			Regex: readRewrite(redirect.GetRegexRewrite()), Code: []int{301, 302, 303, 307, 308}[redirect.ResponseCode], StripQuery: redirect.StripQuery}
		if redirect.GetHttpsRedirect() {
			want.Redirect.Scheme = "https"
		}
	case *route.Route_DirectResponse:
		want.Respond = &mesh.Response{Status: int(action.DirectResponse.Status)}
		switch body := action.DirectResponse.GetBody().GetSpecifier().(type) {
		case *core.DataSource_InlineString:
			want.Respond.Body = []byte(body.InlineString)
		case *core.DataSource_InlineBytes:
			want.Respond.Body = body.InlineBytes
		}
	}
	return want
}

func readRouteMatch(m *route.RouteMatch) mesh.RouteMatch {
	want := mesh.RouteMatch{IgnoreCase: m.CaseSensitive != nil && !m.CaseSensitive.Value}
	switch p := m.PathSpecifier.(type) {
	case *route.RouteMatch_Prefix:
		want.Kind, want.Path = mesh.PathPrefix, p.Prefix
	case *route.RouteMatch_Path:
		want.Kind, want.Path = mesh.PathExact, p.Path
	case *route.RouteMatch_SafeRegex:
		want.Kind, want.Path = mesh.PathRegex, p.SafeRegex.Regex
	case *route.RouteMatch_PathSeparatedPrefix:
		want.Kind, want.Path = mesh.PathSeparatedPrefix, p.PathSeparatedPrefix
	}
	want.Headers = readHeaders(m.Headers)
	for _, parameter := range m.QueryParameters {
		q := mesh.QueryMatcher{Name: parameter.Name, Present: true}
		switch p := parameter.QueryParameterMatchSpecifier.(type) {
		case *route.QueryParameterMatcher_StringMatch:
			q.Text, q.Present = new(readMatcher(p.StringMatch)), false
		case *route.QueryParameterMatcher_PresentMatch:
			q.Present = p.PresentMatch
		}
		want.Query = append(want.Query, q)
	}
	for _, metadata := range m.DynamicMetadata {
		want.Metadata = append(want.Metadata, *readMetadata(metadata))
	}
	return want
}

func readValue(m *matcher.ValueMatcher) (want mesh.ValueMatcher) {
	switch p := m.MatchPattern.(type) {
	case *matcher.ValueMatcher_NullMatch_:
		want.Kind = mesh.ValueNull
	case *matcher.ValueMatcher_StringMatch:
		want.Kind, want.Text = mesh.ValueText, readMatcher(p.StringMatch)
	case *matcher.ValueMatcher_BoolMatch:
		want.Kind, want.Bool = mesh.ValueBool, p.BoolMatch
	case *matcher.ValueMatcher_PresentMatch:
		want.Kind, want.Bool = mesh.ValuePresence, p.PresentMatch
	case *matcher.ValueMatcher_ListMatch:
		want.Kind, want.Any = mesh.ValueList, []mesh.ValueMatcher{readValue(p.ListMatch.GetOneOf())}
	case *matcher.ValueMatcher_OrMatch:
		want.Kind = mesh.ValueOr
		for _, value := range p.OrMatch.ValueMatchers {
			want.Any = append(want.Any, readValue(value))
		}
	}
	return want
}

// readHeaders reads matchers of header fields, also in their older forms.
func readHeaders(list []*route.HeaderMatcher) (want []mesh.HeaderMatcher) {
	for _, m := range list {
		w := mesh.HeaderMatcher{Name: m.Name, Invert: m.InvertMatch, MissingIsEmpty: m.TreatMissingHeaderAsEmpty}
		text := func(kind mesh.MatchKind, text string) {
			w.Kind, w.Text = mesh.HeaderText, mesh.StringMatcher{Kind: kind, Text: text}
		}
		switch p := m.HeaderMatchSpecifier.(type) {
		case nil:
			w.Present = true
		case *route.HeaderMatcher_PresentMatch:
			w.Present = p.PresentMatch
		case *route.HeaderMatcher_RangeMatch:
			w.Kind, w.Start, w.End = mesh.HeaderRange, p.RangeMatch.Start, p.RangeMatch.End
		case *route.HeaderMatcher_StringMatch:
			w.Kind, w.Text = mesh.HeaderText, readMatcher(p.StringMatch)
		case *route.HeaderMatcher_ExactMatch:
			text(mesh.MatchExact, p.ExactMatch)
		case *route.HeaderMatcher_PrefixMatch:
			text(mesh.MatchPrefix, p.PrefixMatch)
		case *route.HeaderMatcher_SuffixMatch:
			text(mesh.MatchSuffix, p.SuffixMatch)
		case *route.HeaderMatcher_ContainsMatch:
			text(mesh.MatchContains, p.ContainsMatch)
		case *route.HeaderMatcher_SafeRegexMatch:
			text(mesh.MatchRegex, p.SafeRegexMatch.Regex)
		}
		want = append(want, w)
	}
	return want
}

func readForward(a *route.RouteAction) *mesh.Forward {
	length := func(d *durationpb.Duration) *time.Duration {
		if d == nil {
			return nil
		}
		return new(d.AsDuration())
	}
	want := &mesh.Forward{NotFoundCode: []int{503, 404, 500}[a.ClusterNotFoundResponseCode], PrefixRewrite: a.PrefixRewrite, RegexRewrite: readRewrite(a.RegexRewrite), HostRewrite: a.GetHostRewriteLiteral(),
		ForwardedHost: a.AppendXForwardedHost, Timeout: 15 * time.Second, IdleTimeout: length(a.IdleTimeout), MaxStreamLength: length(a.GetMaxStreamDuration().GetMaxStreamDuration()),
		MaxGRPCStream: length(a.GetMaxStreamDuration().GetGrpcTimeoutHeaderMax()),
		Retry:         readRetry(a.RetryPolicy), Mirrors: readMirrors(a.RequestMirrorPolicies),
		//lint:ignore SA1019 istiod sends this field
		MaxGRPCTimeout: length(a.MaxGrpcTimeout)}
	if a.Timeout != nil {
		want.Timeout = a.Timeout.AsDuration()
	}
	switch p := a.ClusterSpecifier.(type) {
	case *route.RouteAction_Cluster:
		want.Clusters = []mesh.WeightedCluster{{Name: p.Cluster, Weight: 1}}
	case *route.RouteAction_WeightedClusters:
		for _, c := range p.WeightedClusters.Clusters {
			want.Clusters = append(want.Clusters, mesh.WeightedCluster{Name: c.Name, Weight: c.GetWeight().GetValue(), HostRewrite: c.GetHostRewriteLiteral(), Edits: readEdits(c), Filters: readFilters(c.TypedPerFilterConfig)})
		}
	}
	for _, policy := range a.HashPolicy {
		h := mesh.HashPolicy{Terminal: policy.Terminal}
		switch p := policy.PolicySpecifier.(type) {
		case *route.RouteAction_HashPolicy_Header_:
			h.Kind, h.Name, h.Rewrite = mesh.HashHeader, p.Header.HeaderName, readRewrite(p.Header.RegexRewrite)
		case *route.RouteAction_HashPolicy_Cookie_:
			h.Kind, h.Name, h.TTL, h.Path = mesh.HashCookie, p.Cookie.Name, length(p.Cookie.Ttl), p.Cookie.Path
			for _, attribute := range p.Cookie.Attributes {
				h.Attributes = append(h.Attributes, mesh.CookieAttribute{Name: attribute.Name, Value: attribute.Value})
			}
		case *route.RouteAction_HashPolicy_ConnectionProperties_:
			if p.ConnectionProperties.SourceIp {
				h.Kind = mesh.HashSourceIP
			}
		case *route.RouteAction_HashPolicy_QueryParameter_:
			h.Kind, h.Name = mesh.HashQuery, p.QueryParameter.Name
		}
		want.Hash = append(want.Hash, h)
	}
	return want
}

func readRewrite(r *matcher.RegexMatchAndSubstitute) *mesh.RegexRewrite {
	if r == nil {
		return nil
	}
	return &mesh.RegexRewrite{Pattern: r.GetPattern().GetRegex(), Substitution: r.Substitution}
}

func readMirrors(list []*route.RouteAction_RequestMirrorPolicy) (want []mesh.Mirror) {
	for _, m := range list {
		mirror := mesh.Mirror{Cluster: m.Cluster, Fraction: mesh.Fraction{Numerator: 100, Denominator: 100}, KeepHost: m.DisableShadowHostSuffixAppend, HostRewrite: m.HostRewriteLiteral}
		if m.RuntimeFraction != nil {
			mirror.Fraction = readFraction(m.RuntimeFraction.DefaultValue)
		}
		want = append(want, mirror)
	}
	return want
}

func readFraction(f *typev3.FractionalPercent) mesh.Fraction {
	return mesh.Fraction{Numerator: f.GetNumerator(), Denominator: []uint32{100, 10_000, 1_000_000}[f.GetDenominator()]}
}

func readRetry(r *route.RetryPolicy) *mesh.RetryPolicy {
	if r == nil {
		return nil
	}
	names := map[string]mesh.RetryConditions{"5xx": mesh.Retry5xx, "gateway-error": mesh.RetryGatewayError, "reset": mesh.RetryReset, "reset-before-request": mesh.RetryResetBeforeRequest,
		"connect-failure": mesh.RetryConnectFailure, "refused-stream": mesh.RetryRefusedStream, "envoy-ratelimited": mesh.RetryRateLimited, "retriable-4xx": mesh.Retry4xx,
		"retriable-status-codes": mesh.RetryStatusCodes, "retriable-headers": mesh.RetryHeaders, "cancelled": mesh.RetryCancelled, "deadline-exceeded": mesh.RetryDeadlineExceeded,
		"internal": mesh.RetryInternal, "resource-exhausted": mesh.RetryResourceExhausted, "unavailable": mesh.RetryUnavailable, "": 0}
	want := &mesh.RetryPolicy{Retries: 1, TryTimeout: r.PerTryTimeout.AsDuration(), Codes: r.RetriableStatusCodes,
		Headers: readHeaders(r.RetriableHeaders), RequestHeaders: readHeaders(r.RetriableRequestHeaders), BackOff: 25 * time.Millisecond, MaxBackOff: 250 * time.Millisecond,
		HostChoices: uint32(min(max(r.HostSelectionRetryMaxAttempts, 1), 1000)), OtherHosts: len(r.RetryHostPredicate) > 0}
	for name := range strings.SplitSeq(r.RetryOn, ",") {
		want.On |= names[strings.TrimSpace(name)]
	}
	if r.NumRetries != nil {
		want.Retries = r.NumRetries.Value
	}
	if r.RetryBackOff != nil {
		want.BackOff, want.MaxBackOff = r.RetryBackOff.BaseInterval.AsDuration(), r.RetryBackOff.MaxInterval.AsDuration()
		if want.MaxBackOff == 0 {
			want.MaxBackOff = 10 * want.BackOff
		}
	}
	if r.RetryPriority != nil {
		want.OtherPriorities = uint32(max(unpack(r.RetryPriority.GetTypedConfig().Value, &priorities.PreviousPrioritiesConfig{}).UpdateFrequency, 0))
	}
	return want
}

// edited is a message with edits of headers.
type edited interface {
	GetRequestHeadersToAdd() []*core.HeaderValueOption
	GetRequestHeadersToRemove() []string
	GetResponseHeadersToAdd() []*core.HeaderValueOption
	GetResponseHeadersToRemove() []string
}

func readEdits(m edited) mesh.Edits {
	read := func(add []*core.HeaderValueOption, remove []string) mesh.HeaderEdits {
		want := mesh.HeaderEdits{Remove: remove}
		for _, option := range add {
			want.Add = append(want.Add, mesh.HeaderEdit{Name: option.Header.Key, Value: option.Header.Value + string(option.Header.RawValue), Action: mesh.EditAction(option.AppendAction), KeepEmpty: option.KeepEmptyValue})
		}
		return want
	}
	return mesh.Edits{Request: read(m.GetRequestHeadersToAdd(), m.GetRequestHeadersToRemove()), Response: read(m.GetResponseHeadersToAdd(), m.GetResponseHeadersToRemove())}
}

func readFilters(filters map[string]*anypb.Any) (want mesh.RouteFilters) {
	for key, packed := range filters {
		disabled := false
		if packed.MessageIs(&route.FilterConfig{}) {
			config := unpack(packed.Value, &route.FilterConfig{})
			packed, disabled = config.Config, config.Disabled
		}
		switch {
		case disabled && key == "envoy.filters.http.fault":
			want.Fault = &mesh.Fault{Disabled: true}
		case disabled && key == "envoy.filters.http.cors":
			want.CORS = &mesh.CORS{Disabled: true}
		case disabled:
			want.Policies = append(want.Policies, mesh.RoutePolicy{Filter: key, Disabled: true})
		case packed.MessageIs(&fault.HTTPFault{}):
			want.Fault = readFault(unpack(packed.Value, &fault.HTTPFault{}))
		case packed.MessageIs(&cors.CorsPolicy{}):
			want.CORS = readCORS(unpack(packed.Value, &cors.CorsPolicy{}))
		}
	}
	return want
}

func readFault(f *fault.HTTPFault) *mesh.Fault {
	want := &mesh.Fault{Delay: f.GetDelay().GetFixedDelay().AsDuration(), DelayFraction: readFraction(f.GetDelay().GetPercentage()), AbortFraction: readFraction(f.GetAbort().GetPercentage()),
		RateFraction: mesh.Fraction{Denominator: 100}, // of no recorded fault
		Cluster:      f.UpstreamCluster, Headers: readHeaders(f.Headers)}
	if f.MaxActiveFaults != nil {
		want.MaxActive = &f.MaxActiveFaults.Value
	}
	switch p := f.GetAbort().GetErrorType().(type) {
	case *fault.FaultAbort_HttpStatus:
		want.Abort = &mesh.Abort{Status: int(p.HttpStatus), Body: f.Abort.ResponseBody}
	case *fault.FaultAbort_GrpcStatus:
		want.Abort = &mesh.Abort{GRPC: &p.GrpcStatus, Body: f.Abort.ResponseBody}
	}
	return want
}

func readCORS(c *cors.CorsPolicy) *mesh.CORS {
	value := func(b *wrapperspb.BoolValue) *bool {
		if b == nil {
			return nil
		}
		return &b.Value
	}
	want := &mesh.CORS{Methods: c.AllowMethods, Headers: c.AllowHeaders, Expose: c.ExposeHeaders, MaxAge: c.MaxAge, Credentials: value(c.AllowCredentials), PrivateNetwork: value(c.AllowPrivateNetworkAccess),
		ForwardUnmatched: value(c.ForwardNotMatchingPreflights), Enabled: mesh.Fraction{Numerator: 100, Denominator: 100}}
	for _, origin := range c.AllowOriginStringMatch {
		want.Origins = append(want.Origins, readMatcher(origin))
	}
	if c.FilterEnabled != nil {
		want.Enabled = readFraction(c.FilterEnabled.DefaultValue)
	}
	return want
}

// A resource that was changed at random is decoded as by the generated types, has findings, or is an error.
func TestDamagedRoutesAreNeverMisread(t *testing.T) {
	random := rand.New(rand.NewPCG(2, 7))
	same, found, failed := 0, 0, 0
	try := func(place string, b []byte) {
		damaged := damage(random, b)
		got, findings, err := mesh.DecodeRoutes(damaged)
		var judge route.RouteConfiguration
		switch problem := proto.Unmarshal(damaged, &judge); {
		case err != nil:
			failed++
		case len(findings) > 0:
			found++
		case problem != nil: // within a field that is ignored
		default:
			same++
			if want, ok := attempt(readRoutes, &judge); ok && !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: got\n%s\nwant\n%s\nof %x", place, text(got), text(want), damaged)
			}
		}
	}
	each(t, "rds.json", func(t *testing.T, place string, b []byte) {
		for range 20 {
			try(place, b)
		}
	})
	wide, err := proto.Marshal(wideRoutes())
	if err != nil {
		t.Fatal(err)
	}
	for range 5000 {
		try("wide", wide)
	}
	allOccur(t, same, found, failed)
}

// Protobuf merges messages of a field that occurs twice. Few decoders of ours do, so such fields have to be marked: a second
// occurrence is a finding.
func TestMessagesThatOccurOnceAreMarked(t *testing.T) {
	merged := map[string]bool{"envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext.common_tls_context": true} // by its decoder
	marked := 0
	for row := range mesh.Rows() {
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(row.Message))
		if err != nil {
			t.Errorf("%s: %v", row.Message, err)
			continue
		}
		field := found.(protoreflect.MessageDescriptor).Fields().ByNumber(protoreflect.FieldNumber(row.Number))
		single := field.Message() != nil && field.Cardinality() != protoreflect.Repeated
		if row.Choice {
			marked++
			continue // see TestMembersOfOneofsAreMarked
		}
		if row.Once != (single && row.Treatment == "decoded" && !merged[row.Message+"."+row.Field]) {
			t.Errorf("%s.%s: marked %v, a message that occurs once %v", row.Message, row.Field, row.Once, single)
		}
		if row.Once {
			marked++
		}
	}
	if marked < 150 {
		t.Errorf("%d are marked", marked)
	}
}

// Of two members of a oneof, protobuf keeps the last. The decoders of policies report them, so in a message with a member that
// is marked all have to be.
func TestMembersOfOneofsAreMarked(t *testing.T) {
	marked := map[string]int{}
	for row := range mesh.Rows() {
		if row.Choice {
			marked[row.Message]++
		}
	}
	if len(marked) < 9 {
		t.Errorf("members are marked in %d messages", len(marked))
	}
	for row := range mesh.Rows() {
		if marked[row.Message] == 0 {
			continue
		}
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(row.Message))
		if err != nil {
			t.Errorf("%s: %v", row.Message, err)
			continue
		}
		message := found.(protoreflect.MessageDescriptor)
		member := message.Fields().ByNumber(protoreflect.FieldNumber(row.Number)).ContainingOneof() != nil
		if row.Choice != (member && row.Treatment == "decoded") || message.Oneofs().Len() != 1 {
			t.Errorf("%s.%s: marked %v, a member %v, %d oneofs", row.Message, row.Field, row.Choice, member, message.Oneofs().Len())
		}
	}
}

// BenchmarkRoutes decodes all recorded tables of routes, by hand and by the generated types.
func BenchmarkRoutes(b *testing.B) {
	benchmark(b, "rds.json",
		func(resource []byte) error { _, _, err := mesh.DecodeRoutes(resource); return err },
		func(resource []byte) { readRoutes(unpack(resource, &route.RouteConfiguration{})) })
}
