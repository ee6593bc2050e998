// Package controlplane keeps what the control plane has configured: the snapshot in force, the bytes it was compiled from,
// and what was refused.
package controlplane

import (
	"iter"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Resource is one resource of the control plane, as received and as used.
type Resource struct {
	Type    xds.Type
	Name    string
	TypeURL string    // of the bytes
	Updated time.Time // when bytes that differ from the last ones were received
	Version string    // of the bytes: the hash by which they are compared

	// Bytes returns the resource in force. It is nil if the resource has been refused and has no good version.
	Bytes func() ([]byte, error)

	Findings []mesh.Finding // of the resource in force
	Warming  bool           // received, and not in use before what it needs has come

	Refusal *Refusal // of a version that came after the one in force; may be nil
}

// Refusal is a version of a resource that is not used.
type Refusal struct {
	Reason   string
	At       time.Time
	Bytes    func() ([]byte, error)
	Findings []mesh.Finding
}

// Resources is a sequence of resources in the order of their types, and in each type by name.
type Resources = iter.Seq[Resource]
