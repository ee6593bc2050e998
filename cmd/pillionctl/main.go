// Command pillionctl adds pillion to manifests, removes it again, and serves the admission webhook that injects pods as
// they are created.
//
// This package translates flags into calls of internal/inject, and errors into exit codes. It is a separate program to
// keep its dependencies out of the sidecar.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
)

// Exit codes, the same as pillion's.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 255
)

// version is set by the build.
var version = "devel"

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// usageError is an error in the form of the command line.
type usageError struct{ error }

// run executes the command line args (without the program's name) and returns the exit code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(stderr, "pillionctl: error:", err)
	if errors.As(err, new(usageError)) {
		return exitUsage
	}
	return exitFailure
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "pillionctl",
		Version:       version,
		Short:         "Add pillion to pods",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(newInject(), newUninject(), newWebhook())
	return root
}

func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unexpected argument %q for %s", args[0], cmd.CommandPath())}
	}
	return nil
}
