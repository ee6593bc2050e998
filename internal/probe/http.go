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

// httpProbe sends a GET with the fields of the kubelet's request.
//
// Like the kubelet, it follows redirects to the same host. A redirect to another host counts as a success and is answered
// with 200, because the answer to the kubelet has no Location.
type httpProbe struct {
	url        *url.URL
	statusPort uint16
	client     *http.Client
}

// maxRedirects bounds the redirects that are followed.
const maxRedirects = 10

// hopByHop are the fields that concern the kubelet's connection (RFC 9110 §7.6.1), and those that frame a body; a probe does
// not have one.
var hopByHop = []string{
	"Connection", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Content-Length",
}

// dialerKey is the key of the context that ends a dial, see newProbeClient.
type dialerKey struct{}

// newProbeClient makes the client that all HTTP probes share. Like the kubelet, it does not verify certificates: they are
// rarely issued for an address.
func newProbeClient(config Config) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(config.HTTP2)
	return &http.Client{
		Transport: &http.Transport{
			// Package net/http lets a dial continue when its request has ended. If the workload does not accept connections,
			// such dials would accumulate.
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
			DisableCompression:     true, // otherwise net/http would add Accept-Encoding to the kubelet's fields
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

// askedConn blocks reads until the first write. Package net/http logs bytes that arrive before a request to the
// standard log; a workload that sends first would fill it.
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
	c.ask() // ends a blocked Read
	return c.Conn.Close()
}

// probeURL parses a probe's path with its query, if any. Like the kubelet, it uses an invalid path literally.
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
			err = about.Err // the answer names the URL already
		}
		return answer{}, err
	}
	defer response.Body.Close()
	if response.StatusCode < 200 {
		return answer{}, fmt.Errorf("the workload answers %d: not a final status", response.StatusCode)
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

// host returns the kubelet's Host. The injector has replaced the probed port by the status port; host restores it.
func (p *httpProbe) host(from string) string {
	name, port, err := net.SplitHostPort(from)
	if err != nil || port != strconv.Itoa(int(p.statusPort)) {
		return from
	}
	return net.JoinHostPort(name, p.url.Port())
}

// fields returns the kubelet's fields without the hop-by-hop ones.
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
		fields["User-Agent"] = []string{""} // otherwise net/http would add its own
	}
	return fields
}
