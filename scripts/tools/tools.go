// Package tools is empty: its module holds the versions of the programs that check the source and list its modules, so
// that the main module does not depend on them.
package tools
