package rulestest

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

// CanBeDialled excludes stories that only the tracer can judge: about interfaces that the pod lacks, about packets in
// the middle of a connection, and about link-local addresses without a host.
func CanBeDialled(p trace.Packet) bool {
	lost := p.Dst.Addr().IsLinkLocalUnicast() && p.Dst.Addr().Zone() == ""
	return !lost && p.State == "" && slices.Contains([]string{"", "eth0", "vm0"}, p.In) && slices.Contains([]string{"", "eth0", ruleset.Loopback}, p.Out)
}

// World is a pod, its peer and a virtual machine in the pod, with a listener at every destination that answers with its
// own name, and diallers for all users and groups of the stories.
type World struct {
	Pod, peer, vm *nettest.Namespace
	doors         map[string]bool
	diallers      map[string]*dialler
}

func NewWorld(t *testing.T) *World {
	pod, peer := nettest.PodAndPeer(t)
	vm := nettest.New(t, "vm")
	w := &World{Pod: pod, peer: peer, vm: vm, doors: make(map[string]bool), diallers: make(map[string]*dialler)}
	for _, a := range Families {
		peer.AddAddress(t, "lo", netip.PrefixFrom(a.Excluded, a.Excluded.BitLen()))
	}
	peer.AddAddress(t, "eth0", netip.PrefixFrom(linkLocalPeer, 64))
	pod.AddAddress(t, "eth0", netip.PrefixFrom(linkLocalPod, 64))
	pod.MustRun(t, "/sbin/ip", "link", "add", "vm0", "type", "veth", "peer", "name", "eth0", "netns", vm.Path())
	for _, ends := range []struct {
		ns     *nettest.Namespace
		link   string
		v4, v6 string
	}{{pod, "vm0", "192.0.2.1/24", "2001:db8:3::1/64"}, {vm, "eth0", "192.0.2.2/24", "2001:db8:3::2/64"}} {
		ends.ns.AddAddress(t, ends.link, netip.MustParsePrefix(ends.v4))
		ends.ns.AddAddress(t, ends.link, netip.MustParsePrefix(ends.v6))
		ends.ns.MustRun(t, "/sbin/ip", "link", "set", ends.link, "up")
	}
	vm.AddDefaultRoute(t, netip.MustParseAddr("192.0.2.1"))
	vm.AddDefaultRoute(t, netip.MustParseAddr("2001:db8:3::1"))
	// The pod forwards the packets of the virtual machine, and the answers to it.
	pod.Do(t, func() error {
		return errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
	})
	peer.MustRun(t, "/sbin/ip", "route", "add", "192.0.2.0/24", "via", nettest.PodIP4.String())
	peer.MustRun(t, "/sbin/ip", "route", "add", "2001:db8:3::/64", "via", nettest.PodIP6.String())
	w.open(t, pod, ruleset.TCP, fmt.Sprintf(":%d", capture.OutboundPort), Outbound)
	w.open(t, pod, ruleset.TCP, fmt.Sprintf(":%d", capture.InboundPort), Inbound)
	// Rules select the zone of the agent's answers by its user, so another process sends them.
	for _, address := range []string{"127.0.0.1", "[::1]"} {
		server := helper(pod, Agent, Agent, serveEnvironment, fmt.Sprintf("%s:%d", address, capture.DNSPort))
		ready, err := server.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		pod.Start(t, server)
		if _, err := bufio.NewReader(ready).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// open starts a listener. The agent's inbound one is transparent, so that TPROXY can lead to it.
func (w *World) open(t *testing.T, where *nettest.Namespace, protocol ruleset.Protocol, address string, says trace.Verdict) {
	key := fmt.Sprint(where.Name, protocol, address)
	if w.doors[key] {
		return
	}
	w.doors[key] = true
	var door io.Closer
	var answering sync.WaitGroup
	where.Do(t, func() error {
		var config net.ListenConfig
		config.SetMultipathTCP(false)
		if says == Inbound {
			config.Control = transparent
		}
		if protocol == ruleset.UDP {
			packets, err := config.ListenPacket(context.Background(), "udp", address)
			door = packets
			answering.Go(func() { answerPackets(packets, says) })
			return err
		}
		listener, err := config.Listen(context.Background(), "tcp", address)
		door = listener
		answering.Go(func() { answer(listener, says) })
		return err
	})
	t.Cleanup(func() {
		door.Close()
		answering.Wait()
	})
}

// transparent allows a socket to have foreign addresses.
func transparent(_, _ string, c syscall.RawConn) (err error) {
	controlErr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		if errors.Is(err, unix.ENOPROTOOPT) || err == nil {
			unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
		}
	})
	return cmp.Or(controlErr, err)
}

