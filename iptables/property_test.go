package iptables

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// randomSpec draws a valid spec from few values, so that they meet often.
func randomSpec(r *rand.Rand) capture.Spec {
	spec := capture.Default()
	coin := func() bool { return r.IntN(2) == 0 }
	some := func(from ...string) string {
		var chosen []string
		for _, item := range from {
			if r.IntN(3) == 0 {
				chosen = append(chosen, item)
			}
		}
		return strings.Join(chosen, ",")
	}
	if coin() {
		spec.Mode = capture.TPROXY
	}
	spec.Compat, spec.DropInvalid, spec.RedirectDNS, spec.CaptureAllDNS = coin(), coin(), coin(), coin()
	spec.ProxyUIDs, spec.ProxyGIDs = ids(some("1337", "1340-1345")), ids(some("1337", "2000"))
	if len(spec.ProxyUIDs)+len(spec.ProxyGIDs) == 0 {
		spec.ProxyUIDs = ids("1337")
	}
	spec.Inbound.List = ports(some("80", "53", "8000:8010", "15008"))
	if coin() {
		spec.Inbound = capture.Ports{All: true}
	}
	spec.InboundExcluded = ports(some("80", "15021", "8005"))
	spec.Outbound.List = networks(some("203.0.113.0/24", "198.51.100.0/24", "127.0.0.0/8", "2001:db8:1::/64", "2001:db8:2::/64", "::1/128"))
	if coin() {
		spec.Outbound = capture.Prefixes{All: true}
	}
	spec.OutboundExcluded = networks(some("203.0.113.7/32", "2001:db8:2::7/128", "198.51.100.0/24"))
	spec.OutboundPorts, spec.OutboundPortsExcluded = ports(some("80", "8000:8010")), ports(some("8005", "53", "22"))
	if r.IntN(3) == 0 {
		spec.OwnerGroups = capture.Groups{List: ids(some("1000", "1001-1010", "2000"))}
	}
	spec.OwnerGroupsExcluded = ids(some("1000", "1005"))
	if coin() {
		spec.Localhost4 = netip.MustParsePrefix("127.0.0.0/8")
	}
	for _, name := range strings.Split(some("eth1", "tun+"), ",") {
		if name != "" {
			spec.InterfacesExcluded = append(spec.InterfacesExcluded, name)
		}
	}
	if r.IntN(3) == 0 {
		spec.VirtualInterfaces = []string{"vm0"}
	}
	for _, a := range families {
		if coin() {
			spec.DNSServers = append(spec.DNSServers, a.elsewhere)
		}
	}
	return spec
}

// randomPacket draws the first packet of a flow.
func randomPacket(r *rand.Rand, a addresses) Packet {
	pick := func(from ...netip.Addr) netip.Addr { return from[r.IntN(len(from))] }
	port := []uint16{22, 53, 80, 8005, 8010, 15008, 15021}[r.IntN(7)]
	p := Packet{Protocol: []Protocol{TCP, TCP, UDP}[r.IntN(3)]}
	if r.IntN(3) == 0 {
		p.In = []string{"eth0", "eth1", "tun3", "vm0"}[r.IntN(4)]
		p.Src, p.Dst = a.peer, netip.AddrPortFrom(pick(a.pod, a.pod, a.elsewhere), port)
		return p
	}
	people := []uint32{0, 1000, 1003, 1005, 1337, 1342, 2000, 3000}
	p.UID, p.GID = people[r.IntN(len(people))], people[r.IntN(len(people))]
	local := pick(a.pod, a.localhost)
	if a.family == IPv4 {
		local = pick(a.pod, a.localhost, netip.MustParseAddr("127.0.0.2"))
	}
	if r.IntN(2) == 0 {
		p.Out, p.Src, p.Dst = loopback, a.pod, netip.AddrPortFrom(local, port)
		if local != a.pod {
			p.Src = a.localhost
		}
	} else {
		p.Out = []string{"eth0", "eth0", "eth1", "tun3"}[r.IntN(4)]
		p.Src, p.Dst = a.pod, netip.AddrPortFrom(pick(a.elsewhere, a.excluded, a.peer), port)
	}
	return p
}

