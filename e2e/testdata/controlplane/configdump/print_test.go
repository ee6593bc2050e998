package configdump

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"

	udpa "github.com/cncf/xds/go/udpa/annotations"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/pillion-proxy/pillion/internal/configdump"
)

// pushed calls test with each recorded resource of istiod.
func pushed(t *testing.T, test func(place string, resource *anypb.Any)) {
	t.Helper()
	count := 0
	for _, name := range []string{"../testdata/pushes.tgz", "../testdata/listeners.tgz"} {
		file, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		unpacked, err := gzip.NewReader(file)
		if err != nil {
			t.Fatal(err)
		}
		for archive := tar.NewReader(unpacked); ; {
			header, err := archive.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Contains([]string{"cds.json", "eds.json", "lds.json", "rds.json"}, path.Base(header.Name)) {
				continue
			}
			var list []json.RawMessage
			if err := json.NewDecoder(archive).Decode(&list); err != nil {
				t.Fatal(err)
			}
			for _, text := range list {
				resource := &anypb.Any{}
				if err := protojson.Unmarshal(text, resource); err != nil {
					t.Fatal(err)
				}
				count++
				test(header.Name, resource)
			}
		}
	}
	if count < 1000 {
		t.Errorf("only %d resources", count)
	}
}

func load(t testing.TB) *configdump.Types {
	t.Helper()
	types, err := configdump.Load()
	if err != nil {
		t.Fatal(err)
	}
	return types
}

func TestRecordedResourcesArePrintedAsByProtojson(t *testing.T) {
	types := load(t)
	pushed(t, func(place string, resource *anypb.Any) {
		text, err := types.Append(nil, resource.TypeUrl, resource.Value)
		if err != nil {
			t.Fatalf("%s: %v", place, err)
		}
		again := &anypb.Any{}
		if err := protojson.Unmarshal(text, again); err != nil {
			t.Fatalf("%s: protojson does not read %s: %v", place, text, err)
		}
		if !proto.Equal(unpacked(t, again), unpacked(t, resource)) {
			t.Errorf("%s: printed and read again, it is another message: %s", place, text)
		}
		same(t, place, text, resource)
	})
}

func unpacked(t *testing.T, packed *anypb.Any) proto.Message {
	t.Helper()
	message, err := packed.UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	return message
}

// same fails the test unless text has the values that protojson prints of the resource.
func same(t *testing.T, place string, text []byte, resource proto.Message) {
	t.Helper()
	wanted, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(resource)
	if err != nil {
		t.Fatal(err)
	}
	var got, want any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatalf("%s: not JSON: %v: %s", place, err, text)
	}
	if err := json.Unmarshal(wanted, &want); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		i := 0
		for g, w := asText(got), asText(want); i < min(len(g), len(w)); i++ {
			if g[i] != w[i] {
				t.Errorf("%s: printed\n…%.200s\nwant\n…%.200s", place, g[max(0, i-50):], w[max(0, i-50):])
				return
			}
		}
		t.Errorf("%s: one text is the beginning of the other", place)
	}
}

func asText(value any) []byte {
	text, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return text
}

// TestEachTypeIsPrintedAsByProtojson fills each type with random values, twice, and puts both in a row, which merges them.
func TestEachTypeIsPrintedAsByProtojson(t *testing.T) {
	registerNameTable(t)
	types, random := load(t), rand.New(rand.NewPCG(1, 2))
	messages, enums := map[protoreflect.FullName]bool{}, map[protoreflect.FullName]bool{}
	for name := range rootNames(t) {
		reach(protoregistry.GlobalFiles, name, messages, enums)
	}
	opaque := 0
	for name := range messages {
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
		if err != nil {
			t.Fatal(err)
		}
		descriptor := found.(protoreflect.MessageDescriptor)
		if descriptor.IsMapEntry() || name == "google.protobuf.Any" {
			continue
		}
		if !types.Known("type.googleapis.com/" + string(name)) {
			t.Errorf("no description of %s", name)
			continue
		}
		for range 20 {
			var b []byte
			for range 2 {
				message := dynamicpb.NewMessage(descriptor)
				fill(random, message, 4)
				b, err = proto.MarshalOptions{}.MarshalAppend(b, message)
				if err != nil {
					t.Fatal(err)
				}
			}
			merged := dynamicpb.NewMessage(descriptor)
			if err := proto.Unmarshal(b, merged); err != nil {
				t.Fatal(err)
			}
			redact(merged, false)
			resource := &anypb.Any{TypeUrl: "type.googleapis.com/" + string(name)}
			if resource.Value, err = proto.Marshal(merged); err != nil {
				t.Fatal(err)
			}
			text, err := types.Append(nil, resource.TypeUrl, b)
			if err != nil {
				if _, err := protojson.Marshal(resource); err == nil {
					t.Errorf("%s: %v", name, err)
				}
				opaque++
				continue
			}
			same(t, string(name), text, typed(t, resource))
		}
	}
	if opaque > 100 {
		t.Errorf("%d messages were printed as bytes", opaque)
	}
}

