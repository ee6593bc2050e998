package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/iptables"
)

// changeOptions are what init and cleanup have in common: how to treat a plan.
type changeOptions struct {
	dryRun bool
	output output
	log    logOptions
}

func (o *changeOptions) bind(flags *pflag.FlagSet, dryRun string) {
	parsedSwitch(flags, &o.dryRun, "dry-run", "n", dryRun)
	o.output = outputText
	parsed(flags, &o.output, parseOutput, "output", "", string(outputText), "form", "form of the result: text or json")
	o.log.bind(flags)
}

// carryOut makes a plan and commits it, or only shows it, and reports what happened.
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
	text := plan.String()
	if !o.dryRun {
		if err := plan.Commit(ctx); err != nil {
			return err
		}
		text = ""
		if summary := plan.Summary(); summary != "" {
			text = summary + "\n"
		}
	}
	for _, warning := range plan.Warnings {
		log.Warn(warning)
	}
	if o.output == outputJSON {
		encoder := json.NewEncoder(stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(struct {
			DryRun bool           `json:"dryRun"`
			Plan   *iptables.Plan `json:"plan"`
		}{o.dryRun, plan})
	}
	_, err = io.WriteString(stdout, text)
	return err
}

// output is the form of what a command prints.
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
	return "", fmt.Errorf("%q is not a form: use text or json", text)
}

// logOptions are the flags by which injectors set the log.
type logOptions struct {
	level slog.Level
	json  bool
}

func (o *logOptions) bind(flags *pflag.FlagSet) {
	parsed(flags, &o.level, parseLogLevel, "log_output_level", "", "default:info", "level",
		"least level that is logged: debug, info, warn, error or none, with \"default:\" in front if you like")
	parsedSwitch(flags, &o.json, "log_as_json", "", "log JSON instead of text")
}

func (o *logOptions) logger(to io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: o.level}
	if o.json {
		return slog.New(slog.NewJSONHandler(to, options))
	}
	return slog.New(slog.NewTextHandler(to, options))
}

// parseLogLevel reads a list of scope:level. Here is one scope, default, whose name may be left out; the levels of
// others must exist but have no effect.
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
			return 0, fmt.Errorf("%q is not a log level: use debug, info, warn, error, fatal or none", item)
		}
		if scope == "default" || scope == "all" {
			result = level
		}
	}
	return result, nil
}
