// Command pillion is a sidecar that captures and carries a workload's network traffic.
//
// This package is the front door: it turns flags and environment into the configuration of the rooms behind it, and
// their errors into exit codes, and prints what a running agent says of itself. It decides nothing else.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

// Exit codes. An unknown flag is 255 and a failed validation 126 because istio-iptables says so and injectors' authors rely
// on it.
const (
	exitOK         = 0
	exitFailure    = 1
	exitUnknown    = 2 // `rules check` could not compare; 1 says that there is a difference
	exitValidation = 126
	exitUsage      = 255
)

// version is stamped by the build.
var version = "devel"

func main() {
	os.Exit(run(os.Args[1:]))
}

// usageError is an error of the command line's form, as opposed to a bad value or a failed run.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// run executes the command line args (without the program's name) and returns the exit code. Errors go to stderr as
// one line.
func run(args []string) int {
	root := newRoot()
	root.SetArgs(args)
	err := root.Execute()
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errDifferent) { // it has been told already
		return exitFailure
	}
	fmt.Fprintln(os.Stderr, "pillion: error:", err)
	switch {
	case errors.As(err, new(usageError)):
		return exitUsage
	case errors.As(err, new(validationError)):
		return exitValidation
	case errors.As(err, new(unknownError)):
		return exitUnknown
	}
	return exitFailure
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "pillion",
		Version:       version,
		Short:         "A sidecar that captures and carries a workload's network traffic",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(newInit(), newIstioIPTables(), newCleanup(), newRules(), newAgent(), newProxy(), newWait(),
		newStatus(), newTop(), newTap(), newRequest(), newBundle(), newVersion())
	return root
}
