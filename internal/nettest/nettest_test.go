package nettest

import (
	"io"
	"net/netip"
	"os"
	"testing"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

func TestPodAndPeerReachEachOther(t *testing.T) {
	RequireRoot(t)
	pod, peer := PodAndPeer(t)
	for _, c := range []struct {
		from, to *Namespace
		address  netip.Addr
	}{
		{peer, pod, PodIP4}, {peer, pod, PodIP6}, {pod, peer, PeerIP4}, {pod, peer, PeerIP6},
		{pod, peer, Elsewhere4}, {pod, peer, Elsewhere6},
	} {
		t.Run(c.from.Name+" to "+c.address.String(), func(t *testing.T) {
			listener := c.to.Listen(t, "tcp", netip.AddrPortFrom(c.address, 0).String())
			go func() {
				conn, err := listener.Accept()
				if err == nil {
					io.WriteString(conn, "hello")
					conn.Close()
				}
			}()
			conn, err := c.from.Dial("tcp", listener.Addr().String(), Patience)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if got, _ := io.ReadAll(conn); string(got) != "hello" {
				t.Errorf("read %q", got)
			}
		})
	}
}

// A listener waits for an address that is in use, and for no other error.
func TestAListenerWaitsForItsAddress(t *testing.T) {
	RequireRoot(t)
	ns := New(t, "alone")
	first := ns.Listen(t, "tcp", "127.0.0.1:0")
	at := first.Addr().String()
	OnceBlocked(t, "time.Sleep", func() { first.Close() })
	if second := ns.Listen(t, "tcp", at); second.Addr().String() != at {
		t.Errorf("listens at %v, want %s", second.Addr(), at)
	}
	strange := &attempt{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		ns.Listen(strange, "tcp", netip.AddrPortFrom(PodIP4, 1).String())
	}()
	<-done
	if !strange.Failed() {
		t.Error("listens at an address that the namespace does not have")
	}
}

func TestProgramsRunInsideAsTheGivenUser(t *testing.T) {
	RequireRoot(t)
	ns := New(t, "alone")
	out, err := ns.Run(ns.Command(1337, 1337, "sh", "-c", "id -u; ls /sys/class/net >/dev/null; tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '"))
	if err != nil {
		t.Fatal(err)
	}
	if out != "1337\nlo\n" {
		t.Errorf("uid and interfaces: got %q, want 1337 and lo alone", out)
	}
}
