package controlplane

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	_ "github.com/cncf/xds/go/udpa/type/v1"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dns/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/network/dns_resolver/cares/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// pushes returns the recorded resources of istiod in the files with a given name, by file.
var pushes = sync.OnceValues(func() (map[string][]*anypb.Any, error) {
	found := map[string][]*anypb.Any{}
	// The second archive has listeners of ports with other protocols and modes of TLS.
	return found, errors.Join(readPushes("testdata/pushes.tgz", found), readPushes("testdata/listeners.tgz", found))
})

// readPushes adds the resources in an archive to found.
func readPushes(name string, found map[string][]*anypb.Any) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	unpacked, err := gzip.NewReader(file)
	if err != nil {
		return err
	}
	for archive := tar.NewReader(unpacked); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		switch path.Base(header.Name) {
		case "cds.json", "eds.json", "lds.json", "rds.json":
		default:
			continue
		}
		var list []json.RawMessage
		if err := json.NewDecoder(archive).Decode(&list); err != nil {
			return err
		}
		for _, text := range list {
			var resource anypb.Any
			if err := protojson.Unmarshal(text, &resource); err != nil {
				return err
			}
			found[header.Name] = append(found[header.Name], &resource)
		}
	}
}

// each calls test with the bytes of each recorded resource of a type.
func each(t *testing.T, base string, test func(t *testing.T, place string, bytes []byte)) {
	t.Helper()
	all, err := pushes()
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if path.Base(name) != base {
			continue
		}
		for _, resource := range all[name] {
			count++
			test(t, name, resource.Value)
		}
	}
	if count < 100 {
		t.Errorf("only %d resources", count)
	}
}

// unpack decodes b into m. It panics if that fails; see tryReadCluster.
func unpack[M proto.Message](b []byte, m M) M {
	if err := proto.Unmarshal(b, m); err != nil {
		panic(err)
	}
	return m
}

func TestRecordedAssignmentsAreDecodedAsByGeneratedTypes(t *testing.T) {
	each(t, "eds.json", func(t *testing.T, place string, b []byte) {
		got, findings, err := mesh.DecodeAssignment(b)
		want := readAssignment(unpack(b, &endpoint.ClusterLoadAssignment{}))
		if err != nil || len(findings) > 0 || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: error %v, findings %v, got\n%+v\nwant\n%+v", place, err, findings, got, want)
		}
	})
}

func readAssignment(a *endpoint.ClusterLoadAssignment) *mesh.Assignment {
	want := &mesh.Assignment{Name: a.ClusterName}
	for _, group := range a.Endpoints {
		l := mesh.Locality{Region: group.GetLocality().GetRegion(), Zone: group.GetLocality().GetZone(), SubZone: group.GetLocality().GetSubZone(),
			Priority: group.Priority, Weight: group.GetLoadBalancingWeight().GetValue()}
		for _, host := range group.LbEndpoints {
			address := host.GetEndpoint().GetAddress().GetSocketAddress()
			e := mesh.Endpoint{Weight: max(host.GetLoadBalancingWeight().GetValue(), 1), Health: mesh.Health(host.HealthStatus),
				TLSMode:  host.GetMetadata().GetFilterMetadata()["envoy.transport_socket_match"].GetFields()["tlsMode"].GetStringValue(),
				Workload: host.GetMetadata().GetFilterMetadata()["istio"].GetFields()["workload"].GetStringValue()}
			if ip, err := netip.ParseAddr(address.GetAddress()); err == nil {
				e.Address = netip.AddrPortFrom(ip, uint16(address.GetPortValue()))
			} else {
				e.Host, e.Port = address.GetAddress(), uint16(address.GetPortValue())
			}
			l.Endpoints = append(l.Endpoints, e)
		}
		want.Localities = append(want.Localities, l)
	}
	return want
}

