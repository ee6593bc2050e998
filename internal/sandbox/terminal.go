package sandbox

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// Terminal is the controlling terminal of this process. The zero Terminal stands for a process without one.
type Terminal struct {
	file  *os.File
	group int // the foreground process group when it was opened
}

// OpenTerminal opens the controlling terminal, if there is one.
func OpenTerminal() *Terminal {
	file, err := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return &Terminal{}
	}
	group, err := unix.IoctlGetInt(int(file.Fd()), unix.TIOCGPGRP)
	if err != nil {
		file.Close()
		return &Terminal{}
	}
	return &Terminal{file, group}
}

// Foreground reports whether this process is in the foreground group, to which the terminal sends its signals.
func (t *Terminal) Foreground() bool {
	if t.file == nil {
		return false
	}
	group, err := unix.IoctlGetInt(int(t.file.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// Restore gives the terminal back to this process's group if it had it before, and closes it. A shell in the sandbox takes
// the terminal for its jobs and cannot give it back, because the group is in another PID namespace.
func (t *Terminal) Restore() {
	if t.file == nil {
		return
	}
	defer t.file.Close()
	if t.group != unix.Getpgrp() || t.Foreground() {
		return
	}
	// The kernel sends SIGTTOU to a background process that takes the terminal.
	signal.Ignore(unix.SIGTTOU)
	_ = unix.IoctlSetPointerInt(int(t.file.Fd()), unix.TIOCSPGRP, t.group)
	signal.Reset(unix.SIGTTOU)
}
