// Package nettest gives tests real network namespaces, wired like a pod and its peer, and checks that a test leaves
// no resources behind. Only tests import it.
//
// Namespaces have no name: they vanish with the handle, and a test that is killed leaves nothing. Everything that a
// helper makes is taken away by t.Cleanup, in reverse order.
package nettest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/netns"
)

// Addresses of the two ends that PodAndPeer makes. They are documentation ranges (RFC 5737, RFC 3849), so a packet that
// should ever leave a namespace goes nowhere.
var (
	PodIP4     = netip.MustParseAddr("198.51.100.2")
	PodIP6     = netip.MustParseAddr("2001:db8:1::2")
	PeerIP4    = netip.MustParseAddr("198.51.100.1")
	PeerIP6    = netip.MustParseAddr("2001:db8:1::1")
	Elsewhere4 = netip.MustParseAddr("203.0.113.7")   // a third host's address; the peer answers for it
	Elsewhere6 = netip.MustParseAddr("2001:db8:2::7") // the same for IPv6
)

// RequireRoot skips the test on a laptop without the capabilities that namespaces need. In CI (CI set and not empty) it
// fails instead: a promise that was not checked is not kept.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("this test needs root (or `unshare -rn`), and in CI it must not be skipped")
	}
	t.Skip("needs root: run it under `unshare -rn` or as root")
}

// Namespace is a network namespace of one test.
type Namespace struct {
	Name   string // for messages only
	handle netns.Handle
}

// New makes a namespace whose loopback is up.
func New(t testing.TB, name string) *Namespace {
	t.Helper()
	handle, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { handle.Close() })
	ns := &Namespace{Name: name, handle: handle}
	ns.Do(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return ns
}

// Open refers to a namespace that others made, by its path.
func Open(t testing.TB, name, path string) *Namespace {
	t.Helper()
	handle, err := netns.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { handle.Close() })
	return &Namespace{Name: name, handle: handle}
}

// PodAndPeer makes two namespaces joined by a veth pair, both eth0: the pod at PodIP4 and PodIP6 with its default routes
// through the peer, and the peer at PeerIP4 and PeerIP6. The peer also answers for Elsewhere4 and Elsewhere6.
func PodAndPeer(t testing.TB) (pod, peer *Namespace) {
	t.Helper()
	pod, peer = New(t, "pod"), New(t, "peer")
	Join(t, pod, peer)
	pod.AddAddress(t, "eth0", netip.PrefixFrom(PodIP4, 24))
	pod.AddAddress(t, "eth0", netip.PrefixFrom(PodIP6, 64))
	peer.AddAddress(t, "eth0", netip.PrefixFrom(PeerIP4, 24))
	peer.AddAddress(t, "eth0", netip.PrefixFrom(PeerIP6, 64))
	peer.AddAddress(t, "lo", netip.PrefixFrom(Elsewhere4, 32))
	peer.AddAddress(t, "lo", netip.PrefixFrom(Elsewhere6, 128))
	pod.AddDefaultRoute(t, PeerIP4)
	pod.AddDefaultRoute(t, PeerIP6)
	return pod, peer
}

var linkSerial atomic.Uint32

// Join connects two namespaces by a veth pair whose ends are both called eth0 and are up.
func Join(t testing.TB, a, b *Namespace) {
	t.Helper()
	serial := linkSerial.Add(1)
	nameA, nameB := fmt.Sprintf("nta%d", serial), fmt.Sprintf("ntb%d", serial)
	var pathB *os.File
	b.Do(t, func() (err error) {
		pathB, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	defer pathB.Close()
	a.Do(t, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = nameA
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: nameB}); err != nil {
			return fmt.Errorf("making a veth pair: %w", err)
		}
		far, err := netlink.LinkByName(nameB)
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(far, int(pathB.Fd()))
	})
	for ns, name := range map[*Namespace]string{a: nameA, b: nameB} {
		ns.Do(t, func() error {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetName(link, "eth0"); err != nil {
				return err
			}
			return netlink.LinkSetUp(link)
		})
	}
}

// AddAddress gives an interface an address, usable at once: IPv6 duplicate address detection is off for it.
func (ns *Namespace) AddAddress(t testing.TB, link string, prefix netip.Prefix) {
	t.Helper()
	ns.Do(t, func() error {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{
			IP:   prefix.Addr().AsSlice(),
			Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
		}}
		if prefix.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		return netlink.AddrAdd(l, addr)
	})
}

// AddDefaultRoute sends everything of the gateway's family through it.
func (ns *Namespace) AddDefaultRoute(t testing.TB, gateway netip.Addr) {
	t.Helper()
	ns.Do(t, func() error {
		return netlink.RouteAdd(&netlink.Route{Gw: gateway.AsSlice()})
	})
}

// DeliverMarked delivers here whatever has a mark, wherever it goes.
func (ns *Namespace) DeliverMarked(t testing.TB, mark uint32) {
	t.Helper()
	for _, family := range []string{"-4", "-6"} {
		ns.MustRun(t, "ip", family, "rule", "add", "fwmark", fmt.Sprint(mark), "lookup", "133")
		ns.MustRun(t, "ip", family, "route", "add", "local", "default", "dev", "lo", "table", "133")
	}
}

