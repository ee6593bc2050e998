package outbound

import (
	"net/netip"
	"os"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func place() servetest.Place {
	return servetest.Place{Outbound: true, Rules: true, New: func(t testing.TB, parts servetest.Parts) servetest.Role {
		proxy, err := New(Config{
			Poller: parts.Poller, OwnPorts: servetest.OwnPorts(), OwnAddresses: parts.Addresses, Flows: parts.Flows,
			Settings: parts.Settings, HTTP: parts.HTTP,
		})
		if err != nil {
			t.Fatal(err)
		}
		return proxy
	}}
}

func TestOutboundKeepsThePromisesOfARole(t *testing.T) { servetest.Promises(t, place()) }

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
