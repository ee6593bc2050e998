package controlplane

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path"
	"reflect"
	"slices"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// nameTable is the descriptor of istio.networking.nds.v1.NameTable, after pkg/dns/proto/nds.proto of istio.io/istio. That
// module has the generated types, but is too large to be a requirement of these tests.
var nameTable = func() protoreflect.MessageDescriptor {
	repeated, single := descriptorpb.FieldDescriptorProto_LABEL_REPEATED, descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL
	text := func(number int32, name string, label descriptorpb.FieldDescriptorProto_Label) *descriptorpb.FieldDescriptorProto {
		return &descriptorpb.FieldDescriptorProto{Name: &name, Number: &number, Label: &label, Type: descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum()}
	}
	message := func(number int32, name string, label descriptorpb.FieldDescriptorProto_Label, typ string) *descriptorpb.FieldDescriptorProto {
		return &descriptorpb.FieldDescriptorProto{Name: &name, Number: &number, Label: &label, Type: descriptorpb.FieldDescriptorProto_TYPE_MESSAGE.Enum(), TypeName: &typ}
	}
	return register(&descriptorpb.FileDescriptorProto{
		Name: new("pkg/dns/proto/nds.proto"), Package: new("istio.networking.nds.v1"), Syntax: new("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{{
			Name:  new("NameTable"),
			Field: []*descriptorpb.FieldDescriptorProto{message(1, "table", repeated, ".istio.networking.nds.v1.NameTable.TableEntry")},
			NestedType: []*descriptorpb.DescriptorProto{
				{Name: new("NameInfo"), Field: []*descriptorpb.FieldDescriptorProto{text(1, "ips", repeated), text(2, "registry", single), text(3, "shortname", single), text(4, "namespace", single), text(5, "alt_hosts", repeated)}},
				{Name: new("TableEntry"), Options: &descriptorpb.MessageOptions{MapEntry: new(true)},
					Field: []*descriptorpb.FieldDescriptorProto{text(1, "key", single), message(2, "value", single, ".istio.networking.nds.v1.NameTable.NameInfo")}},
			},
		}},
	})
}()

// The descriptor of istio.mesh.v1alpha1.ProxyConfig, after mesh/v1alpha1/proxy.proto of istio.io/api 1.31, has all
// fields with their numbers, but only the one that is decoded with its type.
var proxyConfig = func() protoreflect.MessageDescriptor {
	fields := map[int32]string{
		1: "config_path", 2: "binary_path", 3: "service_cluster", 4: "drain_duration", 6: "discovery_address", 7: "discovery_refresh_delay", 8: "zipkin_address",
		10: "statsd_udp_address", 11: "proxy_admin_port", 12: "availability_zone", 13: "control_plane_auth_policy", 14: "custom_config_file", 15: "stat_name_length",
		16: "concurrency", 17: "proxy_bootstrap_template_path", 18: "interception_mode", 19: "tracing", 20: "envoy_metrics_service_address", 21: "sds",
		22: "envoy_access_log_service", 23: "envoy_metrics_service", 24: "proxy_metadata", 26: "status_port", 27: "extra_stat_tags", 28: "gateway_topology",
		29: "termination_drain_duration", 30: "mesh_id", 31: "readiness_probe", 32: "proxy_stats_matcher", 33: "hold_application_until_proxy_starts",
		34: "ca_certificates_pem", 35: "image", 36: "tracing_service_name", 37: "runtime_values", 38: "private_key_provider", 39: "proxy_headers",
		40: "file_flush_interval", 41: "file_flush_min_size_kb", 42: "stats_compression", 43: "connection_settings",
	}
	message := &descriptorpb.DescriptorProto{Name: new("ProxyConfig")}
	for _, number := range slices.Sorted(maps.Keys(fields)) {
		field := &descriptorpb.FieldDescriptorProto{Name: new(fields[number]), Number: new(number), Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(), Type: descriptorpb.FieldDescriptorProto_TYPE_BYTES.Enum()}
		if number == 34 {
			field.Label, field.Type = descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum(), descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum()
		}
		message.Field = append(message.Field, field)
	}
	return register(&descriptorpb.FileDescriptorProto{Name: new("mesh/v1alpha1/proxy.proto"), Package: new("istio.mesh.v1alpha1"), Syntax: new("proto3"), MessageType: []*descriptorpb.DescriptorProto{message}})
}()

