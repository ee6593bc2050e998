package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net/netip"
	"os"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	faults "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/fault/v3"
	fault "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	inspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	previoushosts "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreams "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	percent "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// services is the content of the file of -services: a service of HTTP with subsets, as istiod configures it.
type services struct {
	Port     uint32
	Host     string
	Clusters []subset
	Routes   []rule
	TCP      connections // further connections, which are not HTTP
	Gateway  string      // file of a certificate and its key: Port is bound, and ends TLS with it; empty: Port is that of outbound requests
}

// connections are those to a port, divided among clusters by weight.
type connections struct {
	Port    uint32 // 0: there is none
	Weights map[string]uint32
}

// subset is a cluster.
type subset struct {
	Name      string
	Endpoints []host
	Outliers  bool // 3 failures in a row eject for a second
	Mutual    bool // the endpoints require mutual TLS
	Closed    bool // no request is allowed at a time
	HTTP2     bool // the endpoints speak HTTP/2; otherwise HTTP/1
}

type host struct {
	Address  netip.AddrPort
	Priority uint32
}

// rule is a route: of all requests, or of those with the value User of the field end-user, and below Path if that is set. It is
// named User or Path.
type rule struct {
	User, Path string
	Weights    map[string]uint32 // by cluster; 0: for one without a configuration
	Retries    uint32
	Timeout    time.Duration // 0: none
	Delay      time.Duration // by fault injection
	Abort      uint32        // status, by fault injection; 0: none
	Mirror     string        // cluster; may be empty
}

// follow serves the services of a file, and pushes each change of it. It looks for changes at this interval; 0: it does not.
func follow(snapshots cache.SnapshotCache, file string, interval time.Duration, strict bool) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	push := func(version int) error {
		var s services
		if err := json.Unmarshal(content, &s); err != nil {
			return err
		}
		resources := configuration(strict)
		for _, c := range s.Clusters {
			if c.Mutual { // an endpoint may be this proxy's own workload
				resources[resource.ListenerType][0] = inbound(strict, inboundManager())
			}
		}
		s.add(resources)
		snapshot, err := cache.NewSnapshot(fmt.Sprint(version), resources)
		if err != nil {
			return err
		}
		return snapshots.SetSnapshot(context.Background(), "", snapshot)
	}
	if err := push(1); err != nil || interval == 0 {
		return err
	}
	go func() {
		for version := 2; ; version++ {
			for {
				time.Sleep(interval)
				if next, err := os.ReadFile(file); err == nil && !bytes.Equal(next, content) {
					content = next
					break
				}
			}
			if err := push(version); err != nil {
				log.Fatal(err)
			}
		}
	}()
	return nil
}

var http2Options = &upstreams.HttpProtocolOptions{UpstreamProtocolOptions: &upstreams.HttpProtocolOptions_ExplicitHttpConfig_{
	ExplicitHttpConfig: &upstreams.HttpProtocolOptions_ExplicitHttpConfig{
		ProtocolConfig: &upstreams.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &core.Http2ProtocolOptions{}},
	},
}}

