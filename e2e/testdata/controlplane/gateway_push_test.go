package controlplane

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"io"
	"os"
	"testing"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
)

// gatewayPush has the first push to a gateway with TLS, as package pushtest reads it, where there are no generated types.
const gatewayPush = "../../../internal/controlplane/pushtest/gateway.gz"

func TestThePushToAGatewayIsTheRecordedOne(t *testing.T) {
	all, err := pushes()
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for _, kind := range []struct {
		file, typeURL string
		name          func(b []byte) string
	}{
		{"cds", "envoy.config.cluster.v3.Cluster", func(b []byte) string { return unpack(b, &cluster.Cluster{}).Name }},
		{"eds", "envoy.config.endpoint.v3.ClusterLoadAssignment", func(b []byte) string { return unpack(b, &endpoint.ClusterLoadAssignment{}).ClusterName }},
		{"lds", "envoy.config.listener.v3.Listener", func(b []byte) string { return unpack(b, &listener.Listener{}).Name }},
		{"rds", "envoy.config.route.v3.RouteConfiguration", func(b []byte) string { return unpack(b, &route.RouteConfiguration{}).Name }},
	} {
		response := &discovery.DeltaDiscoveryResponse{TypeUrl: "type.googleapis.com/" + kind.typeURL}
		for _, resource := range all["xds-cases/11-gateway-tls/gateway-delta/"+kind.file+".json"] {
			response.Resources = append(response.Resources, &discovery.Resource{Name: kind.name(resource.Value), Resource: resource})
		}
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(response)
		if err != nil || len(response.Resources) == 0 {
			t.Fatalf("%s: %d resources, %v", kind.file, len(response.Resources), err)
		}
		want = append(binary.AppendUvarint(want, uint64(len(b))), b...)
	}
	if *update {
		var packed bytes.Buffer
		w, _ := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		w.Write(want)
		w.Close()
		if err := os.WriteFile(gatewayPush, packed.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	packed, err := os.ReadFile(gatewayPush)
	if err != nil {
		t.Fatal(err)
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s has another push (%v); use -update", gatewayPush, err)
	}
}
