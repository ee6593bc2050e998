package iptables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

// Effects of the rules in the kernel besides verdicts.

func TestAQueryAndItsAnswerAreOneConnectionInOneZone(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		world := rulestest.NewWorld(t)
		mustInit(t, world.Pod, rulestest.SpecOf(func(s *capture.Spec) {
			s.Outbound.All, s.RedirectDNS = true, true
			s.DNSServers = []netip.Addr{nettest.Elsewhere4, nettest.Elsewhere6}
			s.OwnerGroupsExcluded = rulestest.IDs("2001")
		}))
		for _, a := range rulestest.Families {
			world.Dial(t, rulestest.UDP(rulestest.Sends(rulestest.Workload, rulestest.Workload, a.Elsewhere, 53)))
			world.Dial(t, rulestest.UDP(rulestest.Sends(rulestest.Workload, 2001, a.Elsewhere, 53)))
			world.Dial(t, rulestest.UDP(rulestest.Sends(rulestest.Agent, rulestest.Agent, a.Elsewhere, 53)))
			var zones []int
			world.Pod.Do(t, func() error {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily(map[ruleset.Family]int{ruleset.IPv4: netlink.FAMILY_V4, ruleset.IPv6: netlink.FAMILY_V6}[a.Family]))
				for _, f := range flows {
					if f.Forward.Protocol == unix.IPPROTO_UDP {
						zones = append(zones, int(f.Zone))
					}
				}
				return err
			})
			slices.Sort(zones)
			if want := []int{0, 0, 2}; !slices.Equal(zones, want) {
				t.Errorf("%s: connections in zones %v, want %v", a.Family, zones, want)
			}
		}
	})
}

// Docker's rules send queries from 127.0.0.11:53 to another port. They are older than ours, newer, or added again.
func TestQueriesToDockersResolverAreCapturedAndTheAgentsAnswered(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		for _, dockers := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy} {
			t.Run("docker by "+string(dockers), func(t *testing.T) {
				world := rulestest.NewWorld(t)
				resolver := netip.MustParseAddr("127.0.0.11")
				ask := func(when string, workload trace.Verdict) {
					t.Helper()
					for _, q := range []struct {
						who      string
						uid, gid uint32
						want     trace.Verdict
					}{
						{"the workload", rulestest.Workload, rulestest.Workload, workload},
						{"the agent", rulestest.Agent, rulestest.Agent, rulestest.Docker},
						{"an excluded group", rulestest.Workload, 2001, rulestest.Docker},
					} {
						packet := rulestest.ToItself(q.uid, q.gid, resolver, 53)
						for range 3 {
							for _, p := range []trace.Packet{packet, rulestest.UDP(packet)} {
								if got := world.Ask(t, p); got != q.want.String() {
									t.Errorf("%s: %s over %s: %s, want %v", when, q.who, p.Protocol, got, q.want)
								}
							}
						}
					}
				}
				spec := rulestest.SpecOf(func(s *capture.Spec) {
					s.Outbound.All, s.RedirectDNS, s.DNSServers = true, true, []netip.Addr{resolver}
					s.OwnerGroupsExcluded = rulestest.IDs("2001")
				})
				world.DockersResolver(t, dockers)
				before := rulestest.Everything(t, world.Pod)
				ask("before init", rulestest.Docker)
				mustInit(t, world.Pod, spec)
				ask("after init", rulestest.Dns)
				if plan := mustInit(t, world.Pod, spec); !plan.Unchanged() {
					t.Errorf("a second init would change %v", plan)
				}
				// Docker inserts its jump once more, for example when the container joins a network.
				docker := programName(ruleset.IPv4, dockers)
				world.Pod.MustRun(t, docker, "-t", "nat", "-D", "OUTPUT", "-d", "127.0.0.11", "-j", "DOCKER_OUTPUT")
				world.Pod.MustRun(t, docker, "-t", "nat", "-I", "OUTPUT", "-d", "127.0.0.11", "-j", "DOCKER_OUTPUT")
				if plan := mustInit(t, world.Pod, spec); plan.Unchanged() != (flavour != dockers) {
					t.Errorf("init after Docker's change: %v", plan)
				}
				ask("after Docker's change", rulestest.Dns)
				if _, err := cleanupIn(world.Pod); err != nil {
					t.Fatal(err)
				}
				if after := rulestest.Everything(t, world.Pod); flavour != ruleset.Legacy && after != before {
					t.Errorf("before:\n%s\nafter:\n%s", before, after)
				}
				ask("after cleanup", rulestest.Docker)
			})
		}
	})
}

