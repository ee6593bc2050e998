package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/commandline"
	"github.com/pillion-proxy/pillion/internal/inject"
)

// bindOptions adds the flags that inject and webhook share.
func bindOptions(flags *pflag.FlagSet, o *inject.Options) {
	flags.StringVar(&o.Image, "image", defaultImage, "image of both containers, unless a pod's annotation names another")
	flags.StringVar(&o.PullPolicy, "image-pull-policy", "", "Always, IfNotPresent or Never; empty: Kubernetes' default")
	commandline.SetChoices(flags.Lookup("image-pull-policy"), "Always", "IfNotPresent", "Never")
	flags.StringVar(&o.SidecarName, "sidecar-name", inject.SidecarName, "name of the agent's container; tools expect the default")
	flags.BoolVar(&o.Classic, "classic", false, "make the agent an ordinary container, for Kubernetes before 1.29")
	o.Defaults = make(map[string]string)
	for _, a := range inject.Annotations {
		if a.Option != "" {
			flags.Var(defaultOf{o.Defaults, a.Name}, sidecarFlag(a.Option), "default of the annotation "+a.Name)
			if words := choices(a.Value); len(words) > 1 {
				commandline.SetChoices(flags.Lookup(sidecarFlag(a.Option)), words...)
			}
		}
	}
}

// choices returns the words of an annotation's value if it is one of some words, as "`text`, `json`".
func choices(value string) (words []string) {
	for item := range strings.SplitSeq(value, ", ") {
		word := strings.Trim(item, "`")
		if word == item {
			return nil
		}
		words = append(words, word)
	}
	return words
}

func sidecarFlag(option string) string { return "sidecar-" + option }

// defaultOf is the flag that sets the default of an annotation.
type defaultOf struct {
	of   map[string]string
	name string
}

func (d defaultOf) String() string         { return d.of[d.name] }
func (d defaultOf) Set(value string) error { d.of[d.name] = value; return nil }
func (d defaultOf) Type() string           { return "value" }

// flagNames are the flags that set the fields of inject.Options.
var flagNames = map[string]string{
	"Image": "--image", "PullPolicy": "--image-pull-policy", "SidecarName": "--sidecar-name", "Namespace": "--namespace",
}

// flagNamed turns an error about a field of inject.Options into a usageError that names the field's flag.
func flagNamed(err error) error {
	var field *inject.FieldError
	if !errors.As(err, &field) {
		return err
	}
	name := flagNames[field.Field]
	for _, a := range inject.Annotations {
		if a.Name == field.Field {
			name = "--" + sidecarFlag(a.Option)
		}
	}
	return usageError{Err: fmt.Errorf("%s%w", name, field.Err)}
}

