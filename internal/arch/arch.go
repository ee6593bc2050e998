// Package arch holds tests that hold the house together: which room may import which, where raw system calls live, what
// the module depends on, and a few habits that a reader relies on. It has no code of its own.
package arch
