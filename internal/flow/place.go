package flow

import "sync/atomic"

// maxPlaces is the number of sinks that may keep a value with each connection. Every record has room for it.
const maxPlaces = 3

// Place is where one sink keeps a value of its own with each connection. Only the goroutine that owns the record, and
// the function given to Table.Each, may use it.
type Place struct{ index int }

var places atomic.Int32

// NewPlace returns a place that no other sink has. A package takes one when the program starts; more than maxPlaces is a
// programming error and panics.
func NewPlace() Place {
	n := int(places.Add(1))
	if n > maxPlaces {
		panic("flow: too many sinks keep values with records: raise maxPlaces")
	}
	return Place{n - 1}
}

// Get returns the value that was set, or nil.
func (p Place) Get(r *Record) any { return r.bound[p.index] }

// Set keeps a value until the record ends.
func (p Place) Set(r *Record, value any) { r.bound[p.index] = value }

// Continue makes r the further course of the same connection: sinks find with it the values that they keep with from,
// and do not count the connection a second time.
func (r *Record) Continue(from *Record) { r.bound = from.bound }