func TestRecordedClustersAreDecodedAsByGeneratedTypes(t *testing.T) {
	each(t, "cds.json", func(t *testing.T, place string, b []byte) {
		got, findings, err := mesh.DecodeCluster(b)
		want := readCluster(unpack(b, &cluster.Cluster{}))
		if err != nil || len(findings) > 0 || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: error %v, findings %v, got\n%+v\nwant\n%+v", place, err, findings, got, want)
		}
	})
}

func readCluster(c *cluster.Cluster) *mesh.Cluster {
	seconds := func(d interface{ AsDuration() time.Duration }, absent time.Duration) time.Duration {
		if reflect.ValueOf(d).IsNil() {
			return absent
		}
		return d.AsDuration()
	}
	value := func(v interface{ GetValue() uint32 }, absent uint32) uint32 {
		if reflect.ValueOf(v).IsNil() {
			return absent
		}
		return v.GetValue()
	}
	want := &mesh.Cluster{
		Name: c.Name, Discovery: mesh.Discovery(c.GetType()), Assignment: c.GetEdsClusterConfig().GetServiceName(),
		DNS:            mesh.DNS{Refresh: seconds(c.DnsRefreshRate, 5*time.Second), RespectTTL: c.RespectDnsTtl, Family: mesh.DNSFamily(c.DnsLookupFamily)},
		ConnectTimeout: seconds(c.ConnectTimeout, 5*time.Second),
		Balancing:      mesh.Balancing{Policy: mesh.Policy(c.LbPolicy), MinRing: 1024, MaxRing: 8 << 20, Table: 65537, Choices: 2, SlowStartMin: 10, PanicBelow: 50},
		Breakers:       mesh.Breakers{Connections: 1024, Pending: 1024, Requests: 1024, Retries: 3},
		Origin:         c.GetMetadata().GetFilterMetadata()["istio"].GetFields()["config"].GetStringValue(),
		Service:        serviceOf(c),
		External:       c.GetMetadata().GetFilterMetadata()["istio"].GetFields()["external"].GetBoolValue(),
		KeepALPN:       c.GetMetadata().GetFilterMetadata()["istio"].GetFields()["alpn_override"].GetStringValue() == "false",
	}
	if want.Assignment == "" {
		want.Assignment = c.Name
	}
	if c.LoadAssignment != nil {
		want.Hosts = readAssignment(c.LoadAssignment)
	}
	if size := c.GetRingHashLbConfig().GetMinimumRingSize(); size != nil {
		want.Balancing.MinRing = size.Value
	}
	if threshold := c.GetCommonLbConfig().GetHealthyPanicThreshold(); threshold != nil {
		want.Balancing.PanicBelow = threshold.Value
	}
	want.Balancing.LocalityWeighted = c.GetCommonLbConfig().GetLocalityWeightedLbConfig() != nil
	if size := c.GetRingHashLbConfig().GetMaximumRingSize(); size != nil {
		want.Balancing.MaxRing = size.Value
	}
	if size := c.GetMaglevLbConfig().GetTableSize(); size != nil {
		want.Balancing.Table = size.Value
	}
	if c.CircuitBreakers != nil {
		limits := c.CircuitBreakers.Thresholds[0]
		want.Breakers = mesh.Breakers{Connections: value(limits.MaxConnections, 1024), Pending: value(limits.MaxPendingRequests, 1024),
			Requests: value(limits.MaxRequests, 1024), Retries: value(limits.MaxRetries, 3)}
	}
	if o := c.OutlierDetection; o != nil {
		want.Outliers = &mesh.Outliers{Consecutive5xx: value(o.Consecutive_5Xx, 5), ConsecutiveGateway: value(o.ConsecutiveGatewayFailure, 5),
			ConsecutiveLocal: value(o.ConsecutiveLocalOriginFailure, 5), SplitLocal: o.SplitExternalLocalOriginErrors,
			Interval: seconds(o.Interval, 10*time.Second), Ejection: seconds(o.BaseEjectionTime, 30*time.Second), MaxPercent: value(o.MaxEjectionPercent, 10)}
		want.Outliers.MaxEjection = max(300*time.Second, want.Outliers.Ejection)
		if value(o.EnforcingConsecutive_5Xx, 100) == 0 {
			want.Outliers.Consecutive5xx = 0
		}
		if value(o.EnforcingConsecutiveGatewayFailure, 0) == 0 {
			want.Outliers.ConsecutiveGateway = 0
		}
		if value(o.EnforcingConsecutiveLocalOriginFailure, 100) == 0 {
			want.Outliers.ConsecutiveLocal = 0
		}
	}
	if bind := c.UpstreamBindConfig; bind != nil {
		want.Sources = append(want.Sources, netip.MustParseAddr(bind.SourceAddress.Address))
		for _, extra := range bind.ExtraSourceAddresses {
			want.Sources = append(want.Sources, netip.MustParseAddr(extra.Address.Address))
		}
	}
	if keepalive := c.GetUpstreamConnectionOptions().GetTcpKeepalive(); keepalive != nil {
		want.Keepalive = &mesh.Keepalive{Probes: keepalive.GetKeepaliveProbes().GetValue(), Time: time.Duration(keepalive.GetKeepaliveTime().GetValue()) * time.Second,
			Interval: time.Duration(keepalive.GetKeepaliveInterval().GetValue()) * time.Second}
	}
	for _, match := range c.TransportSocketMatches {
		transport := readTransport(match.TransportSocket)
		transport.Name, transport.TLSMode = match.Name, match.GetMatch().GetFields()["tlsMode"].GetStringValue()
		want.Transports = append(want.Transports, transport)
	}
	if c.TransportSocket != nil {
		want.Transports = append(want.Transports, readTransport(c.TransportSocket))
	}
	for _, filter := range c.Filters {
		want.HasMetadataPeer = want.HasMetadataPeer || filter.Name == "istio.metadata_exchange"
	}
	for _, packed := range c.TypedExtensionProtocolOptions {
		options := unpack(packed.Value, &httpv3.HttpProtocolOptions{})
		want.HTTP.IdleTimeout = time.Hour
		if idle := options.GetCommonHttpProtocolOptions().GetIdleTimeout(); idle != nil {
			want.HTTP.IdleTimeout = idle.AsDuration()
		}
		want.HTTP.MaxLifetime = options.GetCommonHttpProtocolOptions().GetMaxConnectionDuration().AsDuration()
		want.HTTP.MaxRequests = options.GetCommonHttpProtocolOptions().GetMaxRequestsPerConnection().GetValue()
		var http2 *core.Http2ProtocolOptions
		switch {
		case options.GetExplicitHttpConfig().GetHttp2ProtocolOptions() != nil:
			want.HTTP.Protocol, http2 = mesh.UpstreamHTTP2, options.GetExplicitHttpConfig().GetHttp2ProtocolOptions()
		case options.GetUseDownstreamProtocolConfig() != nil:
			want.HTTP.Protocol, http2 = mesh.UpstreamAsDownstream, options.GetUseDownstreamProtocolConfig().GetHttp2ProtocolOptions()
		}
		want.HTTP.MaxStreams = http2.GetMaxConcurrentStreams().GetValue()
	}
	return want
}

