package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/commandline"
	"github.com/pillion-proxy/pillion/internal/netns"
	"github.com/pillion-proxy/pillion/iptables"
)

// changeOptions are common to init and cleanup: how to treat a plan.
type changeOptions struct {
	dryRun    bool
	output    output
	log       logOptions
	namespace string
	cniMode   bool
	// namespaceFlag names the setting of namespace in errors.
	namespaceFlag *pflag.Flag
}

func (o *changeOptions) bind(flags *pflag.FlagSet, dryRun string) {
	parsedSwitch(flags, &o.dryRun, "dry-run", "n", dryRun)
	twin(flags, "dry-run", "DRY_RUN")
	o.bindView(flags)
}

// bindView adds flags for the namespace, the output and the log.
func (o *changeOptions) bindView(flags *pflag.FlagSet) {
	o.output = outputText
	parsed(flags, &o.output, parseOutput, "output", "", string(outputText), "text|json", "output format")
	o.log.bind(flags)
	o.namespaceFlag = parsed(flags, &o.namespace, asItIs, "network-namespace", "", "", "path", "work in this network namespace, such as /proc/4711/ns/net")
	twin(flags, "network-namespace", "NETWORK_NAMESPACE")
	parsedSwitch(flags, &o.cniMode, "cni-mode", "", "with --network-namespace: the legacy programs lock the pod instead of the machine")
	twin(flags, "cni-mode", "CNI_MODE")
}

// inNamespace runs fn in the selected network namespace.
func (o *changeOptions) inNamespace(fn func() error) error {
	if o.namespace == "" {
		return fn()
	}
	namespace, err := netns.Open(o.namespace)
	if err != nil {
		return o.namespaceError(err)
	}
	defer namespace.Close()
	if o.cniMode {
		// By default the legacy programs lock the whole machine.
		if err := os.Setenv("XTABLES_LOCKFILE", o.namespace); err != nil {
			return fmt.Errorf("--cni-mode: %w", err)
		}
	}
	entered := false
	err = namespace.Do(func() error {
		entered = true
		return fn()
	})
	if err != nil && !entered {
		return o.namespaceError(err)
	}
	return err
}

// namespaceError is an error about the selected network namespace.
func (o *changeOptions) namespaceError(err error) error {
	cause := cmp.Or(errors.Unwrap(err), err)
	remedy := "use the path of a network namespace, such as /proc/4711/ns/net or /run/netns/pod"
	if errors.Is(err, os.ErrPermission) {
		remedy = "CAP_SYS_ADMIN is needed in the user namespaces of this process and of that namespace"
	}
	return fmt.Errorf("%s %s: %w: %s", settingName(o.namespaceFlag), capture.Quoted(o.namespace), cause, remedy)
}

// carryOut makes a plan, commits or only prints it, and reports the result.
func (o *changeOptions) carryOut(ctx context.Context, stdout io.Writer, log *slog.Logger, makePlan func(context.Context) (*iptables.Plan, error)) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if !o.dryRun {
		release, err := iptables.Lock(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	plan, err := makePlan(ctx)
	if err != nil {
		return err
	}
	var text string
	if o.dryRun {
		text = plan.String()
	}
	if path := os.Getenv("DRY_RUN_FILE_PATH"); o.dryRun && path != "" {
		if err := os.WriteFile(path, []byte(plan.Script()), 0o644); err != nil {
			return fmt.Errorf("environment variable DRY_RUN_FILE_PATH: %w", err)
		}
	}
	if !o.dryRun {
		if err := plan.Commit(ctx); err != nil {
			return err
		}
		if summary := plan.Summary(); summary != "" {
			text = summary + "\n"
		}
	}
	for _, warning := range plan.Warnings {
		log.Warn(warning)
	}
	if o.output == outputJSON {
		return writeJSON(stdout, struct {
			DryRun bool           `json:"dryRun"`
			Plan   *iptables.Plan `json:"plan"`
		}{o.dryRun, plan})
	}
	_, err = io.WriteString(stdout, text)
	return err
}

func writeJSON(to io.Writer, value any) error {
	encoder := json.NewEncoder(to)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

// output is the format of a command's output.
type output string

const (
	outputText output = "text"
	outputJSON output = "json"
)

func parseOutput(text string) (output, error) {
	switch o := output(text); o {
	case outputText, outputJSON:
		return o, nil
	}
	return "", fmt.Errorf("unknown output format %s: use text or json", capture.Quoted(text))
}

// logOptions are the log flags that injectors set.
type logOptions struct {
	level slog.Level
	json  bool
}

func (o *logOptions) bind(flags *pflag.FlagSet) {
	level := parsed(flags, &o.level, parseLogLevel, "log_output_level", "", "default:info", "level",
		"minimum log level: debug, info, warn, error or none, optionally with the prefix \"default:\"")
	commandline.SetChoices(level, "debug", "info", "warn", "error", "none")
	parsedSwitch(flags, &o.json, "log_as_json", "", "log JSON instead of text")
}

func (o *logOptions) logger(to io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: o.level}
	if o.json {
		return slog.New(slog.NewJSONHandler(to, options))
	}
	return slog.New(slog.NewTextHandler(to, options))
}

// parseLogLevel reads a list of scope:level. The only scope is default, and its name is optional. Levels of other scopes
// must be valid and have no effect.
func parseLogLevel(text string) (slog.Level, error) {
	levels := map[string]slog.Level{
		"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
		"fatal": slog.LevelError + 4, "none": slog.LevelError + 8,
	}
	result := slog.LevelInfo
	for item := range strings.SplitSeq(text, ",") {
		scope, name, scoped := strings.Cut(item, ":")
		if !scoped {
			scope, name = "default", item
		}
		level, ok := levels[name]
		if !ok {
			return 0, fmt.Errorf("%s is not a log level: use debug, info, warn, error, fatal or none", capture.Quoted(item))
		}
		if scope == "default" || scope == "all" {
			result = level
		}
	}
	return result, nil
}
