package sockopt_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/sockopt"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// TestOriginalDst redirects in a namespace and asks the accepted socket, for both families and for the two kinds of
// socket that can accept them.
func TestOriginalDst(t *testing.T) {
	nettest.RequireRoot(t)
	pod, peer := nettest.PodAndPeer(t)
	for _, program := range []string{"iptables", "ip6tables"} {
		pod.MustRun(t, program, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "80:90", "-j", "REDIRECT", "--to-ports", "15006")
	}
	for _, c := range []struct {
		name, network, listen string
		dialled               netip.AddrPort
	}{
		{"IPv4", "tcp4", "0.0.0.0:15006", netip.AddrPortFrom(nettest.PodIP4, 80)},
		{"IPv6", "tcp6", "[::]:15006", netip.AddrPortFrom(nettest.PodIP6, 81)},
		{"IPv4 on a dual-stack socket", "tcp", "[::]:15006", netip.AddrPortFrom(nettest.PodIP4, 82)},
		{"IPv6 on a dual-stack socket", "tcp", "[::]:15006", netip.AddrPortFrom(nettest.PodIP6, 83)},
		{"not redirected: our own listener", "tcp4", "0.0.0.0:15006", netip.AddrPortFrom(nettest.PodIP4, 15006)},
	} {
		t.Run(c.name, func(t *testing.T) {
			listener := pod.Listen(t, c.network, c.listen)
			defer listener.Close()
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
			if got, err := sockopt.OriginalDst(accepted.(*net.TCPConn)); err != nil || got != c.dialled {
				t.Errorf("OriginalDst = %v, %v; want %v", got, err, c.dialled)
			}
		})
	}
}

func TestOriginalDstWithoutConnectionTrackingIsAnError(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "untracked")
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener := ns.Listen(t, "tcp", address)
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
		got, err := sockopt.OriginalDst(accepted.(*net.TCPConn))
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOPROTOOPT) {
			t.Errorf("%s: OriginalDst = %v, %v; want ENOENT or ENOPROTOOPT", address, got, err)
		}
		if err != nil && !strings.Contains(err.Error(), accepted.RemoteAddr().String()) {
			t.Errorf("the error does not name the connection: %v", err)
		}
	}
}

// TestKeepAlive reads the options back where they matter: on an accepted socket, which inherits them, and on a dialled
// one.
func TestKeepAlive(t *testing.T) {
	for _, c := range []struct{ network, address string }{{"tcp4", "127.0.0.1:0"}, {"tcp6", "[::1]:0"}} {
		config := net.ListenConfig{Control: sockopt.ListenControl, KeepAlive: -1}
		config.SetMultipathTCP(false)
		listener, err := config.Listen(t.Context(), c.network, c.address)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		dialer := net.Dialer{Control: sockopt.DialControl, KeepAlive: -1}
		dialled, err := dialer.DialContext(t.Context(), c.network, listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer dialled.Close()
		accepted, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		for which, conn := range map[string]net.Conn{"accepted": accepted, "dialled": dialled} {
			on := option(t, conn, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
			idle := option(t, conn, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
			interval := option(t, conn, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)
			if on != 1 || idle > 30 || interval > 30 {
				t.Errorf("%s, %s: keep-alive %d, first probe after %d s, then every %d s; want on, at most 30 s", c.network, which, on, idle, interval)
			}
			if nodelay := option(t, conn, unix.IPPROTO_TCP, unix.TCP_NODELAY); nodelay != 1 {
				t.Errorf("%s, %s: TCP_NODELAY is off", c.network, which)
			}
		}
	}
}

// TestManyConnectionsFromOneSourceAddress opens more connections from one address than it has ports, to two
// destinations. Bound the ordinary way, the kernel would reserve a port for each over all destinations.
func TestSourcePortsCountForEachDestination(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "ports")
	ns.Do(t, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40009"), 0) })
	source := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 6)}
	for _, address := range []string{"127.0.0.1:7001", "127.0.0.1:7002"} {
		listener := ns.Listen(t, "tcp4", address)
		for i := range 10 {
			ns.Do(t, func() error {
				dialer := net.Dialer{Control: sockopt.DialControl, LocalAddr: source, Timeout: 5 * time.Second}
				conn, err := dialer.DialContext(context.Background(), "tcp4", listener.Addr().String())
				if err != nil {
					t.Fatalf("connection %d to %s: %v", i+1, address, err)
				}
				t.Cleanup(func() { conn.Close() })
				return nil
			})
		}
	}
}

func TestResetIsSeenAsReset(t *testing.T) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	sockopt.Reset(accepted.(*net.TCPConn))
	if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read after Reset: %v", err)
	}
}

func option(t *testing.T, conn net.Conn, level, name int) (value int) {
	t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, name) })
	if err != nil {
		t.Fatal(err)
	}
	return value
}
