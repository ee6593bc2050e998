package wire

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"unsafe"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// fill reads m into the message that into describes.
func fill(m Message, into protoreflect.Message) {
	for m.Next() {
		field := into.Descriptor().Fields().ByNumber(protoreflect.FieldNumber(m.Number))
		switch {
		case field == nil:
		case field.IsMap():
			entry, key, value := m.Message(), protoreflect.MapKey{}, into.Mutable(field).Map().NewValue()
			key = protoreflect.ValueOfString("").MapKey()
			for entry.Next() {
				if entry.Number == 1 {
					key = protoreflect.ValueOfString(entry.String()).MapKey()
				} else if entry.Number == 2 {
					fill(entry.Message(), value.Message())
				}
			}
			into.Mutable(field).Map().Set(key, value)
		case field.IsList() && field.Kind() == protoreflect.Sint64Kind:
			for bits := range m.Varints() {
				into.Mutable(field).List().Append(protoreflect.ValueOfInt64(protowire.DecodeZigZag(bits)))
			}
		case field.IsList() && field.Message() == nil:
			into.Mutable(field).List().Append(scalar(&m, field))
		case field.IsList():
			fill(m.Message(), into.Mutable(field).List().AppendMutable().Message())
		case field.Message() != nil:
			fill(m.Message(), into.Mutable(field).Message()) // a second occurrence is merged
		default:
			into.Set(field, scalar(&m, field))
		}
	}
}

func scalar(m *Message, field protoreflect.FieldDescriptor) protoreflect.Value {
	switch field.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(m.String())
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(m.Bytes())
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(m.Bool())
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(m.Uint64()))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(m.Uint64()))
	case protoreflect.Sint32Kind:
		return protoreflect.ValueOfInt32(int32(protowire.DecodeZigZag(m.Uint64() & math.MaxUint32)))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(m.Uint64()))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(int64(m.Uint64()))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(m.Uint64())
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(m.Double())
	}
	panic(field.Kind())
}

func metric() *dto.MetricFamily {
	return &dto.MetricFamily{
		Name: proto.String("requests"), Help: proto.String("Ä"), Type: dto.MetricType_HISTOGRAM.Enum(),
		Metric: []*dto.Metric{
			{Label: []*dto.LabelPair{{Name: proto.String("a"), Value: proto.String("b")}, {}}, TimestampMs: proto.Int64(-5)},
			{Histogram: &dto.Histogram{
				SampleCount: proto.Uint64(1 << 63), SampleSum: proto.Float64(-0.5), Schema: proto.Int32(-3), ZeroThreshold: proto.Float64(1e-300),
				NegativeSpan:  []*dto.BucketSpan{{Offset: proto.Int32(-7), Length: proto.Uint32(9)}},
				PositiveDelta: []int64{1, -2, 300, -70000}, PositiveCount: []float64{1.5, -2},
				CreatedTimestamp: &timestamppb.Timestamp{Seconds: -1, Nanos: 5},
			}},
		},
	}
}

func object() *structpb.Struct {
	s, err := structpb.NewStruct(map[string]any{"a": 1.5, "b": []any{true, nil, "text", map[string]any{"": "x"}}})
	if err != nil {
		panic(err)
	}
	return s
}

func TestReadingAgreesWithProtobuf(t *testing.T) {
	for _, message := range []proto.Message{metric(), object(), &dto.Metric{}} {
		b, err := proto.Marshal(message)
		if err != nil {
			t.Fatal(err)
		}
		got := message.ProtoReflect().New()
		fill(Read(b, &err), got)
		if err != nil || !proto.Equal(got.Interface(), message) {
			t.Errorf("%T: error %v, got\n%v\nwant\n%v", message, err, got, message)
		}
	}
}

func FuzzReadingAgreesWithProtobuf(f *testing.F) {
	for _, message := range []proto.Message{metric(), object()} {
		b, err := proto.Marshal(message)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, empty := range []proto.Message{&dto.MetricFamily{}, &structpb.Struct{}} {
			want, got := empty.ProtoReflect().New(), empty.ProtoReflect().New()
			var err error
			fill(Read(b, &err), got)
			judge := proto.Unmarshal(b, want.Interface())
			if err == nil && judge != nil {
				t.Fatalf("%T: protobuf fails with %v", empty, judge)
			}
			if judge != nil {
				continue
			}
			if err == nil {
				compare(t, got, want)
			}
			// Protobuf skips a field of another wire type than declared. After encoding it again there is no such field.
			discardUnknown(want)
			again, err := proto.MarshalOptions{Deterministic: true}.Marshal(want.Interface())
			if err != nil {
				t.Fatal(err)
			}
			got = empty.ProtoReflect().New()
			if fill(Read(again, &err), got); err != nil && !errors.Is(err, ErrDepth) && !errors.Is(err, ErrUTF8) {
				t.Fatalf("%T: protobuf accepts it, and reading fails with %v", empty, err)
			}
		}
	})
}