func answer(listener net.Listener, says trace.Verdict) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		verdict := says
		if local := conn.LocalAddr().(*net.TCPAddr); says == Inbound && local.Port != capture.InboundPort {
			verdict = Given
		}
		io.WriteString(conn, verdict.String())
		conn.Close()
	}
}

func answerPackets(packets net.PacketConn, says trace.Verdict) {
	question := make([]byte, 512)
	for {
		_, from, err := packets.ReadFrom(question)
		if err != nil {
			return
		}
		packets.WriteTo([]byte(says.String()), from)
	}
}

// Dial opens the connection that the packet begins, and returns the answer of the listener that it reached.
func (w *World) Dial(t *testing.T, p trace.Packet) string {
	t.Helper()
	where, uid, gid := w.Pod, p.UID, p.GID
	switch p.In {
	case "eth0":
		where, uid, gid = w.peer, 0, 0
	case "vm0":
		where, uid, gid = w.vm, 0, 0
	}
	// The listener that the packet reaches if it is not captured.
	behind := w.peer
	if p.Out == ruleset.Loopback || slices.Contains([]netip.Addr{nettest.PodIP4, nettest.PodIP6, linkLocalPod}, p.Dst.Addr().WithZone("")) {
		behind = w.Pod
	}
	protocol, address := ruleset.TCP, fmt.Sprintf(":%d", p.Dst.Port())
	if p.Protocol == ruleset.UDP {
		protocol, address = ruleset.UDP, p.Dst.String() // so that the answer has this source
	}
	w.open(t, behind, protocol, address, Untouched)
	src := "-"
	if p.Src.IsValid() && p.In == "" {
		src = netip.AddrPortFrom(p.Src, 0).String()
	}
	return w.dial(t, where, uid, gid, fmt.Sprintf("%s %s %s %d", protocol, src, p.Dst, p.Mark))
}

// Ask is Dial for a local process, without a listener at the destination.
func (w *World) Ask(t *testing.T, p trace.Packet) string {
	t.Helper()
	return w.dial(t, w.Pod, p.UID, p.GID, fmt.Sprintf("%s - %s 0", cmp.Or(p.Protocol, ruleset.TCP), p.Dst))
}

func (w *World) dial(t *testing.T, where *nettest.Namespace, uid, gid uint32, request string) string {
	t.Helper()
	key := fmt.Sprint(where.Name, uid, gid)
	if w.diallers[key] == nil {
		w.diallers[key] = startDialler(t, where, uid, gid)
	}
	return w.diallers[key].dial(t, request)
}

// DockersResolver installs the nat rules of Docker's embedded name server, and a listener behind them. That server
// listens at 127.0.0.11, on other ports than 53.
func (w *World) DockersResolver(t *testing.T, flavour ruleset.Flavour) {
	t.Helper()
	const address = "127.0.0.11:39321"
	var answering sync.WaitGroup
	var doors []io.Closer
	w.Pod.Do(t, func() error {
		var config net.ListenConfig
		config.SetMultipathTCP(false)
		packets, err := config.ListenPacket(context.Background(), "udp", address)
		if err != nil {
			return err
		}
		listener, err := config.Listen(context.Background(), "tcp", address)
		doors = append(doors, packets, listener)
		answering.Go(func() { answerPackets(packets, Docker) })
		answering.Go(func() { answer(listener, Docker) })
		return err
	})
	t.Cleanup(func() {
		for _, door := range doors {
			door.Close()
		}
		answering.Wait()
	})
	for _, rule := range []string{
		"-N DOCKER_OUTPUT", "-N DOCKER_POSTROUTING",
		"-I OUTPUT -d 127.0.0.11 -j DOCKER_OUTPUT", "-I POSTROUTING -d 127.0.0.11 -j DOCKER_POSTROUTING",
		"-A DOCKER_OUTPUT -d 127.0.0.11 -p udp --dport 53 -j DNAT --to-destination " + address,
		"-A DOCKER_POSTROUTING -s 127.0.0.11 -p udp --sport 39321 -j SNAT --to-source :53",
		"-A DOCKER_OUTPUT -d 127.0.0.11 -p tcp --dport 53 -j DNAT --to-destination " + address,
		"-A DOCKER_POSTROUTING -s 127.0.0.11 -p tcp --sport 39321 -j SNAT --to-source :53",
	} {
		w.Pod.MustRun(t, "/usr/sbin/iptables-"+string(flavour), append([]string{"-t", "nat"}, strings.Fields(rule)...)...)
	}
}

