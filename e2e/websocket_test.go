package e2e

import (
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Handshake with subprotocol and compression, small and large messages, ping, and an orderly end with a status.
func TestWebSocket(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "websocket")
	s := newStage(t)
	s.everyWay(t, func(t *testing.T, w way) {
		address := w.startPeer(t, 8080, program, "serve", "ADDRESS")
		w.runPeer(t, program, "talk", "ws://"+address+"/")
		s.agent.log.await(t, "original_destination="+address)
	})
}
