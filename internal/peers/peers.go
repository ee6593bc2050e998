// Package peers is the metadata exchange of Istio's proxies: how they describe their workloads to each other, in header
// fields of HTTP and in a preamble of TCP connections (extensions/filters/{http/peer_metadata,network/metadata_exchange} of
// istio/proxy). It gives telemetry the names of the other side. A description is not authenticated: it never decides what a
// connection or a request may do.
package peers

import (
	"bytes"
	"encoding/base64"
	"sync"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// Bounds of what peers can send.
const (
	// maxText is the longest description that is read, in bytes as it is sent. Istio's have some hundred bytes.
	maxText = 8 << 10

	// maxName bounds each name of a workload. A name of Kubernetes has at most 253 bytes, the value of a label 63.
	maxName = 253

	// maxKept is how many descriptions each of the two generations keeps, and maxBytes how many bytes of their text.
	maxKept  = 256
	maxBytes = 256 << 10
)

// Exchange is this workload's part of the exchange, and the descriptions that peers have sent. Make it with New. It is safe
// for concurrent use.
type Exchange struct {
	ID       string // of this proxy's node, in x-envoy-peer-metadata-id
	Metadata string // of this workload, in x-envoy-peer-metadata

	preamble []byte // the same for TCP

	mu          sync.RWMutex
	now, before map[string]*flow.Workload // by what describes it; nil: that could not be read
	bytes       int                       // of the keys of now
}

// New returns the exchange of a node with an ID. metadata is a google.protobuf.Struct that describes its workload.
func New(id string, metadata []byte) *Exchange {
	return &Exchange{
		ID: id, Metadata: base64.StdEncoding.EncodeToString(metadata), preamble: appendPreamble(nil, id, metadata),
		now: make(map[string]*flow.Workload),
	}
}

// Find returns the workload that the value of a field x-envoy-peer-metadata describes; nil if it describes none. The result
// is the same pointer for the same value while that is in use, and a value that was seen before costs no memory.
func Find[T string | []byte](e *Exchange, value T) *flow.Workload {
	if len(value) == 0 || len(value) > maxText {
		return nil
	}
	e.mu.RLock()
	w, known := e.now[string(value)]
	e.mu.RUnlock()
	if !known {
		w = e.keep(string(value), decodeText)
	}
	return w
}

// keep returns the workload that a text describes, which read decodes if it is new. When a generation is full, the next one
// begins; texts that are not used meanwhile are forgotten.
func (e *Exchange) keep(text string, read func(string) *flow.Workload) *flow.Workload {
	e.mu.Lock()
	defer e.mu.Unlock()
	w, known := e.now[text]
	if known {
		return w
	}
	if w, known = e.before[text]; !known {
		w = read(text)
	}
	if len(e.now) >= maxKept || e.bytes+len(text) > maxBytes {
		e.before, e.now, e.bytes = e.now, make(map[string]*flow.Workload), 0
	}
	e.now[text] = w
	e.bytes += len(text)
	return w
}

// decodeText decodes the value of a field. Padding is optional.
func decodeText(text string) *flow.Workload {
	b, err := base64.RawStdEncoding.DecodeString(string(bytes.TrimRight([]byte(text), "=")))
	if err != nil {
		return nil
	}
	return decode(b)
}

// decode reads a google.protobuf.Struct that describes a workload; nil if it is malformed. Names that are no strings count
// as missing.
func decode(b []byte) *flow.Workload {
	var err error
	w := new(flow.Workload)
	eachField(wire.Read(b, &err), func(key string, value wire.Message) {
		switch key {
		case "WORKLOAD_NAME":
			w.Name = text(value)
		case "NAMESPACE":
			w.Namespace = text(value)
		case "CLUSTER_ID":
			w.Cluster = text(value)
		case "LABELS":
			labels(w, value)
		}
	})
	if err != nil {
		return nil
	}
	return w
}

// labels reads the labels of a pod, a Value.
func labels(w *flow.Workload, value wire.Message) {
	for value.Next() {
		if value.Number != structValue {
			continue
		}
		eachField(value.Message(), func(key string, value wire.Message) {
			switch key {
			case "app":
				w.App = text(value)
			case "version":
				w.Version = text(value)
			case "service.istio.io/canonical-name":
				w.CanonicalService = text(value)
			case "service.istio.io/canonical-revision":
				w.CanonicalRevision = text(value)
			}
		})
	}
}

// Fields of google.protobuf.Value.
const (
	stringValue = 3
	structValue = 5
)

// eachField calls f for each entry of a Struct.
func eachField(m wire.Message, f func(key string, value wire.Message)) {
	for m.Next() {
		if m.Number != 1 {
			continue
		}
		key, value := "", []byte(nil)
		entry := m.Message()
		for entry.Next() {
			switch entry.Number {
			case 1:
				key = entry.String()
			case 2:
				value = entry.Bytes()
			}
		}
		f(key, m.Nested(value))
	}
}

// text returns a Value that is a string of a length that a name may have; otherwise "".
func text(value wire.Message) (s string) {
	for value.Next() {
		if s = ""; value.Number == stringValue {
			s = value.String()
		}
	}
	if len(s) > maxName {
		return ""
	}
	return s
}