// register adds a file to the registry, where the tables of messages are compared with it, and returns its first message.
func register(file *descriptorpb.FileDescriptorProto) protoreflect.MessageDescriptor {
	made, err := protodesc.NewFile(file, protoregistry.GlobalFiles)
	if err == nil {
		err = protoregistry.GlobalFiles.RegisterFile(made)
	}
	if err != nil {
		panic(err)
	}
	return made.Messages().Get(0)
}

// recordedNames calls test with each recorded table of names, as JSON.
func recordedNames(t *testing.T, test func(place string, text []byte)) {
	t.Helper()
	file, err := os.Open("testdata/pushes.tgz")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	unpacked, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for archive := tar.NewReader(unpacked); ; {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if path.Base(header.Name) != "nds.json" {
			continue
		}
		text, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		count++
		test(header.Name, text)
	}
	if count < 20 {
		t.Errorf("only %d tables", count)
	}
}

func TestRecordedNamesAreDecodedAsRecorded(t *testing.T) {
	recordedNames(t, func(place string, text []byte) {
		var recorded struct {
			Table map[string]struct {
				IPs                            []netip.Addr
				Registry, Shortname, Namespace string
			}
		}
		message := dynamicpb.NewMessage(nameTable)
		if err := json.Unmarshal(text, &recorded); err != nil {
			t.Fatal(err)
		}
		if err := protojson.Unmarshal(text, message); err != nil {
			t.Fatal(err)
		}
		b, err := proto.Marshal(message)
		if err != nil {
			t.Fatal(err)
		}
		want := &mesh.Names{Hosts: map[string]mesh.Name{}}
		for host, entry := range recorded.Table {
			want.Hosts[host] = mesh.Name{Addresses: entry.IPs, Registry: entry.Registry, ShortName: entry.Shortname, Namespace: entry.Namespace}
		}
		got, findings, err := mesh.DecodeNames(b)
		if err != nil || len(findings) > 0 || len(got.Hosts) == 0 || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: error %v, findings %v, got\n%+v\nwant\n%+v", place, err, findings, got, want)
		}
	})
}

func TestTheTrustBundleIsDecoded(t *testing.T) {
	message := dynamicpb.NewMessage(proxyConfig)
	roots := message.Mutable(proxyConfig.Fields().ByNumber(34)).List()
	roots.Append(protoreflect.ValueOfString("one"))
	roots.Append(protoreflect.ValueOfString("two"))
	message.Set(proxyConfig.Fields().ByNumber(30), protoreflect.ValueOfBytes([]byte("mesh")))
	b, err := proto.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	if got, findings, err := mesh.DecodeTrustBundle(b); err != nil || len(findings) > 0 || !slices.Equal(got, []string{"one", "two"}) {
		t.Errorf("error %v, findings %v, roots %q", err, findings, got)
	}
}

// secrets has one of each kind that istiod sends.
func secrets() []*tlsv3.Secret {
	inline := func(text string) *core.DataSource {
		return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: []byte(text)}}
	}
	return []*tlsv3.Secret{
		{Name: "kubernetes://web", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline("chain"), PrivateKey: inline("the key"), OcspStaple: inline("ocsp")}}},
		{Name: "kubernetes://web-cacert", Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline("roots"), Crl: inline("crl")}}},
		{Name: "configmap://a/b", Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: "roots"}}}}},
	}
}

