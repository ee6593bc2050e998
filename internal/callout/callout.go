// Package callout sends requests of the agent's own to servers of the control plane's clusters: those that have the keys of
// tokens, and those that decide about requests. The endpoint of each request is chosen by the cluster's load balancing, and
// connections are secured as the cluster configures. Answers are bounded.
package callout

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/grpcwire"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Config is what a Client needs.
type Config struct {
	Snapshot func() *mesh.Snapshot // in force; nil before the first configuration
	Balancer *balance.Balancer

	// Security returns how connections to endpoints are secured. Equal results are interchangeable. host is that of the
	// request. An error means that no request may be sent.
	Security func(t *mesh.UpstreamTLS, http2 bool, host string) (Security, error)
}

// Security secures connections. It is a key of a map.
type Security interface {
	// Handshake returns the connection in which TLS is spoken. It does not close conn after an error.
	Handshake(ctx context.Context, conn net.Conn) (net.Conn, error)
}

// Client sends requests. Make it with New, and Close it.
type Client struct {
	config Config

	mu         sync.Mutex
	transports map[transportKey]*http.Transport
}

// transportKey identifies connections that are interchangeable, apart from their endpoint.
type transportKey struct {
	security Security // nil: they are plain
	http2    bool
	timeout  time.Duration // for connecting
}

// New returns a Client.
func New(config Config) *Client {
	return &Client{config: config, transports: map[transportKey]*http.Transport{}}
}

// Close closes the connections that are idle. Requests in progress end with their contexts.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop()
}

// drop forgets the transports. c.mu is held.
func (c *Client) drop() {
	for _, t := range c.transports {
		t.CloseIdleConnections()
	}
	clear(c.transports)
}

// Answer is the response of a server. Its body is as much as was asked for.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
}

// Get sends a request to a URI of a cluster. The answer's body has at most limit bytes; a longer one is an error.
func (c *Client) Get(ctx context.Context, cluster, uri string, limit int) (*Answer, error) {
	target, err := url.Parse(uri)
	if err != nil {
		return nil, fmt.Errorf("the URI %.200q: %w", uri, err)
	}
	r := (&http.Request{Method: http.MethodGet, URL: target, Host: target.Host, Header: http.Header{}}).WithContext(ctx)
	return c.Do(cluster, r, limit)
}

// Do sends a request to a cluster. The host of its URL is not looked at.
func (c *Client) Do(cluster string, r *http.Request, limit int) (*Answer, error) {
	response, err := (&toCluster{c, cluster, false}).RoundTrip(r)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, int64(limit)+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the answer of cluster %s: %w", cluster, err)
	case len(body) > limit:
		return nil, fmt.Errorf("the answer of cluster %s has more than %d bytes", cluster, limit)
	}
	return &Answer{response.StatusCode, response.Header, body}, nil
}

// Call makes a call of gRPC to a cluster. An empty authority is the cluster's name.
func (c *Client) Call(ctx context.Context, cluster, authority, path string, header http.Header, message []byte, limit int) ([]byte, error) {
	if authority == "" {
		authority = cluster
	}
	client := grpcwire.Client{
		Transport: &toCluster{c, cluster, true}, Base: url.URL{Scheme: "http", Host: authority}, Header: header, MaxMessage: limit,
	}
	return client.Call(ctx, path, message)
}

// To returns what sends requests to the endpoints of a cluster, by HTTP/1.1 or HTTP/2 unless the cluster has one.
func (c *Client) To(cluster string, http2 bool) http.RoundTripper {
	return &toCluster{c, cluster, http2}
}

// toCluster sends requests to the endpoints of a cluster.
type toCluster struct {
	*Client
	cluster string
	http2   bool
}

var (
	errNoConfiguration = errors.New("the control plane has sent no configuration yet")
	errRefused         = errors.New("the cluster is not supported, or the transport to its endpoint")
	errNoEndpoint      = errors.New("the cluster has no healthy endpoint")
	errOverflow        = errors.New("a limit of the cluster is reached")
	errSwitches        = errors.New("the server switches protocols, which it was not asked for")
)

// RoundTrip implements http.RoundTripper.
func (t *toCluster) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := t.send(r)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", t.cluster, err)
	}
	return response, nil
}