// judge says what becomes of the first packet of a flow, in the order in which a person would ask. It knows nothing of
// tables and chains.
func judge(s capture.Spec, a addresses, p Packet) Verdict {
	portIn := func(ranges []capture.PortRange) bool {
		return slices.ContainsFunc(ranges, func(r capture.PortRange) bool { return r.Contains(p.Dst.Port()) })
	}
	netIn := func(prefixes []netip.Prefix) bool {
		return slices.ContainsFunc(prefixes, func(n netip.Prefix) bool { return n.Contains(p.Dst.Addr()) })
	}
	excludedInterface := func(name string) bool {
		return slices.ContainsFunc(s.InterfacesExcluded, func(pattern string) bool { return onInterface(pattern, name) })
	}
	captured := s.Outbound.All || netIn(s.Outbound.List)
	inboundPort := s.Inbound.Contains(p.Dst.Port()) && (!s.Inbound.All || !portIn(s.InboundExcluded))
	tunnel := p.Dst.Port() == s.TunnelPort && (s.Mode == capture.Redirect || !s.Compat)
	toAgent := inbound
	if s.Mode == capture.TPROXY {
		toAgent = given
	}

	if p.In != "" { // from outside
		switch {
		case p.Protocol != TCP:
			return untouched
		case slices.Contains(s.VirtualInterfaces, p.In):
			if captured {
				return outbound
			}
			return untouched
		case excludedInterface(p.In), tunnel, !inboundPort:
			return untouched
		}
		return toAgent
	}

	user, group := contains(s.ProxyUIDs, p.UID), contains(s.ProxyGIDs, p.GID)
	localhost := p.Dst.Addr() == a.localhost
	if a.family == IPv4 {
		localhost = s.Localhost4.Contains(p.Dst.Addr())
	}
	query := p.Dst.Port() == 53
	switch {
	case excludedInterface(p.Out):
		return untouched
	case user || group: // the agent calls a service of its own workload, or anybody else
		query := query && s.CapturesDNS()
		redirected := s.Mode == capture.Redirect
		if s.Compat {
			redirected = redirected || user || query || slices.ContainsFunc(s.Outbound.List, isLoopback)
		}
		switch {
		case p.Protocol != TCP || p.Out != loopback || localhost || query && !s.Compat:
			return untouched
		case redirected && !(query && user) && !portIn(s.OutboundPortsExcluded) && p.Dst.Port() != s.TunnelPort:
			return inbound
		case s.Mode == capture.Redirect:
			return untouched
		case inboundPort && !tunnel:
			return given
		}
		return untouched
	case portIn(s.OutboundPortsExcluded):
		return untouched
	case !s.OwnerGroups.All && !contains(s.OwnerGroups.List, p.GID):
		return untouched
	case s.OwnerGroups.All && contains(s.OwnerGroupsExcluded, p.GID):
		return untouched
	case query && s.CapturesDNS() && (s.CaptureAllDNS || slices.Contains(s.DNSServers, p.Dst.Addr())):
		return dns
	case p.Protocol != TCP:
		return untouched
	}
	loopbackIsJudged := slices.ContainsFunc(s.Outbound.List, isLoopback) || s.Compat && s.CapturesDNS() && query
	switch {
	case p.Out == loopback && (localhost || !loopbackIsJudged), netIn(s.OutboundExcluded):
		return untouched
	case portIn(s.OutboundPorts), captured:
		return outbound
	}
	return untouched
}

func contains(ranges []capture.IDRange, id uint32) bool {
	return slices.ContainsFunc(ranges, func(r capture.IDRange) bool { return r.Contains(id) })
}

