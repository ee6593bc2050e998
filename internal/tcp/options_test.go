package tcp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// TestOriginalDst redirects connections in a namespace and compares what the accepted ones return.
func TestOriginalDst(t *testing.T) {
	nettest.RequireRoot(t)
	pod, peer := nettest.PodAndPeer(t)
	for _, program := range []string{"iptables", "ip6tables"} {
		pod.MustRun(t, program, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "80:90", "-j", "REDIRECT", "--to-ports", "15006")
	}
	for _, c := range []struct {
		name, listen string
		dialled      netip.AddrPort
	}{
		{"IPv4", "0.0.0.0:15006", netip.AddrPortFrom(nettest.PodIP4, 80)},
		{"IPv6", "[::]:15006", netip.AddrPortFrom(nettest.PodIP6, 81)},
		{"not redirected: our own listener", "0.0.0.0:15006", netip.AddrPortFrom(nettest.PodIP4, 15006)},
		{"not redirected, IPv6", "[::]:15006", netip.AddrPortFrom(nettest.PodIP6, 15006)},
	} {
		t.Run(c.name, func(t *testing.T) {
			listener := listenIn(t, pod, newPoller(t), c.listen)
			conn, err := peer.Dial("tcp", c.dialled.String(), 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			accepted, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			if got, err := accepted.OriginalDst(); err != nil || got != c.dialled {
				t.Errorf("OriginalDst = %v, %v; want %v", got, err, c.dialled)
			}
			if got, want := accepted.RemoteAddr().String(), conn.LocalAddr().String(); got != want {
				t.Errorf("RemoteAddr = %v, want %v", got, want)
			}
		})
	}
}

func TestOriginalDstWithoutConnectionTrackingIsAnError(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "untracked")
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener := listenIn(t, ns, newPoller(t), address)
		conn, err := ns.Dial("tcp", listener.Addr().String(), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		accepted, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		got, err := accepted.OriginalDst()
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOPROTOOPT) {
			t.Errorf("%s: OriginalDst = %v, %v; want ENOENT or ENOPROTOOPT", address, got, err)
		}
	}
}

// TestSocketOptions reads the options back from an accepted socket, for which they are inherited, and from a dialled one.
func TestSocketOptions(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		dialled, accepted := connected(t, newPoller(t), address)
		for which, conn := range map[string]*Conn{"accepted": accepted, "dialled": dialled} {
			idle, interval := option(t, conn, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE), option(t, conn, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)
			if on := option(t, conn, unix.SOL_SOCKET, unix.SO_KEEPALIVE); on != 1 || idle > 30 || interval > 30 {
				t.Errorf("%s, %s: keep-alive %d, first probe after %d s, then every %d s; want on, at most 30 s", address, which, on, idle, interval)
			}
			if nodelay := option(t, conn, unix.IPPROTO_TCP, unix.TCP_NODELAY); nodelay != 1 {
				t.Errorf("%s, %s: TCP_NODELAY is off", address, which)
			}
			if inline := option(t, conn, unix.SOL_SOCKET, unix.SO_OOBINLINE); inline != 1 {
				t.Errorf("%s, %s: SO_OOBINLINE is off", address, which)
			}
		}
	}
}

// TestSourcePortsAreReusedAcrossDestinations opens more connections from one address than there are source ports, to two
// destinations. With an ordinary bind the kernel would reserve each port for all destinations.
func TestSourcePortsAreReusedAcrossDestinations(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "ports")
	ns.Do(t, func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40009"), 0)
	})
	poller, waiter := newPoller(t), NewWaiter(t.Context())
	defer waiter.Close()
	for _, address := range []string{"127.0.0.1:7001", "127.0.0.1:7002"} {
		listener := listenIn(t, ns, poller, address)
		for i := range 10 {
			ns.Do(t, func() error {
				conn, err := poller.Dial(waiter, netip.MustParseAddr("127.0.0.6"), listener.Addr(), time.Now().Add(5*time.Second))
				if err != nil {
					return fmt.Errorf("connection %d to %s: %w", i+1, address, err)
				}
				t.Cleanup(conn.Close)
				return nil
			})
		}
	}
}

// TestDialRefusesASelfConnection limits the source ports to a single one, and dials that port.
func TestDialRefusesASelfConnection(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "itself")
	var poller *Poller
	ns.Do(t, func() (err error) {
		if err = os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40000"), 0); err == nil {
			poller, err = NewPoller()
		}
		return err
	})
	defer poller.Close()
	waiter := NewWaiter(t.Context())
	defer waiter.Close()
	for _, remote := range []string{"127.0.0.1:40000", "[::1]:40000"} {
		remote := netip.MustParseAddrPort(remote)
		for _, source := range []netip.Addr{{}, remote.Addr()} {
			ns.Do(t, func() error {
				for range 3 { // each attempt must leave the port free for the next
					if conn, err := poller.Dial(waiter, source, remote, time.Now().Add(patience)); !errors.Is(err, unix.ECONNREFUSED) {
						t.Errorf("from %v to %v: %v, %v; want ECONNREFUSED", source, remote, conn, err)
					}
				}
				return nil
			})
		}
	}
}

