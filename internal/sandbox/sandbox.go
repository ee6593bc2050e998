// Package sandbox runs a command in namespaces of its own, whose TCP connections and DNS queries arrive at sockets that the
// caller holds.
//
// Start runs this program again as the first process of the namespaces: the helper. It makes a network of two joined links
// that lead nowhere, installs rules that redirect what the command sends to listening sockets, and passes these sockets to
// the caller over a socket pair, while the caller prepares for them. A socket keeps the namespace in which it was made, so the
// caller accepts connections from inside with sockets of its own namespace beside them. Packets have no other way out.
//
// The command holds no capability and cannot gain any, so it cannot change links, routes or rules. All processes are in a
// PID namespace whose first process is the helper. It ends when the caller ends, however that happens, and the kernel then
// kills every other process and removes the namespaces.
package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/prestart"
)

// Config describes the network.
type Config struct {
	IPv6      bool          // give the namespace an IPv6 address and route, so that programs try IPv6
	Loopback  capture.Ports // ports of loopback addresses that are captured too
	Datagrams bool          // UDP to other ports than DNS's arrives at Sandbox.Packets; otherwise it is rejected

	// Dropped receives the destination of each datagram that the rules reject. It is called from one goroutine and must
	// not block. nil: not reported.
	Dropped func(destination string) `json:"-"`
}

// Command is what runs in the sandbox. Path and Arguments are required.
type Command struct {
	Path        string   // of the program
	Arguments   []string // with the program's name
	Environment []string // variables besides those of the caller, as NAME=value
}

// order is a Command as a message has it. Names of files and arguments may have any bytes, and a string of JSON may not.
type order struct {
	Path                   []byte
	Arguments, Environment [][]byte
}

func orderOf(c *Command) *order {
	return &order{[]byte(c.Path), inBytes(c.Arguments), inBytes(c.Environment)}
}

func (o *order) command() Command {
	return Command{string(o.Path), inStrings(o.Arguments), inStrings(o.Environment)}
}

func inBytes(texts []string) (all [][]byte) {
	for _, text := range texts {
		all = append(all, []byte(text))
	}
	return all
}

func inStrings(texts [][]byte) (all []string) {
	for _, text := range texts {
		all = append(all, string(text))
	}
	return all
}

// Sandbox is a running helper. Make it with Start. The sockets are there after Await.
type Sandbox struct {
	TCP    []*net.TCPListener // receives captured connections, one for each address family
	DNS    []*net.UDPConn     // receives captured DNS queries over UDP
	DNSTCP []*net.TCPListener // the same over TCP

	// Packets receive UDP as frames of Ethernet, and deliver frames to the command; one for each address family. The command's
	// end of the link has datagram.HardwareAddress.
	Packets []*os.File

	config     Config
	privileged bool     // the namespaces are not in a user namespace of their own
	ports      []uint16 // of the listeners
	helper     int      // its process ID; 0 when it has been waited for
	control    *net.UnixConn
	done       chan struct{} // closed when reading control has ended

	writing sync.Mutex

	mu      sync.Mutex
	waiting map[uint64]chan message // replies of the helper by serial
	serial  uint64
	failure error // of the command's start
}

// marker is the name under which the helper runs.
const marker = prestart.Marker

// message is what caller and helper send each other.
type message struct {
	Kind      string
	Config    *Config  `json:",omitempty"` // of "configure"
	Command   *order   `json:",omitempty"` // of "start"
	Text      string   `json:",omitempty"` // of "failed" and "dropped"
	Errno     int      `json:",omitempty"` // of "failed"
	Signal    int      `json:",omitempty"` // of "signal"
	Serial    uint64   `json:",omitempty"` // of "socket" and "ports", and of their replies
	Family    int      `json:",omitempty"` // of "socket"
	Listening []string `json:",omitempty"` // reply to "ports"
	Files     []string `json:",omitempty"` // of "ready": what the attached descriptors are

	socket int // attached to the reply to "socket"
}

const maxMessage = 256 << 10

// StartError is an error of a command that could not be started.
type StartError struct {
	Err   error
	Found bool // the program exists
}

func (e *StartError) Error() string { return e.Err.Error() }
func (e *StartError) Unwrap() error { return e.Err }