// inboundManager passes all requests to the workload that the filters let pass.
func inboundManager(filters ...*hcm.HttpFilter) *listener.Filter {
	routes := &route.RouteConfiguration{Name: "inbound", VirtualHosts: []*route.VirtualHost{{
		Name: "inbound|http|0", Domains: []string{"*"},
		Routes: []*route.Route{{
			Name: "default", Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
			Action: &route.Route_Route{Route: &route.RouteAction{
				ClusterSpecifier: &route.RouteAction_Cluster{Cluster: "InboundPassthroughCluster"}, Timeout: durationpb.New(0),
			}},
		}},
	}}}
	return &listener.Filter{Name: "envoy.filters.network.http_connection_manager", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(
		&hcm.HttpConnectionManager{
			StatPrefix: "inbound", RouteSpecifier: &hcm.HttpConnectionManager_RouteConfig{RouteConfig: routes},
			UpgradeConfigs: []*hcm.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
			HttpFilters:    append(filters, &hcm.HttpFilter{Name: "envoy.filters.http.router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&router.Router{})}}),
		},
	)}}
}

func (s *services) add(resources map[resource.Type][]types.Resource) {
	ads := &core.ConfigSource{ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}}, ResourceApiVersion: core.ApiVersion_V3}
	for _, c := range s.Clusters {
		config := &cluster.Cluster{
			Name: c.Name, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS}, LbPolicy: cluster.Cluster_LEAST_REQUEST,
			EdsClusterConfig: &cluster.Cluster_EdsClusterConfig{EdsConfig: ads},
			CommonLbConfig:   &cluster.Cluster_CommonLbConfig{HealthyPanicThreshold: &percent.Percent{}},
			ConnectTimeout:   durationpb.New(10 * time.Second),
		}
		if c.Outliers {
			config.OutlierDetection = &cluster.OutlierDetection{
				Consecutive_5Xx: wrapperspb.UInt32(3), Interval: durationpb.New(100 * time.Millisecond),
				BaseEjectionTime: durationpb.New(time.Second), MaxEjectionPercent: wrapperspb.UInt32(100),
			}
		}
		if c.Closed {
			config.CircuitBreakers = &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{{MaxRequests: wrapperspb.UInt32(0)}}}
		}
		if c.Mutual {
			config.TransportSocket = mutual("outbound_." + fmt.Sprint(s.Port) + "_._." + s.Host)
		}
		if c.HTTP2 {
			config.TypedExtensionProtocolOptions = map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": packed(http2Options)}
		}
		resources[resource.ClusterType] = append(resources[resource.ClusterType], config)
		resources[resource.EndpointType] = append(resources[resource.EndpointType], c.assignment())
	}
	resources[resource.RouteType] = append(resources[resource.RouteType], s.routes())
	manager := &hcm.HttpConnectionManager{
		StatPrefix: "outbound", RouteSpecifier: &hcm.HttpConnectionManager_Rds{Rds: &hcm.Rds{ConfigSource: ads, RouteConfigName: fmt.Sprint(s.Port)}},
		UpgradeConfigs: []*hcm.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		HttpFilters: []*hcm.HttpFilter{
			{Name: faultFilter, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&fault.HTTPFault{})}},
			{Name: "envoy.filters.http.router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&router.Router{})}},
		},
	}
	l := outbound(s.Port, &listener.Filter{
		Name: "envoy.filters.network.http_connection_manager", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(manager)},
	})
	resources[resource.ListenerType] = append(resources[resource.ListenerType], l)
	if s.TCP.Port != 0 {
		resources[resource.ListenerType] = append(resources[resource.ListenerType], outbound(s.TCP.Port, s.TCP.proxy(s.Clusters)))
	}
	if s.Gateway == "" {
		return
	}
	manager.UseRemoteAddress = wrapperspb.Bool(true)
	l.FilterChains[0].Filters[0].ConfigType = &listener.Filter_TypedConfig{TypedConfig: packed(manager)}
	l.FilterChains[0].TransportSocket = &core.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: packed(
		&tls.DownstreamTlsContext{CommonTlsContext: &tls.CommonTlsContext{
			AlpnProtocols:                  []string{"h2", "http/1.1"},
			TlsCertificateSdsSecretConfigs: []*tls.SdsSecretConfig{{Name: "file-cert:" + s.Gateway + "~" + s.Gateway, SdsConfig: ads}},
		}},
	)}}
	l.BindToPort = nil
	l.ListenerFilters = []*listener.ListenerFilter{{
		Name: "envoy.filters.listener.tls_inspector", ConfigType: &listener.ListenerFilter_TypedConfig{TypedConfig: packed(&inspector.TlsInspector{})},
	}}
}

// outbound is a listener of outbound connections to a port.
func outbound(port uint32, filter *listener.Filter) *listener.Listener {
	return &listener.Listener{
		Name: fmt.Sprintf("0.0.0.0_%d", port), TrafficDirection: core.TrafficDirection_OUTBOUND, BindToPort: wrapperspb.Bool(false),
		Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
			Address: "0.0.0.0", PortSpecifier: &core.SocketAddress_PortValue{PortValue: port},
		}}},
		FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{filter}}},
	}
}

func (c *connections) proxy(clusters []subset) *listener.Filter {
	weighted := &tcpproxy.TcpProxy_WeightedCluster{}
	for _, s := range clusters { // in order, so that equal contents are equal resources
		if weight := c.Weights[s.Name]; weight > 0 {
			weighted.Clusters = append(weighted.Clusters, &tcpproxy.TcpProxy_WeightedCluster_ClusterWeight{Name: s.Name, Weight: weight})
		}
	}
	return &listener.Filter{Name: "envoy.filters.network.tcp_proxy", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&tcpproxy.TcpProxy{
		StatPrefix: "outbound", ClusterSpecifier: &tcpproxy.TcpProxy_WeightedClusters{WeightedClusters: weighted},
	})}}
}

