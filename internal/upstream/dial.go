// Package upstream dials the workload and the world on behalf of a downstream connection.
package upstream

import (
	"errors"
	"math/rand/v2"
	"net/netip"
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
	Timeout time.Duration // for one Dial with all its attempts, unless the target has one; zero or less leaves it to the kernel
	Within  time.Duration // limits each Dial as well, also to a target with a timeout; zero: it does not
	Stats   *Stats        // counts dials and their results; nil: not counted
	Borrow  *Borrower     // for targets with a borrowed source; nil: such targets never occur

	// Socket is from Poller.Socket, for a Dial by another goroutine than that of the downstream connection. The Dial takes
	// it over, and makes one attempt. nil: each attempt makes a socket.
	Socket *tcp.Conn

	// Returned is the result of Stats.Returned for the downstream connection on whose behalf Dial connects.
	Returned *tcp.Conn
}

// Stats counts the upstream connections of one direction. The zero value is ready to use.
type Stats struct {
	Active            atomic.Int64  // open connections, in the pool or in use
	Connected, Failed atomic.Uint64 // attempts to connect
	Redialled         atomic.Uint64 // of these, the second and third attempts of a dial
	Reused, Missed    atomic.Uint64 // requests that found a connection in the pool, and that did not
	Retried           atomic.Uint64 // requests that were sent again

	Copied, CopiesDropped atomic.Uint64 // copies for mirrors that were sent, or at least begun, and that were not

	open tcp.Set // the connections of Active
}

// Count adds the number of open connections to each address.
func (s *Stats) Count(to map[netip.AddrPort]int) { s.open.Count(to) }

// Returned returns the upstream connection that the rules seem to have sent back to the agent as the downstream connection
// from peer to original destination dst. It is nil in general. One match may be a coincidence, so it does not prove
// a loop: Dial for such a downstream connection with Dialer.Returned. If that upstream connection returns too, a loop is
// proven, and tcp.Conn.Looped reports it for both. See tcp.Set.Returned.
//
// A connection is found once its dial has returned. One that comes back is established during the dial, so that its other
// end may be accepted shortly before; then two later connections of the loop are found.
func (s *Stats) Returned(peer, dst netip.AddrPort) (up *tcp.Conn, loop bool) {
	return s.open.Returned(peer, dst)
}

// ErrLoop is the error of both ends of such a connection.
var ErrLoop = errors.New("the rules send the agent's own connections back to it")

const (
	// maxAttempts limits the attempts of one dial to a balanced target. Istio's routes retry as often.
	maxAttempts = 3

	// redialPause is the mean pause between two attempts, from half of it to one and a half times it. A client whose
	// connection is refused learns that at most three of these pauses later than without the agent.
	redialPause = 25 * time.Millisecond
)

// Dial connects to target, waiting with w. The kernel chooses the source port, or the Borrower does. Reason maps the
// error.
//
// A dial to a balanced target that is refused, gets no answer or finds its host unreachable is attempted again, at most
// twice and within Timeout: no byte of the connection was sent, and the network may choose another server. With another
// target, the next attempt would reach the same server, so the error is returned at once. attempts is their number, at
// least 1.
func (d *Dialer) Dial(w *tcp.Waiter, target Target) (up *tcp.Conn, attempts int, err error) {
	var deadline time.Time
	timeout := d.Timeout
	if o := target.options(); o != nil && o.ConnectTimeout > 0 {
		timeout = o.ConnectTimeout
	}
	if d.Within > 0 && (timeout <= 0 || d.Within < timeout) {
		timeout = d.Within
	}
	if timeout > 0 {
		deadline = time.Now().Add(timeout)
	}
	for attempts = 1; ; attempts++ {
		end := deadline
		if d.Socket == nil {
			end = attemptDeadline(deadline, target, attempts)
		}
		up, err = d.connect(w, target, end)
		if err == nil || !target.Balanced || d.Socket != nil || attempts == maxAttempts || !mayRedial(err) {
			break
		}
		if paused := pause(w, deadline); paused != nil {
			if errors.Is(paused, tcp.ErrCanceled) || errors.Is(paused, tcp.ErrInterrupted) {
				err = paused
			}
			break
		}
		d.count(func(s *Stats) { s.Failed.Add(1); s.Redialled.Add(1) })
	}
	if err == nil {
		d.count(func(s *Stats) { up.Track(&s.Active); up.Join(&s.open, target.Group, d.Returned) }) // before a handshake, which may return here
		if o := target.options(); o != nil && (o.KeepAliveProbes > 0 || o.KeepAliveIdle > 0 || o.KeepAliveGap > 0) {
			up.KeepAlive(int(o.KeepAliveProbes), int(o.KeepAliveIdle.Seconds()), int(o.KeepAliveGap.Seconds()))
		}
		if target.Secured() {
			err = target.Security.Handshake(w, up, deadline)
		}
		if err != nil {
			up.Close() // not with a reset, which could overtake the alert that names the cause
		}
	}
	if err != nil {
		d.count(func(s *Stats) { s.Failed.Add(1) })
		return nil, attempts, err
	}
	d.count(func(s *Stats) { s.Connected.Add(1) })
	return up, attempts, nil
}