// Start makes the namespaces, whose network the helper makes afterwards: see Await. The calling goroutine may stay locked to its
// thread: the kernel kills the helper when that thread ends.
func Start(config Config) (*Sandbox, error) {
	p := prestart.Start()
	if p.Err != nil {
		return nil, refused(fmt.Errorf("making namespaces: %w", p.Err), p.Privileged)
	}
	control, err := unixConn(p.Control)
	if err != nil {
		_ = unix.Kill(p.ID, unix.SIGKILL)
		return nil, fmt.Errorf("preparing the sandbox: %w", err)
	}
	s := &Sandbox{
		config: config, privileged: p.Privileged, helper: p.ID, control: control, done: make(chan struct{}), waiting: make(map[uint64]chan message),
	}
	if err := s.write(message{Kind: "configure", Config: &config}); err != nil {
		s.Close()
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			return nil, firstEnded(err)
		}
		return nil, fmt.Errorf("preparing the sandbox: %w", err)
	}
	return s, nil
}

// Await returns when the network works. It must be called once. After an error only Close may be called.
func (s *Sandbox) Await() error {
	if err := s.awaitReady(); err != nil {
		return err
	}
	go s.read()
	return nil
}

// unixConn takes ownership of fd.
func unixConn(fd int) (*net.UnixConn, error) {
	file := os.NewFile(uintptr(fd), "control")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

func send(to *net.UnixConn, m message, files ...int) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		rights = unix.UnixRights(files...)
	}
	_, _, err = to.WriteMsgUnix(text, rights, nil)
	return err
}

// receive returns the next message and its descriptors. The error is io.EOF when the other side has ended.
func receive(from *net.UnixConn, buffer []byte) (m message, files []int, err error) {
	var rights [256]byte
	n, attached, _, _, err := from.ReadMsgUnix(buffer, rights[:])
	if err != nil {
		return m, nil, err
	}
	if n == 0 && attached == 0 {
		return m, nil, io.EOF
	}
	if attached > 0 {
		if files, err = descriptors(rights[:attached]); err != nil {
			return m, nil, err
		}
	}
	return m, files, json.Unmarshal(buffer[:n], &m)
}

func descriptors(rights []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, err
	}
	var files []int
	for i := range messages {
		list, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return nil, err
		}
		for _, fd := range list {
			unix.CloseOnExec(fd)
		}
		files = append(files, list...)
	}
	return files, nil
}

func firstEnded(err error) error {
	return fmt.Errorf("starting the sandbox: its first process ended: %w", err)
}

// awaitReady waits for the helper's sockets.
func (s *Sandbox) awaitReady() error {
	m, files, err := receive(s.control, make([]byte, maxMessage))
	if err != nil {
		return firstEnded(err)
	}
	if m.Kind != "ready" {
		err := fmt.Errorf("preparing the sandbox: %s", m.Text)
		if m.Errno != 0 {
			err = fmt.Errorf("preparing the sandbox: %s: %w", m.Text, unix.Errno(m.Errno))
		}
		return refused(err, s.privileged)
	}
	for i, fd := range files {
		if err := s.adopt(m.Files[i], fd); err != nil {
			return fmt.Errorf("taking over a socket of the sandbox: %w", err)
		}
	}
	return nil
}

// adopt takes ownership of a socket.
func (s *Sandbox) adopt(kind string, fd int) error {
	file := os.NewFile(uintptr(fd), kind)
	if kind == "packets" {
		s.Packets = append(s.Packets, file)
		return nil
	}
	defer file.Close()
	if kind == "dns" {
		conn, err := net.FilePacketConn(file)
		if err == nil {
			s.DNS = append(s.DNS, conn.(*net.UDPConn))
		}
		return err
	}
	listener, err := net.FileListener(file)
	if err != nil {
		return err
	}
	s.ports = append(s.ports, listener.Addr().(*net.TCPAddr).AddrPort().Port())
	if kind == "tcp" {
		s.TCP = append(s.TCP, listener.(*net.TCPListener))
	} else {
		s.DNSTCP = append(s.DNSTCP, listener.(*net.TCPListener))
	}
	return nil
}