func compare(t *testing.T, got, want protoreflect.Message) {
	t.Helper()
	a, err := proto.MarshalOptions{Deterministic: true, AllowPartial: true}.Marshal(got.Interface())
	if err != nil {
		return // a proto2 message may hold strings that are not UTF-8
	}
	known := proto.Clone(want.Interface())
	discardUnknown(known.ProtoReflect())
	b, err := proto.MarshalOptions{Deterministic: true, AllowPartial: true}.Marshal(known)
	if err != nil || !bytes.Equal(a, b) {
		t.Fatalf("%v: got\n%v\nwant\n%v", err, got, want)
	}
}

func discardUnknown(m protoreflect.Message) {
	m.SetUnknown(nil)
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.IsMap():
			value.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
				discardUnknown(v.Message())
				return true
			})
		case field.Message() == nil:
		case field.IsList():
			for i := range value.List().Len() {
				discardUnknown(value.List().Get(i).Message())
			}
		default:
			discardUnknown(value.Message())
		}
		return true
	})
}

func TestMalformedMessagesAreErrorsThatNameTheField(t *testing.T) {
	whole, err := proto.Marshal(metric())
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(whole) {
		var ours error
		fill(Read(whole[:n], &ours), (&dto.MetricFamily{}).ProtoReflect())
		if judge := proto.Unmarshal(whole[:n], &dto.MetricFamily{}); (judge == nil) != (ours == nil) {
			t.Fatalf("the first %d bytes: error %v, protobuf's %v", n, ours, judge)
		}
	}
	for _, test := range []struct {
		name  string
		bytes []byte
		want  error
	}{
		{"varint for a string", AppendVarint(nil, 1, 5), ErrWireType},
		{"field number 0", []byte{0, 0}, ErrTag},
		{"field number above 2²⁹", []byte{0x80, 0x80, 0x80, 0x80, '0', '0'}, ErrTag},
		{"lone end of a group", []byte{9<<3 | 4}, ErrTruncated},
		{"unfinished group", []byte{9<<3 | 3}, ErrTruncated},
		{"length beyond the end", []byte{1<<3 | 2, 200, 1, 'a'}, ErrTruncated},
		{"text that is not UTF-8", AppendString(nil, 1, "\xff"), ErrUTF8},
	} {
		var err error
		fill(Read(test.bytes, &err), (&dto.MetricFamily{}).ProtoReflect())
		if !errors.Is(err, test.want) || !strings.HasPrefix(err.Error(), "field ") {
			t.Errorf("%s: error %v, want %v with the field's number", test.name, err, test.want)
		}
	}
	skipped := append([]byte{9<<3 | 3, 1 << 3, 7, 9<<3 | 4}, AppendString(nil, 1, "after a group")...)
	var got dto.MetricFamily
	if fill(Read(skipped, &err), got.ProtoReflect()); err != nil || got.GetName() != "after a group" {
		t.Errorf("a group is not skipped: %v, %v", err, &got)
	}
}

func TestNestingIsBounded(t *testing.T) {
	var descend func(Message) int
	descend = func(m Message) int {
		for m.Next() {
			return 1 + descend(m.Message())
		}
		return 0
	}
	b := []byte{}
	for range MaxDepth - 2 {
		b = AppendBytes(nil, 1, b)
	}
	var err error
	if got := descend(Read(b, &err)); err != nil || got != MaxDepth-2 {
		t.Errorf("%d levels: error %v", got, err)
	}
	for range MaxDepth {
		b = AppendBytes(nil, 1, b)
	}
	if got := descend(Read(b, &err)); !errors.Is(err, ErrDepth) || got > MaxDepth+1 {
		t.Errorf("%d levels: error %v, want %v", got, err, ErrDepth)
	}
}

func TestPackedAndSingleValuesReadAlike(t *testing.T) {
	packed := AppendBytes(nil, 1, []byte{1, 0x80, 0x01})
	single := AppendVarint(AppendVarint(nil, 1, 1), 1, 128)
	for _, b := range [][]byte{packed, single} {
		var err error
		var got []uint64
		for m := Read(b, &err); m.Next(); {
			for v := range m.Varints() {
				got = append(got, v)
			}
		}
		if err != nil || len(got) != 2 || got[0] != 1 || got[1] != 128 {
			t.Errorf("% x: %v, error %v", b, got, err)
		}
	}
	var err error
	for m := Read(AppendBytes(nil, 1, []byte{0x80}), &err); m.Next(); {
		for range m.Varints() {
			t.Error("a truncated value was read")
		}
	}
	if !errors.Is(err, ErrTruncated) {
		t.Errorf("error %v, want %v", err, ErrTruncated)
	}
}

func TestReadingDoesNotAllocate(t *testing.T) {
	b, err := proto.Marshal(metric())
	if err != nil {
		t.Fatal(err)
	}
	var walk func(Message) int
	walk = func(m Message) int {
		n := 0
		for m.Next() {
			if n++; m.Number == 4 {
				n += walk(m.Message())
			}
		}
		return n
	}
	fields := 0
	if allocations := testing.AllocsPerRun(100, func() { fields = walk(Read(b, &err)) }); allocations > 0 || fields < 5 {
		t.Errorf("%v allocations for %d fields", allocations, fields)
	}
}

