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

func TestWhatTPROXYNeedsStaysWhileItsConnectionsAreUnderWay(t *testing.T) {
	forEachFlavour(t, func(t *testing.T, flavour Flavour) {
		for _, spec := range []capture.Spec{captureAll, specOf(func(s *capture.Spec) { s.Mode, s.Outbound.All = capture.TPROXY, true })} {
			t.Run(string(spec.Mode), func(t *testing.T) {
				pod := nettest.New(t, "pod")
				check := func() (found Findings) {
					t.Helper()
					pod.Do(t, func() (err error) {
						found, err = Check(t.Context(), spec, Auto)
						return err
					})
					return found
				}
				mustInit(t, pod, tproxyAll)
				track(t, pod, 1, 0, nl.TCP_CONNTRACK_ESTABLISHED)
				track(t, pod, 2, tproxyAll.TPROXYMark, nl.TCP_CONNTRACK_TIME_WAIT)
				mustInit(t, pod, spec)
				if routes := routing(t, pod); routes != "" {
					t.Errorf("no connection of TPROXY is under way, and there is still\n%s", routes)
				}
				for _, mark := range []uint32{tproxyAll.TPROXYMark, capture.LoopMark} {
					mustInit(t, pod, tproxyAll)
					wanted := routing(t, pod)
					track(t, pod, 3, mark, nl.TCP_CONNTRACK_ESTABLISHED)
					if found := check(); found.Equal || !strings.Contains(found.String(), "CONNMARK --restore-mark") {
						t.Errorf("a check before init does not tell of what it would do without connections:\n%s", found)
					}
					plan := mustInit(t, pod, spec)
					if warnings := strings.Join(plan.Warnings, "\n"); !strings.Contains(warnings, "connections under way (1 tracked)") {
						t.Errorf("mark %d: the warnings are %q", mark, warnings)
					}
					if routes := routing(t, pod); routes != wanted {
						t.Errorf("mark %d: the routes are\n%s\nwant\n%s", mark, routes, wanted)
					}
					if plan := mustInit(t, pod, spec); !plan.Unchanged() {
						t.Errorf("mark %d: a second run changes %v", mark, plan)
					}
					pod.Do(t, func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
					if found := check(); !found.Equal {
						t.Errorf("mark %d: for a check there is a difference when they have ended:\n%s", mark, found)
					}
					mustInit(t, pod, spec)
					if routes := routing(t, pod); routes != "" {
						t.Errorf("mark %d: the connections have ended, and there is still\n%s", mark, routes)
					}
					for _, family := range Families {
						if changes := Diff(Rules(spec, family), rulesIn(t, pod, family, flavour)); len(changes) > 0 {
							t.Errorf("mark %d: %v", mark, changes)
						}
					}
				}
			})
		}
	})
}

// The agent may still open connections for those that it was given, and knows them by their mark alone.
func TestConnectionsUnderWayFindTheirWay(t *testing.T) {
	mark := capture.Default().TPROXYMark
	for _, a := range families {
		rules := rulesWith(captureAll, a.family, mark)
		ask := func(p Packet) Walk {
			t.Helper()
			w := rules.Trace(p)
			if slices.ContainsFunc(w.Met, Met.Unknown) {
				t.Fatalf("%v met a rule that is not ours", p)
			}
			return w
		}
		workload := netip.AddrPortFrom(a.own, 8080)
		dial := Packet{Out: loopback, UID: 0, GID: 1337, Src: a.elsewhere, Dst: workload, Mark: mark}
		if w := ask(dial); w.Verdict.Action != LeftAlone || w.ConnMark != mark {
			t.Errorf("%s: what the agent opens from a client's address: %v, connection mark %d", a.family, w.Verdict, w.ConnMark)
		}
		dial.Mark = 0
		if w := ask(dial); w.Verdict != inbound {
			t.Errorf("%s: a call of the own service: %v", a.family, w.Verdict)
		}
		answer := Packet{Out: "eth0", UID: 1000, GID: 1000, Src: a.own, Dst: netip.AddrPortFrom(a.elsewhere, 20000), ConnMark: mark, State: Established}
		if w := ask(answer); w.Mark != mark {
			t.Errorf("%s: the answer has mark %d", a.family, w.Mark)
		}
		given := Packet{In: "eth0", Src: a.elsewhere, Dst: workload, Mark: mark, ConnMark: capture.LoopMark, State: Established}
		if w := ask(given); w.ConnMark != capture.LoopMark {
			t.Errorf("%s: a connection that was given to the agent by rules elsewhere gets mark %d", a.family, w.ConnMark)
		}
	}
}
