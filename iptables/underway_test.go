package iptables

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

// track makes connection tracking know a connection of TCP with the mark, in the state.
func track(t *testing.T, ns *nettest.Namespace, port uint16, mark uint32, state uint8) {
	t.Helper()
	client, pod := net.IP(nettest.PeerIP4.AsSlice()), net.IP(nettest.PodIP4.AsSlice())
	ns.Do(t, func() error {
		return netlink.ConntrackCreate(netlink.ConntrackTable, netlink.FAMILY_V4, &netlink.ConntrackFlow{
			FamilyType: netlink.FAMILY_V4, Mark: mark, TimeOut: 600, ProtoInfo: &netlink.ProtoInfoTCP{State: state},
			Forward: netlink.IPTuple{SrcIP: client, DstIP: pod, SrcPort: port, DstPort: 8080, Protocol: 6},
			Reverse: netlink.IPTuple{SrcIP: pod, DstIP: client, SrcPort: 8080, DstPort: port, Protocol: 6},
		})
	})
}

func TestTPROXYRulesStayWhileItsConnectionsAreOpen(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		for _, spec := range []capture.Spec{rulestest.CaptureAll, rulestest.SpecOf(func(s *capture.Spec) { s.Mode, s.Outbound.All = capture.TPROXY, true })} {
			t.Run(string(spec.Mode), func(t *testing.T) {
				pod := nettest.New(t, "pod")
				check := func() (found *Plan) {
					t.Helper()
					pod.Do(t, func() (err error) {
						found, err = PlanCheck(t.Context(), spec, Auto)
						return err
					})
					return found
				}
				mustInit(t, pod, rulestest.TPROXYAll)
				track(t, pod, 1, 0, nl.TCP_CONNTRACK_ESTABLISHED)
				track(t, pod, 2, rulestest.TPROXYAll.TPROXYMark, nl.TCP_CONNTRACK_TIME_WAIT)
				mustInit(t, pod, spec)
				if routes := routing(t, pod); routes != "" {
					t.Errorf("no connection of TPROXY is under way, and there is still\n%s", routes)
				}
				for _, mark := range []uint32{rulestest.TPROXYAll.TPROXYMark, capture.LoopMark} {
					mustInit(t, pod, rulestest.TPROXYAll)
					wanted := routing(t, pod)
					track(t, pod, 3, mark, nl.TCP_CONNTRACK_ESTABLISHED)
					if found := check(); found.Unchanged() || !strings.Contains(found.String(), "CONNMARK --restore-mark") {
						t.Errorf("a check before init does not tell of what it would do without connections:\n%s", found)
					}
					plan := mustInit(t, pod, spec)
					if warnings := strings.Join(plan.Warnings, "\n"); !strings.Contains(warnings, "open connections (1 tracked)") {
						t.Errorf("mark %d: the warnings are %q", mark, warnings)
					}
					if routes := routing(t, pod); routes != wanted {
						t.Errorf("mark %d: the routes are\n%s\nwant\n%s", mark, routes, wanted)
					}
					if plan := mustInit(t, pod, spec); !plan.Unchanged() {
						t.Errorf("mark %d: a second run changes %v", mark, plan)
					}
					pod.Do(t, func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
					if found := check(); !found.Unchanged() {
						t.Errorf("mark %d: for a check there is a difference when they have ended:\n%s", mark, found)
					}
					mustInit(t, pod, spec)
					if routes := routing(t, pod); routes != "" {
						t.Errorf("mark %d: the connections have ended, and there is still\n%s", mark, routes)
					}
					for _, family := range ruleset.Families {
						if changes := ruleset.Diff(policy.Rules(spec, family), rulesIn(t, pod, family, flavour)); len(changes) > 0 {
							t.Errorf("mark %d: %v", mark, changes)
						}
					}
				}
			})
		}
	})
}

// The agent may still dial the workload for connections that it has. The rules recognise these dials by their mark alone.
func TestOpenTPROXYConnectionsStillWork(t *testing.T) {
	mark := capture.Default().TPROXYMark
	for _, a := range rulestest.Families {
		rules := policy.RulesWithMark(rulestest.CaptureAll, a.Family, mark)
		ask := func(p trace.Packet) trace.Walk {
			t.Helper()
			w := trace.Of(rules, p)
			if slices.ContainsFunc(w.Met, trace.Met.Unknown) {
				t.Fatalf("%v met a rule that is not ours", p)
			}
			return w
		}
		workload := netip.AddrPortFrom(a.Own, 8080)
		dial := trace.Packet{Out: ruleset.Loopback, UID: 0, GID: 1337, Src: a.Elsewhere, Dst: workload, Mark: mark}
		if w := ask(dial); w.Verdict.Action != trace.LeftAlone || w.ConnMark != mark {
			t.Errorf("%s: what the agent opens from a client's address: %v, connection mark %d", a.Family, w.Verdict, w.ConnMark)
		}
		dial.Mark = 0
		if w := ask(dial); w.Verdict != rulestest.Inbound {
			t.Errorf("%s: a call of the own service: %v", a.Family, w.Verdict)
		}
		answer := trace.Packet{Out: "eth0", UID: 1000, GID: 1000, Src: a.Own, Dst: netip.AddrPortFrom(a.Elsewhere, 20000), ConnMark: mark, State: ruleset.Established}
		if w := ask(answer); w.Mark != mark {
			t.Errorf("%s: the answer has mark %d", a.Family, w.Mark)
		}
		given := trace.Packet{In: "eth0", Src: a.Elsewhere, Dst: workload, Mark: mark, ConnMark: capture.LoopMark, State: ruleset.Established}
		if w := ask(given); w.ConnMark != capture.LoopMark {
			t.Errorf("%s: a connection that was given to the agent by rules elsewhere gets mark %d", a.Family, w.ConnMark)
		}
	}
}