func readTransport(socket *core.TransportSocket) mesh.Transport {
	want := mesh.Transport{Name: socket.Name}
	packed := socket.GetTypedConfig()
	if !strings.HasSuffix(packed.TypeUrl, "UpstreamTlsContext") {
		return want
	}
	context := unpack(packed.Value, &tlsv3.UpstreamTlsContext{})
	common := context.CommonTlsContext
	want.TLS = &mesh.UpstreamTLS{SNI: context.Sni, ALPN: common.AlpnProtocols, Roots: common.GetCombinedValidationContext().GetValidationContextSdsSecretConfig().GetName(),
		MinVersion: mesh.TLSVersion(common.GetTlsParams().GetTlsMinimumProtocolVersion()), MaxVersion: mesh.TLSVersion(common.GetTlsParams().GetTlsMaximumProtocolVersion())}
	for _, secret := range common.TlsCertificateSdsSecretConfigs {
		want.TLS.Certificate = secret.Name
	}
	want.TLS.Pins, want.TLS.Suites = readPins(common.GetCombinedValidationContext().GetDefaultValidationContext()), readSuites(common)
	for _, name := range common.GetCombinedValidationContext().GetDefaultValidationContext().GetMatchSubjectAltNames() {
		want.TLS.Names = append(want.TLS.Names, mesh.NameMatcher{StringMatcher: readMatcher(name)})
	}
	return want
}

