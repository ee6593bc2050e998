package configdump

import (
	"bytes"
	"cmp"
	"compress/flate"
	"flag"
	"os"
	"slices"
	"testing"

	udpa "github.com/cncf/xds/go/udpa/annotations"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

var update = flag.Bool("update", false, "write the types that internal/configdump embeds")

const typesFile = "../../../../internal/configdump/types.pb.deflate"

// rootPackages hold the messages that istiod sends as resources and inside of google.protobuf.Any, and those that
// EnvoyFilters commonly add. Other types are shown as bytes.
var rootPackages = []protoreflect.FullName{
	"envoy.config.accesslog.v3", "envoy.config.cluster.v3", "envoy.config.core.v3", "envoy.config.endpoint.v3", "envoy.config.listener.v3",
	"envoy.config.rbac.v3", "envoy.config.route.v3", "envoy.config.trace.v3", "envoy.config.common.mutation_rules.v3",
	"udpa.type.v1", "xds.type.v3",
	"istio.networking.nds.v1", "istio.envoy.config.filter.http.alpn.v2alpha1", "envoy.tcp.metadataexchange.config", "stats",
}

// rootMessages are single messages of packages that have many others, and types with a form of their own in JSON.
var rootMessages = []protoreflect.FullName{"istio.mesh.v1alpha1.ProxyConfig", "google.protobuf.FieldMask", "google.protobuf.BytesValue"}

// TestTypesOfConfigDumpAreThoseOfGeneratedCode compares the embedded descriptions with those of the generated types.
func TestTypesOfConfigDumpAreThoseOfGeneratedCode(t *testing.T) {
	want, err := proto.MarshalOptions{Deterministic: true}.Marshal(describeTypes(t))
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		var packed bytes.Buffer
		w, _ := flate.NewWriter(&packed, flate.BestCompression)
		w.Write(want)
		w.Close()
		if err := os.WriteFile(typesFile, packed.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d bytes, compressed %d", len(want), packed.Len())
	}
	got, err := readTypes()
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s has other types (error %v); use -update", typesFile, err)
	}
}

func readTypes() ([]byte, error) {
	packed, err := os.ReadFile(typesFile)
	if err != nil {
		return nil, err
	}
	var text bytes.Buffer
	_, err = text.ReadFrom(flate.NewReader(bytes.NewReader(packed)))
	return text.Bytes(), err
}

// describeTypes returns the messages that the roots reach and their enumerations, one file for each package. Only what is
// needed to print a message is kept of them.
func describeTypes(t *testing.T) *descriptorpb.FileDescriptorSet {
	registerNameTable(t)
	messages, enums := map[protoreflect.FullName]bool{}, map[protoreflect.FullName]bool{}
	for name := range rootNames(t) {
		reach(protoregistry.GlobalFiles, name, messages, enums)
	}
	packages := map[protoreflect.FullName]*descriptorpb.FileDescriptorProto{}
	protoregistry.GlobalFiles.RangeFiles(func(file protoreflect.FileDescriptor) bool {
		described := protodesc.ToFileDescriptorProto(file)
		of := packages[file.Package()]
		if of == nil {
			of = &descriptorpb.FileDescriptorProto{Package: proto.String(string(file.Package()))}
		}
		of.MessageType = append(of.MessageType, prune(described.MessageType, file.Package(), messages, enums)...)
		of.EnumType = append(of.EnumType, pruneEnums(described.EnumType, file.Package(), enums)...)
		if len(of.MessageType)+len(of.EnumType) > 0 {
			packages[file.Package()] = of
		}
		return true
	})
	t.Logf("%d messages, %d enumerations", len(messages), len(enums))
	set := &descriptorpb.FileDescriptorSet{}
	for _, file := range packages {
		slices.SortFunc(file.MessageType, func(a, b *descriptorpb.DescriptorProto) int { return cmp.Compare(a.GetName(), b.GetName()) })
		slices.SortFunc(file.EnumType, func(a, b *descriptorpb.EnumDescriptorProto) int { return cmp.Compare(a.GetName(), b.GetName()) })
		set.File = append(set.File, file)
	}
	slices.SortFunc(set.File, func(a, b *descriptorpb.FileDescriptorProto) int { return cmp.Compare(a.GetPackage(), b.GetPackage()) })
	return set
}

func rootNames(t *testing.T) map[protoreflect.FullName]bool {
	roots := map[protoreflect.FullName]bool{}
	for _, name := range rootMessages {
		roots[name] = true
	}
	for _, name := range rootPackages {
		before := len(roots)
		addMessages(name, roots)
		if len(roots) == before {
			t.Errorf("no message in %s", name)
		}
	}
	protoregistry.GlobalFiles.RangeFiles(func(file protoreflect.FileDescriptor) bool {
		if name := string(file.Package()); len(name) > len("envoy.extensions.") && name[:len("envoy.extensions.")] == "envoy.extensions." {
			addMessages(file.Package(), roots)
		}
		return true
	})
	return roots
}

func addMessages(name protoreflect.FullName, to map[protoreflect.FullName]bool) {
	protoregistry.GlobalFiles.RangeFilesByPackage(name, func(file protoreflect.FileDescriptor) bool {
		for i := range file.Messages().Len() {
			to[file.Messages().Get(i).FullName()] = true
		}
		return true
	})
}

