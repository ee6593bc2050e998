// Command pillionctl adds pillion to manifests, removes it again, serves the admission webhook that injects pods as they are
// created, and checks a cluster.
//
// This package translates flags into calls of other packages, and errors into exit statuses. It is a separate program to
// keep its dependencies out of the sidecar.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/commandline"
)

// Exit statuses, the same as pillion's.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = commandline.ExitUsage
)

// version is set by the build.
var version = "devel"

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// usageError is an error in the form of the command line.
type usageError = commandline.UsageError

// run executes the command line args (without the program's name) and returns the exit status.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	commandline.CompleteValues(root, args)
	err := root.Execute()
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errFailed) { // the findings are printed already
		return exitFailure
	}
	fmt.Fprintln(stderr, "pillionctl: error:", err)
	if errors.As(err, new(usageError)) {
		return exitUsage
	}
	return exitFailure
}

func newRoot() *cobra.Command {
	root := commandline.Group(&cobra.Command{
		Use:           "pillionctl",
		Version:       version,
		Short:         "Add pillion to pods",
		SilenceUsage:  true,
		SilenceErrors: true,
	})
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(commandline.NewHelp())
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(newInject(), newUninject(), newWebhook(), newCheck(),
		commandline.NewVersion(version), commandline.NewCompletion("pillionctl"))
	return root
}

// flagError makes every error about a flag a usageError, also an invalid value.
func flagError(cmd *cobra.Command, err error) error {
	if usage := commandline.FlagError(cmd, err); usage != nil {
		return usage
	}
	return usageError{Err: err}
}

var noArguments = commandline.NoArguments