func (c *subset) assignment() *endpoint.ClusterLoadAssignment {
	a := &endpoint.ClusterLoadAssignment{ClusterName: c.Name}
	byPriority := map[uint32]*endpoint.LocalityLbEndpoints{}
	for _, h := range c.Endpoints {
		l := byPriority[h.Priority]
		if l == nil {
			l = &endpoint.LocalityLbEndpoints{Priority: h.Priority, Locality: &core.Locality{Zone: fmt.Sprint("zone-", h.Priority)}}
			byPriority[h.Priority] = l
			a.Endpoints = append(a.Endpoints, l)
		}
		l.LbEndpoints = append(l.LbEndpoints, &endpoint.LbEndpoint{
			LoadBalancingWeight: wrapperspb.UInt32(1),
			HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: &core.Address{Address: &core.Address_SocketAddress{
				SocketAddress: &core.SocketAddress{Address: h.Address.Addr().String(), PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(h.Address.Port())}},
			}}}},
		})
	}
	return a
}

const faultFilter = "envoy.filters.http.fault"

// faults are for all requests.
func (r *rule) faults() *fault.HTTPFault {
	all := &percent.FractionalPercent{Numerator: 100}
	f := &fault.HTTPFault{}
	if r.Delay > 0 {
		f.Delay = &faults.FaultDelay{Percentage: all, FaultDelaySecifier: &faults.FaultDelay_FixedDelay{FixedDelay: durationpb.New(r.Delay)}}
	}
	if r.Abort > 0 {
		f.Abort = &fault.FaultAbort{Percentage: all, ErrorType: &fault.FaultAbort_HttpStatus{HttpStatus: r.Abort}}
	}
	return f
}

func (s *services) routes() *route.RouteConfiguration {
	v := &route.VirtualHost{Name: s.Host, Domains: []string{s.Host, fmt.Sprintf("%s:%d", s.Host, s.Port)}, IncludeRequestAttemptCount: true}
	for _, rule := range s.Routes {
		clusters := &route.WeightedCluster{}
		for name, weight := range rule.Weights {
			if weight == 0 {
				clusters.Clusters = append(clusters.Clusters, &route.WeightedCluster_ClusterWeight{Name: name, Weight: wrapperspb.UInt32(1)})
			}
		}
		for _, c := range s.Clusters { // in order, so that equal contents are equal resources
			if weight := rule.Weights[c.Name]; weight > 0 {
				clusters.Clusters = append(clusters.Clusters, &route.WeightedCluster_ClusterWeight{Name: c.Name, Weight: wrapperspb.UInt32(weight)})
			}
		}
		action := &route.RouteAction{ClusterSpecifier: &route.RouteAction_WeightedClusters{WeightedClusters: clusters}, Timeout: durationpb.New(rule.Timeout)}
		if rule.Mirror != "" {
			action.RequestMirrorPolicies = []*route.RouteAction_RequestMirrorPolicy{{Cluster: rule.Mirror}}
		}
		if rule.Retries > 0 {
			action.RetryPolicy = &route.RetryPolicy{
				RetryOn: "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes", NumRetries: wrapperspb.UInt32(rule.Retries),
				RetriableStatusCodes: []uint32{503},
				RetryHostPredicate: []*route.RetryPolicy_RetryHostPredicate{{
					Name:       "envoy.retry_host_predicates.previous_hosts",
					ConfigType: &route.RetryPolicy_RetryHostPredicate_TypedConfig{TypedConfig: packed(&previoushosts.PreviousHostsPredicate{})},
				}},
				HostSelectionRetryMaxAttempts: 5,
			}
		}
		r := &route.Route{
			Name: "default", Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}}, Action: &route.Route_Route{Route: action},
		}
		if rule.Path != "" {
			r.Name, r.Match.PathSpecifier = rule.Path, &route.RouteMatch_Prefix{Prefix: rule.Path}
		}
		if rule.Delay > 0 || rule.Abort > 0 {
			r.TypedPerFilterConfig = map[string]*anypb.Any{faultFilter: packed(rule.faults())}
		}
		if rule.User != "" {
			r.Name = rule.User
			r.Match.Headers = []*route.HeaderMatcher{{Name: "end-user", HeaderMatchSpecifier: &route.HeaderMatcher_StringMatch{
				StringMatch: &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: rule.User}},
			}}}
		}
		v.Routes = append(v.Routes, r)
	}
	return &route.RouteConfiguration{Name: fmt.Sprint(s.Port), VirtualHosts: []*route.VirtualHost{v}, IgnorePortInHostMatching: true}
}
