package upstream

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// TestReason dials each kind of unreachable destination.
func TestReason(t *testing.T) {
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	// No host has this address. The static neighbour entry prevents the kernel from detecting that.
	silent := netip.MustParseAddr("198.51.100.99")
	pod.Do(t, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.NeighAdd(&netlink.Neigh{
			LinkIndex: eth0.Attrs().Index, State: unix.NUD_PERMANENT, IP: silent.AsSlice(),
			HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9},
		})
	})
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	waiter := tcp.NewWaiter(t.Context())
	defer waiter.Close()
	for _, c := range []struct {
		name   string
		remote netip.AddrPort
		source netip.Addr
		want   flow.Reason
	}{
		{"nothing listens", netip.AddrPortFrom(nettest.PeerIP4, 9), netip.Addr{}, flow.UpstreamRefused},
		{"nothing listens, IPv6", netip.AddrPortFrom(nettest.PeerIP6, 9), netip.Addr{}, flow.UpstreamRefused},
		{"nobody answers", netip.AddrPortFrom(silent, 9), netip.Addr{}, flow.UpstreamTimeout},
		{"no such source address", netip.AddrPortFrom(nettest.PeerIP6, 9), netip.MustParseAddr("::6"), flow.UpstreamUnreachable},
	} {
		t.Run(c.name, func(t *testing.T) {
			var dialErr error
			pod.Do(t, func() error {
				timeout := 5 * time.Second
				if c.want == flow.UpstreamTimeout {
					timeout = 100 * time.Millisecond
				}
				conn, _, err := (&Dialer{Poller: poller, Timeout: timeout}).Dial(waiter, Target{Source: c.source, Address: c.remote})
				if err == nil {
					conn.Close()
				}
				dialErr = err
				return nil
			})
			if dialErr == nil {
				t.Fatal("the dial succeeded")
			}
			if got := Reason(dialErr); got != c.want {
				t.Errorf("Reason(%v) = %s, want %s", dialErr, got, c.want)
			}
		})
	}
	t.Run("cancelled while it waits", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		pod.Do(t, func() error {
			nettest.OnceBlocked(t, "tcp.(*Waiter).Wait", func() { cancel(); poller.WakeAll() })
			canceled := tcp.NewWaiter(ctx)
			defer canceled.Close()
			_, _, err := (&Dialer{Poller: poller}).Dial(canceled, Target{Address: netip.AddrPortFrom(silent, 9)})
			if got := Reason(err); got != flow.DrainDeadline {
				t.Errorf("Reason(%v) = %s", err, got)
			}
			return nil
		})
	})
	t.Run("other errors", func(t *testing.T) {
		for err, want := range map[error]flow.Reason{
			unix.EMFILE: flow.NoDescriptors, unix.ENFILE: flow.NoDescriptors, unix.ENOSPC: flow.NoDescriptors,
			unix.ENOMEM: flow.NoDescriptors, unix.ENOBUFS: flow.NoDescriptors, unix.EHOSTUNREACH: flow.UpstreamUnreachable,
			unix.ENETUNREACH: flow.UpstreamUnreachable, unix.ETIMEDOUT: flow.UpstreamTimeout, io.EOF: flow.UpstreamUnreachable,
		} {
			if got := Reason(fmt.Errorf("connecting: %w", os.NewSyscallError("connect", err))); got != want {
				t.Errorf("Reason(%v) = %s, want %s", err, got, want)
			}
		}
	})
}