// reach adds the message of a name, and what its fields may hold.
func reach(files *protoregistry.Files, name protoreflect.FullName, messages, enums map[protoreflect.FullName]bool) {
	if messages[name] {
		return
	}
	found, err := files.FindDescriptorByName(name)
	if err != nil {
		panic(err)
	}
	messages[name] = true
	fields := found.(protoreflect.MessageDescriptor).Fields()
	for i := range fields.Len() {
		if field := fields.Get(i); field.Message() != nil {
			reach(files, field.Message().FullName(), messages, enums)
		} else if field.Enum() != nil {
			enums[field.Enum().FullName()] = true
		}
	}
}

// prune returns the messages in keep with the fields that print them. A message that only has others in it stays without
// fields.
func prune(list []*descriptorpb.DescriptorProto, in protoreflect.FullName, keep, enums map[protoreflect.FullName]bool) (kept []*descriptorpb.DescriptorProto) {
	for _, m := range list {
		name := in + "." + protoreflect.FullName(m.GetName())
		pruned := &descriptorpb.DescriptorProto{Name: m.Name, NestedType: prune(m.NestedType, name, keep, enums), EnumType: pruneEnums(m.EnumType, name, enums)}
		if keep[name] {
			for _, field := range m.Field {
				pruned.Field = append(pruned.Field, pruneField(field))
			}
			if m.GetOptions().GetMapEntry() {
				pruned.Options = &descriptorpb.MessageOptions{MapEntry: proto.Bool(true)}
			}
		} else if len(pruned.NestedType)+len(pruned.EnumType) == 0 {
			continue
		}
		kept = append(kept, pruned)
	}
	return kept
}

func pruneField(f *descriptorpb.FieldDescriptorProto) *descriptorpb.FieldDescriptorProto {
	pruned := &descriptorpb.FieldDescriptorProto{Name: f.Name, Number: f.Number, Type: f.Type, TypeName: f.TypeName, Proto3Optional: f.Proto3Optional}
	if f.GetLabel() == descriptorpb.FieldDescriptorProto_LABEL_REPEATED {
		pruned.Label = f.Label
	}
	if f.OneofIndex != nil && !f.GetProto3Optional() {
		pruned.OneofIndex = f.OneofIndex
	}
	if proto.GetExtension(f.GetOptions(), udpa.E_Sensitive).(bool) || f.GetOptions().GetDebugRedact() {
		pruned.Options = &descriptorpb.FieldOptions{DebugRedact: proto.Bool(true)} // the standard's name for Envoy's option
	}
	return pruned
}

func pruneEnums(list []*descriptorpb.EnumDescriptorProto, in protoreflect.FullName, keep map[protoreflect.FullName]bool) (kept []*descriptorpb.EnumDescriptorProto) {
	for _, e := range list {
		if !keep[in+"."+protoreflect.FullName(e.GetName())] {
			continue
		}
		pruned := &descriptorpb.EnumDescriptorProto{Name: e.Name}
		for _, value := range e.Value {
			pruned.Value = append(pruned.Value, &descriptorpb.EnumValueDescriptorProto{Name: value.Name, Number: value.Number})
		}
		kept = append(kept, pruned)
	}
	return kept
}

// registerNameTable describes the message by which istiod sends names, as in istio/pkg/dns/proto/nds.proto. Its generated
// type is in a module with most of Kubernetes.
func registerNameTable(t *testing.T) {
	if _, err := protoregistry.GlobalFiles.FindDescriptorByName("istio.networking.nds.v1.NameTable"); err == nil {
		return
	}
	field := func(name string, number int32, repeated bool, message string) *descriptorpb.FieldDescriptorProto {
		f := &descriptorpb.FieldDescriptorProto{Name: &name, Number: &number, Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
			Type: descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum()}
		if repeated {
			f.Label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum()
		}
		if message != "" {
			f.Type, f.TypeName = descriptorpb.FieldDescriptorProto_TYPE_MESSAGE.Enum(), proto.String(".istio.networking.nds.v1.NameTable."+message)
		}
		return f
	}
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("pkg/dns/proto/nds.proto"), Package: proto.String("istio.networking.nds.v1"), Syntax: proto.String("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{{
			Name:  proto.String("NameTable"),
			Field: []*descriptorpb.FieldDescriptorProto{field("table", 1, true, "TableEntry")},
			NestedType: []*descriptorpb.DescriptorProto{
				{Name: proto.String("NameInfo"), Field: []*descriptorpb.FieldDescriptorProto{field("ips", 1, true, ""), field("registry", 2, false, ""),
					field("shortname", 3, false, ""), field("namespace", 4, false, ""), field("alt_hosts", 5, true, "")}},
				{Name: proto.String("TableEntry"), Options: &descriptorpb.MessageOptions{MapEntry: proto.Bool(true)},
					Field: []*descriptorpb.FieldDescriptorProto{field("key", 1, false, ""), field("value", 2, false, "NameInfo")}},
			},
		}},
	}, protoregistry.GlobalFiles)
	if err == nil {
		err = protoregistry.GlobalFiles.RegisterFile(file)
	}
	if err != nil {
		t.Fatal(err)
	}
}