// Each method accepts the wire type of its own kind only, and names the field.
func TestValuesOfAnotherWireTypeAreErrors(t *testing.T) {
	fields := map[protowire.Type][]byte{
		protowire.VarintType:  AppendVarint(nil, 7, 1),
		protowire.BytesType:   AppendBytes(nil, 7, nil),
		protowire.Fixed64Type: AppendDouble(nil, 7, 1),
		protowire.Fixed32Type: protowire.AppendFixed32(protowire.AppendTag(nil, 7, protowire.Fixed32Type), 1),
	}
	for name, method := range map[string]struct {
		typ  protowire.Type
		read func(*Message)
	}{
		"Bytes":   {protowire.BytesType, func(m *Message) { m.Bytes() }},
		"String":  {protowire.BytesType, func(m *Message) { _ = m.String() }},
		"Message": {protowire.BytesType, func(m *Message) { m.Message() }},
		"Uint64":  {protowire.VarintType, func(m *Message) { m.Uint64() }},
		"Bool":    {protowire.VarintType, func(m *Message) { m.Bool() }},
		"Double":  {protowire.Fixed64Type, func(m *Message) { m.Double() }},
	} {
		for typ, field := range fields {
			var err error
			m := Read(field, &err)
			if !m.Next() {
				t.Fatal(err)
			}
			method.read(&m)
			if want := typ != method.typ; errors.Is(err, ErrWireType) != want || want && !strings.HasPrefix(err.Error(), "field 7: ") {
				t.Errorf("%s of wire type %d: error %v", name, typ, err)
			}
			if err != nil && m.Next() {
				t.Errorf("%s of wire type %d: reading goes on after the error", name, typ)
			}
		}
	}
}

// A field that is not read does not hide the next one, whatever its kind.
func TestFieldsThatAreNotReadAreSkipped(t *testing.T) {
	for _, field := range [][]byte{
		AppendVarint(nil, 7, 1<<40), AppendString(nil, 7, "text"), AppendDouble(nil, 7, 1),
		protowire.AppendFixed32(protowire.AppendTag(nil, 7, protowire.Fixed32Type), 0x08080808),
	} {
		var err error
		var numbers []int
		text := ""
		for m := Read(AppendString(slices.Clone(field), 1, "next"), &err); m.Next(); {
			if numbers = append(numbers, m.Number); m.Number == 1 {
				text = m.String()
			}
		}
		if err != nil || !slices.Equal(numbers, []int{7, 1}) || text != "next" {
			t.Errorf("% x: fields %v, text %q, error %v", field, numbers, text, err)
		}
	}
}

// A tag that cannot be read is not named by the number of the field before it.
func TestAMalformedTagHasNoNumber(t *testing.T) {
	var err error
	m := Read(append(AppendVarint(nil, 7, 1), 0), &err)
	for m.Next() {
	}
	if !errors.Is(err, ErrTag) || !strings.HasPrefix(err.Error(), "field 0: ") {
		t.Errorf("error %v", err)
	}
}

// A message may be nested in MaxDepth-1 others.
func TestTheDeepestMessageIsRead(t *testing.T) {
	for depth, want := range map[int]error{MaxDepth - 1: nil, MaxDepth: ErrDepth} {
		var err error
		m := Read(nil, &err)
		for range depth {
			m = m.Nested(nil)
		}
		if !errors.Is(err, want) || m.Depth() != depth {
			t.Errorf("depth %d: error %v, want %v", m.Depth(), err, want)
		}
	}
}

func TestMessagesWithTextsShareEqualStrings(t *testing.T) {
	long := strings.Repeat("x", maxShared+1)
	b := AppendString(AppendString(nil, 1, "name"), 2, long)
	texts := Texts{}
	read := func() (all []string) {
		var err error
		outer := Read(AppendBytes(nil, 1, b), &err)
		outer.Texts = texts
		for outer.Next() {
			for m := outer.Message(); m.Next(); {
				all = append(all, m.String())
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	first, second := read(), read()
	if !slices.Equal(first, []string{"name", long}) || !slices.Equal(first, second) {
		t.Fatalf("read %.50q and %.50q", first, second)
	}
	if unsafe.StringData(first[0]) != unsafe.StringData(second[0]) {
		t.Error("equal strings are not shared")
	}
	if len(texts) != 1 {
		t.Errorf("%d strings are kept, and a long one", len(texts))
	}
	if b[len(b)-1] = 'y'; first[1] != long {
		t.Error("a string shares memory with the message")
	}
}

func TestFieldsAreCounted(t *testing.T) {
	var err error
	b := slices.Concat(AppendString(nil, 3, "a"), AppendVarint(nil, 1, 7), AppendString(nil, 3, "b"), AppendDouble(nil, 2, 1), AppendString(nil, 3, ""))
	for want, m := 3, Read(b, &err); ; {
		if got := m.Count(3); got != want {
			t.Errorf("%d fields, want %d", got, want)
		}
		if !m.Next() {
			break
		}
		if m.Number == 3 {
			want--
		}
	}
	if m := Read(b[:len(b)-1], &err); m.Count(3) != 2 {
		t.Errorf("%d whole fields, want 2", m.Count(3))
	}
}
