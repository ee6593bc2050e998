package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// echoDatagrams answers datagrams at an address of a namespace with their source and size, from the same port or from another one.
func echoDatagrams(t *testing.T, ns *nettest.Namespace, at string, fromElsewhere bool) {
	open := func(address string) (conn net.PacketConn) {
		ns.Do(t, func() (err error) {
			conn, err = net.ListenPacket("udp", address)
			return err
		})
		return conn
	}
	incoming := open(at)
	outgoing, done := incoming, make(chan struct{})
	if fromElsewhere {
		outgoing = open(netip.AddrPortFrom(netip.MustParseAddrPort(at).Addr(), 0).String())
	}
	go func() {
		defer close(done)
		buffer := make([]byte, 1<<16)
		for {
			n, from, err := incoming.ReadFrom(buffer)
			if err != nil {
				return
			}
			outgoing.WriteTo(fmt.Appendf(nil, "%v %d", from, n), from)
		}
	}()
	t.Cleanup(func() {
		incoming.Close()
		outgoing.Close()
		<-done
	})
}

// datagramsInPython defines functions for the commands of the tests.
const datagramsInPython = `
import errno, socket, sys
def opened(family=socket.AF_INET):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(60)
    return s
def exchange(s, address, size=1):
    s.sendto(b"x" * size, address)
    answer, sender = s.recvfrom(65535)
    return *answer.decode().rsplit(" ", 1), sender[:2]
def failure(address, family=socket.AF_INET, payload=b"x"):
    s = opened(family)
    try:
        s.connect(address)
        s.send(payload)
        s.recv(100)
    except OSError as e:
        return errno.errorcode.get(e.errno, str(e))
`

// With --udp allow, datagrams reach what the caller reaches, one source for all destinations of a socket, and answers have
// the source that the server gave them.
func TestRunCarriesDatagrams(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		requireProgram(t, "python3")
		for _, at := range []string{"203.0.113.7:9000", "198.51.100.1:9000", "[2001:db8:2::7]:9000"} {
			echoDatagrams(t, c.peer, at, false)
		}
		echoDatagrams(t, c.peer, "203.0.113.80:69", true)
		stdout, stderr, status := c.run(t, "--udp", "allow", "--log", "json", "--", "python3", "-c", datagramsInPython+`
s = opened()
first, second = exchange(s, ("203.0.113.7", 9000)), exchange(s, ("198.51.100.1", 9000), 60000)
assert first[0] == second[0], "the servers see different sources: %s, %s" % (first, second)
print(first[0].split(":")[0], first[1:], second[1:])
six = exchange(opened(socket.AF_INET6), ("2001:db8:2::7", 9000), 40000)
print(six[0].rsplit(":", 1)[0], six[1:])
print(exchange(opened(), ("203.0.113.80", 69))[2][0])
UDP_SEGMENT = 103
s.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
print(exchange(s, ("203.0.113.7", 9000), 2500)[1], [s.recv(100).decode().split(" ")[1] for _ in range(2)])`)
		want := "198.51.100.2 ('1', ('203.0.113.7', 9000)) ('60000', ('198.51.100.1', 9000))\n" +
			"[2001:db8:1::2] ('40000', ('2001:db8:2::7', 9000))\n203.0.113.80\n1000 ['1000', '500']\n"
		if stdout != want || status != 0 {
			t.Fatalf("the command printed %q, want %q\n%s", stdout, want, stderr)
		}
		bytes := make(map[string]uint64)
		for _, r := range recorded(t, stderr) {
			if r.Protocol != "UDP" || r.Failed || r.Reason != "completed" || (r.Sent == 0) != (r.Destination == "203.0.113.80:69") {
				t.Errorf("a record is %+v", r)
			}
			bytes[r.Destination] = r.Received
		}
		for destination, want := range map[string]uint64{"203.0.113.7:9000": 2501, "198.51.100.1:9000": 60000, "[2001:db8:2::7]:9000": 40000, "203.0.113.80:69": 1} {
			if bytes[destination] != want {
				t.Errorf("%d bytes to %s are recorded, want %d", bytes[destination], destination, want)
			}
		}
	})
}

// Errors that datagrams meet reach the command, and are recorded.
func TestRunReportsDatagramsThatFail(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		requireProgram(t, "python3")
		stdout, stderr, _ := c.run(t, "--udp", "allow", "--log", "json", "--", "python3", "-c", datagramsInPython+`
print(failure(("203.0.113.7", 9)), failure(("2001:db8:2::7", 9), socket.AF_INET6), failure(("224.0.0.251", 5353)))`)
		if stdout != "ECONNREFUSED ECONNREFUSED EPERM\n" {
			t.Errorf("the errors are %q", stdout)
		}
		var got []string
		for _, r := range recorded(t, stderr) {
			got = append(got, r.Destination+" "+r.Reason+" "+r.Failure)
		}
		slices.Sort(got)
		want := []string{"203.0.113.7:9 udp_failed connection refused", "224.0.0.251:5353 udp_rejected datagrams to groups of hosts are not carried",
			"[2001:db8:2::7]:9 udp_failed connection refused"}
		if !slices.Equal(got, want) {
			t.Errorf("the records are %q, want %q", got, want)
		}
	})
}

// The policy is applied to datagrams: by address, and by the names that the command has resolved. The machine's loopback is
// not reached.
func TestRunJudgesDatagrams(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		requireProgram(t, "python3")
		for _, at := range []string{"203.0.113.7:9000", "203.0.113.80:9000", "198.51.100.1:9000", "[2001:db8:2::7]:9000"} {
			echoDatagrams(t, c.peer, at, false)
		}
		echoDatagrams(t, c.net, "127.0.0.1:9000", false)
		stdout, stderr, _ := c.run(t, "--udp", "allow", "--default", "deny", "--allow", "web.example:9000", "--allow", "[2001:db8:2::7]:9000",
			"--log", "json", "--", "python3", "-c", datagramsInPython+`
print(exchange(opened(), ("203.0.113.80", 9000))[2][0], exchange(opened(socket.AF_INET6), ("2001:db8:2::7", 9000))[2][0])
for address in ("203.0.113.7", 9000), ("203.0.113.80", 9001):
    print(failure(address))
for address in ("127.0.0.1", 9000), ("192.0.0.8", 9000):
    s = opened()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"pillion0")
    s.settimeout(0.2)
    s.sendto(b"x", address)
    try:
        print(s.recvfrom(100))
    except TimeoutError:
        pass`)
		if want := "203.0.113.80 2001:db8:2::7\nEHOSTUNREACH\nEHOSTUNREACH\n"; stdout != want {
			t.Errorf("the command printed %q, want %q\n%s", stdout, want, stderr)
		}
		denied := slices.DeleteFunc(recorded(t, stderr), func(r live.Record) bool { return r.Reason != "denied" })
		if len(denied) != 2 || !strings.Contains(denied[0].Failure, "203.0.113.7:9000 is not allowed") || denied[0].Received != 0 {
			t.Errorf("the records are %+v", denied)
		}
	})
}
