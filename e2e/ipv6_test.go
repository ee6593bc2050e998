package e2e

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// IPv6 is captured if the interfaces have it, whatever was written to all of them before, as by CNI plugins.
func TestIPv6IsCapturedWhereAnInterfaceHasIt(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	for _, flavour := range []string{nft, legacy, native} {
		t.Run(flavour, func(t *testing.T) {
			s := &stage{}
			s.pod, s.peer = nettest.PodAndPeer(t)
			setSysctls(t, s.pod, "all=1", "lo=0", "eth0=0")
			s.pod.AddAddress(t, "eth0", netip.PrefixFrom(nettest.PodIP6, 64))
			s.pod.AddDefaultRoute(t, nettest.PeerIP6)
			initPod(t, s.pod, flavour)
			s.agent = startAgent(t, s.pod)
			s.everyWay(t, func(t *testing.T, w way) {
				downstream, upstream := w.connect(t)
				converse(t, downstream, upstream)
			})

			// Without it on the loopback, init cannot capture it, and neither init nor check succeeds.
			setSysctls(t, s.pod, "lo=1")
			for command, want := range map[string]int{"init": 1, "rules check": 2} {
				_, stderr, code := execute(t, s.pod, []string{pathWith(t, flavour)}, append(strings.Fields(command), "-i", "*", "-b", "*")...)
				if code != want || !strings.Contains(stderr, "IPv6 cannot be captured: it is disabled on lo (net.ipv6.conf.lo.disable_ipv6) but not elsewhere (2001:db8:1::2 on eth0)") {
					t.Errorf("%s: exit code %d, want %d\n%s", command, code, want, stderr)
				}
			}
		})
	}
}

// setSysctls writes to net.ipv6.conf.*.disable_ipv6.
func setSysctls(t *testing.T, ns *nettest.Namespace, settings ...string) {
	t.Helper()
	ns.Do(t, func() error {
		for _, setting := range settings {
			name, value, _ := strings.Cut(setting, "=")
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte(value), 0); err != nil {
				return err
			}
		}
		return nil
	})
}