// newInject is `pillionctl inject`.
func newInject() *cobra.Command {
	var options inject.Options
	var files files
	cmd := &cobra.Command{
		Use:   "inject -f FILE",
		Short: "Add the sidecar to the pods of manifests",
		Long: `Add the sidecar to the pods of manifests: Pod, Deployment, StatefulSet, DaemonSet, ReplicaSet, ReplicationController,
Job, CronJob, OpenShift's DeploymentConfig, Argo's Rollout, and lists of them. Other objects pass unchanged, and so does
every byte that need not change. A second injection changes nothing.

Standard error has a line for each object with a pod: injected, or left alone with the reason. If an object cannot be
injected, nothing is written and the exit status is 1.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := options.Validate(); err != nil {
				return flagNamed(err)
			}
			outcomes, err := files.rewrite(cmd, func(text, name string, report func(inject.Outcome), out inject.Output) error {
				return inject.Inject(text, name, options, report, out)
			})
			warnOfImage(cmd, options, outcomes)
			return err
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	files.bind(flags)
	bindOptions(flags, &options)
	flags.StringVarP(&options.Namespace, "namespace", "n", "", "namespace of objects without one (default \"default\")")
	return cmd
}

// newUninject is `pillionctl uninject`.
func newUninject() *cobra.Command {
	var files files
	cmd := &cobra.Command{
		Use:   "uninject -f FILE",
		Short: "Remove the sidecar",
		Long:  `Remove the sidecar. The output of "pillionctl inject" is restored byte for byte.`,
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := files.rewrite(cmd, inject.Uninject)
			return err
		},
	}
	cmd.Flags().SortFlags = false
	files.bind(cmd.Flags())
	return cmd
}

// files names the input and the output.
type files struct {
	from []string
	to   string
}

// toJSON is the output that is a report in place of the manifests.
const toJSON = "json"

func (f *files) bind(flags *pflag.FlagSet) {
	flags.StringArrayVarP(&f.from, "filename", "f", nil, "YAML or JSON file, - for standard input; repeatable")
	flags.StringVarP(&f.to, "output", "o", "-", "output file, - for standard output; json: print a report as JSON and write no manifests")
}

// rewrite changes all files and then writes them as one stream.
func (f *files) rewrite(cmd *cobra.Command, change func(text, name string, report func(inject.Outcome), out inject.Output) error) ([]inject.Outcome, error) {
	if len(f.from) == 0 {
		return nil, usageError{Err: errors.New("no input: name a file with -f; - is standard input")}
	}
	// Manifests of a whole cluster are large. Collecting more often costs little time and saves a third of the memory.
	defer debug.SetGCPercent(debug.SetGCPercent(50))
	outcomes := []inject.Outcome{}
	out := &spool{}
	defer out.close()
	var failed []error
	for _, name := range f.from {
		if name == "-" {
			name = "standard input"
		}
		text, err := f.read(cmd.InOrStdin(), name)
		if err == nil {
			out.begin()
			err = change(text, name, func(o inject.Outcome) { outcomes = append(outcomes, o) }, out)
		}
		if err != nil {
			failed = append(failed, err)
		}
	}
	err := errors.Join(failed...)
	if f.to == toJSON {
		return outcomes, errors.Join(writeReport(cmd.OutOrStdout(), outcomes), err)
	}
	printOutcomes(cmd.ErrOrStderr(), outcomes, err == nil)
	if err != nil {
		return outcomes, err
	}
	if f.to == "-" {
		return outcomes, out.writeTo(cmd.OutOrStdout())
	}
	return outcomes, writeFile(f.to, out)
}

// writeReport prints the outcomes as JSON.
func writeReport(to io.Writer, outcomes []inject.Outcome) error {
	encoder := json.NewEncoder(to)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	return encoder.Encode(struct {
		Objects []inject.Outcome `json:"objects"`
	}{outcomes})
}

// printOutcomes prints a line for each object and each warning. Without written
// manifests, only the warnings hold.
func printOutcomes(to io.Writer, outcomes []inject.Outcome, written bool) {
	for _, o := range outcomes {
		switch {
		case !written:
		case o.Reason != "":
			fmt.Fprintf(to, "%s: %s: %s\n", o.Object(), o.Action, o.Reason)
		default:
			fmt.Fprintf(to, "%s: %s\n", o.Object(), o.Action)
		}
		for _, warning := range o.Warnings {
			fmt.Fprintf(to, "%s: warning: %s\n", o.Object(), warning)
		}
	}
	if written && len(outcomes) == 0 {
		fmt.Fprintln(to, "pillionctl: warning: no object has a pod")
	}
}

// defaultImage is the name that `make image` gives the image, without a registry.
const defaultImage = "pillion"

// warnOfImage warns if injected pods have the default image.
func warnOfImage(cmd *cobra.Command, options inject.Options, outcomes []inject.Outcome) {
	used := slices.ContainsFunc(outcomes, func(o inject.Outcome) bool { return o.Image == options.Image })
	if used && !cmd.Flags().Changed("image") {
		fmt.Fprintf(cmd.ErrOrStderr(), "pillionctl: warning: the image %q names no registry: set --image, unless the nodes have it\n", options.Image)
	}
}

func writeFile(name string, text *spool) error {
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(text.writeTo(file), file.Close())
}

func (f *files) read(stdin io.Reader, name string) (string, error) {
	if name == "standard input" {
		return inject.Read(stdin, name, 0)
	}
	file, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("-f %s: %w", name, err)
	}
	defer file.Close()
	size := int64(0)
	if info, err := file.Stat(); err == nil {
		size = info.Size()
	}
	return inject.Read(file, name, size)
}
