package serve

import (
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/secure"
)

// A handshake that ends for want of memory or descriptors is not called a failure of TLS.
func TestAHandshakeThatLacksResourcesHasTheirReason(t *testing.T) {
	for failure, want := range map[secure.Failure][2]flow.Reason{
		secure.NoMemory:    {flow.MemoryBudget, flow.UpstreamTLS}, // handshakes with upstream are not in the budget
		secure.NoResources: {flow.NoDescriptors, flow.NoDescriptors},
		secure.Protocol:    {flow.TLSFailed, flow.UpstreamTLS},
	} {
		err := &secure.Error{Failure: failure}
		if got := [2]flow.Reason{handshakeReason(err), upstreamReason(err)}; got != want {
			t.Errorf("%v: reasons %v, want %v", failure, got, want)
		}
	}
}

// Each failure of a handshake that an operator remedies in another way has a reason of its own.
func TestFailuresOfHandshakesHaveReasons(t *testing.T) {
	for failure, want := range map[secure.Failure]flow.Reason{
		secure.NotTLS: flow.TLSFailed, secure.Alert: flow.TLSFailed, secure.Version: flow.TLSVersion, secure.Deadline: flow.TLSTimeout,
		secure.NoCertificate: flow.TLSNoCertificate, secure.Expired: flow.TLSExpired, secure.NotYetValid: flow.TLSExpired,
		secure.UnknownRoot: flow.TLSUnknownRoot, secure.NameRefused: flow.TLSNameRefused, secure.NoIdentity: flow.TLSNoIdentity,
		secure.Malformed: flow.TLSPeerRefused, secure.WrongUsage: flow.TLSPeerRefused, secure.Revoked: flow.TLSPeerRefused, secure.NoSPIFFE: flow.TLSPeerRefused,
		secure.Ended: flow.DownstreamReset,
	} {
		if got := handshakeReason(&secure.Error{Failure: failure}); got != want {
			t.Errorf("%v: %v, want %v", failure, got, want)
		}
	}
}