// typed returns a resource whose type the registry of generated types has, also if it was only described.
func typed(t *testing.T, resource *anypb.Any) proto.Message {
	t.Helper()
	if _, err := protoregistry.GlobalTypes.FindMessageByURL(resource.TypeUrl); err != nil {
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(strings.TrimPrefix(resource.TypeUrl, "type.googleapis.com/")))
		if err != nil {
			t.Fatal(err)
		}
		if err := protoregistry.GlobalTypes.RegisterMessage(dynamicpb.NewMessageType(found.(protoreflect.MessageDescriptor))); err != nil {
			t.Fatal(err)
		}
	}
	return resource
}

// fill sets about half of the fields of a message.
func fill(random *rand.Rand, m protoreflect.Message, depth int) {
	switch m.Descriptor().FullName() {
	case "google.protobuf.Any": // its two fields belong together
		return
	case "google.protobuf.Duration", "google.protobuf.Timestamp":
		m.Set(m.Descriptor().Fields().ByNumber(1), protoreflect.ValueOfInt64(random.Int64N(1e9)))
		m.Set(m.Descriptor().Fields().ByNumber(2), protoreflect.ValueOfInt32([]int32{0, 5, 1_000_000, 120_000_000, 123_456_000}[random.IntN(5)]))
		return
	case "google.protobuf.FieldMask":
		m.Mutable(m.Descriptor().Fields().ByNumber(1)).List().Append(protoreflect.ValueOfString("some_field.other_field"))
		return
	case "google.protobuf.Value": // no kind is not valid for protojson
		m.Set(m.Descriptor().Fields().ByNumber(3), protoreflect.ValueOfString("text"))
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if random.IntN(2) == 0 || depth == 0 && f.Message() != nil {
			continue
		}
		switch {
		case f.IsMap():
			for range random.IntN(3) {
				value := m.Mutable(f).Map().NewValue()
				if f.MapValue().Message() != nil {
					fill(random, value.Message(), depth-1)
				} else {
					value = scalar(random, f.MapValue())
				}
				m.Mutable(f).Map().Set(scalar(random, f.MapKey()).MapKey(), value)
			}
		case f.IsList():
			for range random.IntN(3) {
				if f.Message() != nil {
					fill(random, m.Mutable(f).List().AppendMutable().Message(), depth-1)
				} else {
					m.Mutable(f).List().Append(scalar(random, f))
				}
			}
		case f.Message() != nil:
			fill(random, m.Mutable(f).Message(), depth-1)
		default:
			m.Set(f, scalar(random, f))
		}
	}
}

func scalar(random *rand.Rand, f protoreflect.FieldDescriptor) protoreflect.Value {
	n := []int64{0, 1, -1, 77, math.MaxInt32, math.MinInt64, random.Int64()}[random.IntN(7)]
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(n&1 == 1)
	case protoreflect.EnumKind:
		if values := f.Enum().Values(); n&1 == 1 {
			return protoreflect.ValueOfEnum(values.Get(random.IntN(values.Len())).Number())
		}
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(n & 0xff))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(n))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(n)
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(uint64(n))
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(float32(n) * 0.3)
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64([]float64{0, 0.1, 1e21, 1e-9, float64(n), -2.5}[random.IntN(6)])
	case protoreflect.StringKind:
		return protoreflect.ValueOfString([]string{"", "plain", `"quoted" \ back`, "line\nbreak\ttab\x01", "ünïcode 🙂 <&>\u2028"}[random.IntN(5)])
	default:
		return protoreflect.ValueOfBytes([]byte{0, 1, 0xff, byte(n)}[:random.IntN(5)])
	}
}

