package dns

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"strings"
)

// maxServers bounds the servers that are read from resolv.conf. The C library reads three.
const maxServers = 64

// ReadResolvConf returns the servers of path, a resolv.conf(5): all of them, in their order and with their zones, at port
// 53. Invalid lines are skipped, as by every resolver.
func ReadResolvConf(path string) ([]netip.AddrPort, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading name servers: %w", err)
	}
	defer file.Close()
	var servers []netip.AddrPort
	lines := bufio.NewScanner(file)
	for lines.Scan() && len(servers) < maxServers {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(fields[1]); err == nil {
			servers = append(servers, netip.AddrPortFrom(addr, 53))
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("reading name servers from %s: %w", path, err)
	}
	return servers, nil
}
