package main

import (
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

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

// newVersion is `pillion version`, with the flags and output formats of pilot-agent.
func newVersion() *cobra.Command {
	var short bool
	output := ""
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print what this program was built from",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			info := ownBuild()
			out := cmd.OutOrStdout()
			switch {
			case output == "json":
				text, err := json.MarshalIndent(map[string]buildInfo{"clientVersion": info}, "", "  ")
				if err != nil {
					return err
				}
				fmt.Fprintf(out, "%s\n", text)
			case output == "yaml":
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
	flags := cmd.Flags()
	parsedSwitch(flags, &short, "short", "s", "print the version only")
	parse := func(text string) (string, error) {
		if text != "json" && text != "yaml" {
			return "", fmt.Errorf("unknown output format %q: use json or yaml", text)
		}
		return text, nil
	}
	parsed(flags, &output, parse, "output", "o", "", "json|yaml", "output format")
	return cmd
}

// ownBuild describes this build. Builds are stamped with a version only; the revision comes from the Go toolchain, if known.
func ownBuild() buildInfo {
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
