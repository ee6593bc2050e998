// Command strict reads YAML or JSON documents from standard input as the API server with strict field validation would.
// It prints the errors of each document to standard error.
package main

import (
	"fmt"
	"os"

	"github.com/pillion-proxy/pillion/e2e/testdata/kubernetes/decode"
)

func main() {
	if _, err := decode.Stream(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