func TestSixtyFourGroupsAreInstalled(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		mustInit(t, nettest.New(t, "pod"), rulestest.SpecOf(func(s *capture.Spec) {
			s.Outbound.All, s.RedirectDNS, s.CaptureAllDNS = true, true, true
			for i := range uint32(capture.MaxOwnerGroups) {
				s.OwnerGroups.All = false
				s.OwnerGroups.List = append(s.OwnerGroups.List, capture.IDRange{First: 2000 + 2*i, Last: 2000 + 2*i})
			}
		}))
	})
}

// The kernel answers an unsolicited SYN+ACK with a reset. A dropped one gets no answer.
func TestInvalidPacketsAreResetUnlessDropped(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		for _, drop := range []bool{false, true} {
			pod, peer := nettest.PodAndPeer(t)
			mustInit(t, pod, rulestest.SpecOf(func(s *capture.Spec) { s.Outbound.All, s.DropInvalid = true, drop }))
			var raw int
			peer.Do(t, func() (err error) {
				raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
				return err
			})
			defer unix.Close(raw)
			timeout := unix.NsecToTimeval(nettest.Patience.Nanoseconds())
			if err := unix.SetsockoptTimeval(raw, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
				t.Fatal(err)
			}
			// Behind the strange segment goes an ordinary one, to a closed port, whose reset ends the wait.
			for _, segment := range [][]byte{tcpSegment(4001, 80, synAck), tcpSegment(4002, 80, syn)} {
				if err := unix.Sendto(raw, segment, 0, &unix.SockaddrInet4{Addr: nettest.PodIP4.As4()}); err != nil {
					t.Fatal(err)
				}
			}
			resets := make(map[uint16]bool)
			for !resets[4002] {
				port, err := readReset(raw)
				if err != nil {
					t.Fatal(err)
				}
				resets[port] = true
			}
			if resets[4001] == drop {
				t.Errorf("dropping is %t, and it was answered: %t", drop, resets[4001])
			}
		}
	})
}

// Flags of a TCP header.
const (
	syn    = 2
	rst    = 4
	synAck = 18
)

// tcpSegment is a segment without payload from the peer to the pod.
func tcpSegment(from, to uint16, flags byte) []byte {
	segment := make([]byte, 20)
	binary.BigEndian.PutUint16(segment[0:], from)
	binary.BigEndian.PutUint16(segment[2:], to)
	segment[12], segment[13] = 5<<4, flags
	binary.BigEndian.PutUint16(segment[14:], 1000) // window
	pseudo := slices.Concat(nettest.PeerIP4.AsSlice(), nettest.PodIP4.AsSlice(), []byte{0, unix.IPPROTO_TCP, 0, 20}, segment)
	var sum uint32
	for i := 0; i < len(pseudo); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(pseudo[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(segment[16:], ^uint16(sum))
	return segment
}

// readReset returns the port to which the next reset goes.
func readReset(raw int) (uint16, error) {
	packet := make([]byte, 2048)
	for {
		n, err := unix.Read(raw, packet)
		if err != nil {
			return 0, fmt.Errorf("waiting for a reset: %w", err)
		}
		if header := int(packet[0]&15) * 4; n >= header+20 && packet[header+13]&rst != 0 {
			return binary.BigEndian.Uint16(packet[header+2:]), nil
		}
	}
}
