package configdump

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/wire"
)

const prefix = "type.googleapis.com/"

func anyOf(url string, b []byte) []byte {
	return wire.AppendBytes(wire.AppendString(nil, 1, url), 2, b)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestMessagesArePrinted(t *testing.T) {
	types, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	const (
		cluster  = prefix + "envoy.config.cluster.v3.Cluster"
		secret   = prefix + "envoy.extensions.transport_sockets.tls.v3.Secret"
		listener = prefix + "envoy.config.listener.v3.Listener"
		names    = prefix + "istio.networking.nds.v1.NameTable"
	)
	text := func(number int, value string) []byte { return wire.AppendString(nil, number, value) }
	message := func(number int, parts ...[]byte) []byte { return wire.AppendBytes(nil, number, join(parts...)) }
	varint := func(number int, value uint64) []byte { return wire.AppendVarint(nil, number, value) }
	filter := func(typed []byte) []byte { return message(3, message(3, text(1, "f"), message(4, typed))) }
	for _, test := range []struct{ name, url, want string }{
		{"fields in the order of their description", cluster, `{"@type":"URL","name":"c","type":"EDS"}`},
		{"a key", secret, `{"@type":"URL","name":"s","tls_certificate":{"certificate_chain":{"inline_string":"chain"},"private_key":{"inline_bytes":"W3JlZGFjdGVkXQ=="}}}`},
		{"a key in a file", secret, `{"@type":"URL","tls_certificate":{"private_key":{"filename":"[redacted]"}}}`},
		{"an unknown type inside", listener, `{"@type":"URL","filter_chains":[{"filters":[{"name":"f","typed_config":{"@type":"x/unknown.Type","value":"CgFh"}}]}]}`},
		{"a malformed message inside", listener, `{"@type":"URL","filter_chains":[{"filters":[{"name":"f","typed_config":{"@type":"` + cluster + `","value":"W3JlZGFjdGVkXQ=="}}]}],"traffic_direction":"INBOUND"}`},
		{"an unknown enumeration and an unknown field", listener, `{"@type":"URL","traffic_direction":77}`},
		{"a map, whose last entry counts", names, `{"@type":"URL","table":{"a":{"ips":["2"]},"b":{}}}`},
		{"the last of a oneof", secret, `{"@type":"URL","validation_context":{"trusted_ca":{"filename":"2"}}}`},
		{"a message in parts", secret, `{"@type":"URL","validation_context":{"trusted_ca":{"filename":"1"},"crl":{"filename":"2"}}}`},
		{"numbers, packed and not", listener, `{"@type":"URL","filter_chains":[{"filter_chain_match":{"source_ports":[80,443,8080]}}]}`},
		{"a duration", cluster, `{"@type":"URL","connect_timeout":"-1.500s"}`},
	} {
		b := map[string][]byte{
			"fields in the order of their description": join(varint(2, 3), text(1, "c")),
			"a key":                      join(text(1, "s"), message(2, message(1, text(3, "chain")), message(2, wire.AppendBytes(nil, 2, []byte("key material"))))),
			"a key in a file":            message(2, message(2, text(1, "/etc/key"))),
			"an unknown type inside":     filter(anyOf("x/unknown.Type", text(1, "a"))),
			"a malformed message inside": join(varint(16, 1), filter(anyOf(cluster, []byte("\n\x05a")))),
			"an unknown enumeration and an unknown field": join(varint(16, 77), varint(1000, 1)),
			"a map, whose last entry counts":              join(message(1, text(1, "b")), message(1, text(1, "a"), message(2, text(1, "1"))), message(1, text(1, "a"), message(2, text(1, "2")))),
			"the last of a oneof":                         join(message(4, message(1, text(1, "1"))), message(2, text(4, "x")), message(4, message(1, text(1, "2")))),
			"a message in parts":                          join(message(4, message(1, text(1, "1"))), message(4, message(7, text(1, "2")))),
			"numbers, packed and not":                     message(3, message(1, wire.AppendBytes(nil, 7, []byte{80, 0xbb, 3}), varint(7, 8080))),
			"a duration":                                  message(4, varint(1, ^uint64(0)), varint(2, uint64(0xffffffffffffffff-499_999_999))),
		}[test.name]
		want := strings.ReplaceAll(test.want, "URL", test.url)
		if got, err := types.Append(nil, test.url, b); err != nil || string(got) != want {
			t.Errorf("%s: error %v, got\n%s\nwant\n%s", test.name, err, got, want)
		}
	}
}

func TestTypesWithAFormOfTheirOwn(t *testing.T) {
	types, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	entry := func(key string, value []byte) []byte {
		return wire.AppendBytes(nil, 1, join(wire.AppendString(nil, 1, key), wire.AppendBytes(nil, 2, value)))
	}
	number := wire.AppendDouble(nil, 2, 1.5)
	for want, b := range map[string][]byte{
		`Struct {}`: nil,
		`Struct {"a":1.5,"b":"x","c":true,"d":null,"e":null,"f":[1.5],"g":{"a":"x"},"h":[],"i":{}}`: join(
			entry("b", wire.AppendString(nil, 3, "x")), entry("a", number), entry("c", wire.AppendVarint(nil, 4, 1)), entry("d", wire.AppendVarint(nil, 1, 0)),
			entry("e", nil), entry("f", wire.AppendBytes(nil, 6, wire.AppendBytes(nil, 1, number))), entry("g", wire.AppendBytes(nil, 5, entry("a", wire.AppendString(nil, 3, "x")))),
			entry("h", wire.AppendBytes(nil, 6, nil)), entry("i", wire.AppendBytes(nil, 5, nil))),
		`Timestamp "2026-02-03T04:05:06.070Z"`: join(wire.AppendVarint(nil, 1, 1770091506), wire.AppendVarint(nil, 2, 70_000_000)),
		`Duration "0s"`:                        nil,
		`Duration "1.000000001s"`:              join(wire.AppendVarint(nil, 1, 1), wire.AppendVarint(nil, 2, 1)),
		`FieldMask "aB,c.dE"`:                  join(wire.AppendString(nil, 1, "a_b"), wire.AppendString(nil, 1, "c.d_e")),
		`UInt32Value 0`:                        nil,
		`UInt64Value "7"`:                      wire.AppendVarint(nil, 1, 7),
		`DoubleValue "-Infinity"`:              wire.AppendDouble(nil, 1, math.Inf(-1)),
		`BytesValue "YQ=="`:                    wire.AppendString(nil, 1, "a"),
		`BoolValue true`:                       join(wire.AppendVarint(nil, 1, 0), wire.AppendVarint(nil, 1, 1)),
	} {
		name, want, _ := strings.Cut(want, " ")
		url := prefix + "google.protobuf." + name
		got, err := types.Append(nil, url, b)
		if want := `{"@type":"` + url + `","value":` + want + `}`; err != nil || string(got) != want {
			t.Errorf("error %v, got %s, want %s", err, got, want)
		}
	}
}

func TestWhatCannotBePrintedIsReported(t *testing.T) {
	types, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	const cluster = prefix + "envoy.config.cluster.v3.Cluster"
	deep := []byte{}
	for range 200 { // a Value in a list in a Value …
		deep = wire.AppendBytes(nil, 6, wire.AppendBytes(nil, 1, deep))
	}
	long := wire.AppendString(nil, 1, strings.Repeat("\x01", maxText/6+1)) // each byte takes six
	for name, test := range map[string]struct {
		url  string
		b    []byte
		want error
	}{
		"unknown":   {prefix + "some.Type", []byte("a"), nil},
		"malformed": {cluster, []byte{0x0a}, errMalformed},
		"packed":    {prefix + "envoy.config.listener.v3.FilterChainMatch", wire.AppendBytes(nil, 7, []byte{80, 0xbb}), errMalformed},
		"not UTF-8": {cluster, wire.AppendString(nil, 1, "\xff"), wire.ErrUTF8},
		"nested":    {prefix + "google.protobuf.Value", deep, wire.ErrDepth},
		"too long":  {cluster, long, errTooLong},
		"no time":   {prefix + "google.protobuf.Timestamp", wire.AppendVarint(nil, 1, 1<<60), errValue},
	} {
		got, err := types.Append([]byte("before"), test.url, test.b)
		var shown struct {
			Type  string `json:"@type"`
			Value []byte
		}
		if err == nil || test.want != nil && !errors.Is(err, test.want) {
			t.Errorf("%s: error %v, want %v", name, err, test.want)
		}
		if types.Known(test.url) { // it may hold a key
			test.b = []byte(redacted)
		}
		text, ok := bytes.CutPrefix(got, []byte("before"))
		if err := json.Unmarshal(text, &shown); !ok || err != nil || shown.Type != test.url || !bytes.Equal(shown.Value, test.b) {
			t.Errorf("%s: error %v: %.200s", name, err, got)
		}
	}
}

func FuzzAppend(f *testing.F) {
	types, err := Load()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(prefix+"envoy.config.cluster.v3.Cluster", wire.AppendString(nil, 1, "a"))
	f.Add(prefix+"envoy.config.listener.v3.Listener", wire.AppendBytes(nil, 3, wire.AppendBytes(nil, 3, anyOf("x", nil))))
	f.Add(prefix+"google.protobuf.Struct", wire.AppendBytes(nil, 1, wire.AppendString(nil, 1, "k")))
	f.Fuzz(func(t *testing.T, url string, b []byte) {
		if text, _ := types.Append(nil, url, b); !json.Valid(text) {
			t.Errorf("not JSON: %s", text)
		}
	})
}
