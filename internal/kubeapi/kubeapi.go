// Package kubeapi sends single requests to a Kubernetes API server, with the credentials of a kubeconfig or of a pod.
//
// It supports the credentials that kubectl supports: client certificates, tokens, token files and plugins (exec). It is ours
// because the Kubernetes client libraries are larger than all of pillionctl, and pillionctl sends a dozen different
// requests.
package kubeapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	requestTimeout = 30 * time.Second // longer than the webhooks of a request may take
	maxAnswer      = 32 << 20
)

// Client sends requests to one API server.
type Client struct {
	// Server is the address of the API server, for people.
	Server string
	// Namespace is the namespace of the context; "default" without one.
	Namespace string

	base      *url.URL
	token     string
	tokenFile string // read for each request: the kubelet replaces the token of a service account
	http      *http.Client
}

// StatusError is a response of the API server that is not a success.
type StatusError struct {
	Code    int
	Message string // the server's
}

func (e *StatusError) Error() string { return fmt.Sprintf("%d: %s", e.Code, e.Message) }

// IsForbidden reports whether the credentials lack the permission for a request. A refusal by admission has the same status,
// and is false.
func IsForbidden(err error) bool {
	var status *StatusError
	return errors.As(err, &status) && (status.Code == http.StatusUnauthorized ||
		status.Code == http.StatusForbidden && strings.Contains(status.Message, " cannot "))
}

// IsConflict reports whether a request failed because of a concurrent change, so that reading the object again may help. The
// API server answers a failed test of a JSON Patch with 422.
func IsConflict(err error) bool {
	var status *StatusError
	return errors.As(err, &status) && (status.Code == http.StatusConflict || status.Code == http.StatusUnprocessableEntity)
}

// newClient makes a client of an address and credentials.
func newClient(server, serverName, proxy string, roots []byte, insecure bool, pair *tls.Certificate, token string) (*Client, error) {
	base, err := url.Parse(server)
	if err != nil || base.Host == "" || base.Scheme != "https" && base.Scheme != "http" {
		return nil, fmt.Errorf("server %q is not a URL", server)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: serverName, InsecureSkipVerify: insecure}
	if len(roots) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(roots) {
			return nil, errors.New("certificate-authority: no certificate in PEM")
		}
	}
	if pair != nil {
		config.Certificates = []tls.Certificate{*pair}
	}
	transport := &http.Transport{TLSClientConfig: config, Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, ForceAttemptHTTP2: true}
	if proxy != "" {
		through, err := url.Parse(proxy)
		if err != nil {
			return nil, fmt.Errorf("proxy-url: %w", err)
		}
		transport.Proxy = http.ProxyURL(through)
	}
	refuse := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse } // a redirect would leak the token
	return &Client{Server: server, Namespace: "default", base: base, token: token,
		http: &http.Client{Transport: transport, CheckRedirect: refuse, Timeout: requestTimeout}}, nil
}

// Get reads the object at path into the value. The path may have a query.
func (c *Client) Get(ctx context.Context, path string, into any) error {
	return c.do(ctx, http.MethodGet, path, "", nil, into)
}

// Post creates an object and reads the server's form of it into the value.
func (c *Client) Post(ctx context.Context, path string, body, into any) error {
	return c.send(ctx, http.MethodPost, path, "application/json", body, into)
}

// Put replaces an object.
func (c *Client) Put(ctx context.Context, path string, body any) error {
	return c.send(ctx, http.MethodPut, path, "application/json", body, nil)
}

// Patch changes an object by a patch of the form of contentType, such as application/json-patch+json.
func (c *Client) Patch(ctx context.Context, path, contentType string, patch any) error {
	return c.send(ctx, http.MethodPatch, path, contentType, patch, nil)
}

func (c *Client) send(ctx context.Context, method, path, contentType string, body, into any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("encoding an object: %w", err)
	}
	return c.do(ctx, method, path, contentType, text, into)
}

// do sends a request. The response is not decoded if into is nil.
func (c *Client) do(ctx context.Context, method, path, contentType string, body []byte, into any) error {
	where, query, _ := strings.Cut(path, "?")
	at := c.base.JoinPath(where)
	at.RawQuery = query
	request, err := http.NewRequestWithContext(ctx, method, at.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Accept", "application/json")
	if body != nil {
		request.Header.Set("Content-Type", contentType)
	}
	token := c.token
	if c.tokenFile != "" {
		text, err := os.ReadFile(c.tokenFile)
		if err != nil {
			return fmt.Errorf("reading the token of the service account: %w", err)
		}
		token = strings.TrimSpace(string(text))
	}
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return fmt.Errorf("requesting %s: %w", c.Server, unwrapped(err))
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("reading %s%s: %w", c.Server, where, err)
	}
	if len(text) > maxAnswer {
		return fmt.Errorf("reading %s%s: longer than %d MiB", c.Server, where, maxAnswer>>20)
	}
	if response.StatusCode >= http.StatusMultipleChoices {
		return statusError(response.StatusCode, text)
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("reading %s%s: %w", c.Server, where, err)
	}
	return nil
}

// unwrapped removes the method and the URL that net/http adds.
func unwrapped(err error) error {
	var failed *url.Error
	if errors.As(err, &failed) {
		return failed.Err
	}
	return err
}

func statusError(code int, text []byte) error {
	var status struct{ Message string }
	if json.Unmarshal(text, &status) != nil || status.Message == "" {
		status.Message = strings.Join(strings.Fields(string(text[:min(len(text), 500)])), " ")
	}
	return &StatusError{code, status.Message}
}

// serviceAccount is where the kubelet puts the credentials of a pod.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// InCluster returns a client of the cluster in which this process runs as a pod.
func InCluster() (*Client, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST or KUBERNETES_SERVICE_PORT is not set: run it in a pod")
	}
	return inCluster(serviceAccount, host, port)
}

// inCluster uses the service account in a directory.
func inCluster(account, host, port string) (*Client, error) {
	tokenFile := filepath.Join(account, "token")
	if _, err := os.Stat(tokenFile); err != nil {
		return nil, err
	}
	roots, err := os.ReadFile(filepath.Join(account, "ca.crt"))
	if err != nil {
		return nil, err
	}
	client, err := newClient("https://"+net.JoinHostPort(host, port), "", "", roots, false, nil, "")
	if err != nil {
		return nil, err
	}
	client.tokenFile = tokenFile
	if namespace, err := os.ReadFile(filepath.Join(account, "namespace")); err == nil {
		client.Namespace = strings.TrimSpace(string(namespace))
	}
	return client, nil
}
