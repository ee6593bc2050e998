package iptables

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// The fifth judge: the stories are dialled for real, by processes with the story's user and group, and the kernel has to
// say what the tracer said.
func TestTheKernelSaysWhatTheTracerSays(t *testing.T) {
	forEachFlavour(t, func(t *testing.T, flavour Flavour) {
		for _, sc := range scenarios {
			t.Run(sc.name, func(t *testing.T) {
				pod, peer := nettest.PodAndPeer(t)
				for _, a := range families {
					peer.AddAddress(t, "lo", netip.PrefixFrom(a.excluded, a.excluded.BitLen()))
				}
				peer.AddAddress(t, "eth0", netip.PrefixFrom(linkLocalPeer, 64))
				pod.AddAddress(t, "eth0", netip.PrefixFrom(linkLocalPod, 64))
				mustInit(t, pod, sc.spec)
				world := newWorld(t, pod, peer)
				for _, a := range families {
					for _, s := range sc.allStories(a) {
						if onRealInterface(s.packet) {
							world.listen(t, s.packet)
							if got := world.dial(t, s.packet); got != s.want.String() {
								t.Errorf("%s, %s: the kernel: %s, want: %v", a.family, s.name, got, s.want)
							}
						}
					}
				}
			})
		}
	})
}

// onRealInterface leaves the stories about interfaces that the pod does not have to the tracer.
func onRealInterface(p Packet) bool {
	for _, name := range []string{p.In, p.Out} {
		if name != "" && name != "eth0" && name != loopback {
			return false
		}
	}
	return true
}

// world is a pod and its peer with somebody at every door, who says which door it is, and with diallers under all the
// users and groups of the stories.
type world struct {
	pod, peer *nettest.Namespace
	doors     map[string]bool
	diallers  map[string]*dialler
}

func newWorld(t *testing.T, pod, peer *nettest.Namespace) *world {
	w := &world{pod: pod, peer: peer, doors: make(map[string]bool), diallers: make(map[string]*dialler)}
	w.open(t, pod, capture.OutboundPort, outbound)
	w.open(t, pod, capture.InboundPort, inbound)
	return w
}

// listen opens the door to which the packet goes if it is left alone.
func (w *world) listen(t *testing.T, p Packet) {
	where := w.pod
	if p.Out == "eth0" {
		where = w.peer
	}
	w.open(t, where, p.Dst.Port(), untouched)
}

func (w *world) open(t *testing.T, where *nettest.Namespace, port uint16, says Verdict) {
	key := fmt.Sprint(where.Name, port)
	if w.doors[key] {
		return
	}
	w.doors[key] = true
	listener := where.Listen(t, "tcp", fmt.Sprintf(":%d", port))
	var answering sync.WaitGroup
	answering.Go(func() { answer(listener, says.String()+"\n") })
	t.Cleanup(func() {
		listener.Close()
		answering.Wait()
	})
}

func answer(listener net.Listener, says string) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		io.WriteString(conn, says)
		conn.Close()
	}
}

// dial opens the connection that the packet begins and returns what the door said at which it ended.
func (w *world) dial(t *testing.T, p Packet) string {
	t.Helper()
	where, uid, gid := w.pod, p.UID, p.GID
	if p.In != "" {
		where, uid, gid = w.peer, 0, 0
	}
	key := fmt.Sprint(where.Name, uid, gid)
	if w.diallers[key] == nil {
		w.diallers[key] = startDialler(t, where, uid, gid)
	}
	src := ""
	if p.Src.IsValid() {
		src = netip.AddrPortFrom(p.Src, 0).String()
	}
	return w.diallers[key].dial(t, src, p.Dst.String())
}

// dialler is this test's own program, run again under another user, in dialForOthers.
type dialler struct {
	requests io.Writer
	answers  *bufio.Reader
}

const dialEnvironment = "PILLION_TEST_DIAL"

func startDialler(t *testing.T, ns *nettest.Namespace, uid, gid uint32) *dialler {
	t.Helper()
	// By this name other users reach it, too: it lies in a directory that they cannot enter.
	cmd := ns.Command(uid, gid, "/proc/self/exe")
	cmd.Env = append(os.Environ(), dialEnvironment+"=1")
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

func (d *dialler) dial(t *testing.T, src, dst string) string {
	t.Helper()
	if _, err := fmt.Fprintf(d.requests, "%s %s\n", src, dst); err != nil {
		t.Fatal(err)
	}
	answer, err := d.answers.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(answer)
}

// dialForOthers reads "source destination" lines, dials, and prints the line that the other side says.
func dialForOthers() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		src, dst, _ := strings.Cut(lines.Text(), " ")
		fmt.Println(dialOnce(src, dst))
	}
	os.Exit(0)
}

func dialOnce(src, dst string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var from net.Dialer
	if src != "" {
		from.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(src))
	}
	conn, err := from.DialContext(ctx, "tcp", dst)
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	said, err := io.ReadAll(conn)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(said))
}