func (t *toCluster) send(r *http.Request) (*http.Response, error) {
	s := t.config.Snapshot()
	if s == nil {
		return nil, errNoConfiguration
	}
	config := s.Cluster(t.cluster)
	switch {
	case config == nil:
		return nil, errors.New("there is no such cluster")
	case config.Refused:
		return nil, errRefused
	}
	http2 := t.http2 || config.HTTP.Protocol == mesh.UpstreamHTTP2
	choice, err := t.choose(r.Context(), s, config, http2)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	response, err := t.sendTo(&choice, config, http2, r)
	outcome := balance.Outcome{GRPC: -1, Reason: flow.Completed, Connected: true, Duration: time.Since(began)}
	if err != nil {
		outcome.Reason, outcome.Connected = flow.UpstreamUnreachable, false
	} else {
		outcome.Status = response.StatusCode
	}
	choice.Lease.End(outcome)
	return response, err
}

// choose chooses an endpoint. It waits for the addresses of names that are looked up for the first time.
func (t *toCluster) choose(ctx context.Context, s *mesh.Snapshot, config *mesh.Cluster, http2 bool) (balance.Choice, error) {
	request := balance.Request{}
	if http2 {
		request.Kind = balance.HTTP2
	}
	c := t.config.Balancer.Cluster(s, config)
	choice, failed := c.Pick(&request)
	if failed == balance.Resolving {
		select {
		case <-c.Resolved():
		case <-ctx.Done():
			return choice, ctx.Err()
		}
		choice, failed = c.Pick(&request)
	}
	switch {
	case failed == balance.Overflow:
		return choice, errOverflow
	case failed != balance.None:
		return choice, errNoEndpoint
	case !choice.Address.IsValid(): // its endpoint is the original destination of a connection, which there is not
		choice.Lease.End(balance.Outcome{GRPC: -1})
		return choice, errNoEndpoint
	case choice.Transport != nil && choice.Transport.Refused:
		choice.Lease.End(balance.Outcome{GRPC: -1})
		return choice, errRefused
	}
	return choice, nil
}

// sendTo sends a request to an endpoint.
func (t *toCluster) sendTo(to *balance.Choice, config *mesh.Cluster, http2 bool, r *http.Request) (*http.Response, error) {
	key := transportKey{http2: http2, timeout: config.ConnectTimeout}
	if to.Transport != nil && to.Transport.TLS != nil {
		var err error
		if key.security, err = t.config.Security(to.Transport.TLS, http2, r.Host); err != nil {
			return nil, err
		}
	}
	own := r.Clone(r.Context())
	own.URL.Scheme, own.URL.Host = "http", to.Address.String()
	response, err := t.transport(key).RoundTrip(own)
	if err == nil && response.StatusCode < http.StatusOK { // its body would be the connection, which outlives the context
		response.Body.Close()
		return nil, errSwitches
	}
	return response, err
}

const (
	maxTransports = 32
	idleTimeout   = 30 * time.Second
	maxHeadBytes  = 64 << 10
	maxIdle       = 4 // connections to an endpoint
)

func (c *Client) transport(key transportKey) *http.Transport {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.transports[key]; t != nil {
		return t
	}
	if len(c.transports) >= maxTransports { // of earlier configurations, mostly
		c.drop()
	}
	var protocols http.Protocols
	protocols.SetHTTP1(!key.http2)
	protocols.SetUnencryptedHTTP2(key.http2) // TLS is below it
	t := &http.Transport{
		DialContext: key.dial, Protocols: &protocols, DisableCompression: true,
		MaxIdleConnsPerHost: maxIdle, IdleConnTimeout: idleTimeout, MaxResponseHeaderBytes: maxHeadBytes,
	}
	c.transports[key] = t
	return t
}

// dial connects to an endpoint. The rules do not capture the agent's own connections.
func (k transportKey) dial(ctx context.Context, _, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{Timeout: k.timeout}
	conn, err := dialer.DialContext(ctx, "tcp", to.String())
	if err != nil || k.security == nil {
		return conn, err
	}
	secured, err := k.security.Handshake(ctx, conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return secured, nil
}

// Body returns the body of a request.
func Body(b []byte) io.ReadCloser { return io.NopCloser(bytes.NewReader(b)) }
