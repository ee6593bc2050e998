package run

import (
	"cmp"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// proxyVariables are those by which programs find a proxy.
var proxyVariables = []string{"http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"}

// unreachableProxies returns a line for each proxy of the environment on the caller's loopback, which the command does not
// reach: its loopback is its own, except for the ports reached.
func unreachableProxies(getenv func(string) string, reached capture.Ports) (lines []string) {
	seen := make(map[uint16]bool)
	for _, name := range proxyVariables {
		port := loopbackPort(getenv(name))
		if port == 0 || seen[port] || reached.Contains(port) {
			continue
		}
		seen[port] = true
		lines = append(lines, fmt.Sprintf("%s leads to the command's own loopback: add --host-loopback %d to reach the proxy of this machine", name, port))
	}
	return lines
}

// loopbackPort returns the port of a proxy on loopback, and 0 for others.
func loopbackPort(proxy string) uint16 {
	if !strings.Contains(proxy, "://") {
		proxy = "http://" + proxy
	}
	u, err := url.Parse(proxy)
	if err != nil {
		return 0
	}
	address, err := netip.ParseAddr(u.Hostname())
	if u.Hostname() != "localhost" && (err != nil || !address.Unmap().IsLoopback()) {
		return 0
	}
	usual := map[string]string{"http": "80", "https": "443"}[u.Scheme]
	port, _ := strconv.ParseUint(cmp.Or(u.Port(), usual, "1080"), 10, 16)
	return uint16(port)
}