func readMatcher(m *matcher.StringMatcher) mesh.StringMatcher {
	want := mesh.StringMatcher{IgnoreCase: m.IgnoreCase}
	switch pattern := m.MatchPattern.(type) {
	case *matcher.StringMatcher_Exact:
		want.Kind, want.Text = mesh.MatchExact, pattern.Exact
	case *matcher.StringMatcher_Prefix:
		want.Kind, want.Text = mesh.MatchPrefix, pattern.Prefix
	case *matcher.StringMatcher_Suffix:
		want.Kind, want.Text = mesh.MatchSuffix, pattern.Suffix
	case *matcher.StringMatcher_Contains:
		want.Kind, want.Text = mesh.MatchContains, pattern.Contains
	case *matcher.StringMatcher_SafeRegex:
		want.Kind, want.Text = mesh.MatchRegex, pattern.SafeRegex.Regex
	}
	return want
}

// A resource that was changed at random is decoded as by the generated types, has findings, or is an error.
func TestDamagedClustersAreNeverMisread(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 4))
	same, found, failed := 0, 0, 0
	each(t, "cds.json", func(t *testing.T, place string, b []byte) {
		for range 20 {
			damaged := damage(random, b)
			got, findings, err := mesh.DecodeCluster(damaged)
			var judge cluster.Cluster
			switch problem := proto.Unmarshal(damaged, &judge); {
			case err != nil:
				failed++
			case len(findings) > 0:
				found++
			case problem != nil: // within a field that is ignored
			default:
				same++
				if want, ok := attempt(readCluster, &judge); ok && !reflect.DeepEqual(got, want) {
					t.Fatalf("%s: got\n%+v\nwant\n%+v", place, got, want)
				}
			}
		}
	})
	allOccur(t, same, found, failed)
}

// The tables have each field of each message that they are about, under its own name, and no other.
func TestTheTablesHaveEveryField(t *testing.T) {
	rows := map[string]map[int]string{}
	for row := range mesh.Rows() {
		if rows[row.Message] == nil {
			rows[row.Message] = map[int]string{}
		}
		rows[row.Message][row.Number] = row.Field
	}
	for name, got := range rows {
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		fields := found.(protoreflect.MessageDescriptor).Fields()
		want := map[int]string{}
		for i := range fields.Len() {
			want[int(fields.Get(i).Number())] = string(fields.Get(i).Name())
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: the table has %v, the message %v", name, got, want)
		}
	}
	if len(rows) < 40 {
		t.Errorf("%d messages", len(rows))
	}
}

// BenchmarkClusters decodes all recorded clusters, by hand and by the generated types.
func BenchmarkClusters(b *testing.B) {
	benchmark(b, "cds.json",
		func(resource []byte) error { _, _, err := mesh.DecodeCluster(resource); return err },
		func(resource []byte) { readCluster(unpack(resource, &cluster.Cluster{})) })
}

// serviceOf returns the first service in a cluster's metadata.
func serviceOf(c *cluster.Cluster) (s mesh.Service) {
	services := c.GetMetadata().GetFilterMetadata()["istio"].GetFields()["services"].GetListValue().GetValues()
	if len(services) > 0 {
		fields := services[0].GetStructValue().GetFields()
		s = mesh.Service{Host: fields["host"].GetStringValue(), Name: fields["name"].GetStringValue(), Namespace: fields["namespace"].GetStringValue()}
	}
	return s
}
