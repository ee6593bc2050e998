package xds

import (
	"fmt"
	"slices"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// Resource is one resource of a response. Its bytes share the memory of the response.
type Resource struct {
	Name    string // empty for a type of which there is one resource
	TypeURL string // of Value; not always the type that was asked for
	Value   []byte
}

// response is a message from the control plane, of either protocol.
type response struct {
	server    string // as it names itself; may be empty
	typ       Type
	version   string // of the push. In the state-of-the-world protocol an answer repeats it
	nonce     string
	resources []Resource
	removed   []string // delta only
}

// request is a message to the control plane, of either protocol.
type request struct {
	typ   Type
	node  []byte // encoded Node, in the first request of a stream
	nonce string // of the response that is acknowledged or rejected
	err   string // why that response is rejected, if it is

	version string   // state of the world: of the last accepted response
	names   []string // state of the world: all names that are asked for

	subscribe, unsubscribe []string // delta
	held                   []string // delta: names of resources that an earlier stream served
}

// Field numbers of envoy.service.discovery.v3 and google.rpc.Status.
const (
	deltaNode, deltaType, deltaSubscribe, deltaUnsubscribe, deltaInitial, deltaNonce, deltaError = 1, 2, 3, 4, 5, 6, 7
	worldVersion, worldNode, worldNames, worldType, worldNonce, worldError                       = 1, 2, 3, 4, 5, 6
	statusCode, statusMessage                                                                    = 1, 2
)

// encode returns the request as a DeltaDiscoveryRequest or a DiscoveryRequest.
func (r *request) encode(delta bool) []byte {
	var b []byte
	if !delta {
		b = appendText(b, worldVersion, r.version)
		b = appendBytes(b, worldNode, r.node)
		for _, name := range r.names {
			b = wire.AppendString(b, worldNames, name)
		}
		b = wire.AppendString(b, worldType, r.typ.URL())
		b = appendText(b, worldNonce, r.nonce)
		return r.appendError(b, worldError)
	}
	b = appendBytes(b, deltaNode, r.node)
	b = wire.AppendString(b, deltaType, r.typ.URL())
	for _, name := range r.subscribe {
		b = wire.AppendString(b, deltaSubscribe, name)
	}
	for _, name := range r.unsubscribe {
		b = wire.AppendString(b, deltaUnsubscribe, name)
	}
	for _, name := range r.held { // a map from names to versions; istiod has no versions
		b = wire.AppendBytes(b, deltaInitial, wire.AppendString(wire.AppendString(nil, 1, name), 2, ""))
	}
	b = appendText(b, deltaNonce, r.nonce)
	return r.appendError(b, deltaError)
}

func (r *request) appendError(b []byte, number int) []byte {
	if r.err == "" {
		return b
	}
	status := wire.AppendVarint(nil, statusCode, uint64(envoy.GRPCInvalidArgument))
	return wire.AppendBytes(b, number, wire.AppendString(status, statusMessage, r.err))
}

// appendText and appendBytes append fields that are absent when they are empty.
func appendText(b []byte, number int, text string) []byte {
	if text == "" {
		return b
	}
	return wire.AppendString(b, number, text)
}

func appendBytes(b []byte, number int, value []byte) []byte {
	if value == nil {
		return b
	}
	return wire.AppendBytes(b, number, value)
}

// maxNames bounds the resources and removed names of a response, and the resources that are held of a type. An entry of two
// bytes takes 56 in memory. A mesh of 10,000 services has about 50,000 clusters.
const maxNames = 250_000

// decode reads a DeltaDiscoveryResponse or a DiscoveryResponse. Unknown fields are skipped: they are of the envelope, and
// concern no resource.
func decode(b []byte, delta bool) (*response, error) {
	var r response
	var err error
	var url string
	m := wire.Read(b, &err)
	for m.Next() {
		switch {
		case m.Number == 4: // in both
			url = m.String()
		case m.Number == 5:
			r.nonce = m.String()
		case m.Number == 2 && delta:
			r.resources = append(r.resources, decodeResource(m.Message()))
		case m.Number == 7 && delta || m.Number == 6 && !delta:
			r.server = decodeServer(m.Message())
		case m.Number == 6 && delta:
			r.removed = append(r.removed, m.String())
		case m.Number == 1: // in both
			r.version = m.String()
		case m.Number == 2:
			r.resources = append(r.resources, decodeAny(m.Message()))
		}
		if len(r.resources)+len(r.removed) > maxNames {
			return nil, fmt.Errorf("the response has more than %d resources", maxNames)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("malformed discovery response: %w", err)
	}
	if r.typ, err = parseType(url); err != nil {
		return nil, err
	}
	if !delta {
		err = r.nameResources()
	}
	return &r, err
}

// maxServer bounds the names of a server and of a version that are kept for people, in bytes.
const maxServer = 1 << 10

// decodeServer returns the identifier in an envoy.config.core.v3.ControlPlane.
func decodeServer(m wire.Message) (name string) {
	for m.Next() {
		if m.Number == 1 {
			name = m.String()
		}
	}
	return name[:min(len(name), maxServer)]
}

func decodeResource(m wire.Message) Resource {
	var r Resource
	for m.Next() {
		switch m.Number {
		case 2:
			inner := decodeAny(m.Message())
			r.TypeURL, r.Value = inner.TypeURL, inner.Value
		case 3:
			r.Name = m.String()
		}
	}
	return r
}

func decodeAny(m wire.Message) Resource {
	var r Resource
	for m.Next() {
		switch m.Number {
		case 1:
			r.TypeURL = m.String()
		case 2:
			r.Value = m.Bytes()
		}
	}
	return r
}

// nameResources takes the names from the resources themselves, where field 1 of each named type has it.
func (r *response) nameResources() error {
	if r.typ.singleton() {
		return nil
	}
	for i := range r.resources {
		var err error
		m := wire.Read(r.resources[i].Value, &err)
		for m.Next() {
			if m.Number == 1 {
				r.resources[i].Name = m.String()
			}
		}
		if err != nil {
			r.resources[i].Name = "" // the handler finds the same error and rejects it
		}
	}
	return nil
}

// sorted returns the keys of a set in order.
func sorted(set map[string]struct{}) []string {
	names := make([]string, 0, len(set))
	for name := range set {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
