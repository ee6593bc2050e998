package sandbox

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/iptables/kernel"
)

// IsHelper reports whether the command line args, with the program's name, is that of the helper.
func IsHelper(args []string) bool { return len(args) == 2 && args[0] == marker }

// RunHelper is the helper: the first process of the sandbox. It returns the exit status of the process.
func RunHelper(args []string) int {
	fd, err := strconv.Atoi(args[1])
	if err != nil || os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "pillion: error: this name is for internal use")
		return 1
	}
	unix.CloseOnExec(fd)
	control, err := unixConn(fd)
	if err != nil {
		return 1
	}
	h := &inside{control: control, orders: make(chan Command, 1)}
	keepFromSignals()
	if err := h.prepare(); err != nil {
		h.fail(err)
		return 1
	}
	go h.serve()
	status := h.runCommand()
	h.awaitDropped()
	return status
}

// inside is the helper's state.
type inside struct {
	control *net.UnixConn
	writing sync.Mutex
	config  Config
	orders  chan Command // receives the command that is to be started
	dropped dropped

	starting sync.Mutex    // held while the command is started
	command  int           // its process ID, 0 before
	pending  []unix.Signal // arrived before the command was started
}

// failure is an error of a step, with the kernel's number for the other side.
type failure struct {
	step string
	err  error
}

func (f *failure) Error() string { return f.step + ": " + f.err.Error() }

func failed(step string, err error) error {
	if err == nil {
		return nil
	}
	return &failure{step, err}
}

// fail reports an error. The number of the kernel's error is sent apart from the text.
func (h *inside) fail(err error) {
	m := message{Kind: "failed", Text: err.Error()}
	var step *failure
	var errno unix.Errno
	if errors.As(err, &step) && errors.As(err, &errno) {
		m.Text, m.Errno = step.step, int(errno)
	}
	h.write(m)
}

func (f *failure) Unwrap() error { return f.err }

// write ends the process if the caller has ended.
func (h *inside) write(m message, files ...int) {
	h.writing.Lock()
	defer h.writing.Unlock()
	if send(h.control, m, files...) != nil {
		os.Exit(1)
	}
}

// keepFromSignals makes the signals that a terminal sends to all processes of the foreground have no effect on the helper: it
// removes Go's handlers. The kernel passes a signal without a handler to the first process of a PID namespace only if it is
// SIGKILL or SIGSTOP (pid_namespaces(7)). They are not ignored, because the command would inherit that they are ignored.
func keepFromSignals() {
	for _, s := range []unix.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGCONT} {
		if !signal.Ignored(s) {
			var byDefault [4]uintptr // struct sigaction: SIG_DFL, no flags and an empty mask
			const maskBytes = 8
			_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&byDefault)), 0, maskBytes, 0, 0)
		}
	}
}

// prepare makes the network and hands over its sockets.
func (h *inside) prepare() error {
	m, _, err := receive(h.control, make([]byte, maxMessage))
	if err != nil {
		return failed("reading the configuration", err)
	}
	h.config = *m.Config
	if err := mountProc(); err != nil {
		return err
	}
	changeSettings()
	if err := kernel.LinkUp("lo"); err != nil {
		return failed("enabling the loopback", err)
	}
	sockets, err := openSockets()
	if err != nil {
		return err
	}
	if err := h.connect(sockets); err != nil {
		return err
	}
	if err := h.watchDropped(); err != nil {
		return err
	}
	if sockets.hasIPv6 && h.config.IPv6 {
		awaitAddress6()
	}
	h.write(message{Kind: "ready", Files: sockets.kinds}, sockets.files...)
	for _, fd := range sockets.files {
		unix.Close(fd)
	}
	return nil
}

// connect makes the links and installs the rules. Both take the kernel some time, which waits for other processors meanwhile.
func (h *inside) connect(sockets *sockets) error {
	installed := make(chan error, 1)
	go func() { installed <- failed("installing rules", rulesFor(&h.config, sockets).install()) }()
	err := h.makeLinks()
	if err == nil && h.config.Datagrams {
		err = sockets.openPackets()
	}
	return cmp.Or(err, <-installed)
}

// mountProc shows the processes of the PID namespace in /proc. The kernel refuses that if parts of /proc are hidden, as in
// containers; programs then see the processes outside.
func mountProc() error {
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return failed("separating mounts", err)
	}
	err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	if err != nil && err != unix.EPERM {
		return failed("mounting /proc", err)
	}
	return nil
}

// serve carries out the caller's requests. It ends the process, and with it the namespaces, when the caller has ended.
func (h *inside) serve() {
	buffer := make([]byte, maxMessage)
	for {
		m, _, err := receive(h.control, buffer)
		if err != nil {
			if err != io.EOF { // such as a message that is too long
				h.fail(failed("reading an order", err))
			}
			os.Exit(1)
		}
		switch m.Kind {
		case "start":
			h.orders <- m.Command.command()
		case "signal":
			h.signal(unix.Signal(m.Signal))
		case "socket":
			h.openSocket(m)
		case "ports":
			m.Listening = listening()
			h.write(m)
		}
	}
}

// signal sends a signal to the command. One that arrives before the command is started is sent after that: the caller does
// not know when the command starts, and a lost SIGTERM would let it run on.
func (h *inside) signal(s unix.Signal) {
	h.starting.Lock()
	defer h.starting.Unlock()
	switch {
	case h.command > 0:
		_ = unix.Kill(h.command, s)
	case len(h.pending) < maxPending:
		h.pending = append(h.pending, s)
	}
}