// redact is Envoy's redaction: of what is in a sensitive field, texts are replaced and other values dropped.
func redact(m protoreflect.Message, hide bool) {
	name := m.Descriptor().FullName()
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		hide := hide || proto.GetExtension(f.Options(), udpa.E_Sensitive).(bool)
		switch {
		case f.IsMap() && f.MapValue().Message() != nil:
			v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { redact(v.Message(), hide); return true })
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				redact(v.List().Get(i).Message(), hide)
			}
		case f.Message() != nil && !f.IsMap():
			redact(v.Message(), hide)
		case !hide:
		case f.IsMap() && f.MapValue().Kind() == protoreflect.StringKind:
			v.Map().Range(func(key protoreflect.MapKey, _ protoreflect.Value) bool {
				v.Map().Set(key, protoreflect.ValueOfString("[redacted]"))
				return true
			})
		case f.IsMap() || f.IsList():
			panic("a sensitive field of " + string(name) + " has a kind that the test does not expect")
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, protoreflect.ValueOfString("[redacted]"))
		case f.Kind() == protoreflect.BytesKind:
			m.Set(f, protoreflect.ValueOfBytes([]byte("[redacted]")))
		default:
			m.Clear(f)
		}
		return true
	})
}

// TestDamagedResourcesArePrintedOrReported changes recorded resources. What protojson prints, configdump prints; what is
// malformed at the outermost level is an error, and nothing of it is shown.
func TestDamagedResourcesArePrintedOrReported(t *testing.T) {
	types, random := load(t), rand.New(rand.NewPCG(3, 4))
	printed, failed := 0, 0
	pushed(t, func(place string, resource *anypb.Any) {
		b := slices.Clone(resource.Value)
		switch i := random.IntN(len(b)); random.IntN(4) {
		case 0:
			b[i] ^= 1 << random.IntN(8)
		case 1:
			b = b[:i]
		case 2:
			b = slices.Delete(b, i, min(i+1+random.IntN(8), len(b)))
		case 3:
			b = slices.Insert(b, i, byte(random.Uint32()))
		}
		damaged := &anypb.Any{TypeUrl: resource.TypeUrl, Value: b}
		text, err := types.Append(nil, damaged.TypeUrl, b)
		if !json.Valid(text) {
			t.Fatalf("%s: not JSON: %s", place, text)
		}
		_, malformed := damaged.UnmarshalNew()
		_, unprintable := protojson.Marshal(damaged)
		switch {
		case malformed != nil:
			failed++
			var shown struct{ Value []byte }
			if json.Unmarshal(text, &shown); err == nil || string(shown.Value) != "[redacted]" {
				t.Errorf("%s: %v was printed as %.200s, error %v", place, malformed, text, err)
			}
		case unprintable == nil:
			printed++
			same(t, place, text, damaged)
		}
	})
	if printed < 100 || failed < 100 {
		t.Errorf("%d printed, %d failed: both should occur", printed, failed)
	}
}

func BenchmarkPrint(b *testing.B) {
	types := load(b)
	var resources []*anypb.Any
	pushed(&testing.T{}, func(_ string, resource *anypb.Any) { resources = append(resources, resource) })
	b.Run("by hand", func(b *testing.B) {
		var text []byte
		for b.Loop() {
			for _, r := range resources {
				text, _ = types.Append(text[:0], r.TypeUrl, r.Value)
				b.SetBytes(int64(len(text)))
			}
		}
	})
	b.Run("protojson", func(b *testing.B) {
		for b.Loop() {
			for _, r := range resources {
				if _, err := protojson.Marshal(r); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("load", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			load(b)
		}
	})
}
