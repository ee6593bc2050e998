package localaddr

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func TestContains(t *testing.T) {
	set := Of(netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("fe80::1"), netip.MustParseAddr("::1"))
	for address, want := range map[string]bool{
		"198.51.100.2": true, "::ffff:198.51.100.2": true, "198.51.100.3": false, "2001:db8::2": true, "2001:db8::3": false,
		"fe80::1%eth0": true, "::1": true, "::6": false, "127.0.0.1": true, "127.9.9.9": true, "128.0.0.1": false,
		"0.0.0.0": false, "::": false,
	} {
		if got := set.Contains(netip.MustParseAddr(address)); got != want {
			t.Errorf("Contains(%s) = %v, want %v", address, got, want)
		}
	}
}

func TestTheSetFollowsTheKernel(t *testing.T) {
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	ctx, cancel := context.WithCancel(t.Context())
	var set *Set
	pod.Do(t, func() (err error) {
		set, err = Watch(ctx, slog.New(slog.DiscardHandler))
		return err
	})
	defer set.Wait()
	defer cancel()
	for _, address := range []netip.Addr{nettest.PodIP4, nettest.PodIP6, netip.IPv6Loopback()} {
		if !set.Contains(address) {
			t.Errorf("%v is missing", address)
		}
	}
	if set.Contains(nettest.PeerIP4) {
		t.Error("the peer's address counts as our own")
	}
	if err := set.Current(); err != nil {
		t.Errorf("not current: %v", err)
	}

	for _, later := range []netip.Prefix{netip.MustParsePrefix("203.0.113.200/32"), netip.MustParsePrefix("::6/128")} {
		pod.AddAddress(t, "lo", later)
		nettest.Eventually(t, later.String()+" to appear", func() bool { return set.Contains(later.Addr()) })
		pod.Do(t, func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			addr, err := netlink.ParseAddr(later.String())
			if err != nil {
				return err
			}
			return netlink.AddrDel(lo, addr)
		})
		nettest.Eventually(t, later.String()+" to disappear", func() bool { return !set.Contains(later.Addr()) })
	}
}

func TestAStormOfChangesIsNotLost(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "storm")
	ctx, cancel := context.WithCancel(t.Context())
	var set *Set
	ns.Do(t, func() (err error) {
		set, err = Watch(ctx, slog.New(slog.DiscardHandler))
		return err
	})
	defer set.Wait()
	defer cancel()
	var last netip.Addr
	for i := range 2000 {
		last = netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
		if i >= 250 {
			last = netip.AddrFrom4([4]byte{198, 51, byte(i / 250), byte(i % 250)})
		}
		ns.AddAddress(t, "lo", netip.PrefixFrom(last, 32))
	}
	nettest.Eventually(t, "the last address", func() bool { return set.Contains(last) && set.Current() == nil })
}

// Any privileged process in the namespace can send to our netlink socket. A malformed message must not end the watch.
func TestMalformedMessagesDoNotEndTheWatch(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "malformed")
	ctx, cancel := context.WithCancel(t.Context())
	var set *Set
	ns.Do(t, func() (err error) {
		set, err = Watch(ctx, slog.New(slog.DiscardHandler))
		return err
	})
	defer set.Wait()
	defer cancel()
	ns.Do(t, func() error {
		sockets, err := os.ReadFile("/proc/thread-self/net/netlink")
		if err != nil {
			return err
		}
		sender, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer unix.Close(sender)
		sent := 0
		for line := range strings.Lines(string(sockets)) {
			fields := strings.Fields(line)
			port, err := strconv.ParseUint(fields[2], 10, 32)
			if err != nil || port == 0 || fields[3] == "00000000" { // the watcher's socket is the one that has joined groups
				continue
			}
			sent++
			if err := unix.Sendto(sender, make([]byte, 16), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: uint32(port)}); err != nil {
				return err
			}
		}
		if sent == 0 {
			return errors.New("found no netlink socket that has joined groups")
		}
		return nil
	})
	later := netip.MustParsePrefix("203.0.113.5/32")
	ns.AddAddress(t, "lo", later)
	nettest.Eventually(t, "the new address", func() bool { return set.Contains(later.Addr()) && set.Current() == nil })
}