func (d *Dialer) count(add func(*Stats)) {
	if d.Stats != nil {
		add(d.Stats)
	}
}

// attemptDeadline divides the time that is left equally among the attempts that are left. The kernel repeats a SYN after
// 1 s, 3 s and 7 s, so several short attempts send more of them than a long one.
func attemptDeadline(deadline time.Time, target Target, attempt int) time.Time {
	if deadline.IsZero() || !target.Balanced {
		return deadline
	}
	return time.Now().Add(time.Until(deadline) / time.Duration(maxAttempts-attempt+1))
}

// connect makes one attempt.
func (d *Dialer) connect(w *tcp.Waiter, target Target, deadline time.Time) (*tcp.Conn, error) {
	if up := d.Socket; up != nil {
		if err := up.Connect(w, target.Source, deadline); err != nil {
			up.Close()
			return nil, err
		}
		return up, nil
	}
	if target.Borrowed {
		return d.Borrow.dial(d.Poller, w, target, deadline)
	}
	return d.Poller.Dial(w, target.Source, target.Address, deadline)
}

// mayRedial reports whether another server may accept what this one did not. After ETIMEDOUT, the kernel itself has tried
// for minutes.
func mayRedial(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EHOSTUNREACH) ||
		errors.Is(err, tcp.ErrDeadline)
}

// pause waits before the next attempt. It returns tcp.ErrDeadline at once if the deadline would pass meanwhile, and
// tcp.ErrCanceled if w is canceled.
func pause(w *tcp.Waiter, deadline time.Time) error {
	end := time.Now().Add(redialPause/2 + rand.N(redialPause))
	if !deadline.IsZero() && !end.Before(deadline) {
		return tcp.ErrDeadline
	}
	for {
		switch err := w.Wait(end, nil, nil); {
		case err == nil: // an event of a connection that w has waited for before
		case errors.Is(err, tcp.ErrDeadline):
			return nil
		default:
			return err
		}
	}
}

// Reason maps a dial error to the reason with which the flow ends.
func Reason(err error) flow.Reason {
	var handshake *HandshakeError
	switch {
	case errors.As(err, &handshake):
		return handshake.Reason
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

// HandshakeError is the error of a connection that could not be secured.
type HandshakeError struct {
	Reason flow.Reason
	Err    error
}

func (e *HandshakeError) Error() string { return e.Err.Error() }

func (e *HandshakeError) Unwrap() error { return e.Err }

// TransportFailure is Envoy's text for a dial error, such as "delayed connect error: Connection refused". It is empty
// for a timeout and for a lack of descriptors: Envoy reports these differently.
func TransportFailure(err error) string {
	var handshake *HandshakeError
	if errors.As(err, &handshake) {
		return "TLS_error: " + handshake.Err.Error()
	}
	var errno syscall.Errno
	if Reason(err) == flow.NoDescriptors || !errors.As(err, &errno) {
		return ""
	}
	first, size := utf8.DecodeRuneInString(errno.Error())
	return "delayed connect error: " + string(unicode.ToUpper(first)) + errno.Error()[size:]
}
