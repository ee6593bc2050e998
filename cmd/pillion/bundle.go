package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/report"
)

// newBundle is `pillion bundle`.
func newBundle() *cobra.Command {
	var admin adminOptions
	file := ""
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Write everything that a support case needs into one file",
		Long: `Write everything that a support case needs into one .tar.gz: the rules, the agent's configuration and gates, the last 1,000
lines of its log, its metrics, its open connections and the last hundred records, its goroutines, and versions.

It contains no secrets: paths have no queries, no header values are included except the host, and environment variables
have values only if they are the agent's own or known to be harmless. It does contain hosts, paths and addresses. Check it
before you share it.

A part that cannot be read becomes NAME.error with the reason, and the exit status is 1. Reading the rules requires the
capabilities of "pillion init", which the agent's container lacks; there, rules.txt.note describes how to get them.

From a pod: kubectl exec POD -c istio-proxy -- pilot-agent bundle -f - > bundle.tar.gz`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			ctx, cancel := context.WithTimeout(ctx, bundleTimeout)
			defer cancel()
			if file == "-" {
				return writeBundle(ctx, &admin, cmd.OutOrStdout())
			}
			if file == "" {
				file = "pillion-bundle-" + time.Now().UTC().Format("20060102T150405Z") + ".tar.gz"
			}
			// The file is private, and never replaces another.
			out, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return fmt.Errorf("creating the bundle: %w: name another file with --file, or - for standard output", err)
			}
			err = writeBundle(ctx, &admin, out)
			if closed := out.Close(); err == nil {
				err = closed
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "wrote", file)
			return err
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVarP(&file, "file", "f", "", "file to write, - for standard output (default pillion-bundle-TIME.tar.gz)")
	admin.bind(flags)
	return cmd
}

const (
	bundleTimeout = time.Minute      // for all parts together
	partTimeout   = 30 * time.Second // for each
)

// part is one file of a bundle.
type part struct {
	name string
	get  func(context.Context, *adminOptions) ([]byte, error)
}

// bundleParts are in the order in which they are most often read.
var bundleParts = []part{
	{"version.txt", versions},
	{"live.json", fromAdmin("/live")},
	{"records.json", recordsWithoutSecrets},
	{"gates.txt", gates},
	{"log.txt", fromAdmin("/log")},
	{"rules.txt", installedRules},
	{"environment.txt", environmentNames},
	{"server_info.json", fromAdmin("/server_info")},
	{"config_dump.json.gz", packedDump},
	{"findings.json", findings},
	{"metrics.txt", fromAdmin("/stats/prometheus")},
	{"goroutines.txt", fromAdmin("/debug/pprof/goroutine?debug=2")},
}

// errNote marks an omitted part that is not an error.
type errNote struct{ error }

// writeBundle writes all parts that can be read. The error names the others.
func writeBundle(ctx context.Context, admin *adminOptions, to io.Writer) error {
	zipped := gzip.NewWriter(to)
	archive := tar.NewWriter(zipped)
	now := time.Now()
	add := func(name string, content []byte) error {
		header := &tar.Header{Name: "pillion-bundle/" + name, Mode: 0o600, Size: int64(len(content)), ModTime: now, Typeflag: tar.TypeReg}
		if err := archive.WriteHeader(header); err != nil {
			return err
		}
		_, err := archive.Write(content)
		return err
	}
	var failed []string
	for _, part := range bundleParts {
		partly, cancel := context.WithTimeout(ctx, partTimeout)
		content, err := part.get(partly, admin)
		cancel()
		name := part.name
		switch {
		case errors.As(err, new(errNote)):
			name, content = part.name+".note", []byte(err.Error()+"\n")
		case err != nil:
			failed = append(failed, part.name)
			name, content = part.name+".error", []byte(err.Error()+"\n")
		}
		if err := add(name, content); err != nil {
			return fmt.Errorf("writing the bundle: %w", err)
		}
	}
	if err := errors.Join(archive.Close(), zipped.Close()); err != nil {
		return fmt.Errorf("writing the bundle: %w", err)
	}
	if len(failed) > 0 {
		return fmt.Errorf("the bundle lacks %s; its .error files have the reasons", strings.Join(failed, ", "))
	}
	return nil
}