// maxPending bounds the signals that wait for the command. As many have one number each.
const maxPending = 64

func (h *inside) openSocket(m message) {
	fd, err := unix.Socket(m.Family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		m.Errno = int(err.(unix.Errno))
		h.write(m)
		return
	}
	h.write(m, fd)
	unix.Close(fd)
}

// runCommand returns the exit status of the command.
func (h *inside) runCommand() int {
	pid, err := h.startCommand()
	if err != nil {
		h.fail(err)
		return 127
	}
	for {
		var status unix.WaitStatus
		ended, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 1
		case ended != pid:
		case status.Signaled():
			return 128 + int(status.Signal())
		default:
			return status.ExitStatus()
		}
	}
}

// startCommand starts the command when the caller orders it, from a thread without capabilities. Threads have capabilities of
// their own, and a new process has those of the thread that starts it. All is ready for the command before the order comes.
//
// The helper is not dumpable from here on, so only a process with CAP_SYS_PTRACE may trace it or read its files (ptrace(2),
// "access mode checking"). The capabilities of its threads do not protect it: the thread above has none, and may be the first.
func (h *inside) startCommand() (pid int, err error) {
	protected := failed("protecting the helper", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
	done := make(chan struct{})
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		defer close(done)
		dropped := dropCapabilities()
		command := <-h.orders
		if err = cmp.Or(protected, dropped); err != nil {
			return
		}
		h.starting.Lock() // a signal that arrives meanwhile waits
		defer h.starting.Unlock()
		pid, err = syscall.ForkExec(command.Path, command.Arguments, &syscall.ProcAttr{Env: command.environment(), Files: []uintptr{0, 1, 2}})
		if err != nil {
			err = failed(command.Arguments[0], err)
			return
		}
		h.command = pid
		for _, s := range h.pending {
			_ = unix.Kill(pid, s)
		}
	}()
	<-done
	return pid, err
}

// environment is that of the caller with the variables of the configuration in the place of its own. A name must not occur
// twice: the C library takes the first one.
func (c *Command) environment() []string {
	replaced := make(map[string]bool)
	for _, pair := range c.Environment {
		name, _, _ := strings.Cut(pair, "=")
		replaced[name] = true
	}
	kept := slices.DeleteFunc(os.Environ(), func(pair string) bool {
		name, _, _ := strings.Cut(pair, "=")
		return replaced[name]
	})
	return append(kept, c.Environment...)
}

// dropCapabilities removes all capabilities from the calling thread, and the ways to gain some: set-user-ID programs,
// capabilities of files, and user 0.
func dropCapabilities() error {
	for c := range uintptr(64) {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err == unix.EINVAL {
			break // the kernel's last capability is c-1
		} else if err != nil {
			return failed("dropping capabilities", err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return failed("dropping capabilities", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return failed("dropping capabilities", err)
	}
	var none [2]unix.CapUserData
	return failed("dropping capabilities", unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]))
}

// sockets are those that the helper hands over.
type sockets struct {
	files   []int
	kinds   []string
	tcp     uint16 // port of the listeners for captured connections
	dns     uint16 // the same for DNS queries, over UDP and TCP
	hasIPv6 bool
}

func (s *sockets) add(kind string, file *os.File) {
	fd := int(file.Fd())
	s.files, s.kinds = append(s.files, fd), append(s.kinds, kind)
	kept = append(kept, file)
}

// kept holds files whose descriptors are handed over, so that they are not closed before.
var kept []*os.File

// openSockets opens the sockets on loopback, at ports that the kernel chooses. Both families have the same ports.
func openSockets() (*sockets, error) {
	for attempt := 0; ; attempt++ {
		s := new(sockets)
		err := s.open()
		if err == nil || !errors.Is(err, unix.EADDRINUSE) || attempt == 10 {
			return s, err
		}
	}
}

func (s *sockets) open() error {
	tcp, err := s.listen("tcp", "tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.tcp = tcp
	if s.dns, err = s.listenDNS("4", "127.0.0.1", 0); err != nil {
		return err
	}
	if _, err := s.listen("tcp", "tcp6", fmt.Sprintf("[::1]:%d", s.tcp)); err != nil {
		if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
			return nil // no IPv6
		}
		return err
	}
	s.hasIPv6 = true
	_, err = s.listenDNS("6", "[::1]", s.dns)
	return err
}

func (s *sockets) listen(kind, network, address string) (uint16, error) {
	listener, err := listenConfig.Listen(background, network, address)
	if err != nil {
		return 0, failed("listening on "+address, err)
	}
	defer listener.Close()
	file, err := listener.(*net.TCPListener).File()
	if err != nil {
		return 0, failed("listening on "+address, err)
	}
	s.add(kind, file)
	return uint16(listener.Addr().(*net.TCPAddr).Port), nil
}

func (s *sockets) listenDNS(family, host string, port uint16) (uint16, error) {
	address := fmt.Sprintf("%s:%d", host, port)
	packets, err := net.ListenPacket("udp"+family, address)
	if err != nil {
		return 0, failed("listening on "+address, err)
	}
	defer packets.Close()
	file, err := packets.(*net.UDPConn).File()
	if err != nil {
		return 0, failed("listening on "+address, err)
	}
	s.add("dns", file)
	bound := uint16(packets.LocalAddr().(*net.UDPAddr).Port)
	return s.listen("dnstcp", "tcp"+family, fmt.Sprintf("%s:%d", host, bound))
}

// listening returns the addresses of listening TCP sockets.
func listening() []string {
	var all []string
	for _, name := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		text, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		all = append(all, parseListening(string(text))...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}
