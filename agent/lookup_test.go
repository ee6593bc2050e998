package agent

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

func TestFamiliesOfAddresses(t *testing.T) {
	v4, v6 := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8::1")
	for _, c := range []struct {
		family mesh.DNSFamily
		has    []netip.Addr
		want   string
	}{
		{mesh.DNSAuto, []netip.Addr{v4, v6}, "[2001:db8::1] 6s"},
		{mesh.DNSAuto, []netip.Addr{v4}, "[203.0.113.1] 4s"},
		{mesh.DNSv4, []netip.Addr{v4, v6}, "[203.0.113.1] 4s"},
		{mesh.DNSv6, []netip.Addr{v4, v6}, "[2001:db8::1] 6s"},
		{mesh.DNSv6, []netip.Addr{v4}, "[] 0s"},
		{mesh.DNSv4Preferred, []netip.Addr{v4, v6}, "[203.0.113.1] 4s"},
		{mesh.DNSv4Preferred, []netip.Addr{v6}, "[2001:db8::1] 6s"},
		{mesh.DNSAll, []netip.Addr{v4, v6}, "[203.0.113.1 2001:db8::1] 4s"},
	} {
		lookup := func(_ context.Context, _ string, ipv6 bool) (found []netip.Addr, ttl time.Duration, _ error) {
			for _, a := range c.has {
				if a.Is6() == ipv6 {
					found, ttl = append(found, a), 4*time.Second
					if ipv6 {
						ttl = 6 * time.Second
					}
				}
			}
			return found, ttl, nil
		}
		addresses, ttl, err := lookupFamily(context.Background(), lookup, "a.example", c.family)
		if got := fmt.Sprint(addresses, " ", ttl); got != c.want || err != nil {
			t.Errorf("family %d of %v: %s, %v; want %s", c.family, c.has, got, err, c.want)
		}
	}
}
