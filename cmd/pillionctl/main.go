// Command pillionctl is for those who put pillion into pods: it injects manifests, takes injections out again, and
// serves the admission webhook that injects pods as they are created.
//
// This package is the front door: it turns flags into what internal/inject is to do, and its errors into exit codes. It
// is a program of its own because what it needs has no business in a sidecar.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
)

// Exit codes, as those of pillion.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 255
)

// version is stamped by the build.
var version = "devel"

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// usageError is an error of the command line's form.
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
		Short:         "Put pillion into pods",
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
		return usageError{fmt.Errorf("%s takes no arguments, and %q is one", cmd.CommandPath(), args[0])}
	}
	return nil
}
