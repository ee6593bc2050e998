package certificate

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
	"os"
	"path/filepath"
	"strings"
	"time"
)

// API is a client of a Kubernetes API server.
type API struct {
	Base  string                 // such as https://10.96.0.1:443
	Token func() (string, error) // of the service account
	HTTP  *http.Client
}

const (
	apiTimeout  = 10 * time.Second
	maxResponse = 4 << 20 // bytes; objects are smaller
)

// serviceAccount is where the kubelet puts the credentials of a pod's service account.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// InCluster returns the API of the cluster in which this process runs, and the namespace of its pod.
func InCluster() (api *API, namespace string, err error) {
	return inCluster(serviceAccount, os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
}

func inCluster(directory, host, port string) (*API, string, error) {
	if host == "" || port == "" {
		return nil, "", errors.New("KUBERNETES_SERVICE_HOST or KUBERNETES_SERVICE_PORT is not set: run it in a pod")
	}
	namespace, err := os.ReadFile(filepath.Join(directory, "namespace"))
	if err != nil {
		return nil, "", fmt.Errorf("reading the service account's namespace: %w", err)
	}
	authority, err := os.ReadFile(filepath.Join(directory, "ca.crt"))
	if err != nil {
		return nil, "", fmt.Errorf("reading the API server's authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authority) {
		return nil, "", fmt.Errorf("%s has no certificate", filepath.Join(directory, "ca.crt"))
	}
	return &API{
		Base: "https://" + net.JoinHostPort(host, port),
		// The kubelet replaces the token before it expires.
		Token: func() (string, error) {
			token, err := os.ReadFile(filepath.Join(directory, "token"))
			return strings.TrimSpace(string(token)), err
		},
		HTTP: &http.Client{Transport: &http.Transport{
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}, DisableKeepAlives: true,
		}},
	}, strings.TrimSpace(string(namespace)), nil
}

// apiError is a refusal of the API server.
type apiError struct {
	code    int
	message string
}

func (e *apiError) Error() string { return e.message }

// conflict reports whether err is due to a concurrent change, so that reading and changing the object again may succeed.
// The API server answers a failed test of a JSON Patch with 422.
func conflict(err error) bool {
	refusal := new(apiError)
	return errors.As(err, &refusal) && (refusal.code == http.StatusConflict || refusal.code == http.StatusUnprocessableEntity)
}

// do sends a request with a JSON body, unless it is nil, and decodes the response.
func (a *API) do(ctx context.Context, method, path, contentType string, body, into any) error {
	err := a.try(ctx, method, path, contentType, body, into)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

func (a *API) try(ctx context.Context, method, path, contentType string, body, into any) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	token, err := a.Token()
	if err != nil {
		return fmt.Errorf("reading the service account's token: %w", err)
	}
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, a.Base+path, content)
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("Accept", "application/json")
	if body != nil {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := a.HTTP.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxResponse))
	if err != nil {
		return err
	}
	if response.StatusCode >= 300 {
		var status struct{ Message string }
		if json.Unmarshal(text, &status) != nil || status.Message == "" {
			status.Message = response.Status
		}
		return &apiError{response.StatusCode, status.Message}
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(text, into)
}