// AnswerMarked gives accepted connections the mark of their SYN. With DeliverMarked, a socket that has another host's
// address and marks what it sends gets its answers without any rule.
func (ns *Namespace) AnswerMarked(t testing.TB) {
	t.Helper()
	ns.Do(t, func() error { return os.WriteFile("/proc/sys/net/ipv4/tcp_fwmark_accept", []byte("1"), 0) })
}

// Do runs fn on a thread inside the namespace and fails the test when it fails.
func (ns *Namespace) Do(t testing.TB, fn func() error) {
	t.Helper()
	if err := ns.handle.Do(fn); err != nil {
		t.Fatalf("in namespace %s: %v", ns.Name, err)
	}
}

// Try is Do for a failure that the test wants to see.
func (ns *Namespace) Try(fn func() error) error { return ns.handle.Do(fn) }

// Path names the namespace for programs that take a path, such as nsenter.
func (ns *Namespace) Path() string { return ns.handle.Path(os.Getpid()) }

// Listen listens inside the namespace; the listener may be used from any goroutine. If the address is in use, it waits: a process
// that another test starts at this moment has a listener that was closed before, until it executes its program.
func (ns *Namespace) Listen(t testing.TB, network, address string) net.Listener {
	t.Helper()
	var listener net.Listener
	var err error
	Within(Patience, func() bool {
		err = ns.Try(func() (err error) {
			config := net.ListenConfig{}
			config.SetMultipathTCP(false)
			listener, err = config.Listen(context.Background(), network, address)
			return err
		})
		return !errors.Is(err, syscall.EADDRINUSE)
	})
	if err != nil {
		t.Fatalf("in namespace %s: %v", ns.Name, err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener
}

// Dial connects from inside the namespace, as this process's user.
func (ns *Namespace) Dial(network, address string, timeout time.Duration) (net.Conn, error) {
	var conn net.Conn
	err := ns.handle.Do(func() (err error) {
		conn, err = net.DialTimeout(network, address, timeout)
		return err
	})
	return conn, err
}

// Command prepares a program that will run inside the namespace as the given user and group (both 0 is this process's
// own). Give it to Start or Run.
func (ns *Namespace) Command(uid, gid uint32, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: 0}
	if uid != 0 || gid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: gid}
	}
	return cmd
}

// hanging is how long a program may run. A JVM or a Python behind a binary with the race detector needs half a minute on a
// machine whose processors many tests share.
const hanging = 3 * Patience

// Run runs cmd inside the namespace to its end and returns what it wrote to stdout and stderr together. It is killed if it
// hangs; the error is ErrHanging then.
func (ns *Namespace) Run(cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &out
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &out
	}
	if err := ns.handle.Do(cmd.Start); err != nil {
		return "", err
	}
	overdue := time.AfterFunc(hanging, func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	err := cmd.Wait()
	if !overdue.Stop() {
		err = ErrHanging
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(out.String()))
	}
	return out.String(), err
}

// ErrHanging is the error of a program that was killed because it had not ended for minutes.
var ErrHanging = errors.New("killed, because it did not end in time")

// MustRun is Run for a program that has to succeed.
func (ns *Namespace) MustRun(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := ns.Run(ns.Command(0, 0, name, args...))
	if err != nil {
		t.Fatalf("in namespace %s: %v", ns.Name, err)
	}
	return out
}

// Process is a program that runs beside the test.
type Process struct {
	Cmd    *exec.Cmd
	exited chan struct{}
	err    error
}

// Start starts cmd inside the namespace. When the test ends, the program and its whole process group are killed and
// waited for.
func (ns *Namespace) Start(t testing.TB, cmd *exec.Cmd) *Process {
	t.Helper()
	ns.Do(t, cmd.Start)
	p := &Process{Cmd: cmd, exited: make(chan struct{})}
	go p.reap()
	t.Cleanup(p.Kill)
	return p
}

func (p *Process) reap() {
	p.err = p.Cmd.Wait()
	close(p.exited)
}

// Kill ends the program and its process group and waits until it is gone. Calling it twice is fine.
func (p *Process) Kill() {
	syscall.Kill(-p.Cmd.Process.Pid, syscall.SIGKILL)
	<-p.exited
}

// Signal sends the program itself a signal.
func (p *Process) Signal(sig syscall.Signal) error { return p.Cmd.Process.Signal(sig) }

// Exited is closed when the program has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Wait waits until the program ends and returns its exit code, -1 when a signal ended it.
func (p *Process) Wait(timeout time.Duration) (int, error) {
	select {
	case <-p.exited:
		return p.Cmd.ProcessState.ExitCode(), nil
	case <-time.After(timeout):
		return 0, fmt.Errorf("%s still runs after %v", p.Cmd.Path, timeout)
	}
}
