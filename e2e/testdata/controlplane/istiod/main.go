// Command istiod stands for an istiod in tests of the agent: go-control-plane's server and a CA, with TLS at 127.0.0.1. It
// configures every node as a sidecar whose inbound ports have the mode of -mtls.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"os"
	"path/filepath"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsinspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
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
	port := flag.String("port", "15012", "port at 127.0.0.1")
	directory := flag.String("directory", "", "where root-cert.pem is written, and where the CA's key is kept for a restart")
	mtls := flag.String("mtls", "PERMISSIVE", "PERMISSIVE or STRICT")
	token := flag.String("token", "secret", "that nodes authenticate with")
	push := flag.String("push", "", "recorded push that is served in place of a configuration: sidecar, or thousand with 1,000 services")
	flag.Parse()
	if err := run(*port, *directory, *mtls, *token, *push); err != nil {
		log.Fatal(err)
	}
}

func run(port, directory, mtls, token, push string) error {
	authority, err := ca.Load(filepath.Join(directory, "key.der"), token)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(directory, "root-cert.pem"), authority.RootPEM(), 0o644); err != nil {
		return err
	}
	if port == "0" { // only the files
		return nil
	}
	service, err := discoveryOf(mtls, push)
	if err != nil {
		return err
	}
	socket, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		return err
	}
	s := grpc.NewServer(grpc.Creds(authority.Credentials()))
	discovery.RegisterAggregatedDiscoveryServiceServer(s, service)
	security.RegisterIstioCertificateServiceServer(s, authority)
	return s.Serve(socket)
}

// discoveryOf returns what serves resources.
func discoveryOf(mtls, push string) (discovery.AggregatedDiscoveryServiceServer, error) {
	if push != "" {
		return newReplay(push)
	}
	snapshots := cache.NewSnapshotCache(true, everyNode{}, nil)
	snapshot, err := cache.NewSnapshot("1", configuration(mtls == "STRICT"))
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
		resource.ListenerType: {inbound(strict)},
	}
}

// inbound is the listener of all inbound ports. Plain connections are accepted unless strict.
func inbound(strict bool) *listener.Listener {
	forward := &listener.Filter{Name: "envoy.filters.network.tcp_proxy", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&tcpproxy.TcpProxy{
		StatPrefix: "InboundPassthroughCluster", ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: "InboundPassthroughCluster"},
	})}}
	secret := func(name string) *tls.SdsSecretConfig { return &tls.SdsSecretConfig{Name: name} }
	mutual := &tls.DownstreamTlsContext{
		RequireClientCertificate: wrapperspb.Bool(true),
		CommonTlsContext: &tls.CommonTlsContext{
			TlsCertificateSdsSecretConfigs: []*tls.SdsSecretConfig{secret("default")},
			ValidationContextType:          &tls.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: secret("ROOTCA")},
		},
	}
	chains := []*listener.FilterChain{{
		Name: "mutual", Filters: []*listener.Filter{forward}, FilterChainMatch: &listener.FilterChainMatch{TransportProtocol: "tls"},
		TransportSocket: &core.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: packed(mutual)}},
	}}
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

func packed(message proto.Message) *anypb.Any {
	a, err := anypb.New(message)
	if err != nil {
		panic(err)
	}
	return a
}
