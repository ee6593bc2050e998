package e2e

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Programs that install the rules: the two flavours of iptables, or pillion itself.
const (
	nft    = "nft"
	legacy = "legacy"
	native = "nftables" // no program
)

// initArguments are the arguments that Istio's injector gives the init container.
var initArguments = []string{
	"init", "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "", "-b", "*",
	"-d", "15090,15021,15020", "--log_output_level=default:info",
}

// stage is a pod with its rules and its agent, and a peer.
type stage struct {
	pod, peer *nettest.Namespace
	agent     *agent
	tproxy    bool // the workload sees its clients' own addresses
}

// newStage returns a stage with the rules in nftables and an agent with the given flags.
func newStage(t testing.TB, flags ...string) *stage {
	t.Helper()
	return newStageIn(t, nft, flags...)
}

func newStageIn(t testing.TB, flavour string, flags ...string) *stage {
	t.Helper()
	nettest.RequireRoot(t)
	s := &stage{}
	s.pod, s.peer = nettest.PodAndPeer(t)
	initPod(t, s.pod, flavour)
	s.agent = startAgent(t, s.pod, flags...)
	return s
}

// injected is the agent's environment in a pod by Istio's injector.
var injected = []string{
	"POD_NAME=reviews-v1-6d4b75cb6d-hswz6", "POD_NAMESPACE=shop", "SERVICE_ACCOUNT=reader", "INSTANCE_IP=" + nettest.PodIP4.String(),
	"ISTIO_META_WORKLOAD_NAME=reviews-v1", "ISTIO_META_CLUSTER_ID=Kubernetes",
}

// newInjectedStage returns a stage whose agent has the injector's environment: its variables, those in env, as NAME=value,
// and the file with the pod's labels.
func newInjectedStage(t testing.TB, env []string, flags ...string) *stage {
	t.Helper()
	nettest.RequireRoot(t)
	const labels = `app="reviews"\nversion="v1.2"\nservice.istio.io/canonical-name="reviews"\nservice.istio.io/canonical-revision="v1"\n`
	s := &stage{}
	s.pod, s.peer = nettest.PodAndPeer(t)
	initPod(t, s.pod, nft)
	wrapper := append(append([]string{"env"}, injected...), env...)
	wrapper = append(wrapper, "unshare", "--mount", "--propagation", "private", "sh", "-c",
		"mount -t tmpfs tmpfs /etc && mkdir -p /etc/istio/pod && printf '"+labels+"' > /etc/istio/pod/labels && exec \"$@\"", "sh")
	s.agent = launchAgent(t, s.pod, wrapper, flags...)
	awaitReady(t, s.pod, s.agent)
	return s
}

// initPod runs `pillion init` as an injector does, and returns its output.
func initPod(t testing.TB, pod *nettest.Namespace, flavour string) string {
	t.Helper()
	stdout, stderr, code := execute(t, pod, []string{pathWith(t, flavour)}, initArguments...)
	if code != 0 {
		t.Fatalf("pillion init: exit code %d\n%s%s", code, stdout, stderr)
	}
	return stdout + stderr
}

