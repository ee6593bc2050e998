// Package e2e holds pillion to its promises: the built binary, in real namespaces, under real rules, with every process
// under its own uid. There is one file for each promise, and it holds tests only.
//
// The binary is built once, with the race detector when the tests have it, and what it writes to stderr is searched for
// reports of data races.
package e2e
