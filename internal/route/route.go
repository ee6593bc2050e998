// Package route finds the route of a request and decides what becomes of the request: the answer that is given here, or the
// cluster that it is sent to, and how it is changed. It has the semantics of Envoy. It does no I/O.
//
// Of compiles the routes of a control plane once. Table.Find chooses a virtual host, a route and one of its clusters.
// Choice.Outcome then adds what filters decide: faults, cross-origin requests, redirects. Policies are enforced between the
// two calls. Neither call allocates memory, unless the request is answered here.
package route

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Fields are the header fields of a message in the order of their arrival, without pseudo-header fields.
type Fields interface {
	Len() int
	At(i int) (name, value []byte) // the name as it was received; HTTP/1 preserves its case
}

// Request is a request as it was received. Its bytes belong to the caller.
type Request struct {
	Method, Path, Authority, Scheme []byte
	Fields                          Fields         // nil: the request has no fields
	Downstream                      netip.AddrPort // address of the client
	Local                           netip.AddrPort // address that the client connected to
	GRPC                            bool           // by its content-type
	Metadata                        Metadata       // nil: filters left no values
	Random                          func() uint64  // draws weights and fractions; nil: math/rand/v2

	last lastHost // of a Table
}

// lastHost is the virtual host of an exact domain. The requests of a connection are mostly for one host.
type lastHost struct {
	table  *Table
	domain string
	host   *host
}

// Metadata has values that filters left about a request, such as the claims of its token.
type Metadata interface {
	// Match compares a value. A missing value does not match; m.Invert inverts that as well.
	Match(m *mesh.MetadataMatcher) match.Value
}
