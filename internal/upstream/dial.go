// Package upstream dials the workload and the world on behalf of a downstream connection.
package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// Dialer opens upstream connections. They have keep-alive as package sockopt says.
type Dialer struct {
	dialer net.Dialer
}

// NewDialer gives up on a connection after timeout; zero or less leaves that to the kernel.
func NewDialer(timeout time.Duration) *Dialer {
	dialer := net.Dialer{Timeout: max(timeout, 0), Control: sockopt.DialControl, KeepAlive: -1}
	dialer.SetMultipathTCP(false)
	return &Dialer{dialer}
}

// Dial connects to remote. A valid local is the source address; its port is the kernel's choice. The error is for
// Reason to judge.
func (d *Dialer) Dial(ctx context.Context, local netip.Addr, remote netip.AddrPort) (*net.TCPConn, error) {
	network := "tcp4"
	if remote.Addr().Is6() {
		network = "tcp6"
	}
	var source netip.AddrPort
	if local.IsValid() {
		source = netip.AddrPortFrom(local, 0)
	}
	return d.dialer.DialTCP(ctx, network, source, remote)
}

// Reason names what a dial error means for the flow.
func Reason(err error) flow.Reason {
	var netErr net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		return flow.UpstreamRefused
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return flow.NoDescriptors
	case errors.Is(err, context.Canceled):
		return flow.DrainDeadline
	case errors.As(err, &netErr) && netErr.Timeout():
		return flow.UpstreamTimeout
	default:
		return flow.UpstreamUnreachable
	}
}
