// Package configdump prints resources of the control plane as JSON, in protobuf's mapping with the fields' original names,
// as Envoy does. It prints the bytes that were received, so a reader sees what the control plane sent, not what pillion
// made of it.
//
// Keys and passwords are never printed: Envoy's definitions mark the fields that hold them.
//
// The descriptions of the messages are embedded, compressed. They are unpacked for a dump and let go afterwards. The
// library's dynamic messages print the same, and were measured: linking them costs each start of the program 1.4 MB of
// resident memory, 5 ms, and 0.46 MB of binary, whether or not something is printed.
package configdump

import (
	"bytes"
	"compress/flate"
	_ "embed"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Resource is one resource of the control plane, as received and as used.
type Resource struct {
	TypeURL string // such as "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	Name    string
	Version string
	Updated time.Time // when these bytes were received first
	Warming bool      // received, and not in use before what it needs has come

	// Bytes returns the version in force. It is nil if there is none.
	Bytes func() ([]byte, error)

	Refusal *Refusal // of a later version; nil: there is none
}

// Refusal is a version of a resource that is not used.
type Refusal struct {
	Reason string
	At     time.Time
	Bytes  func() ([]byte, error)
}

// typesPacked is a google.protobuf.FileDescriptorSet with one file for each package, compressed. The fields that hold
// secrets have the option debug_redact. A test of e2e/testdata/controlplane/configdump makes it from the generated types.
//
//go:embed types.pb.deflate
var typesPacked []byte

// Types describes the messages that istiod sends. It is not safe for use from several goroutines.
type Types struct {
	messages map[string]*message
	enums    map[string]map[int32]string
	err      error // of a description
}

// message describes a type of message.
type message struct {
	name     string
	raw      []byte // its google.protobuf.DescriptorProto until it is used first
	fields   map[int32]*field
	mapEntry bool
}

// field describes a field of a message.
type field struct {
	index     int // among the fields, in the order in which they are printed
	name      string
	number    int32
	kind      kind
	typeName  string // of a message or an enumeration
	repeated  bool
	optional  bool // of a scalar: its zero value is printed
	oneof     int  // 0: not in a oneof
	sensitive bool
}

// kind is the type of a field, with the numbers of google.protobuf.FieldDescriptorProto.Type.
type kind uint8

const (
	kindDouble kind = iota + 1
	kindFloat
	kindInt64
	kindUint64
	kindInt32
	kindFixed64
	kindFixed32
	kindBool
	kindString
	kindGroup
	kindMessage
	kindBytes
	kindUint32
	kindEnum
	kindSfixed32
	kindSfixed64
	kindSint32
	kindSint64
)

// Load unpacks the descriptions: half a megabyte for as long as the result is kept.
func Load() (*Types, error) {
	set, err := io.ReadAll(flate.NewReader(bytes.NewReader(typesPacked)))
	if err != nil {
		return nil, fmt.Errorf("unpacking the types of resources: %w", err)
	}
	t := &Types{messages: make(map[string]*message, 1024), enums: make(map[string]map[int32]string, 128)}
	for m := wire.Read(set, &t.err); m.Next(); {
		if m.Number == 1 {
			t.addFile(m.Message())
		}
	}
	if t.err != nil {
		return nil, fmt.Errorf("reading the types of resources: %w", t.err)
	}
	return t, nil
}

// The functions below read the messages of descriptor.proto.

func (t *Types) addFile(file wire.Message) {
	var in string
	var messages, enums [][]byte
	for file.Next() {
		switch file.Number {
		case 2:
			in = file.String()
		case 4:
			messages = append(messages, file.Bytes())
		case 5:
			enums = append(enums, file.Bytes())
		}
	}
	for _, b := range messages {
		t.addMessage(in, b, file.Nested(b))
	}
	for _, b := range enums {
		t.addEnum(in, file.Nested(b))
	}
}

func (t *Types) addMessage(in string, raw []byte, m wire.Message) {
	name := ""
	for m.Next() {
		switch m.Number {
		case 1: // it is written before the others
			name = in + "." + m.String()
		case 3:
			t.addMessage(name, m.Bytes(), m.Message())
		case 4:
			t.addEnum(name, m.Message())
		}
	}
	t.messages[name] = &message{name: name, raw: raw}
}

func (t *Types) addEnum(in string, m wire.Message) {
	name, values := "", make(map[int32]string)
	for m.Next() {
		switch m.Number {
		case 1:
			name = in + "." + m.String()
		case 2:
			var number int32
			var value string
			for m := m.Message(); m.Next(); {
				switch m.Number {
				case 1:
					value = m.String()
				case 2:
					number = int32(m.Uint64())
				}
			}
			if _, ok := values[number]; !ok { // the first of several names is printed
				values[number] = value
			}
		}
	}
	t.enums[name] = values
}

// message returns the description of a type; nil if there is none.
func (t *Types) message(name string) *message {
	found := t.messages[name]
	if found == nil || found.raw == nil {
		return found
	}
	found.fields = make(map[int32]*field)
	for m := wire.Read(found.raw, &t.err); m.Next(); {
		switch m.Number {
		case 2:
			f := readField(m.Message())
			f.index = len(found.fields)
			found.fields[f.number] = f
		case 7:
			for m := m.Message(); m.Next(); {
				found.mapEntry = found.mapEntry || m.Number == 7 && m.Bool()
			}
		}
	}
	found.raw = nil
	return found
}

const labelRepeated = 3

func readField(m wire.Message) *field {
	f := &field{}
	for m.Next() {
		switch m.Number {
		case 1:
			f.name = m.String()
		case 3:
			f.number = int32(m.Uint64())
		case 4:
			f.repeated = m.Uint64() == labelRepeated
		case 5:
			f.kind = kind(m.Uint64())
		case 6:
			f.typeName = strings.TrimPrefix(m.String(), ".")
		case 8:
			for m := m.Message(); m.Next(); {
				f.sensitive = f.sensitive || m.Number == 16 && m.Bool()
			}
		case 9:
			f.oneof = int(m.Uint64()) + 1
		case 17:
			f.optional = m.Bool()
		}
	}
	f.optional = f.optional || f.oneof != 0
	return f
}