// TestDialAsUsesAForeignAddress dials from addresses that are not assigned in the namespace.
func TestDialAsUsesAForeignAddress(t *testing.T) {
	nettest.RequireRoot(t)
	const mark = 77
	pod, _ := nettest.PodAndPeer(t)
	pod.DeliverMarked(t, mark)
	pod.AnswerMarked(t)
	poller, waiter := newPoller(t), NewWaiter(t.Context())
	defer waiter.Close()
	for _, c := range []struct{ here, client netip.Addr }{
		{nettest.PodIP4, netip.MustParseAddr("203.0.113.50")}, {nettest.PodIP6, netip.MustParseAddr("2001:db8:9::50")},
	} {
		listener := listenIn(t, pod, poller, netip.AddrPortFrom(c.here, 0).String())
		dial := func(port uint16) (conn *Conn, err error) {
			pod.Do(t, func() error {
				conn, err = poller.DialAs(waiter, netip.AddrPortFrom(c.client, port), mark, listener.Addr(), time.Now().Add(patience))
				return nil
			})
			return conn, err
		}
		client := netip.AddrPortFrom(c.client, 20000)
		conn, err := dial(client.Port())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		accepted, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		if conn.LocalAddr() != client || accepted.RemoteAddr() != client {
			t.Errorf("dialled as %v: LocalAddr = %v, the listener sees %v", client, conn.LocalAddr(), accepted.RemoteAddr())
		}
		if _, err := dial(client.Port()); !errors.Is(err, unix.EADDRNOTAVAIL) {
			t.Errorf("a second connection with the same addresses: %v, want EADDRNOTAVAIL", err)
		}
		another, err := dial(20001)
		if err != nil {
			t.Fatalf("from another port of the same client address: %v", err)
		}
		defer another.Close()
		everywhere := listenIn(t, pod, poller, netip.AddrPortFrom(unspecified(c.here), 0).String())
		if _, err := dial(everywhere.Addr().Port()); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("from a listener's port: %v, want EADDRINUSE", err)
		}
	}
}

func unspecified(like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// TestTransparentListenerKeepsTheDestination sends connections from TPROXY rules and from a REDIRECT rule to one listener.
func TestTransparentListenerKeepsTheDestination(t *testing.T) {
	nettest.RequireRoot(t)
	const mark = 77
	pod, peer := nettest.PodAndPeer(t)
	pod.DeliverMarked(t, mark)
	for _, program := range []string{"iptables", "ip6tables"} {
		pod.MustRun(t, program, "-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "--dport", "80", "-j", "TPROXY", "--on-port", "15006", "--tproxy-mark", fmt.Sprint(mark))
		pod.MustRun(t, program, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "81", "-j", "REDIRECT", "--to-ports", "15006")
	}
	for _, here := range []netip.Addr{nettest.PodIP4, nettest.PodIP6} {
		var listener *Listener
		pod.Do(t, func() (err error) {
			listener, err = newPoller(t).ListenTransparent(netip.AddrPortFrom(unspecified(here), 15006))
			return err
		})
		defer listener.Close()
		for port, localPort := range map[uint16]uint16{80: 80, 81: 15006} {
			dialled := netip.AddrPortFrom(here, port)
			conn, err := peer.Dial("tcp", dialled.String(), patience)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			accepted, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			if got, want := accepted.LocalAddr(), netip.AddrPortFrom(here, localPort); got != want {
				t.Errorf("dialled %v: LocalAddr = %v, want %v", dialled, got, want)
			}
			if got, err := accepted.OriginalDst(); err != nil || got != dialled {
				t.Errorf("OriginalDst = %v, %v; want %v", got, err, dialled)
			}
		}
	}
}

// TestRedirectedConnectionsFromOneClientPort opens two connections from the same client port to two ports of the pod. The
// rule redirects both to one listener, and each must receive its own packets only.
func TestRedirectedConnectionsFromOneClientPort(t *testing.T) {
	nettest.RequireRoot(t)
	pod, peer := nettest.PodAndPeer(t)
	for _, program := range []string{"iptables", "ip6tables"} {
		pod.MustRun(t, program, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "81:82", "-j", "REDIRECT", "--to-ports", "15006")
	}
	for client, here := range map[netip.Addr]netip.Addr{nettest.PeerIP4: nettest.PodIP4, nettest.PeerIP6: nettest.PodIP6} {
		var listener *Listener
		pod.Do(t, func() (err error) {
			listener, err = newPoller(t).ListenTransparent(netip.AddrPortFrom(unspecified(here), 15006))
			return err
		})
		defer listener.Close()
		dialer := net.Dialer{
			LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(client, 40_000)), Timeout: patience,
			Control: func(_, _ string, raw syscall.RawConn) (err error) {
				controlErr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
				return errors.Join(controlErr, err)
			},
		}
		for port := uint16(81); port <= 82; port++ {
			dialled := netip.AddrPortFrom(here, port)
			peer.Do(t, func() error {
				conn, err := dialer.Dial("tcp", dialled.String())
				if err == nil {
					t.Cleanup(func() { conn.Close() })
				}
				return err
			})
			accepted, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			if err := accepted.ClearTransparent(); err != nil {
				t.Fatal(err)
			}
			if got, err := accepted.OriginalDst(); err != nil || got != dialled {
				t.Errorf("OriginalDst = %v, %v; want %v", got, err, dialled)
			}
		}
	}
}

func option(t *testing.T, conn *Conn, level, name int) int {
	t.Helper()
	value, err := unix.GetsockoptInt(conn.fd, level, name)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// pending returns the number of bytes that can be read.
func pending(t *testing.T, conn *Conn) int {
	t.Helper()
	n, err := unix.IoctlGetInt(conn.fd, unix.SIOCINQ)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