// For any spec: verdicts are those of a judge who knows no rules; the agent's connections come back to it in no other way
// than the inbound one; what is written is read back; every rule has an ID of its own; a plan from any spec to any other
// leaves exactly what is wanted.
func TestWhateverTheSpecTheRulesKeepTheirPromises(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	met, verdicts := make(map[string]bool), make(map[Verdict]int)
	var before [2]Ruleset
	for range 450 {
		spec := randomSpec(r)
		if err := spec.Validate(); err != nil {
			t.Fatal(err)
		}
		for i, a := range families {
			rules := Rules(spec, a.family)
			for range 20 {
				p := randomPacket(r, a)
				walk, want := rules.Trace(p), judge(spec, a, p)
				if walk.Verdict != want {
					t.Fatalf("%s, %+v\n%+v:\n%v, want %v; rules on the way: %s", a.family, spec, p, walk.Verdict, want, strings.Join(walk.Path, " → "))
				}
				self := p.In == "" && (contains(spec.ProxyUIDs, p.UID) || contains(spec.ProxyGIDs, p.GID))
				back := walk.Verdict != untouched && (walk.Verdict.Port != capture.InboundPort || p.Out != loopback)
				if self && back {
					t.Fatalf("%s, %+v\n%+v:\nthe agent captures itself: %v", a.family, spec, p, walk.Verdict)
				}
				verdicts[walk.Verdict]++
				for _, id := range walk.Path {
					met[kind(id)] = true
				}
			}
			checkRuleset(t, rules)
			checkTransition(t, before[i], rules, func() Packet { return randomPacket(r, a) })
			before[i] = rules
		}
	}
	for _, verdict := range []Verdict{untouched, inbound, outbound, dns, given} {
		if verdicts[verdict] < 100 {
			t.Errorf("%v only %d times: the draw is poor", verdict, verdicts[verdict])
		}
	}
	for _, sc := range scenarios {
		for _, r := range Rules(sc.spec, IPv6).All() {
			// These are about later packets of connections, marks and addresses that are not drawn.
			rare := slices.ContainsFunc([]string{"to-workload", "arriving/given", "original-source", "link-local", "known", "earlier", "divert", "invalid", "leaving/answer", "zone/answer", "zone/agent-answer", "zone/arriving", "others", "virtual/tap"},
				func(part string) bool { return strings.Contains(r.ID, part) })
			if !met[kind(r.ID)] && !rare {
				t.Errorf("no packet met a rule such as %s", r.ID)
			}
		}
	}
}

// kind is an ID without what the rule is about.
func kind(id string) string {
	parts := strings.Split(id, "/")
	return strings.Join(parts[:min(2, len(parts))], "/")
}

func checkRuleset(t *testing.T, rules Ruleset) {
	t.Helper()
	if got := Parse(rules.Family, rules.String()); !reflect.DeepEqual(got, withoutReasons(rules)) {
		t.Fatalf("not read back as the same:\n%s", rules)
	}
	ids, jumped := make(map[string]bool), make(map[Place]bool)
	for at, r := range rules.All() {
		if r.ID == "" || r.Why == "" || ids[r.ID] {
			t.Fatalf("%+v: it needs a reason and an ID of its own", r)
		}
		ids[r.ID] = true
		if jump, ok := r.Target.(Jump); ok {
			jumped[Place{at.Table, string(jump)}] = true
		}
	}
	for _, at := range places(rules) {
		own := strings.HasPrefix(at.Chain, ownPrefix)
		if own && !jumped[at] {
			t.Fatalf("nothing leads to %v", at)
		}
		if !own && len(rules.chain(at).Rules) != 1 {
			t.Fatalf("%v has %d rules, want one jump", at, len(rules.chain(at).Rules))
		}
		checkNothingIsDead(t, at, rules.chain(at))
	}
	for at := range jumped {
		if rules.find(at) == nil {
			t.Fatalf("%v is jumped to and not there", at)
		}
	}
}

