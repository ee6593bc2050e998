package terminal

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Size returns the columns and rows of a terminal. Both are 0 if out is not a terminal or has no size.
func Size(out io.Writer) (columns, rows int) {
	file, ok := out.(*os.File)
	if !ok || !IsTerminal(out) {
		return 0, 0
	}
	size, err := unix.IoctlGetWinsize(int(file.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, 0
	}
	return int(size.Col), int(size.Row)
}

// Screen is a terminal that shows one text at a time. It uses the terminal's alternate screen, so that Close brings back
// what was there before.
type Screen struct{ out io.Writer }

// OpenScreen takes over the terminal until Close.
func OpenScreen(out io.Writer) (*Screen, error) {
	_, err := io.WriteString(out, "\x1b[?1049h\x1b[?25l") // alternate screen, no cursor
	return &Screen{out}, err
}

// Draw replaces the shown text. The text must fit the terminal.
func (s *Screen) Draw(text string) error {
	text = strings.TrimSuffix(text, "\n") // a newline in the last row would scroll
	// Each line replaces the one before, and the rest of the screen is cleared at the end, so that nothing flickers.
	_, err := io.WriteString(s.out, "\x1b[H"+strings.ReplaceAll(text, "\n", "\x1b[K\n")+"\x1b[K\x1b[J")
	return err
}

// Close restores the terminal.
func (s *Screen) Close() error {
	_, err := io.WriteString(s.out, "\x1b[?25h\x1b[?1049l")
	return err
}

// Keyboard delivers single keys of a terminal, without Enter and without echo. Ctrl-C and Ctrl-Z keep their effect.
type Keyboard struct {
	file    *os.File
	former  unix.Termios
	wake    [2]int // a pipe; closing its end 1 stops the reader
	pressed chan byte
	stopped chan struct{}
}

// OpenKeyboard changes the mode of the terminal in until Close. Without a terminal it returns nil; all
// methods accept that.
func OpenKeyboard(in io.Reader) (*Keyboard, error) {
	file, ok := in.(*os.File)
	if !ok || !isTerminalFile(file) {
		return nil, nil
	}
	former, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("reading the terminal's mode: %w", err)
	}
	k := &Keyboard{file: file, former: *former, pressed: make(chan byte), stopped: make(chan struct{})}
	if err := unix.Pipe2(k.wake[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("reading keys: %w", err)
	}
	raw := *former
	raw.Lflag &^= unix.ICANON | unix.ECHO
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(file.Fd()), unix.TCSETS, &raw); err != nil {
		unix.Close(k.wake[0])
		unix.Close(k.wake[1])
		return nil, fmt.Errorf("changing the terminal's mode: %w", err)
	}
	go k.read()
	return k, nil
}

// Pressed delivers keys until Close. It is closed when the terminal goes away.
func (k *Keyboard) Pressed() <-chan byte {
	if k == nil {
		return nil
	}
	return k.pressed
}

// Close restores the mode of the terminal.
func (k *Keyboard) Close() error {
	if k == nil {
		return nil
	}
	unix.Close(k.wake[1])
	for range k.pressed { // the reader may be delivering
	}
	<-k.stopped
	return unix.IoctlSetTermios(int(k.file.Fd()), unix.TCSETS, &k.former)
}

func (k *Keyboard) read() {
	defer close(k.stopped)
	defer close(k.pressed)
	defer unix.Close(k.wake[0])
	waiting := []unix.PollFd{{Fd: int32(k.file.Fd()), Events: unix.POLLIN}, {Fd: int32(k.wake[0]), Events: unix.POLLIN}}
	keys := make([]byte, 64)
	for {
		if _, err := unix.Poll(waiting, -1); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil || waiting[1].Revents != 0 {
			return
		}
		n, err := unix.Read(int(waiting[0].Fd), keys)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		} else if err != nil || n == 0 {
			return
		}
		if keys[0] == '\x1b' { // an arrow or a function key is a sequence of characters
			continue
		}
		for _, key := range keys[:n] {
			k.pressed <- key
		}
	}
}