// helper is the test's own program, started again as another user for another purpose.
func helper(ns *nettest.Namespace, uid, gid uint32, environment, value string) *exec.Cmd {
	// By this name other users reach it, too: it lies in a directory that they cannot enter.
	cmd := ns.Command(uid, gid, "/proc/self/exe")
	cmd.Env = append(os.Environ(), environment+"="+value)
	return cmd
}

const (
	dialEnvironment  = "PILLION_TEST_DIAL"
	serveEnvironment = "PILLION_TEST_SERVE"
)

// Main runs the tests of a package. Call it from TestMain: worlds start the test's own program to dial and to serve.
func Main(m *testing.M) int {
	if os.Getenv(dialEnvironment) != "" {
		dialForOthers()
	}
	if address := os.Getenv(serveEnvironment); address != "" {
		serveForOthers(address)
	}
	return nettest.Main(m)
}

// dialler is a process that dials as its user.
type dialler struct {
	requests io.Writer
	answers  *bufio.Reader
}

func startDialler(t *testing.T, ns *nettest.Namespace, uid, gid uint32) *dialler {
	t.Helper()
	cmd := helper(ns, uid, gid, dialEnvironment, "1")
	requests, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	answers, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	ns.Start(t, cmd)
	return &dialler{requests, bufio.NewReader(answers)}
}

func (d *dialler) dial(t *testing.T, request string) string {
	t.Helper()
	if _, err := fmt.Fprintln(d.requests, request); err != nil {
		t.Fatal(err)
	}
	answer, err := d.answers.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(answer)
}

// dialForOthers reads lines "protocol source destination mark", dials, and prints the answer.
func dialForOthers() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		mark, _ := strconv.Atoi(words[3])
		fmt.Println(dialOnce(words[0], words[1], words[2], mark))
	}
	os.Exit(0)
}

func dialOnce(network, src, dst string, mark int) string {
	ctx, cancel := context.WithTimeout(context.Background(), dialPatience)
	defer cancel()
	var from net.Dialer
	if src != "-" {
		from.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(src))
	}
	if mark != 0 {
		from.Control = func(network, address string, c syscall.RawConn) error {
			if err := transparent(network, address, c); err != nil {
				return err
			}
			return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) })
		}
	}
	conn, err := from.DialContext(ctx, network, dst)
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	said := make([]byte, 512)
	for end := time.Now().Add(dialPatience); ; {
		deadline := end
		if network == string(ruleset.UDP) { // a datagram may be lost, for example while a neighbour is looked up beside a load
			conn.Write([]byte("?"))
			deadline = time.Now().Add(time.Second)
		}
		conn.SetDeadline(deadline)
		n, err := conn.Read(said)
		switch {
		case err == nil:
			return string(said[:n])
		case !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end):
			return err.Error()
		}
	}
}

// dialPatience is how long a dial and an answer may take.
const dialPatience = 15 * time.Second

// serveForOthers is the agent's DNS listener.
func serveForOthers(address string) {
	packets, err := net.ListenPacket("udp", address)
	if err != nil {
		os.Exit(1)
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		os.Exit(1)
	}
	fmt.Println("ready")
	go answerPackets(packets, Dns)
	answer(listener, Dns)
}

// Everything returns all that init could have changed: both flavours, both families, the loopback's addresses, and
// routes. It changes nothing itself, and uses the machine's own programs.
func Everything(t *testing.T, ns *nettest.Namespace) string {
	t.Helper()
	look := ns.Command(0, 0, "/bin/sh", "-c", `
		PATH=/usr/sbin:/usr/bin:/sbin:/bin
		nft list ruleset 2>/dev/null | sed 's/packets [0-9]* bytes [0-9]*//'
		for x in ip ip6; do
			if [ -s /proc/net/${x}_tables_names ]; then
				echo "legacy $x: $(cat /proc/net/${x}_tables_names)"
				${x}tables-legacy-save | grep -v '^#' | sed 's/\[.*\]//'
			fi
		done
		ip -o addr show dev lo
		for family in -4 -6; do ip $family rule; ip $family route show table 133; ip $family route show table 200; done 2>/dev/null; true`)
	out, err := ns.Run(look)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