func fromAdmin(path string) func(context.Context, *adminOptions) ([]byte, error) {
	path, query, _ := strings.Cut(path, "?")
	return func(ctx context.Context, admin *adminOptions) ([]byte, error) {
		return admin.read(ctx, path, query)
	}
}

// packedDump is the configuration. That of 1,000 services has 14 MB and is not held: the command may run in the agent's
// container and have its memory limit.
func packedDump(ctx context.Context, admin *adminOptions) ([]byte, error) {
	var packed bytes.Buffer
	packer := gzip.NewWriter(&packed)
	err := admin.copy(ctx, packer, "/config_dump", "redact=headers", maxAnswer)
	if err := errors.Join(err, packer.Close()); err != nil {
		return nil, err
	}
	return packed.Bytes(), nil
}

// findings has what of the control plane's configuration is not honoured.
func findings(ctx context.Context, admin *adminOptions) ([]byte, error) {
	content, err := admin.read(ctx, "/config/findings", "")
	if code := new(statusError); errors.As(err, code) && *code == http.StatusNotFound {
		return nil, errNote{err} // without a control plane
	}
	return content, err
}

func versions(context.Context, *adminOptions) ([]byte, error) {
	kernel, err := os.ReadFile("/proc/version")
	return fmt.Appendf(nil, "pillion %s\n%s %s/%s\n%s", version, runtime.Version(), runtime.GOOS, runtime.GOARCH, kernel), err
}

// gates lists the gates of readiness, and why those are closed that are.
func gates(ctx context.Context, admin *adminOptions) ([]byte, error) {
	var s live.Snapshot
	if err := admin.readJSON(ctx, "/live", "", &s); err != nil {
		return nil, err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "ready: %v\n", s.Ready)
	for _, gate := range s.Gates {
		state := "open"
		if !gate.Open {
			state = "closed: " + gate.Why
		}
		fmt.Fprintf(&text, "%s: %s\n", gate.Name, state)
	}
	return []byte(text.String()), nil
}

// recordsWithoutSecrets returns the last records without the parts of requests that may be confidential.
func recordsWithoutSecrets(ctx context.Context, admin *adminOptions) ([]byte, error) {
	var answer live.Records
	if err := admin.readJSON(ctx, "/live/records", "", &answer); err != nil {
		return nil, err
	}
	for i := range answer.Records {
		r := &answer.Records[i]
		r.Path, _, _ = strings.Cut(r.Path, "?")
		r.UserAgent, r.RequestID = "", ""
	}
	return json.MarshalIndent(answer, "", "  ")
}

// installedRules is the output of `pillion rules show` in this network namespace.
func installedRules(ctx context.Context, _ *adminOptions) ([]byte, error) {
	found, err := iptables.Look(ctx)
	if kernel.IsRefused(err) {
		return nil, errNote{howToLook(err)}
	}
	if err != nil {
		return nil, err
	}
	text := report.ShowText(found.Held)
	if text == "" {
		text = noRules
	}
	for _, warning := range found.Warnings {
		text += "# " + warning + "\n"
	}
	return []byte(text), nil
}

// shownVariables have values that are never secret, in addition to those of the agent's flags.
var shownVariables = []string{
	"GODEBUG", "GOGC", "GOMAXPROCS", "GOMEMLIMIT", "HOST_IP", "INSTANCE_IP", "NODE_NAME", "POD_NAME", "POD_NAMESPACE",
	"SERVICE_ACCOUNT", "TRUST_DOMAIN",
}

// environmentNames lists the environment. A value may be a password, so only known ones are shown.
func environmentNames(context.Context, *adminOptions) ([]byte, error) {
	shown := slices.Clone(shownVariables)
	newAgent().Flags().VisitAll(func(flag *pflag.Flag) { shown = append(shown, flag.Annotations[environmentAnnotation]...) })
	var lines []string
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		if slices.Contains(shown, name) {
			name += "=" + value
		}
		lines = append(lines, name+"\n")
	}
	slices.Sort(lines)
	return []byte(strings.Join(lines, "")), nil
}
