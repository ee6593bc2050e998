package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/certview"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

// certsOptions are the flags of `pillion certs`.
type certsOptions struct {
	admin   adminOptions
	form    output
	sni     string
	alpn    string
	expect  string
	timeout time.Duration

	direct    bool
	roots     string
	cert, key string
}

// newCerts is `pillion certs`.
func newCerts() *cobra.Command {
	o := certsOptions{form: outputText}
	cmd := &cobra.Command{
		Use:   "certs [HOST:PORT]",
		Short: "Show the workload's certificate, or the one that a server presents",
		Long: `Show the certificate of this workload: its SPIFFE ID, issuer and validity, the chain, the roots of trust, and when it is
renewed.

With HOST:PORT, show what a client of the mesh sees of that server. The agent performs a handshake with the workload's
certificate, and verifies the server with its roots of trust. The output has the server's chain, what was agreed on, which
authorities the server accepts for clients, and whether each side accepts the other. No data is sent. With --direct this
command performs the handshake, without the agent.

The exit status is 0 if there is a valid certificate, or if both sides accept each other.`,
		Example: "pillion certs\npillion certs web.shop:8080\npillion certs web.shop:8080 --alpn istio-http/1.1,istio,http/1.1 --expect spiffe://cluster.local/ns/shop/sa/web\n" +
			"pillion certs --direct --roots system --alpn h2,http/1.1 www.example.com:443",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageError{Err: fmt.Errorf("%d arguments: use one HOST:PORT, or none for this workload's own certificate", len(args))}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			if len(args) == 0 {
				return o.own(cmd)
			}
			return o.server(cmd, args[0], cmd.Flags().Changed("sni"))
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	parsed(flags, &o.form, parseOutput, "output", "o", string(o.form), "text|json", "output format")
	flags.StringVar(&o.sni, "sni", "", "server name to ask for (default: HOST, unless it is an address)")
	flags.StringVar(&o.alpn, "alpn", "istio", "protocols to offer, separated by commas; empty: none. Istio's proxies choose the filter chain by them")
	flags.StringVar(&o.expect, "expect", "", "name that the server's certificate must have, such as a SPIFFE ID")
	flags.DurationVar(&o.timeout, "timeout", certview.DefaultTimeout, "time limit of the handshake, at most 9s")
	flags.BoolVar(&o.direct, "direct", false, "perform the handshake here, and not in the agent; without --roots the server is not verified")
	flags.StringVar(&o.roots, "roots", "", `with --direct: file with roots of trust in PEM, or "system"`)
	flags.StringVar(&o.cert, "cert", "", "with --direct: file with the client's certificate in PEM")
	flags.StringVar(&o.key, "key", "", "with --direct: file with the key of --cert")
	o.admin.bind(flags)
	return cmd
}

// own shows the workload's certificate.
func (o *certsOptions) own(cmd *cobra.Command) error {
	var i certview.Identity
	if err := o.admin.readJSON(cmd.Context(), "/identity", "", &i); err != nil {
		return err
	}
	now, out := time.Now(), cmd.OutOrStdout()
	err := o.print(out, i, func() string { return terminal.Identity(&i, now, terminal.NewPainter(out)) })
	if err != nil {
		return err
	}
	if len(i.Chain) == 0 || now.After(i.Chain[0].NotAfter) || now.Before(i.Chain[0].NotBefore) {
		return errFailed
	}
	return nil
}

func (o *certsOptions) print(out io.Writer, value any, text func() string) error {
	if o.form == outputJSON {
		return printJSON(out, value)
	}
	_, err := io.WriteString(out, text())
	return ignoreClosed(err)
}

// server shows what a server presents. sni is whether --sni is set.
func (o *certsOptions) server(cmd *cobra.Command, address string, sni bool) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" {
		return usageError{Err: fmt.Errorf("%q is not HOST:PORT", address)}
	}
	if _, err := netip.ParseAddr(host); err != nil && !sni {
		o.sni = host
	}
	if o.timeout <= 0 || o.timeout > certview.MaxTimeout {
		return valueError{fmt.Errorf("--timeout %v: use more than 0s and at most %v", o.timeout, certview.MaxTimeout)}
	}
	if !o.direct && (o.roots != "" || o.cert != "" || o.key != "") {
		return usageError{Err: errors.New("--roots, --cert and --key need --direct: the agent has its own")}
	}
	h, err := o.shake(cmd.Context(), address)
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	if err := o.print(out, h, func() string { return terminal.Handshake(h, time.Now(), terminal.NewPainter(out)) }); err != nil {
		return err
	}
	if !h.OK() {
		return errFailed
	}
	return nil
}

// shake performs the handshake, or has the agent perform it.
func (o *certsOptions) shake(ctx context.Context, address string) (*certview.Handshake, error) {
	if o.direct {
		options, err := o.options(address)
		if err != nil {
			return nil, err
		}
		return certview.Shake(ctx, options), nil
	}
	query := url.Values{"to": {address}, "sni": {o.sni}, "alpn": {o.alpn}, "expect": {o.expect}, "timeout": {o.timeout.String()}}
	ctx, cancel := context.WithTimeout(ctx, o.timeout+adminTimeout)
	defer cancel()
	body, err := o.admin.send(ctx, http.MethodPost, "/identity/handshake", query.Encode())
	if err != nil {
		return nil, err
	}
	defer body.Close()
	h := new(certview.Handshake)
	if err := json.NewDecoder(io.LimitReader(body, adminBytes)).Decode(h); err != nil {
		return nil, fmt.Errorf("reading the agent's answer: %w", err)
	}
	return h, nil
}

// options are those of a handshake without the agent.
func (o *certsOptions) options(address string) (options certview.Options, err error) {
	options = certview.Options{Address: address, ServerName: o.sni, Expect: o.expect, Timeout: o.timeout}
	if o.alpn != "" {
		options.ALPN = strings.Split(o.alpn, ",")
	}
	if o.cert != "" || o.key != "" {
		pair, err := tls.LoadX509KeyPair(o.cert, o.key)
		if err != nil {
			return options, fmt.Errorf("reading --cert and --key: %w", err)
		}
		options.Certificate = &pair
	}
	switch o.roots {
	case "":
	case "system":
		options.Trust.Roots = &identity.Roots{} // a nil pool stands for the system's
	default:
		var text []byte
		if text, err = os.ReadFile(o.roots); err == nil {
			options.Trust.Roots, err = identity.ParseRoots(text)
		}
	}
	if err != nil {
		return options, fmt.Errorf("reading --roots: %w", err)
	}
	return options, nil
}
