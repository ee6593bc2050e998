package run

import (
	"net/netip"
	"os"
	"strings"

	"github.com/pillion-proxy/pillion/internal/dns"
)

const (
	hostsFile  = "/etc/hosts"
	resolvConf = "/etc/resolv.conf"
)

// nameServers returns the configured servers, or else those of the caller. Without any, as the C library does, it returns
// one on this host.
func nameServers(configured []netip.AddrPort) ([]netip.AddrPort, error) {
	if len(configured) > 0 {
		return configured, nil
	}
	servers, err := dns.ReadResolvConf(resolvConf)
	if len(servers) == 0 && (err == nil || os.IsNotExist(err)) {
		return []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53")}, nil
	}
	return servers, err
}

// readHosts returns the names of a file in the format of hosts(5), for programs that query DNS without reading it. A
// missing file has none.
func readHosts(path string) []dns.Host {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var hosts []dns.Host
	index := make(map[string]int)
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		address, err := netip.ParseAddr(fields[0])
		if err != nil || address.Zone() != "" {
			continue
		}
		for _, name := range fields[1:] {
			name = strings.ToLower(strings.TrimSuffix(name, "."))
			i, known := index[name]
			if !known {
				i = len(hosts)
				index[name], hosts = i, append(hosts, dns.Host{Name: name})
			}
			hosts[i].Addresses = append(hosts[i].Addresses, address)
		}
	}
	return hosts
}
