package inbound

import (
	"bufio"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/pires/go-proxyproto"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func place(mark uint32) servetest.Place {
	return servetest.Place{Rules: true, New: func(t testing.TB, parts servetest.Parts) servetest.Role {
		proxy, err := New(Config{
			Poller: parts.Poller, OwnPorts: servetest.OwnPorts(), OwnAddresses: parts.Addresses, Flows: parts.Flows,
			Settings: parts.Settings, HTTP: parts.HTTP, TPROXYMark: mark,
		})
		if err != nil {
			t.Fatal(err)
		}
		return proxy
	}}
}

func TestInboundKeepsThePromisesOfARole(t *testing.T) { servetest.Promises(t, place(0)) }

// A transparent listener also accepts connections that a rule redirected. Connection tracking has their destination.
func TestARedirectedConnectionOfATransparentListenerKeepsThePromises(t *testing.T) {
	servetest.Promises(t, place(1))
}

func TestTheWorkloadIsDialledFromTheAddressThatTheRulesLetPass(t *testing.T) {
	r := servetest.NewRig(t, place(0), servetest.Defaults())
	conns := r.Listen(t, "81")
	servetest.Send(t, r.Dial(t, r.At(81)), "\x00")
	if got := servetest.Take(t, conns).RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); got != capture.InboundSource4 {
		t.Errorf("the workload is dialled from %v, want %v", got, capture.InboundSource4)
	}
}

// The pod's rules redirect packets to other addresses too, when a host routes through the pod.
func TestAConnectionToAForeignAddressIsRefused(t *testing.T) {
	r := servetest.NewRig(t, place(0), servetest.Defaults())
	r.Peer.MustRun(t, "ip", "route", "add", "192.0.2.9", "via", nettest.PodIP4.String())
	servetest.ExpectRefusal(t, r.Peer, netip.MustParseAddrPort("192.0.2.9:81"))
	if got := r.Await(t); got.Reason != flow.ForeignAddress || got.OriginalDestination.String() != "192.0.2.9:81" || got.Upstream.IsValid() {
		t.Errorf("the record is %+v", got)
	}
}

// TPROXY delivers a connection whose local address is its original destination. Without any rule a connection to a
// transparent listener looks the same.
func TestTheLocalAddressOfATransparentConnectionIsItsDestination(t *testing.T) {
	at := place(1)
	at.Rules, at.Port = false, 81
	r := servetest.NewRig(t, at, servetest.Defaults())
	client := r.Dial(t, netip.AddrPortFrom(nettest.PodIP4, 81))
	r.AwaitListed(t, 1)
	client.SetLinger(0)
	client.Close()
	got := r.Await(t)
	if got.OriginalDestination != netip.AddrPortFrom(nettest.PodIP4, 81) || got.Reason != flow.DownstreamReset {
		t.Errorf("the record is %+v", got)
	}
}

func TestAWorkloadGetsAProxyProtocolHeaderWhereSettingsAskForIt(t *testing.T) {
	settings := servetest.Defaults()
	var err error
	if settings.ProxyProtocol, err = capture.ParsePorts("81"); err != nil {
		t.Fatal(err)
	}
	r := servetest.NewRig(t, place(0), settings)
	with, without := r.Listen(t, "81"), r.Listen(t, "82")
	client := r.Dial(t, r.At(81))
	in := bufio.NewReader(servetest.Take(t, with)) // before the client sent anything: the protocol is not detected
	header, err := proxyproto.Read(in)
	if err != nil || header.SourceAddr.String() != client.LocalAddr().String() || header.DestinationAddr.String() != r.At(81).String() {
		t.Fatalf("the header is %+v, %v", header, err)
	}
	servetest.Send(t, client, "hello")
	if got, err := in.Peek(5); err != nil || string(got) != "hello" {
		t.Errorf("behind the header: %q, %v", got, err)
	}
	servetest.Send(t, r.Dial(t, r.At(82)), "\x00")
	servetest.Expect(t, servetest.Take(t, without), "\x00")
}

func TestAnIncompleteConfigurationIsAnError(t *testing.T) {
	for _, config := range []Config{
		{},
		{OwnPorts: servetest.OwnPorts()},
		{OwnPorts: servetest.OwnPorts(), OwnAddresses: noAddresses{}},
	} {
		if proxy, err := New(config); err == nil || proxy != nil {
			t.Errorf("New(%+v) = %v, %v", config, proxy, err)
		}
	}
}

type noAddresses struct{}

func (noAddresses) Contains(netip.Addr) bool { return false }
