// Package arch tests the architecture of the module: which packages may import which, where raw system calls are, the
// module's dependencies, and conventions that a reader relies on. It has no code of its own.
package arch
