package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os/signal"
	"regexp"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/certificate"
	"github.com/pillion-proxy/pillion/internal/inject"
	"github.com/pillion-proxy/pillion/internal/kubeapi"
)

// newWebhook is `pillionctl webhook`.
func newWebhook() *cobra.Command {
	var options inject.Options
	var source certificateSource
	address, level := ":9443", "info"
	cmd := &cobra.Command{
		Use:   "webhook",
		Short: "Serve the admission webhook that injects pods as they are created",
		Long: `Serve the admission webhook that injects pods as they are created: /inject for the API server and /healthz for probes,
both over TLS. The certificate is read from files, which are reloaded when they change, or with --issue-certificate issued
and renewed by the webhook itself. A pod that cannot be injected as its annotations request is refused with the reason.
deploy/kustomize and deploy/helm install it.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := options.Validate(); err != nil {
				return flagNamed(err)
			}
			var from slog.Level
			if err := from.UnmarshalText([]byte(level)); err != nil {
				return usageError{Err: fmt.Errorf("--log-level %q: use debug, info, warn or error", level)}
			}
			if err := checkAddress(address); err != nil {
				return usageError{Err: fmt.Errorf("--listen %s: %w", address, err)}
			}
			if err := source.validate(); err != nil {
				return usageError{Err: err}
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: from}))
			leaveRoom()
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			listener, err := net.Listen("tcp", address)
			if err != nil {
				return fmt.Errorf("--listen %s: %w", address, err)
			}
			get, wait, err := source.open(ctx, log)
			if err != nil {
				listener.Close()
				return err
			}
			defer wait()
			if !cmd.Flags().Changed("image") {
				log.Warn("the image of sidecars names no registry", "image", options.Image, "flag", "--image")
			}
			log.Info("webhook started", "address", listener.Addr().String())
			return inject.Serve(ctx, inject.WebhookConfig{Listener: listener, Certificate: get, Options: options, Log: log})
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&address, "listen", address, "address and port")
	source.bind(flags)
	bindOptions(flags, &options)
	flags.StringVar(&level, "log-level", level, "lowest level to log: debug, info, warn or error")
	return cmd
}

// leaveRoom lowers Go's memory limit by an eighth, because the Deployment sets GOMEMLIMIT to the container's limit. The rest
// is for memory that the runtime does not count, such as the program's pages and socket buffers.
func leaveRoom() {
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 {
		debug.SetMemoryLimit(limit - limit/8)
	}
}

// checkAddress checks the form of an address to listen at.
func checkAddress(address string) error {
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	return err
}

// certificateSource names the files of the certificate, or the objects with which it is issued.
type certificateSource struct {
	cert, key string
	issue     bool
	config    certificate.IssuerConfig
}

func (s *certificateSource) bind(flags *pflag.FlagSet) {
	flags.StringVar(&s.cert, "tls-cert", "/tls/tls.crt", "certificate file, PEM")
	flags.StringVar(&s.key, "tls-key", "/tls/tls.key", "key file, PEM")
	flags.BoolVar(&s.issue, "issue-certificate", false, "issue and renew the certificate, instead of reading files, and publish its authority")
	flags.StringVar(&s.config.Service, "service", "pillion-webhook", "with --issue-certificate: the webhook's service, in its own namespace")
	flags.StringVar(&s.config.Secret, "authority-secret", "pillion-webhook-authority", "with --issue-certificate: the Secret of the authority; it must exist")
	flags.StringVar(&s.config.Configuration, "configuration", "pillion", "with --issue-certificate: the MutatingWebhookConfiguration that gets the authority")
	flags.StringVar(&s.config.PodSecurity, "pod-security", "", "with --issue-certificate: Pod Security level (restricted, baseline or privileged) for the webhook's own namespace, unless it has one")
}

// objectName matches the name of an object. Such names become parts of paths.
var objectName = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`)

// validate checks the flags that have a form. Its error names the flag.
func (s *certificateSource) validate() error {
	for _, f := range []struct{ flag, value string }{
		{"--service", s.config.Service}, {"--authority-secret", s.config.Secret}, {"--configuration", s.config.Configuration},
	} {
		if !objectName.MatchString(f.value) {
			return fmt.Errorf("%s %q is not the name of an object", f.flag, f.value)
		}
	}
	if !slices.Contains([]string{"", "restricted", "baseline", "privileged"}, s.config.PodSecurity) {
		return fmt.Errorf("--pod-security %q: use restricted, baseline or privileged", s.config.PodSecurity)
	}
	return nil
}

// open returns the source of certificates. wait returns after ctx has ended and all work is done.
func (s *certificateSource) open(ctx context.Context, log *slog.Logger) (get func(*tls.ClientHelloInfo) (*tls.Certificate, error), wait func(), err error) {
	if !s.issue {
		files, err := certificate.FromFiles(s.cert, s.key, log)
		if err != nil {
			return nil, nil, fmt.Errorf("--tls-cert %s, --tls-key %s: %w", s.cert, s.key, err)
		}
		return files.Get, func() {}, nil
	}
	config := s.config
	config.Log = log
	api, err := kubeapi.InCluster()
	if err != nil {
		return nil, nil, fmt.Errorf("--issue-certificate: %w", err)
	}
	config.API, config.Namespace = api, api.Namespace
	issuer, err := certificate.NewIssuer(ctx, config)
	if err != nil {
		return nil, nil, fmt.Errorf("--issue-certificate: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { issuer.Run(ctx) })
	return issuer.Get, func() { cancel(); running.Wait() }, nil
}
