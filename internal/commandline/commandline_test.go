package commandline

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// program is a command line with a group, flags and the shared commands.
func program() *cobra.Command {
	root := Group(&cobra.Command{Use: "tool", SilenceErrors: true, SilenceUsage: true})
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(NewHelp())
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if usage := FlagError(cmd, err); usage != nil {
			return usage
		}
		return err
	})
	status := &cobra.Command{Use: "status", Args: NoArguments, RunE: func(*cobra.Command, []string) error { return nil }}
	status.Flags().Duration("connect-timeout", 0, "")
	status.Flags().StringP("admin-port", "p", "", "")
	status.Flags().VarP(&choice{choices: []string{"text", "json"}}, "output", "o", "")
	status.Flags().String("mode", "", "")
	SetChoices(status.Flags().Lookup("mode"), "REDIRECT", "TPROXY")
	rules := Group(&cobra.Command{Use: "rules"})
	rules.AddCommand(&cobra.Command{Use: "show", RunE: func(*cobra.Command, []string) error { return nil }})
	root.AddCommand(status, rules, NewVersion("v1.2.3"), NewCompletion("tool"))
	return root
}

func run(args ...string) (string, error) {
	var out bytes.Buffer
	root := program()
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	CompleteValues(root, args)
	err := root.Execute()
	return out.String(), err
}

func TestErrorsNameTheNearestWord(t *testing.T) {
	long := strings.Repeat("nonsense", 128)
	for args, want := range map[string]string{
		"stauts":                      `unknown command "stauts" for "tool": did you mean "status"?`,
		"sta":                         `unknown command "sta" for "tool": did you mean "status"?`,
		"inject":                      `unknown command "inject" for "tool": "tool --help" lists the commands`,
		"help stauts":                 `unknown command "stauts" for "tool": did you mean "status"?`,
		"help rules shwo":             `unknown command "shwo" for "tool rules": did you mean "show"?`,
		"help rules show now":         `unexpected argument "now": "tool rules show" has no commands`,
		"help inject":                 `unknown command "inject" for "tool": "tool --help" lists the commands`,
		"rules shwo":                  `unknown command "shwo" for "tool rules": did you mean "show"?`,
		"status --conect-timeout 5s":  `unknown flag: --conect-timeout: did you mean --connect-timeout?`,
		"status --admin=1":            `unknown flag: --admin: did you mean --admin-port?`,
		"status -admin-port 1":        `unknown shorthand flag: 'a' in -admin-port: did you mean --admin-port?`,
		"status -x":                   `unknown shorthand flag: 'x' in -x`,
		"status --something-else":     `unknown flag: --something-else`,
		"status --output":             `flag needs an argument: --output`,
		"status now":                  `unexpected argument "now": values belong to flags`,
		"completion":                  `name one shell: bash, zsh, fish`,
		"completion powershell":       `name one shell: bash, zsh, fish`,
		"completion bash zsh":         `name one shell: bash, zsh, fish`,
		"version please --short=true": `unexpected argument "please": values belong to flags`,
		"status --" + long:            `unknown flag: --` + long[:64] + `…`,
		long:                          `unknown command "` + long[:64] + `"… for "tool": "tool --help" lists the commands`,
		"status " + long:              `unexpected argument "` + long[:64] + `"…: values belong to flags`,
	} {
		out, err := run(strings.Fields(args)...)
		if err == nil || err.Error() != want || !errors.As(err, new(UsageError)) || out != "" {
			t.Errorf("%s: %v %q\nwant %s", args, err, out, want)
		}
	}
	if _, err := run("status", "--connect-timeout", "soon"); err == nil || errors.As(err, new(UsageError)) || !errors.As(err, new(*pflag.InvalidValueError)) {
		t.Errorf("an invalid value: %v", err)
	}
	for args, want := range map[string]string{"help": "Available Commands:", "help rules": "tool rules [command]", "help rules show": "tool rules show", "help help": "help of a command"} {
		if out, err := run(strings.Fields(args)...); err != nil || !strings.Contains(out, want) {
			t.Errorf("%q: %v %q, want %q", args, err, out, want)
		}
	}
	for _, args := range []string{"", "rules"} {
		if out, err := run(strings.Fields(args)...); err != nil || !strings.Contains(out, "Available Commands:") {
			t.Errorf("%q alone: %v %q", args, err, out)
		}
	}
}

func TestNearestAcceptsAChangeForEveryThreeLetters(t *testing.T) {
	words := []string{"status", "top", "tap", "inbound-port", "outbound-port"}
	for given, want := range map[string]string{
		"status": "status", "Status": "status", "tatus": "status", "sttaus": "status", "statuss": "status", "stt": "", "tpo": "top",
		"inbuond-prot": "inbound-port", "outboundport": "outbound-port", "in": "inbound-port", "i": "", "": "",
	} {
		if got := Nearest(given, words); got != want {
			t.Errorf("%q: %q, want %q", given, got, want)
		}
	}
}

func TestCompletionCompletesCommandsFlagsAndValues(t *testing.T) {
	for args, want := range map[string]string{
		"__complete st":               "status\n:4\n",
		"__complete rules ":           "show\n:4\n",
		"__complete status --adm":     "--admin-port\n:4\n",
		"__complete status --output ": "text\njson\n:4\n",
		"__complete status --mode ":   "REDIRECT\nTPROXY\n:4\n",
		"__complete help rules ":      "show\n:4\n",
		"__complete completion ":      "bash\nzsh\nfish\n:4\n",
	} {
		out, err := run(strings.Split(args, " ")...)
		if err != nil || !strings.HasPrefix(out, want) {
			t.Errorf("%s: %v %q, want %q", args, err, out, want)
		}
	}
}

func TestEachShellGetsItsScript(t *testing.T) {
	for shell, want := range map[string]string{"bash": "__start_tool", "zsh": "#compdef tool", "fish": "complete -c tool"} {
		script, err := run("completion", shell)
		if err != nil || !strings.Contains(script, want) {
			t.Errorf("%s: %v %.100q", shell, err, script)
		}
		if shell != "bash" {
			continue
		}
		check := exec.Command("bash", "-n")
		check.Stdin = strings.NewReader(script)
		if out, err := check.CombinedOutput(); err != nil {
			t.Errorf("bash: %v: %s", err, out)
		}
	}
}

func TestTheVersionHasPilotAgentsForms(t *testing.T) {
	for args, want := range map[string]string{
		"version --short":   "v1.2.3\n",
		"version":           `version.BuildInfo{Version:"v1.2.3", GitRevision:`,
		"version -o json":   "{\n  \"clientVersion\": {\n    \"version\": \"v1.2.3\",\n",
		"version -o yaml":   "clientVersion:\n  golang_version: \"go",
		"version -s=false ": "version.BuildInfo{",
	} {
		if out, err := run(strings.Fields(args)...); err != nil || !strings.HasPrefix(out, want) {
			t.Errorf("%s: %v %q", args, err, out)
		}
	}
	if _, err := run("version", "-o", "xml"); err == nil || !strings.Contains(err.Error(), `unknown output format "xml": use json or yaml`) {
		t.Errorf("%v", err)
	}
}
