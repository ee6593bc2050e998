package iptables

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// Probe proves by a connection, in the network namespace of the calling thread, that the rules for spec are at work: it
// dials the agent's own source address at port, and one of the agent's ports, at which it listens meanwhile, has to be
// where that ends. Only the agent's user or group is captured there; MayProbe tells whether this process is one. It tries
// until ctx is done, in each family that has the source address.
func Probe(ctx context.Context, spec capture.Spec, port uint16) error {
	state, err := readIPv6()
	if err != nil {
		return err
	}
	for _, family := range Families {
		if family == IPv6 && !state.source {
			continue
		}
		if err := probe(ctx, spec, factsOf(family), port); err != nil {
			return fmt.Errorf("probing the %s rules: %w", family, err)
		}
	}
	return nil
}

// MayProbe tells whether this process's connections are the agent's by the rules for spec.
func MayProbe(spec capture.Spec) bool {
	contains := func(ids []capture.IDRange, id int) bool {
		return slices.ContainsFunc(ids, func(r capture.IDRange) bool { return r.Contains(uint32(id)) })
	}
	return contains(spec.ProxyUIDs, os.Geteuid()) || contains(spec.ProxyGIDs, os.Getegid())
}

const probeInterval = time.Second

func probe(ctx context.Context, spec capture.Spec, f facts, port uint16) error {
	target := netip.AddrPortFrom(f.inboundSource.Addr(), port)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var watching sync.WaitGroup
	defer watching.Wait()
	seen := make(chan struct{}, 2)
	for _, own := range []uint16{spec.OutboundPort, spec.InboundPort} {
		config := net.ListenConfig{Control: beside}
		config.SetMultipathTCP(false)
		listener, err := config.Listen(ctx, "tcp", netip.AddrPortFrom(f.localhost.Addr(), own).String())
		if err != nil {
			return err
		}
		defer listener.Close()
		watching.Go(func() { awaitCaptured(listener.(*net.TCPListener), target, seen) })
	}
	from := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(f.localhost.Addr(), 0)), Timeout: probeInterval}
	ticker := time.NewTicker(probeInterval)
	defer ticker.Stop()
	for {
		conn, err := from.DialContext(ctx, "tcp", target.String())
		if err == nil {
			conn.Close()
		}
		select {
		case <-seen:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("no connection to %v came to port %d or %d: %w", target, spec.OutboundPort, spec.InboundPort, cmp.Or(err, ctx.Err()))
		case <-ticker.C:
		}
	}
}

// beside lets the probe listen where the agent listens already.
func beside(_, _ string, c syscall.RawConn) (err error) {
	controlErr := c.Control(func(fd uintptr) {
		err = cmp.Or(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
	})
	return cmp.Or(controlErr, err)
}

// awaitCaptured accepts until the listener is closed, and tells of a connection that was going to target.
func awaitCaptured(listener *net.TCPListener, target netip.AddrPort, seen chan<- struct{}) {
	for {
		conn, err := listener.AcceptTCP()
		if err != nil {
			return
		}
		if raw, err := conn.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) {
				peer := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
				if dst, err := sockopt.OriginalDst(int(fd), peer); err == nil && dst == target {
					select {
					case seen <- struct{}{}:
					default:
					}
				}
			})
		}
		conn.Close()
	}
}
