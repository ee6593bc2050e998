package report

import (
	"context"
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

// explained returns the verdict of explain for the story's packet, described as people would, in the rules in force.
func explained(t *testing.T, pod *nettest.Namespace, live iptables.Live, p trace.Packet) string {
	t.Helper()
	q := Question{UID: p.UID, GID: p.GID, Src: p.Src, Dst: p.Dst, Protocol: p.Protocol, Mark: p.Mark, State: p.State}
	if p.In != "" {
		q.From, q.Src = p.Src, netip.Addr{}
	}
	if p.Mark != 0 || p.Dst.Addr().IsLinkLocalUnicast() { // the routes alone do not give the interface
		q.Interface = p.In + p.Out
	}
	var said Explanation
	pod.Do(t, func() error {
		packet, err := q.Packet()
		said = Explain(packet, live.Held, live.Foreign)
		return err
	})
	if said.Uncertain {
		t.Errorf("%s: unknown rules in our own namespace", said.Packet)
	}
	return trace.Verdict{Action: said.Action, Port: said.Port}.String()
}

// mustInstall installs the rules for spec in the namespace.
func mustInstall(t *testing.T, ns *nettest.Namespace, spec capture.Spec) {
	t.Helper()
	ns.Do(t, func() error {
		plan, err := iptables.PlanInit(context.Background(), spec, iptables.Auto)
		if err != nil {
			return err
		}
		return plan.Commit(context.Background())
	})
}

// The fifth judge: processes with the story's user and group open the stories' connections, and the kernel's verdict must
// be the tracer's.
func TestTheKernelAgreesWithTheTracer(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		for _, sc := range rulestest.Scenarios {
			t.Run(sc.Name, func(t *testing.T) {
				world := rulestest.NewWorld(t)
				mustInstall(t, world.Pod, sc.Spec)
				var live iptables.Live
				world.Pod.Do(t, func() (err error) {
					live, err = iptables.Look(context.Background())
					return err
				})
				for _, a := range rulestest.Families {
					for _, s := range sc.AllStories(a) {
						if rulestest.CanBeDialled(s.Packet) {
							if got := world.Dial(t, s.Packet); got != s.Want.String() {
								t.Errorf("%s, %s: the kernel: %s, want: %v", a.Family, s.Name, got, s.Want)
							}
							if said := explained(t, world.Pod, live, s.Packet); said != s.Want.String() {
								t.Errorf("%s, %s: explained as %s, want: %v", a.Family, s.Name, said, s.Want)
							}
						}
					}
				}
			})
		}
	})
}