// read dispatches the helper's messages until it ends.
func (s *Sandbox) read() {
	defer close(s.done)
	buffer := make([]byte, maxMessage)
	for {
		m, files, err := receive(s.control, buffer)
		if err != nil {
			return
		}
		switch m.Kind {
		case "dropped":
			if s.config.Dropped != nil {
				s.config.Dropped(m.Text)
			}
		case "failed":
			s.mu.Lock()
			if s.failure = errors.New(m.Text); m.Errno != 0 {
				s.failure = fmt.Errorf("%s: %w", m.Text, unix.Errno(m.Errno))
			}
			s.mu.Unlock()
		default:
			s.reply(m, files)
		}
	}
}

// reply passes a reply to the call that waits for it.
func (s *Sandbox) reply(m message, files []int) {
	if len(files) == 1 {
		m.socket = files[0]
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if waiting := s.waiting[m.Serial]; waiting != nil {
		delete(s.waiting, m.Serial)
		waiting <- m
		return
	}
	for _, fd := range files {
		unix.Close(fd)
	}
}

var errEnded = errors.New("the sandbox has ended")

// call sends a request and waits for its reply.
func (s *Sandbox) call(request message) (message, error) {
	reply := make(chan message, 1)
	s.mu.Lock()
	s.serial++
	request.Serial = s.serial
	s.waiting[request.Serial] = reply
	s.mu.Unlock()
	if err := s.write(request); err != nil {
		return message{}, err
	}
	select {
	case m := <-reply:
		if m.Errno != 0 {
			return m, unix.Errno(m.Errno)
		}
		return m, nil
	case <-s.done:
		return message{}, errEnded
	}
}

func (s *Sandbox) write(m message) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	return send(s.control, m)
}

// Socket returns a TCP socket that belongs to the sandbox's network, in non-blocking mode. It must be closed. family is
// AF_INET or AF_INET6.
func (s *Sandbox) Socket(family int) (fd int, err error) {
	m, err := s.call(message{Kind: "socket", Family: family})
	if err != nil {
		return -1, err
	}
	return m.socket, nil
}

// Owns reports whether a port is that of one of the listening sockets that the caller holds.
func (s *Sandbox) Owns(port uint16) bool { return slices.Contains(s.ports, port) }

// Listening returns the addresses at which processes inside listen for TCP.
func (s *Sandbox) Listening() ([]string, error) {
	m, err := s.call(message{Kind: "ports"})
	return m.Listening, err
}

// Run starts the command and returns its exit status when it has ended: 128 and the number of the signal that ended it. All
// other processes of the sandbox have ended by then. The error is a StartError if the command could not be started.
func (s *Sandbox) Run(command Command) (status int, err error) {
	if err := s.write(message{Kind: "start", Command: orderOf(&command)}); err != nil {
		return 0, fmt.Errorf("starting the command: %w", err)
	}
	ended, err := s.wait()
	<-s.done
	if err != nil {
		return 0, fmt.Errorf("waiting for the sandbox: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failure != nil {
		return 0, &StartError{Err: s.failure, Found: !errors.Is(s.failure, unix.ENOENT)}
	}
	if ended.Signaled() {
		return 128 + int(ended.Signal()), nil
	}
	return ended.ExitStatus(), nil
}

// wait returns how the helper ended.
func (s *Sandbox) wait() (status unix.WaitStatus, err error) {
	for {
		_, err = unix.Wait4(s.helper, &status, 0, nil)
		if err != unix.EINTR {
			s.helper = 0
			return status, err
		}
	}
}

// Signal sends a signal to the command.
func (s *Sandbox) Signal(signal syscall.Signal) error {
	return s.write(message{Kind: "signal", Signal: int(signal)})
}

// Close ends every process of the sandbox that is left, and closes the sockets that the caller has not closed. It must not be
// called while Run does its work.
func (s *Sandbox) Close() {
	s.control.Close() // the helper ends
	if s.helper > 0 {
		_ = unix.Kill(s.helper, unix.SIGKILL)
		_, _ = s.wait()
	}
	for _, l := range append(s.TCP, s.DNSTCP...) {
		l.Close()
	}
	for _, c := range s.DNS {
		c.Close()
	}
	for _, p := range s.Packets {
		p.Close()
	}
}
