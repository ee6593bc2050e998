package serve

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// TakeProxyHeader reads the header of the PROXY protocol, version 1 or 2, with which connections to some listeners begin. The
// client's address in it becomes the record's. Policies call the load balancer's address, that of the packets, direct. The
// destination in it is not used. Call TakeProxyHeader before List: the address must not change afterwards.
func (c *Conn) TakeProxyHeader() bool {
	f, limit := c.governed.snapshot.ProxyFilter(c.Record.OriginalDestination)
	if f == nil {
		return true
	}
	if limit <= 0 {
		limit = handshakeTimeout
	}
	b := tcp.TakeBuffer()
	client, err := c.proxyHeader(b, c.Record.Opened.Add(limit), f.AllowWithout)
	if err == nil {
		if client.IsValid() {
			c.Record.SetClient(client)
		}
		if c.sniffer = sniffers.Get().(*sniff.Sniffer); b.Len() > 0 {
			c.sniffer.Read = b
			return true
		}
	}
	b.Release()
	if err == nil {
		return true
	}
	var violation proxyError
	switch {
	case errors.As(err, &violation):
		c.Refuse(flow.BadProxyHeader, err)
	case errors.Is(err, io.EOF): // the probe of a load balancer
		c.Down.Close()
		c.Record.Close(c.role.flows, flow.Closed, nil)
	default:
		c.Refuse(sniff.Reason(err), err)
	}
	return false
}

// proxyHeader reads into b until it holds the whole header, and removes that. A wait keeps no more than tcp.ShrunkSize.
func (c *Conn) proxyHeader(b *tcp.Buffer, deadline time.Time, optional bool) (client netip.AddrPort, err error) {
	for {
		n, client, err := parseProxyHeader(b.Bytes())
		switch {
		case err == errNoProxyHeader && optional:
			return client, nil
		case err != nil:
			return client, err
		case n > 0:
			b.Discard(n)
			return client, nil
		case b.Len() >= maxProxyHeader:
			return client, errLongProxyHeader
		}
		switch _, err = b.FillAtMost(c.Down, maxProxyHeader-b.Len()); {
		case err == io.EOF && b.Len() > 0:
			return client, errNoProxyHeader
		case err == tcp.ErrAgain:
			b.Shrink()
			if err = c.w.Wait(deadline, c.Down, nil); err == nil && c.leaving() {
				err = sniff.ErrDraining
			}
			if errors.Is(err, tcp.ErrDeadline) {
				err = errLateProxyHeader
			}
		}
		if err != nil {
			return client, err
		}
	}
}

// proxyError is what is wrong with a header.
type proxyError string

func (e proxyError) Error() string { return string(e) }

const (
	errNoProxyHeader   proxyError = "the connection does not begin with a header of the PROXY protocol, as its listener requires"
	errBadProxyHeader  proxyError = "the header of the PROXY protocol is malformed"
	errLongProxyHeader proxyError = "the header of the PROXY protocol has more than 1 KiB"
	errLateProxyHeader proxyError = "the header of the PROXY protocol did not arrive in time"
)

const (
	maxProxyHeader = tcp.ShrunkSize
	maxProxyLine   = 107 // of version 1, with its end
	proxyLine      = "PROXY "
	proxySignature = "\r\n\r\n\x00\r\nQUIT\n"
	proxyFixed     = len(proxySignature) + 4
)

// parseProxyHeader returns the length of the header at the beginning of b, and the client's address in it. The address is not
// valid if the load balancer speaks for itself. A length of 0 without an error means that more has to be read.
func parseProxyHeader(b []byte) (n int, client netip.AddrPort, err error) {
	begins := func(with string) bool { return string(b[:min(len(b), len(with))]) == with[:min(len(b), len(with))] }
	switch {
	case begins(proxyLine):
		end := bytes.IndexByte(b, '\n') + 1
		if end == 0 && len(b) < maxProxyLine {
			return 0, client, nil
		}
		if end == 0 || end > maxProxyLine || b[end-2] != '\r' {
			return 0, client, errBadProxyHeader
		}
		client, err = parseProxyLine(strings.Split(string(b[len(proxyLine):end-2]), " "))
		return end, client, err
	case !begins(proxySignature):
		return 0, client, errNoProxyHeader
	case len(b) < proxyFixed:
		return 0, client, nil
	}
	command, family := b[proxyFixed-4], b[proxyFixed-3]
	n = proxyFixed + int(binary.BigEndian.Uint16(b[proxyFixed-2:]))
	switch {
	case command>>4 != 2 || command&0xf > 1:
		return 0, client, errBadProxyHeader
	case n > maxProxyHeader:
		return 0, client, errLongProxyHeader
	case len(b) < n:
		return 0, client, nil
	case command&0xf == 0, family == 0: // LOCAL, UNSPEC
		return n, client, nil
	}
	client, err = parseProxyAddress(family, b[proxyFixed:n])
	return n, client, err
}

// parseProxyLine reads the words behind PROXY.
func parseProxyLine(words []string) (client netip.AddrPort, err error) {
	if words[0] == "UNKNOWN" {
		return client, nil
	}
	if len(words) != 5 || words[0] != "TCP4" && words[0] != "TCP6" {
		return client, errBadProxyHeader
	}
	for i := 2; i > 0; i-- { // the destination, and the source
		address, err := netip.ParseAddr(words[i])
		port, wrong := strconv.ParseUint(words[i+2], 10, 16)
		if err != nil || wrong != nil || address.Zone() != "" || address.Is4() != (words[0] == "TCP4") {
			return netip.AddrPort{}, errBadProxyHeader
		}
		client = netip.AddrPortFrom(address.Unmap(), uint16(port))
	}
	return client, nil
}

// parseProxyAddress reads the source in the addresses of version 2.
func parseProxyAddress(family byte, b []byte) (netip.AddrPort, error) {
	size := 0
	switch family {
	case 0x11: // TCP over IPv4
		size = 4
	case 0x21: // TCP over IPv6
		size = 16
	}
	if size == 0 || len(b) < 2*size+4 {
		return netip.AddrPort{}, errBadProxyHeader
	}
	address, _ := netip.AddrFromSlice(b[:size])
	return netip.AddrPortFrom(address.Unmap(), binary.BigEndian.Uint16(b[2*size:])), nil
}