// checkNothingIsDead finds rules behind one that takes every packet.
func checkNothingIsDead(t *testing.T, at Place, c Chain) {
	t.Helper()
	for i, r := range c.Rules[:max(len(c.Rules)-1, 0)] {
		if r.final() {
			if r.Match == (Match{}) {
				t.Fatalf("%v: behind %s nothing is ever reached, such as %s", at, r.ID, c.Rules[i+1].ID)
			}
			for _, later := range c.Rules[i+1:] {
				if later.Match == r.Match {
					t.Fatalf("%v: %s takes everything that %s is for", at, r.ID, later.ID)
				}
			}
		}
	}
}

// checkTransition carries out a plan on text, table by table, as iptables-restore would. Whatever goes to the
// same port of the agent before and after has to be captured all the time, but for the agent's calls of its own workload,
// which move between tables.
func checkTransition(t *testing.T, have, want Ruleset, draw func() Packet) {
	t.Helper()
	result := Ruleset{Family: want.Family}
	for _, at := range places(have) {
		c := have.chain(at)
		result.addChain(at.Table, Chain{Name: c.Name, Policy: c.Policy, Rules: slices.Clone(c.Rules)})
	}
	var captured []Packet
	for range 20 {
		p := draw()
		before, after := have.Trace(p).Verdict.Port, want.Trace(p).Verdict.Port
		if before != 0 && before == after && (p.In != "" || p.Out != loopback) {
			captured = append(captured, p)
		}
	}
	for commit := range strings.SplitAfterSeq(restoreInput(want, have), "COMMIT\n") {
		if err := restore(&result, commit); err != nil {
			t.Fatal(err)
		}
		for _, p := range captured {
			if walk := result.Trace(p); walk.Verdict == untouched {
				t.Fatalf("%+v escapes on the way from\n%s\nto\n%s\nby\n%s", p, have, want, restoreInput(want, have))
			}
		}
	}
	if changes := Diff(want, result); len(changes) > 0 {
		t.Fatalf("from\n%s\nto\n%s\nthe plan leaves %v", have, want, changes)
	}
	if input := restoreInput(want, result); input != "" {
		t.Fatalf("a second plan would do\n%s", input)
	}
}

func restore(rs *Ruleset, input string) error {
	var table TableName
	for line := range strings.Lines(input) {
		line = strings.TrimSpace(line)
		words := strings.Fields(line)
		switch {
		case line == "COMMIT":
		case line[0] == '*':
			table = TableName(line[1:])
		case line[0] == ':':
			name := strings.TrimPrefix(words[0], ":")
			if c := rs.find(Place{table, name}); c != nil {
				c.Rules = nil
			} else {
				rs.addChain(table, Chain{Name: name})
			}
		case words[0] == "-A":
			if rs.find(Place{table, words[1]}) == nil {
				rs.addChain(table, Chain{Name: words[1], Policy: policyAccept})
			}
			rs.parseRule(table, line)
		case words[0] == "-D":
			c := rs.find(Place{table, words[1]})
			i := slices.Index(c.lines(), "-A"+strings.TrimPrefix(line, "-D"))
			if i < 0 {
				return fmt.Errorf("%s: there is no such rule", line)
			}
			c.Rules = slices.Delete(c.Rules, i, i+1)
		case words[0] == "-X":
			at := Place{table, words[1]}
			for other, r := range rs.All() {
				if other.Table == table && (r.Target == Jump(at.Chain) || other == at) {
					return fmt.Errorf("%s: it is in use or not empty", line)
				}
			}
			for i := range rs.Tables {
				if rs.Tables[i].Name == table {
					rs.Tables[i].Chains = slices.DeleteFunc(rs.Tables[i].Chains, func(c Chain) bool { return c.Name == at.Chain })
				}
			}
		}
	}
	return nil
}