func TestSecretsAreDecodedAsByGeneratedTypes(t *testing.T) {
	for _, secret := range secrets() {
		b, err := proto.Marshal(secret)
		if err != nil {
			t.Fatal(err)
		}
		got, findings, err := mesh.DecodeSecret(b)
		if err != nil || len(findings) > 0 || !sameSecret(got, secret) {
			t.Errorf("error %v, findings %v, got\n%+v\nwant\n%v", err, findings, got, secret)
		}
	}
}

func sameSecret(got *mesh.Secret, want *tlsv3.Secret) bool {
	content := func(source *core.DataSource) string {
		return string(source.GetInlineBytes()) + source.GetInlineString()
	}
	if got.Name != want.Name || got.Refused {
		return false
	}
	switch secret := want.Type.(type) {
	case *tlsv3.Secret_TlsCertificate:
		c := secret.TlsCertificate
		return got.Roots == nil && got.Certificate != nil && string(got.Certificate.Chain) == content(c.CertificateChain) && string(got.Certificate.Key.PEM()) == content(c.PrivateKey) &&
			string(got.Certificate.OCSP) == content(c.OcspStaple)
	case *tlsv3.Secret_ValidationContext:
		c := secret.ValidationContext
		return got.Certificate == nil && got.Roots != nil && string(got.Roots.CA) == content(c.TrustedCa) && string(got.Roots.CRL) == content(c.Crl)
	}
	return false
}

// A secret or table of names that was changed at random is decoded as by the generated types, has findings, or is an error.
func TestDamagedSecretsAndNamesAreNeverMisread(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 1))
	same, found, failed := 0, 0, 0
	try := func(b []byte, read func(damaged []byte) (findings []mesh.Finding, err error, same bool)) {
		for range 2000 {
			damaged := damage(random, b)
			switch findings, err, equal := read(damaged); {
			case err != nil:
				failed++
			case len(findings) > 0:
				found++
			default:
				same++
				if !equal {
					t.Fatalf("misread: %x", damaged)
				}
			}
		}
	}
	for _, secret := range secrets() {
		b, err := proto.Marshal(secret)
		if err != nil {
			t.Fatal(err)
		}
		try(b, func(damaged []byte) ([]mesh.Finding, error, bool) {
			got, findings, err := mesh.DecodeSecret(damaged)
			var judge tlsv3.Secret
			return findings, err, proto.Unmarshal(damaged, &judge) != nil || sameSecret(got, &judge)
		})
	}
	b, err := proto.Marshal(func() proto.Message {
		message := dynamicpb.NewMessage(nameTable)
		if err := protojson.Unmarshal([]byte(`{"table": {"web.example.com": {"ips": ["192.0.2.1", "2001:db8::1"], "registry": "Kubernetes", "shortname": "web", "namespace": "a"}, "b": {"altHosts": ["c"]}}}`), message); err != nil {
			t.Fatal(err)
		}
		return message
	}())
	if err != nil {
		t.Fatal(err)
	}
	try(b, func(damaged []byte) ([]mesh.Finding, error, bool) {
		got, findings, err := mesh.DecodeNames(damaged)
		message := dynamicpb.NewMessage(nameTable)
		if proto.Unmarshal(damaged, message) != nil {
			return findings, err, true
		}
		want := &mesh.Names{Hosts: map[string]mesh.Name{}}
		info := nameTable.Messages().ByName("NameInfo").Fields()
		message.Get(nameTable.Fields().ByNumber(1)).Map().Range(func(key protoreflect.MapKey, value protoreflect.Value) bool {
			entry := value.Message()
			name := mesh.Name{Registry: entry.Get(info.ByNumber(2)).String(), ShortName: entry.Get(info.ByNumber(3)).String(), Namespace: entry.Get(info.ByNumber(4)).String()}
			for ips, i := entry.Get(info.ByNumber(1)).List(), 0; i < ips.Len(); i++ {
				address, _ := netip.ParseAddr(ips.Get(i).String())
				name.Addresses = append(name.Addresses, address.Unmap())
			}
			want.Hosts[key.String()] = name
			return true
		})
		return findings, err, reflect.DeepEqual(got, want)
	})
	allOccur(t, same, found, failed)
}
