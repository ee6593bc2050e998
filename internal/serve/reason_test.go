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
