package tcp

import "golang.org/x/sys/unix"

// MaxUnsent is the bound of what a Layer's Read may leave unsent.
const MaxUnsent = maxUnsent

// Unsent returns the number of encoded bytes that the socket has not taken.
func Unsent(c *Conn) int {
	if c.layer == nil || c.layer.unsent == nil {
		return 0
	}
	return c.layer.unsent.Len()
}

// Size returns the number of connections in a set.
func Size(s *Set) int { return s.size() }

// SetSendBuffer sets the size of the socket's send buffer.
func SetSendBuffer(c *Conn, bytes int) error {
	return unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, bytes)
}

// State returns what the kernel has for a connection at this moment, and what the connection has of it: after a wait without
// an event, the difference is a lost event.
func State(c *Conn) (kernel, recorded uint32) {
	fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN | unix.POLLOUT}}
	_, _ = unix.Poll(fds, 0)
	return uint32(fds[0].Revents), c.ready.Load()
}
