package live

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Filter selects records. The zero value selects all. Each key that is set must match.
type Filter struct {
	direction *flow.Direction
	host      []byte
	path      []byte
	status    statusRange
	address   netip.Prefix
	port      uint16
}

type statusRange struct{ first, last int }

// FilterKeys are the keys of a Filter in a query.
var FilterKeys = []string{"direction", "host", "path", "status", "address"}

const longestFilter = 256 // bytes of a value

// ParseFilter reads a filter from a query. A key that is neither in FilterKeys nor in others is an error.
func ParseFilter(query url.Values, others ...string) (Filter, error) {
	var f Filter
	for key, values := range query {
		if slices.Contains(others, key) {
			continue
		}
		if err := f.Set(key, values[len(values)-1]); err != nil {
			return Filter{}, fmt.Errorf("%s=%.40q: %w", key, values[len(values)-1], err)
		}
	}
	return f, nil
}

// Set sets one key. The error describes valid values, but names neither key nor value. An empty value is ignored.
func (f *Filter) Set(key, value string) error {
	if value == "" && slices.Contains(FilterKeys, key) {
		return nil
	}
	if len(value) > longestFilter {
		return fmt.Errorf("too long: use %d bytes at most", longestFilter)
	}
	switch key {
	case "direction":
		for _, d := range []flow.Direction{flow.Inbound, flow.Outbound} {
			if value == d.String() {
				f.direction = &d
				return nil
			}
		}
		return errors.New("not a direction: use inbound or outbound")
	case "host":
		f.host = []byte(value)
	case "path":
		f.path = []byte(value)
	case "status":
		return f.setStatus(value)
	case "address":
		return f.setAddress(value)
	default:
		return fmt.Errorf("unknown: use %s", strings.Join(FilterKeys, ", "))
	}
	return nil
}

func (f *Filter) setStatus(value string) error {
	class, isClass := strings.CutSuffix(value, "xx")
	n, err := strconv.Atoi(class)
	switch {
	case err == nil && isClass && 1 <= n && n <= 5:
		f.status = statusRange{n * 100, n*100 + 99}
	case err == nil && !isClass && 100 <= n && n <= 999:
		f.status = statusRange{n, n}
	default:
		return errors.New("not a status: use one such as 404, or a class such as 5xx")
	}
	return nil
}

func (f *Filter) setAddress(value string) error {
	if prefix, err := netip.ParsePrefix(value); err == nil {
		f.address, f.port = prefix.Masked(), 0
		return nil
	}
	if both, err := netip.ParseAddrPort(value); err == nil {
		f.address, f.port = netip.PrefixFrom(both.Addr(), both.Addr().BitLen()), both.Port()
		return nil
	}
	if address, err := netip.ParseAddr(value); err == nil && address.Zone() == "" {
		f.address, f.port = netip.PrefixFrom(address, address.BitLen()), 0
		return nil
	}
	return errors.New("not an address: use one such as 192.0.2.1, 192.0.2.1:80, [2001:db8::1]:80 or 192.0.2.0/24")
}

// matches is called on the data path and does not allocate.
func (f *Filter) matches(e *entry) bool {
	switch {
	case f.direction != nil && *f.direction != e.direction:
		return false
	case len(f.host) > 0 && !sameHost(f.host, e.get(authority)) && !sameName(f.host, e.sni):
		return false
	case !bytes.HasPrefix(e.get(path), f.path):
		return false
	case f.status.first != 0 && (e.status < f.status.first || e.status > f.status.last):
		return false
	case f.address.IsValid() && !f.at(e.downstream) && !f.at(e.destination) && !f.at(e.upstream):
		return false
	}
	return true
}

func (f *Filter) at(a netip.AddrPort) bool {
	return f.address.Contains(a.Addr().Unmap()) && (f.port == 0 || f.port == a.Port())
}

// sameHost ignores case, and the authority's port if want has no port.
func sameHost(want, authority []byte) bool {
	if bytes.EqualFold(want, authority) {
		return true
	}
	colon := bytes.LastIndexByte(authority, ':')
	if colon < 0 {
		return false
	}
	host := authority[:colon]
	if inside, bracketed := bytes.CutPrefix(host, []byte("[")); bracketed {
		host = bytes.TrimSuffix(inside, []byte("]"))
	}
	return bytes.EqualFold(want, host)
}

// sameName ignores case. Both are ASCII, or differ.
func sameName(a []byte, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}
