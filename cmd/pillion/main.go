// Command pillion is a sidecar that captures and forwards a workload's network traffic.
//
// This package translates flags and environment into the configuration of the packages behind it, and their errors into
// exit statuses, and prints what a running agent reports.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/commandline"
	"github.com/pillion-proxy/pillion/internal/sandbox"
)

// Exit statuses. As with diff(1), a command that compares ends with 1 for a difference, and with 2 if it could not compare.
const (
	exitOK         = 0
	exitFailure    = 1
	exitUsage      = commandline.ExitUsage // the command line or an environment variable is invalid
	exitUnknown    = 2                     // `rules check` could not compare
	exitValidation = 126                   // as istio-iptables
)

// exitUsageIstio is the exit status of istio-iptables for an invalid command line. It is kept by the command of that name.
const exitUsageIstio = 255

// version is stamped by the build.
var version = "devel"

func main() {
	if sandbox.IsHelper(os.Args) {
		os.Exit(sandbox.RunHelper(os.Args))
	}
	// These commands do one thing after another. Waking further threads takes a tenth of the CPU time of a native init.
	if len(os.Args) > 1 && slices.Contains([]string{"init", istioIPTables, "cleanup"}, os.Args[1]) {
		runtime.GOMAXPROCS(1)
	}
	os.Exit(run(os.Args[1:]))
}

// usageError is an error in the form of the command line, as opposed to an invalid value.
type usageError = commandline.UsageError

// valueError is a value that a setting does not accept, or values that contradict each other, on the command line or in the
// environment.
type valueError struct{ err error }

func (e valueError) Error() string { return e.err.Error() }
func (e valueError) Unwrap() error { return e.err }

// errFailed ends a command that has printed its findings.
var errFailed = errors.New("something was found")

// run executes the command line args (without the program's name) and returns the exit status. Errors go to stderr as
// one line.
func run(args []string) int {
	root := newRoot(args)
	root.SetArgs(args)
	commandline.CompleteValues(root, args)
	cmd, err := root.ExecuteC()
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errDifferent) || errors.Is(err, errFailed) { // the findings are printed already
		return exitFailure
	}
	var ended exitStatus
	if errors.As(err, &ended) && ended.err == nil {
		return ended.status
	}
	fmt.Fprintln(os.Stderr, "pillion: error:", err)
	if ended.err != nil {
		return ended.status
	}
	istio := cmd.Name() == istioIPTables
	switch {
	case errors.As(err, new(validationError)):
		return exitValidation
	case errors.As(err, new(unknownError)):
		return exitUnknown
	case errors.As(err, new(usageError)) && istio:
		return exitUsageIstio
	case errors.As(err, new(valueError)) && istio:
		return exitFailure
	case errors.As(err, new(usageError)), errors.As(err, new(valueError)):
		return exitUsage
	}
	return exitFailure
}

// commands are the commands in the order in which they were added, with their names.
var commands = []struct {
	name string
	make func() *cobra.Command
}{
	{"init", newInit}, {istioIPTables, newIstioIPTables}, {"cleanup", newCleanup}, {"rules", newRules}, {"agent", newAgent}, {"proxy", newProxy}, {"run", newRun}, {"gateway", newGateway},
	{"wait", newWait}, {"status", newStatus}, {"top", newTop}, {"tap", newTap}, {"config", newConfig}, {"explain", newExplain}, {"certs", newCerts}, {"request", newRequest}, {"bundle", newBundle}, {"check", newCheck},
	{"version", func() *cobra.Command { return commandline.NewVersion(version) }},
	{"completion", func() *cobra.Command { return commandline.NewCompletion("pillion") }},
}

// newRoot returns the command for the command line args. If these begin with the name of a command, the others are left
// out, because building all of them takes as long as half of init's work.
func newRoot(args []string) *cobra.Command {
	root := commandline.Group(&cobra.Command{
		Use:           "pillion",
		Version:       version,
		Short:         "A sidecar that captures and forwards a workload's network traffic",
		SilenceUsage:  true,
		SilenceErrors: true,
	})
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(commandline.NewHelp())
	root.SetFlagErrorFunc(flagError)
	for _, c := range commands {
		if len(args) > 0 && args[0] == c.name {
			root.AddCommand(c.make())
			return root
		}
	}
	for _, c := range commands {
		root.AddCommand(c.make())
	}
	return root
}
