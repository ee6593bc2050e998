// Command istiod stands for an istiod in tests of the agent: go-control-plane's server and a CA, with TLS at an address. It
// configures every node as a sidecar whose inbound ports have the mode of -mtls, and which reaches -outbound by mutual TLS.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	tlsinspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	security "istio.io/api/security/v1alpha1"

	"github.com/pillion-proxy/pillion/e2e/testdata/controlplane/ca"
)

func main() {
	port := flag.String("port", "15012", "port at -address")
	address := flag.String("address", "127.0.0.1", "IP address of the server")
	directory := flag.String("directory", "", "where root-cert.pem and workload.pem, a certificate and its key, are written, and where the CA's key is kept for a restart")
	mtls := flag.String("mtls", "PERMISSIVE", "PERMISSIVE or STRICT")
	token := flag.String("token", "secret", "that nodes authenticate with")
	push := flag.String("push", "", "recorded push that is served in place of a configuration: sidecar, or thousand with 1,000 services")
	outbound := flag.String("outbound", "", "IPv4 address and port of a server of HTTP whose sidecar requires mutual TLS")
	services := flag.String("services", "", "file with a service of HTTP; each change of it is pushed")
	interval := flag.Duration("follow", 2*time.Millisecond, "how often a change of the services is looked for; 0: never")
	policies := flag.Int("policies", -1, "number of authorization policies for requests inside mutual TLS, with 10 rules each; -1: it has no chain for HTTP")
	flag.Parse()
	if err := run(*address, *port, *directory, *mtls, *outbound, *token, *push, *services, *interval, *policies); err != nil {
		log.Fatal(err)
	}
}

func run(address, port, directory, mtls, outbound, token, push, services string, interval time.Duration, policies int) error {
	authority, err := ca.Load(filepath.Join(directory, "key.der"), token)
	if err != nil {
		return err
	}
	if err := replace(filepath.Join(directory, "root-cert.pem"), authority.RootPEM()); err != nil {
		return err
	}
	if port == "0" { // only the files
		return writeCertificate(authority, filepath.Join(directory, "workload.pem"))
	}
	service, err := discoveryOf(mtls, outbound, push, services, interval, policies)
	if err != nil {
		return err
	}
	socket, err := net.Listen("tcp", net.JoinHostPort(address, port))
	if err != nil {
		return err
	}
	s := grpc.NewServer(grpc.Creds(authority.Credentials(net.ParseIP(address))))
	discovery.RegisterAggregatedDiscoveryServiceServer(s, service)
	security.RegisterIstioCertificateServiceServer(s, authority)
	return s.Serve(socket)
}

// replace writes a file that others may be reading.
func replace(file string, content []byte) error {
	if err := os.WriteFile(file+".new", content, 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func writeCertificate(authority *ca.Authority, file string) error {
	chain, key, err := authority.Issue(&url.URL{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/default/sa/another"})
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(chain, key...), 0o600)
}

// discoveryOf returns what serves resources.
func discoveryOf(mtls, outbound, push, services string, interval time.Duration, policies int) (discovery.AggregatedDiscoveryServiceServer, error) {
	if push != "" {
		return newReplay(push)
	}
	snapshots := cache.NewSnapshotCache(true, everyNode{}, nil)
	if services != "" {
		if err := follow(snapshots, services, interval, mtls == "STRICT"); err != nil {
			return nil, err
		}
		return server.NewServer(context.Background(), snapshots, server.CallbackFuncs{}), nil
	}
	resources := configuration(mtls == "STRICT")
	if policies >= 0 {
		resources[resource.ListenerType] = []types.Resource{inbound(mtls == "STRICT", inboundManager(policyFilters(policies)...))}
	}
	if outbound != "" {
		if err := addOutbound(resources, outbound); err != nil {
			return nil, err
		}
	}
	snapshot, err := cache.NewSnapshot("1", resources)
	if err != nil {
		return nil, err
	}
	if err := snapshots.SetSnapshot(context.Background(), "", snapshot); err != nil {
		return nil, err
	}
	return server.NewServer(context.Background(), snapshots, server.CallbackFuncs{}), nil
}

// everyNode gives all nodes one snapshot.
type everyNode struct{}

func (everyNode) ID(*core.Node) string { return "" }

func configuration(strict bool) map[resource.Type][]types.Resource {
	ads := &core.ConfigSource{ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}}}
	return map[resource.Type][]types.Resource{
		resource.ClusterType: {
			&cluster.Cluster{
				Name: "outbound|80||web.shop.svc.cluster.local", ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS},
				EdsClusterConfig: &cluster.Cluster_EdsClusterConfig{EdsConfig: ads},
			},
			&cluster.Cluster{
				Name: "InboundPassthroughCluster", ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_ORIGINAL_DST},
				LbPolicy: cluster.Cluster_CLUSTER_PROVIDED,
			},
		},
		resource.EndpointType: {&endpoint.ClusterLoadAssignment{ClusterName: "outbound|80||web.shop.svc.cluster.local"}},
		resource.ListenerType: {inbound(strict, nil)},
	}
}

