package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// httpProbe does a GET with the fields of the kubelet's request.
//
// Redirects are followed as the kubelet would, which stays with one host. One that leads elsewhere counts as a success;
// it is answered as 200, as there is no Location to go with it.
type httpProbe struct {
	url        *url.URL
	statusPort uint16
	client     *http.Client
}

// maxRedirects is how many redirects are followed.
const maxRedirects = 10

// hopByHop are the fields that are about the kubelet's connection and not for the workload (RFC 9110 §7.6.1), and those
// that frame a body, which a probe has not.
var hopByHop = []string{
	"Connection", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Content-Length",
}

// dialerKey finds the context by which a dial has to end, see newProbeClient.
type dialerKey struct{}

// newProbeClient makes the client that all HTTP probes share. It does not verify certificates, as the kubelet does not:
// they are rarely made out to an address.
func newProbeClient(config Config) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(config.HTTP2)
	return &http.Client{
		Transport: &http.Transport{
			// Package net/http lets a dial go on when its request has ended. A workload that accepts nothing would
			// collect them.
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				conn, err := config.Dial(ctx.Value(dialerKey{}).(context.Context), network, address)
				if err != nil {
					return nil, err
				}
				asked := make(chan struct{})
				return &askedConn{Conn: conn, asked: asked, ask: sync.OnceFunc(func() { close(asked) })}, nil
			},
			TLSClientConfig:        &tls.Config{InsecureSkipVerify: true},
			Protocols:              protocols,
			DisableKeepAlives:      !config.KeepAlive,
			MaxIdleConnsPerHost:    1,
			IdleConnTimeout:        90 * time.Second,
			DisableCompression:     true, // or a field of ours would be among the kubelet's
			MaxResponseHeaderBytes: 256 << 10,
		},
		CheckRedirect: func(to *http.Request, via []*http.Request) error {
			if to.URL.Hostname() != via[0].URL.Hostname() {
				return http.ErrUseLastResponse
			}
			if len(via) > maxRedirects {
				return fmt.Errorf("stopped after %d redirects", maxRedirects)
			}
			return nil
		},
	}
}

// askedConn has nothing to read before something is written. Package net/http writes into the standard log what comes
// without a request, and a workload that speaks first would fill it.
type askedConn struct {
	net.Conn
	asked <-chan struct{}
	ask   func() // closes asked
}

func (c *askedConn) Read(b []byte) (int, error) {
	<-c.asked
	return c.Conn.Read(b)
}

func (c *askedConn) Write(b []byte) (int, error) {
	c.ask()
	return c.Conn.Write(b)
}

func (c *askedConn) Close() error {
	c.ask() // the reader ends
	return c.Conn.Close()
}

// probeURL reads a probe's path, which may have a query. A path that is no URL is taken by its letters, as the kubelet
// does.
func probeURL(scheme, address, path string) *url.URL {
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	parsed, err := url.Parse(scheme + "://" + address + path)
	if err != nil {
		return &url.URL{Scheme: scheme, Host: address, Path: path}
	}
	return parsed
}

func (p *httpProbe) run(ctx context.Context, from *http.Request) (answer, error) {
	to := *p.url
	request := (&http.Request{
		Method: http.MethodGet,
		URL:    &to,
		Host:   p.host(from.Host),
		Header: p.fields(from.Header),
	}).WithContext(context.WithValue(ctx, dialerKey{}, ctx))
	response, err := p.client.Do(request)
	if err != nil {
		if about := (*url.Error)(nil); errors.As(err, &about) {
			err = about.Err // the URL is in the answer anyway
		}
		return answer{}, err
	}
	defer response.Body.Close()
	if response.StatusCode < 200 {
		return answer{}, fmt.Errorf("the workload answers %d, which is no final status", response.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxBody))
	if err != nil {
		return answer{}, fmt.Errorf("reading the body of the answer: %w", err)
	}
	status := response.StatusCode
	if status >= 300 && status < 400 {
		status = http.StatusOK
	}
	return answer{status, body}, nil
}

// host is the kubelet's Host. The status port in it comes from the rewriting of the probe, and was the probed port
// before.
func (p *httpProbe) host(from string) string {
	name, port, err := net.SplitHostPort(from)
	if err != nil || port != strconv.Itoa(int(p.statusPort)) {
		return from
	}
	return net.JoinHostPort(name, p.url.Port())
}

// fields are the kubelet's, without those of its connection.
func (p *httpProbe) fields(from http.Header) http.Header {
	fields := from.Clone()
	for _, value := range from["Connection"] {
		for name := range strings.SplitSeq(value, ",") {
			fields.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range hopByHop {
		fields.Del(name)
	}
	if fields.Get("User-Agent") == "" {
		fields["User-Agent"] = []string{""} // or package net/http would name itself
	}
	return fields
}
