package commandline

import (
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// buildInfo has the fields of pilot-agent's version output.
type buildInfo struct {
	Version       string `json:"version"`
	GitRevision   string `json:"revision"`
	GolangVersion string `json:"golang_version"`
	BuildStatus   string `json:"status"`
	GitTag        string `json:"tag"`
}

// NewVersion is the command that prints the version, with the flags and output formats of pilot-agent and istioctl.
func NewVersion(version string) *cobra.Command {
	var short bool
	output := choice{value: "", choices: []string{"json", "yaml"}}
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print what this program was built from",
		Args:  NoArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			info := ownBuild(version)
			out := cmd.OutOrStdout()
			switch {
			case output.value == "json":
				text, err := json.MarshalIndent(map[string]buildInfo{"clientVersion": info}, "", "  ")
				if err != nil {
					return err
				}
				fmt.Fprintf(out, "%s\n", text)
			case output.value == "yaml":
				fmt.Fprintf(out, "clientVersion:\n  golang_version: %q\n  revision: %q\n  status: %q\n  tag: %q\n  version: %q\n",
					info.GolangVersion, info.GitRevision, info.BuildStatus, info.GitTag, info.Version)
			case short:
				fmt.Fprintln(out, info.Version)
			default:
				fmt.Fprintf(out, "version.BuildInfo{Version:%q, GitRevision:%q, GolangVersion:%q, BuildStatus:%q, GitTag:%q}\n",
					info.Version, info.GitRevision, info.GolangVersion, info.BuildStatus, info.GitTag)
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&short, "short", "s", false, "print the version only")
	cmd.Flags().VarP(&output, "output", "o", "output format")
	return cmd
}

// choice is the value of a flag that accepts one of some words.
type choice struct {
	value   string
	choices []string
}

func (c *choice) String() string { return c.value }

// Type lists the words, for help and for completion.
func (c *choice) Type() string { return strings.Join(c.choices, "|") }

func (c *choice) Set(text string) error {
	if !slices.Contains(c.choices, text) {
		return fmt.Errorf("unknown output format %q: use %s", text, strings.Join(c.choices, " or "))
	}
	c.value = text
	return nil
}

// ownBuild describes this build. Builds are stamped with a version only; the revision comes from the Go toolchain, if known.
func ownBuild(version string) buildInfo {
	info := buildInfo{Version: version, GitRevision: "unknown", GolangVersion: runtime.Version(), BuildStatus: "Clean", GitTag: version}
	if build, ok := debug.ReadBuildInfo(); ok {
		for _, setting := range build.Settings {
			switch {
			case setting.Key == "vcs.revision":
				info.GitRevision = setting.Value
			case setting.Key == "vcs.modified" && setting.Value == "true":
				info.BuildStatus = "Modified"
			}
		}
	}
	return info
}
