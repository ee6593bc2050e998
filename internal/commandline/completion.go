package commandline

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var shells = []string{"bash", "zsh", "fish"}

// NewCompletion is the command that prints a shell's completion script.
func NewCompletion(program string) *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print a completion script for a shell",
		Long: fmt.Sprintf(`Print a completion script for a shell. It completes commands, flags, and the values of flags that
accept one of some words.

    source <(%[1]s completion bash)                                    # this shell; needs the package bash-completion
    %[1]s completion bash > /etc/bash_completion.d/%[1]s               # every shell
    %[1]s completion zsh > "${fpath[1]}/_%[1]s"
    %[1]s completion fish > ~/.config/fish/completions/%[1]s.fish`, program),
		ValidArgs:             shells,
		DisableFlagsInUseLine: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || !slices.Contains(shells, args[0]) {
				return UsageError{fmt.Errorf("name one shell: %s", strings.Join(shells, ", "))}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			}
			return root.GenBashCompletionV2(out, true)
		},
	}
}

const choicesAnnotation = "pillion.dev/choices"

// SetChoices sets the values that CompleteValues completes for a flag whose type does not list them.
func SetChoices(flag *pflag.Flag, words ...string) {
	if flag.Annotations == nil {
		flag.Annotations = make(map[string][]string)
	}
	flag.Annotations[choicesAnnotation] = words
}

// CompleteValues makes the values of flags complete that have choices: by SetChoices or in their type, such as
// text|json. Only the hidden commands of completion need it, so it does nothing for other command lines.
func CompleteValues(root *cobra.Command, args []string) {
	if len(args) == 0 || args[0] != cobra.ShellCompRequestCmd && args[0] != cobra.ShellCompNoDescRequestCmd {
		return
	}
	for _, cmd := range all(root) {
		cmd.LocalFlags().VisitAll(func(flag *pflag.Flag) {
			choices := flag.Annotations[choicesAnnotation]
			if len(choices) == 0 {
				choices = strings.Split(flag.Value.Type(), "|")
			}
			if len(choices) < 2 {
				return
			}
			complete := cobra.FixedCompletions(choices, cobra.ShellCompDirectiveNoFileComp)
			if err := cmd.RegisterFlagCompletionFunc(flag.Name, complete); err != nil {
				panic(err) // the flag exists, and is registered once
			}
		})
	}
}

// all returns a command and the commands below it.
func all(cmd *cobra.Command) []*cobra.Command {
	list := []*cobra.Command{cmd}
	for _, sub := range cmd.Commands() {
		list = append(list, all(sub)...)
	}
	return list
}
