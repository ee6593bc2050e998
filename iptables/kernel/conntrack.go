package kernel

import (
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// CountTCP counts the TCP connections in conntrack that have one of the marks and have not ended.
func CountTCP(marks ...uint32) (n int, err error) {
	for _, family := range ruleset.Families {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily(familyNumber(family)))
		if err != nil {
			return 0, fmt.Errorf("listing tracked connections: %w", err)
		}
		for _, f := range flows {
			tcp, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP)
			ended := ok && (tcp.State == nl.TCP_CONNTRACK_TIME_WAIT || tcp.State == nl.TCP_CONNTRACK_CLOSE)
			if slices.Contains(marks, f.Mark) && !ended {
				n++
			}
		}
	}
	return n, nil
}
