package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/inject"
)

// bindOptions adds the flags of what inject and webhook make.
func bindOptions(flags *pflag.FlagSet, o *inject.Options) {
	flags.StringVar(&o.Image, "image", "pillion", "image of both containers, when a pod's annotations name no other")
	flags.StringVar(&o.PullPolicy, "image-pull-policy", "", "Always, IfNotPresent or Never; empty leaves it to Kubernetes")
	flags.StringVar(&o.SidecarName, "sidecar-name", inject.SidecarName, "name of the agent's container; tools look for the default")
	flags.BoolVar(&o.Classic, "classic", false, "put the agent among the containers, for Kubernetes before 1.29")
}

// newInject is `pillionctl inject`.
func newInject() *cobra.Command {
	var options inject.Options
	var files files
	cmd := &cobra.Command{
		Use:   "inject -f FILE",
		Short: "Add the sidecar to the pods of manifests",
		Long: `Add the sidecar to the pods of manifests: Pod, Deployment, StatefulSet, DaemonSet, ReplicaSet, Job, CronJob, and
lists of them. Whatever else there is passes unchanged, and so does every byte that need not change. Injecting twice is
injecting once. If any object cannot be injected nothing is written.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := options.Validate(); err != nil {
				return err
			}
			return files.rewrite(cmd, func(text []byte, name string, warn func(string)) ([]byte, error) {
				return inject.Inject(text, name, options, warn)
			})
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	files.bind(flags)
	bindOptions(flags, &options)
	flags.StringVarP(&options.Namespace, "namespace", "n", "", "namespace of objects that name none (default \"default\")")
	return cmd
}

// newUninject is `pillionctl uninject`.
func newUninject() *cobra.Command {
	var files files
	cmd := &cobra.Command{
		Use:   "uninject -f FILE",
		Short: "Take the sidecar out again",
		Long:  `Take the sidecar out again. What "pillionctl inject" has written becomes what it was, byte for byte.`,
		Args:  noArguments,
		RunE:  func(cmd *cobra.Command, _ []string) error { return files.rewrite(cmd, inject.Uninject) },
	}
	cmd.Flags().SortFlags = false
	files.bind(cmd.Flags())
	return cmd
}

// files are what is read, and where the result goes.
type files struct {
	from []string
	to   string
}

func (f *files) bind(flags *pflag.FlagSet) {
	flags.StringArrayVarP(&f.from, "filename", "f", nil, "a file of YAML or JSON, - for standard input; may be given many times")
	flags.StringVarP(&f.to, "output", "o", "-", "file that is written, - for standard output")
}

// rewrite changes all files, and then writes all of them as one stream.
func (f *files) rewrite(cmd *cobra.Command, change func(text []byte, name string, warn func(string)) ([]byte, error)) error {
	if len(f.from) == 0 {
		return usageError{Err: errors.New("no input: name a file by -f, or - for standard input")}
	}
	warn := func(text string) { fmt.Fprintln(cmd.ErrOrStderr(), "pillionctl: warning:", text) }
	var out bytes.Buffer
	var failed []error
	for _, name := range f.from {
		text, err := f.read(cmd.InOrStdin(), name)
		if err == nil {
			text, err = change(text, name, warn)
		}
		if err != nil {
			failed = append(failed, err)
			continue
		}
		join(&out, text)
	}
	if err := errors.Join(failed...); err != nil {
		return err
	}
	if f.to == "-" {
		_, err := cmd.OutOrStdout().Write(out.Bytes())
		return err
	}
	return os.WriteFile(f.to, out.Bytes(), 0o644)
}

func (f *files) read(stdin io.Reader, name string) ([]byte, error) {
	if name == "-" {
		return inject.Read(stdin, "standard input")
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("-f %s: %w", name, err)
	}
	defer file.Close()
	return inject.Read(file, name)
}

// join puts a line of --- between files, unless there is one.
func join(out *bytes.Buffer, text []byte) {
	if out.Len() > 0 && len(text) > 0 {
		if !bytes.HasSuffix(out.Bytes(), []byte("\n")) {
			out.WriteByte('\n')
		}
		if !bytes.HasPrefix(text, []byte("---")) {
			out.WriteString("---\n")
		}
	}
	out.Write(text)
}
