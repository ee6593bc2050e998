package mesh

import (
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// The messages below wrap one value, or are maps. Unknown fields in them would change a value, so they are of the class of
// traffic.

var wrapperFields = message{"a wrapper", Traffic, []field{1: {"value", decoded}}}

// uint32Value returns the value of a google.protobuf.UInt32Value.
func (d *decoder) uint32Value(m wire.Message) uint32 { return uint32(d.uint64Value(m)) }

// uint64Value returns the value of a google.protobuf.UInt64Value.
func (d *decoder) uint64Value(m wire.Message) (value uint64) {
	for d.next(&m, &wrapperFields) {
		value = m.Uint64()
	}
	return value
}

var durationFields = message{"google.protobuf.Duration", Traffic, []field{1: {"seconds", decoded}, 2: {"nanos", decoded}}}

// maxSeconds is the limit of a google.protobuf.Duration's seconds that a time.Duration can hold.
const maxSeconds = 9_000_000_000

// duration returns a google.protobuf.Duration, within the range of time.Duration.
func (d *decoder) duration(m wire.Message) time.Duration {
	var seconds, nanos int64
	for d.next(&m, &durationFields) {
		switch m.Number {
		case 1:
			seconds = int64(m.Uint64())
		case 2:
			nanos = int64(int32(m.Uint64()))
		}
	}
	return time.Duration(min(max(seconds, -maxSeconds), maxSeconds))*time.Second + time.Duration(nanos)
}

// Keys of metadata that istiod sets.
const (
	transportSocketMatch = "envoy.transport_socket_match"
	istioMetadata        = "istio"
)

var metadataFields = message{"envoy.config.core.v3.Metadata", Traffic, []field{1: {"filter_metadata", decoded}, 2: {"typed_filter_metadata", ignored}}}

// endpointMetadata reads the metadata that istiod adds to a host. Other metadata is for filters that pillion does
// not have.
func (d *decoder) endpointMetadata(m wire.Message, e *Endpoint) {
	for d.next(&m, &metadataFields) {
		key, value := d.entry(m.Message())
		switch key {
		case transportSocketMatch:
			d.strings(value, func(name, text string) {
				if name == "tlsMode" {
					e.TLSMode = text
				} else {
					d.report(Security, "matches by "+name+" are not supported")
				}
			})
		case istioMetadata:
			d.strings(value, func(name, text string) {
				if name == "workload" {
					e.Workload = text
				}
			})
		}
	}
}

// entry returns the key and the value of an entry of a map from strings to messages.
func (d *decoder) entry(m wire.Message) (key string, value wire.Message) {
	value = wire.Read(nil, &d.err)
	for m.Next() {
		switch m.Number {
		case 1:
			key = m.String()
		case 2:
			value = m.Message()
		}
	}
	return key, value
}

// strings calls visit for the fields of a google.protobuf.Struct that are strings.
func (d *decoder) strings(m wire.Message, visit func(name, text string)) {
	for m.Next() {
		if m.Number != 1 {
			continue
		}
		name, value := d.entry(m.Message())
		for value.Next() {
			if value.Number == 3 {
				visit(name, value.String())
			}
		}
	}
}

// enum returns an enumeration of at most limit. Another value is reported, and 0 is returned.
func (d *decoder) enum(m *wire.Message, limit uint64) uint64 {
	value := m.Uint64()
	if value > limit {
		d.report(Security, "unknown value "+strconv.FormatUint(value, 10))
		return 0
	}
	return value
}

// percent returns a envoy.type.v3.Percent.
func (d *decoder) percent(m wire.Message) (value float64) {
	for d.next(&m, &wrapperFields) {
		value = m.Double()
	}
	return value
}

// any returns the type and the bytes of a google.protobuf.Any.
func (d *decoder) any(m wire.Message) (url string, value []byte) {
	for m.Next() {
		switch m.Number {
		case 1:
			url = m.String()
		case 2:
			value = m.Bytes()
		}
	}
	return url, value
}

// shortType returns the name of the type in a type URL.
func shortType(url string) string { return strings.TrimPrefix(url, typePrefix) }
