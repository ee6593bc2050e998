package ownport

import (
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// FromLoopback reports whether a request's connection comes from loopback. The source address can be trusted, because the
// rules never redirect to the agent's own ports. If they did (init was given other ports than the agent), remote clients
// would appear with inbound's source address, and that is rejected.
func FromLoopback(r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	address := from.Addr().Unmap()
	return err == nil && address.IsLoopback() && address != capture.InboundSource4
}

// NamesLoopback reports whether a Host, with any port, names loopback without a DNS lookup. With DNS rebinding, a page's own
// name resolves to 127.0.0.1, and the browser sends that name as Host. An HTTP/1.0 request may have no Host: it is accepted.
func NamesLoopback(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	} else if inner, ok := strings.CutPrefix(host, "["); ok {
		host = strings.TrimSuffix(inner, "]")
	}
	if host == "" || strings.EqualFold(host, "localhost") {
		return true
	}
	address, err := netip.ParseAddr(host)
	return err == nil && address.Unmap().IsLoopback()
}