// inbound is the listener of all inbound ports. Plain connections are accepted unless strict. Those of mutual TLS are passed on as
// bytes, and those of them that carry HTTP by secured, unless it is nil.
func inbound(strict bool, secured *listener.Filter) *listener.Listener {
	forward := &listener.Filter{Name: "envoy.filters.network.tcp_proxy", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&tcpproxy.TcpProxy{
		StatPrefix: "InboundPassthroughCluster", ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: "InboundPassthroughCluster"},
	})}}
	secret := func(name string) *tls.SdsSecretConfig { return &tls.SdsSecretConfig{Name: name} }
	context := &tls.DownstreamTlsContext{
		RequireClientCertificate: wrapperspb.Bool(true),
		CommonTlsContext: &tls.CommonTlsContext{
			AlpnProtocols:                  []string{"h2", "http/1.1"},
			TlsCertificateSdsSecretConfigs: []*tls.SdsSecretConfig{secret("default")},
			ValidationContextType:          &tls.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: secret("ROOTCA")},
		},
	}
	mutual := func(name string, filter *listener.Filter, protocols ...string) *listener.FilterChain {
		return &listener.FilterChain{
			Name: name, Filters: []*listener.Filter{filter}, FilterChainMatch: &listener.FilterChainMatch{TransportProtocol: "tls", ApplicationProtocols: protocols},
			TransportSocket: &core.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: packed(context)}},
		}
	}
	chains := []*listener.FilterChain{mutual("mutual", forward)}
	if secured != nil {
		chains = append(chains, mutual("mutual HTTP", secured, "istio-http/1.0", "istio-http/1.1", "istio-h2"))
	}
	if !strict {
		chains = append(chains, &listener.FilterChain{
			Name: "plain", Filters: []*listener.Filter{forward}, FilterChainMatch: &listener.FilterChainMatch{TransportProtocol: "raw_buffer"},
		})
	}
	return &listener.Listener{
		Name: "virtualInbound", TrafficDirection: core.TrafficDirection_INBOUND, UseOriginalDst: wrapperspb.Bool(true), FilterChains: chains,
		Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
			Address: "0.0.0.0", PortSpecifier: &core.SocketAddress_PortValue{PortValue: 15006},
		}}},
		ListenerFilters: []*listener.ListenerFilter{{
			Name: "envoy.filters.listener.tls_inspector", ConfigType: &listener.ListenerFilter_TypedConfig{TypedConfig: packed(&tlsinspector.TlsInspector{})},
		}},
	}
}

// addOutbound adds a cluster that is reached by mutual TLS, and a listener whose routes lead to it.
func addOutbound(resources map[resource.Type][]types.Resource, address string) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	const name = "outbound|80||secured.shop.svc.cluster.local"
	resources[resource.ClusterType] = append(resources[resource.ClusterType], &cluster.Cluster{
		Name: name, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_ORIGINAL_DST}, LbPolicy: cluster.Cluster_CLUSTER_PROVIDED,
		TransportSocket: mutual("outbound_.80_._.secured.shop.svc.cluster.local"),
	})
	routes := &route.RouteConfiguration{Name: "80", VirtualHosts: []*route.VirtualHost{{
		Name: "secured.shop.svc.cluster.local:80", Domains: []string{at.String(), fmt.Sprintf("workload.example:%d", at.Port())},
		Routes: []*route.Route{{
			Match:  &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
			Action: &route.Route_Route{Route: &route.RouteAction{ClusterSpecifier: &route.RouteAction_Cluster{Cluster: name}}},
		}},
	}}}
	manager := &hcm.HttpConnectionManager{
		StatPrefix: "outbound", RouteSpecifier: &hcm.HttpConnectionManager_RouteConfig{RouteConfig: routes},
		HttpFilters: []*hcm.HttpFilter{{Name: "envoy.filters.http.router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&router.Router{})}}},
	}
	resources[resource.ListenerType] = append(resources[resource.ListenerType], &listener.Listener{
		Name: "0.0.0.0_" + fmt.Sprint(at.Port()), TrafficDirection: core.TrafficDirection_OUTBOUND, BindToPort: wrapperspb.Bool(false),
		Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
			Address: "0.0.0.0", PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(at.Port())},
		}}},
		FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
			Name: "envoy.filters.network.http_connection_manager", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(manager)},
		}}}},
	})
	return nil
}

// mutual is mutual TLS with servers of the mesh.
func mutual(sni string) *core.TransportSocket {
	secret := func(name string) *tls.SdsSecretConfig { return &tls.SdsSecretConfig{Name: name} }
	context := &tls.UpstreamTlsContext{Sni: sni, CommonTlsContext: &tls.CommonTlsContext{
		AlpnProtocols:                  []string{"istio-peer-exchange", "istio"},
		TlsCertificateSdsSecretConfigs: []*tls.SdsSecretConfig{secret("default")},
		ValidationContextType:          &tls.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: secret("ROOTCA")},
	}}
	return &core.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: packed(context)}}
}

func packed(message proto.Message) *anypb.Any {
	a, err := anypb.New(message)
	if err != nil {
		panic(err)
	}
	return a
}
