package healthz

import (
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// FromHere reports whether a request's connection comes from loopback. Its address is honest, as the rules redirect nobody
// to a port of ours. But should one be behind them after all, on another port than they know, then strangers would come
// from the address that inbound dials from; nobody else has a reason to use it.
func FromHere(r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	address := from.Addr().Unmap()
	return err == nil && address.IsLoopback() && address != capture.InboundSource4
}

// MeansHere reports whether a Host, with any port, names loopback without asking anybody. A page whose own name has come
// to mean 127.0.0.1 (DNS rebinding) has its browser say that name. Requests of HTTP/1.0 may have no Host.
func MeansHere(host string) bool {
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
