// Package upstream dials the workload and the world on behalf of a downstream connection.
package upstream

import (
	"errors"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Dialer opens upstream connections.
type Dialer struct {
	Poller  *tcp.Poller
	Timeout time.Duration // for one dial; zero or less leaves it to the kernel
	Stats   *Stats        // counts dials and their results; nil: not counted
	Borrow  *Borrower     // for targets with a borrowed source; nil: such targets never occur

	// Layer puts a record layer under a fresh connection to a target. Its error is the dial's. nil: connections are bare.
	Layer func(*tcp.Waiter, *tcp.Conn, Target) error
}

// Stats counts the upstream connections of one direction. The zero value is ready to use.
type Stats struct {
	Active            atomic.Int64  // open connections, in the pool or in use
	Connected, Failed atomic.Uint64 // dials
	Reused, Missed    atomic.Uint64 // requests that found a connection in the pool, and that did not
	Retried           atomic.Uint64 // requests that were sent again
}

// Dial connects to target, waiting with w. The kernel chooses the source port, or the Borrower does. Reason maps the
// error.
func (d Dialer) Dial(w *tcp.Waiter, target Target) (*tcp.Conn, error) {
	var deadline time.Time
	if d.Timeout > 0 {
		deadline = time.Now().Add(d.Timeout)
	}
	var up *tcp.Conn
	var err error
	if target.Borrowed {
		up, err = d.Borrow.dial(d.Poller, w, target, deadline)
	} else {
		up, err = d.Poller.Dial(w, target.Source, target.Address, deadline)
	}
	if err == nil && d.Layer != nil {
		if err = d.Layer(w, up, target); err != nil {
			up.Reset()
			up = nil
		}
	}
	switch {
	case d.Stats == nil:
	case err != nil:
		d.Stats.Failed.Add(1)
	default:
		d.Stats.Connected.Add(1)
		up.Track(&d.Stats.Active)
	}
	return up, err
}

// Reason maps a dial error to the reason with which the flow ends.
func Reason(err error) flow.Reason {
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		return flow.UpstreamRefused
	case errors.Is(err, tcp.ErrDeadline), errors.Is(err, unix.ETIMEDOUT):
		return flow.UpstreamTimeout
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOSPC),
		errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOBUFS):
		return flow.NoDescriptors
	case errors.Is(err, tcp.ErrCanceled):
		return flow.DrainDeadline
	default:
		return flow.UpstreamUnreachable
	}
}

// TransportFailure is Envoy's text for a dial error, such as "delayed connect error: Connection refused". It is empty
// for a timeout and for a lack of descriptors: Envoy reports these differently.
func TransportFailure(err error) string {
	var errno syscall.Errno
	if Reason(err) == flow.NoDescriptors || !errors.As(err, &errno) {
		return ""
	}
	first, size := utf8.DecodeRuneInString(errno.Error())
	return "delayed connect error: " + string(unicode.ToUpper(first)) + errno.Error()[size:]
}
