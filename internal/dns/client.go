package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"
)

// Client looks names up at servers as Server does for the workload: it turns to the next one if a server does not answer,
// and to TCP for an answer that is truncated. It keeps no answers.
type Client struct {
	server Server // without sockets
	search []string
}

// NewClient makes a Client. search are the domains that are appended to names that do not exist as they are.
func NewClient(upstreams []netip.AddrPort, search []string, log *slog.Logger) (*Client, error) {
	c := &Client{search: search}
	s := &c.server
	s.Config = Config{Upstreams: upstreams, Timeout: DefaultTimeout, Dial: new(net.Dialer).DialContext, Log: log}
	s.now = time.Now
	if err := s.validate(); err != nil {
		return nil, err
	}
	for _, address := range upstreams {
		s.upstreams = append(s.upstreams, &upstream{addr: address})
	}
	return c, nil
}

// Lookup returns the IPv4 addresses of a name, or the IPv6 addresses, and for how long they are valid. A name that does not
// exist, or has no such address, has none.
func (c *Client) Lookup(ctx context.Context, name string, ipv6 bool) (addresses []netip.Addr, ttl time.Duration, err error) {
	absolute := strings.HasSuffix(name, ".")
	name = strings.TrimSuffix(name, ".")
	if addresses, ttl, err = c.lookup(ctx, name, ipv6); err != nil || len(addresses) > 0 || absolute {
		return addresses, ttl, err
	}
	for _, domain := range c.search {
		if addresses, ttl, err = c.lookup(ctx, name+"."+domain, ipv6); err != nil || len(addresses) > 0 {
			return addresses, ttl, err
		}
	}
	return nil, ttl, nil
}

func (c *Client) lookup(ctx context.Context, name string, ipv6 bool) ([]netip.Addr, time.Duration, error) {
	kind := typeA
	if ipv6 {
		kind = typeAAAA
	}
	raw, err := newQuestion(name, kind)
	if err != nil {
		return nil, 0, err
	}
	m, err := parse(raw)
	if err != nil {
		return nil, 0, fmt.Errorf("the name %q: %w", name, err)
	}
	answer, err := parse(c.server.forward(ctx, newQuery(m)).raw)
	if err == nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, 0, fmt.Errorf("looking up %s: %w", name, err)
	}
	switch answer.rcode() {
	case rcodeSuccess, rcodeNameError:
		addresses, ttl := answer.addresses(kind)
		return addresses, ttl, nil
	}
	return nil, 0, fmt.Errorf("looking up %s: the servers answer %s", name, rcodeName(answer.rcode()))
}

// addresses returns the addresses among the answers. They stand behind the aliases that lead to them.
func (m *message) addresses(kind uint16) (addresses []netip.Addr, ttl time.Duration) {
	for r := range m.records() {
		if r.section != answerSection {
			break
		}
		valid := time.Duration(binary.BigEndian.Uint32(m.ttl(r))) * time.Second
		if ttl == 0 || valid < ttl {
			ttl = max(valid, 1)
		}
		if address, ok := netip.AddrFromSlice(m.data(r)); ok && r.kind == kind {
			addresses = append(addresses, address)
		}
	}
	return addresses, ttl
}

var errName = errors.New("not a domain name")

// newQuestion returns a recursive query. Its ID is set when it is sent.
func newQuestion(name string, kind uint16) ([]byte, error) {
	raw := make([]byte, headerSize, headerSize+len(name)+6)
	raw[2], raw[5] = 1, 1 // recursion is desired; one question
	for label := range strings.SplitSeq(name, ".") {
		if len(label) == 0 || len(label) > 63 {
			return nil, fmt.Errorf("%q: %w", name, errName)
		}
		raw = append(append(raw, byte(len(label))), label...)
	}
	raw = binary.BigEndian.AppendUint16(append(raw, 0), kind)
	return binary.BigEndian.AppendUint16(raw, classINET), nil
}
