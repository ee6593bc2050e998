package e2e

import (
	"io"
	"net/netip"
	"testing"
)

// The rules stay when the agent dies. Its replacement can bind the ports and carries new connections.
func TestRestartedAgentCarriesConnections(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{nft, legacy, native} {
		t.Run(flavour, func(t *testing.T) {
			s := newStageIn(t, flavour)
			for range 3 {
				var ends []io.Reader
				for _, w := range s.ways() {
					downstream, upstream := w.connect(t)
					converse(t, downstream, upstream)
					ends = append(ends, downstream, upstream)
				}
				s.agent.Kill()
				// Connections of the dead agent end on both sides.
				for i, end := range ends {
					if _, err := end.Read(make([]byte, 1)); err == nil {
						t.Errorf("end %d read an unexpected byte", i)
					}
				}
				s.agent = startAgent(t, s.pod)
			}
			for _, w := range s.ways() {
				downstream, upstream := w.connect(t)
				converse(t, downstream, upstream)
			}
		})
	}
}

// Without an agent captured traffic is refused; it does not bypass the rules.
func TestWithoutAnAgentCapturedTrafficIsRefused(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.agent.Kill()
	for _, w := range s.ways() {
		listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
		if err := tryConnection(w.from, listener.Addr().String()); !isRefused(err) {
			t.Errorf("%s: %v, want a refused connection", w.name, err)
		}
	}
}