// pathWith returns a PATH with only one flavour of iptables, or without iptables.
func pathWith(t testing.TB, flavour string) string {
	t.Helper()
	dir := t.TempDir()
	if flavour == native {
		return "PATH=" + dir
	}
	program := requireProgram(t, "xtables-"+flavour+"-multi")
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, verb := range []string{"", "-save", "-restore"} {
			if err := os.Symlink(program, filepath.Join(dir, family+"-"+flavour+verb)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return "PATH=" + dir
}

// way is one direction in one family: the client's and the server's namespace, and the client address that the server sees.
type way struct {
	name     string
	from, to *nettest.Namespace
	address  netip.Addr
	seenAs   netip.Addr
}

func (s *stage) ways() []way {
	seen4, seen6 := capture.InboundSource4, capture.InboundSource6
	if s.tproxy {
		seen4, seen6 = nettest.PeerIP4, nettest.PeerIP6
	}
	return []way{
		{"inbound IPv4", s.peer, s.pod, nettest.PodIP4, seen4},
		{"inbound IPv6", s.peer, s.pod, nettest.PodIP6, seen6},
		{"outbound IPv4", s.pod, s.peer, nettest.Elsewhere4, nettest.PodIP4},
		{"outbound IPv6", s.pod, s.peer, nettest.Elsewhere6, nettest.PodIP6},
	}
}

// everyWay runs a subtest for each way, one after the other.
func (s *stage) everyWay(t *testing.T, test func(t *testing.T, w way)) {
	for _, w := range s.ways() {
		t.Run(w.name, func(t *testing.T) { test(t, w) })
	}
}

// eachDirection runs a subtest inbound and one outbound, for tests in which the family cannot matter.
func (s *stage) eachDirection(t *testing.T, test func(t *testing.T, w way)) {
	for _, w := range []way{s.inbound(), s.outbound()} {
		t.Run(w.name, func(t *testing.T) { test(t, w) })
	}
}

// inbound and outbound return the IPv4 ways, for tests in which the family cannot matter.
func (s *stage) inbound() way  { return s.ways()[0] }
func (s *stage) outbound() way { return s.ways()[2] }

// connect opens a connection along the way and returns its two ends, named from the agent's view: downstream's and
// upstream's. It fails the test if the agent did not carry the connection. The ends have a deadline and no keep-alive, and
// are closed when the test ends.
func (w way) connect(t testing.TB) (downstream, upstream *net.TCPConn) {
	t.Helper()
	listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String()).(*net.TCPListener)
	return w.connectTo(t, listener)
}

// connectTo is connect with an existing listener.
func (w way) connectTo(t testing.TB, listener *net.TCPListener) (downstream, upstream *net.TCPConn) {
	t.Helper()
	downstream = w.dial(t, listener.Addr().String())
	listener.SetDeadline(time.Now().Add(nettest.Patience))
	upstream, err := listener.AcceptTCP()
	if err != nil {
		t.Fatalf("%s: the connection did not arrive: %v", w.name, err)
	}
	prepare(t, upstream)
	seen := upstream.RemoteAddr().(*net.TCPAddr).AddrPort()
	if seen.Addr() != w.seenAs {
		t.Fatalf("%s: upstream sees %v, want %v", w.name, seen.Addr(), w.seenAs)
	}
	// Outbound, upstream sees the pod's address with and without an agent, but a carried connection has another port.
	if seen.Port() == downstream.LocalAddr().(*net.TCPAddr).AddrPort().Port() {
		t.Fatalf("%s: upstream sees downstream's own port %d: the connection was not carried", w.name, seen.Port())
	}
	return downstream, upstream
}

// dial connects to address from the way's beginning.
func (w way) dial(t testing.TB, address string) *net.TCPConn {
	t.Helper()
	conn, err := w.from.Dial("tcp", address, nettest.Patience)
	if err != nil {
		t.Fatalf("%s: %v", w.name, err)
	}
	prepare(t, conn.(*net.TCPConn))
	return conn.(*net.TCPConn)
}

// prepare disables keep-alive, since that is the agent's task, and sets a deadline as a guard against hanging.
func prepare(t testing.TB, conn *net.TCPConn) {
	t.Cleanup(func() { conn.Close() })
	conn.SetKeepAlive(false)
	conn.SetDeadline(time.Now().Add(nettest.Patience))
}

// reset ends a connection with a reset.
func reset(t testing.TB, conn *net.TCPConn) {
	t.Helper()
	if err := conn.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// tryConnection dials address and reads until the end. It returns the error that ended the connection, or nil for EOF.
func tryConnection(from *nettest.Namespace, address string) error {
	conn, err := from.Dial("tcp", address, nettest.Patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	_, err = conn.Read(make([]byte, 1))
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// reads fails the test unless the next bytes from conn are want.
func reads(t testing.TB, conn net.Conn, want string) {
	t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(conn, got)
	if err != nil || string(got[:n]) != want {
		t.Fatalf("read %q and %v, want %q", got[:n], err, want)
	}
}

func writes(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	if _, err := conn.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

// converse sends a word in each direction, to prove that the connection is carried. It has patience, however old the connection is.
func converse(t testing.TB, downstream, upstream net.Conn) {
	t.Helper()
	for _, end := range []net.Conn{downstream, upstream} {
		end.SetDeadline(time.Now().Add(nettest.Patience))
	}
	writes(t, downstream, "question")
	reads(t, upstream, "question")
	writes(t, upstream, "answer")
	reads(t, downstream, "answer")
}

// isReset and isRefused report whether an error means that the other side reset or refused the connection.
func isReset(err error) bool   { return errors.Is(err, syscall.ECONNRESET) }
func isRefused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
