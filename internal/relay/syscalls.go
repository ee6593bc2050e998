package relay

import "golang.org/x/sys/unix"

// read, write and splice are the system calls, begun again when a signal interrupts them.

func read(fd int, p []byte) (int, error) {
	for {
		if n, err := unix.Read(fd, p); err != unix.EINTR {
			return n, err
		}
	}
}

func write(fd int, p []byte) (int, error) {
	for {
		if n, err := unix.Write(fd, p); err != unix.EINTR {
			return n, err
		}
	}
}

// splice moves up to n bytes from in to out, one of which is a pipe, and never waits. The kernel tells neither side's
// EAGAIN from the other's: the caller's pipe is empty when it reads from a socket and not empty when it writes to one, so
// that it can only be the socket's.
func splice(in, out, n int) (int, error) {
	for {
		if n, err := unix.Splice(in, nil, out, nil, n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK); err != unix.EINTR {
			return int(n), err
		}
	}
}

// pollNow returns the events of fd that are always watched for: POLLERR and POLLHUP.
func pollNow(fd int) int16 {
	fds := []unix.PollFd{{Fd: int32(fd)}}
	for {
		if _, err := unix.Poll(fds, 0); err != unix.EINTR {
			return fds[0].Revents
		}
	}
}
