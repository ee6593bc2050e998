package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
)

// adminOptions select the agent whose state a command shows.
type adminOptions struct{ address string }

func (o *adminOptions) bind(flags *pflag.FlagSet) {
	o.address = "127.0.0.1:15000"
	parsed(flags, &o.address, parseAdmin, "admin", "", o.address, "address", "where the agent's admin server listens")
	twin(flags, "admin", "PILLION_ADMIN")
}

func parseAdmin(text string) (string, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil || host == "" || port == "" {
		return "", errors.New("not an address: use one with a port, such as 127.0.0.1:15000")
	}
	return text, nil
}

// Bounds of a response that is not a stream.
const (
	adminTimeout = 10 * time.Second
	adminBytes   = 16 << 20
)

// adminClient ignores the environment's HTTP proxies: the agent is on this machine.
var adminClient = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, ResponseHeaderTimeout: adminTimeout}}

// statusError is the status of a response that is not 200.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("%d %s", int(e), http.StatusText(int(e))) }

// open requests a path and returns the body of the response. The caller closes it.
func (o *adminOptions) open(ctx context.Context, path, query string) (io.ReadCloser, error) {
	return o.send(ctx, http.MethodGet, path, query)
}

// send is open with any method.
func (o *adminOptions) send(ctx context.Context, method, path, query string) (io.ReadCloser, error) {
	where := url.URL{Scheme: "http", Host: o.address, Path: path, RawQuery: query}
	request, err := http.NewRequestWithContext(ctx, method, where.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("requesting %s: %w", &where, err)
	}
	response, err := adminClient.Do(request)
	if err != nil {
		return nil, explainAdmin(&where, err)
	}
	if response.StatusCode != http.StatusOK {
		defer response.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(response.Body, 500))
		return nil, fmt.Errorf("%s answered %w: %s", &where, statusError(response.StatusCode), strings.TrimSpace(string(text)))
	}
	return response.Body, nil
}

// explainAdmin adds a remedy to a failed request.
func explainAdmin(where *url.URL, err error) error {
	cause := err
	if unwrapped := errors.Unwrap(err); unwrapped != nil {
		cause = unwrapped // without a second copy of the address
	}
	if errors.Is(err, context.Canceled) {
		return cause
	}
	remedy := "is --admin right?"
	if errors.Is(err, syscall.ECONNREFUSED) {
		remedy = "is \"pillion agent\" running here? From outside its pod, " +
			"first run \"kubectl port-forward POD 15000\"; for another address use --admin"
	}
	return fmt.Errorf("requesting %s: %w: %s", where, cause, remedy)
}

// read requests a path and returns the whole response.
func (o *adminOptions) read(ctx context.Context, path, query string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	var text bytes.Buffer
	if err := o.copy(ctx, &text, path, query, adminBytes); err != nil {
		return nil, err
	}
	return text.Bytes(), nil
}

// copy requests a path and writes the response, of at most limit bytes.
func (o *adminOptions) copy(ctx context.Context, to io.Writer, path, query string, limit int64) error {
	body, err := o.open(ctx, path, query)
	if err != nil {
		return err
	}
	defer body.Close()
	n, err := io.Copy(to, io.LimitReader(body, limit+1))
	if err == nil && n > limit {
		err = fmt.Errorf("longer than %d MiB", limit>>20)
	}
	if err != nil {
		return fmt.Errorf("reading http://%s%s: %w", o.address, path, err)
	}
	return nil
}

// readJSON requests a path that serves JSON.
func (o *adminOptions) readJSON(ctx context.Context, path, query string, into any) error {
	text, err := o.read(ctx, path, query)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("reading http://%s%s: %w; is this pillion's admin server?", o.address, path, err)
	}
	return nil
}
