// Package commandline is what the command lines of pillion and pillionctl share: errors about arguments and flags that name
// the nearest valid word, and the commands version and completion.
package commandline

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// ExitUsage is the exit status for an invalid command line.
const ExitUsage = 2

// UsageError is an error in the form of the command line: an unknown command or flag, or a wrong number of arguments.
type UsageError struct{ Err error }

func (e UsageError) Error() string { return e.Err.Error() }
func (e UsageError) Unwrap() error { return e.Err }

// Group makes a command that only has subcommands: alone it prints its help, and an unknown subcommand is a UsageError.
func Group(cmd *cobra.Command) *cobra.Command {
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		return unknownCommand(cmd, args[0])
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	return cmd
}

// unknownCommand is the error for a word that is not a subcommand of cmd.
func unknownCommand(cmd *cobra.Command, word string) error {
	var names []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	remedy := fmt.Sprintf("%q lists the commands", cmd.CommandPath()+" --help")
	if near := Nearest(word, names); near != "" {
		remedy = fmt.Sprintf("did you mean %q?", near)
	}
	return UsageError{fmt.Errorf("unknown command %s for %q: %s", capture.Quoted(word), cmd.CommandPath(), remedy)}
}

// NewHelp is the command help, for Command.SetHelpCommand. cobra's own prints the general help for an unknown command, and
// its exit status is 0.
func NewHelp() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "help [command]",
		Short: "Print the help of a command",
		RunE: func(cmd *cobra.Command, args []string) error {
			of := cmd.Root()
			for _, word := range args {
				if !of.HasSubCommands() {
					return UsageError{fmt.Errorf("unexpected argument %s: %q has no commands", capture.Quoted(word), of.CommandPath())}
				}
				subs := of.Commands()
				i := slices.IndexFunc(subs, func(sub *cobra.Command) bool { return sub.Name() == word })
				if i < 0 {
					return unknownCommand(of, word)
				}
				of = subs[i]
			}
			of.InitDefaultHelpFlag()
			of.InitDefaultVersionFlag()
			return of.Help()
		},
	}
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
		of, rest, err := cmd.Root().Find(args)
		if err != nil || len(rest) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		for _, sub := range of.Commands() {
			if sub.IsAvailableCommand() {
				names = append(names, sub.Name())
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
	return cmd
}

// NoArguments rejects arguments that do not belong to a flag.
func NoArguments(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return UsageError{fmt.Errorf("unexpected argument %s: values belong to flags", capture.Quoted(args[0]))}
	}
	return nil
}

// FlagError turns pflag's error about a flag that does not exist, or that lacks its value, into a UsageError. It returns
// nil for an error of another kind.
func FlagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		if errors.As(err, new(*pflag.InvalidValueError)) {
			return nil
		}
		return UsageError{err}
	}
	var names []string
	cmd.Flags().VisitAll(func(flag *pflag.Flag) {
		if !flag.Hidden {
			names = append(names, flag.Name)
		}
	})
	word := unknown.GetSpecifiedName()
	if len(word) > longestFlag {
		return UsageError{fmt.Errorf("unknown flag: --%s…", strings.ToValidUTF8(word[:longestFlag], ""))}
	}
	if letters := unknown.GetSpecifiedShortnames(); letters != "" { // -admin-port is read as -a, -d and so on
		if word, _, _ = strings.Cut(letters, "="); len(word) == 1 {
			return UsageError{err}
		}
	}
	if near := Nearest(word, names); near != "" {
		err = fmt.Errorf("%w: did you mean --%s?", err, near)
	}
	return UsageError{err}
}

// longestFlag is the length to which an error cuts the name of an unknown flag. All names are shorter.
const longestFlag = 64

// Nearest returns the word with the fewest changes from given, or "" if all differ too much: a change for every three
// letters is accepted, and an abbreviation.
func Nearest(given string, words []string) string {
	given = strings.ToLower(given)
	nearest, least := "", max(1, len(given)/3)+1
	abbreviated := ""
	for _, word := range words {
		if d := distance(given, strings.ToLower(word)); d < least {
			nearest, least = word, d
		}
		if abbreviated == "" && len(given) > 1 && strings.HasPrefix(word, given) {
			abbreviated = word
		}
	}
	if nearest == "" {
		return abbreviated
	}
	return nearest
}

// distance counts insertions, deletions, replacements and swaps of neighbours that turn a into b (optimal string
// alignment).
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			replaced := last[j]
			if a[i] != b[j] {
				replaced++
			}
			row[j+1] = min(last[j+1]+1, row[j]+1, replaced)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
