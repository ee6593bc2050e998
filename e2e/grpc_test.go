package e2e

import (
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// gRPC's own interoperability test: all four kinds of calls, deadlines, cancellation, metadata, trailers and statuses,
// messages of 8 MiB, and a stream whose messages must not be held back.
func TestEveryKindOfGRPCCallPasses(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "grpc")
	s := newStage(t)
	s.everyWay(t, func(t *testing.T, w way) {
		address := w.startPeer(t, 50051, program, "serve", "ADDRESS")
		output := w.runPeer(t, program, "call", address)
		if !strings.HasSuffix(output, "ok unimplemented method\n") || strings.Count(output, "ok ") != strings.Count(output, "\n") {
			t.Errorf("client output:\n%s", output)
		}
		s.agent.log.await(t, "original_destination="+address)
	})
}
