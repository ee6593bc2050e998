package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/trace"
	"github.com/pillion-proxy/pillion/iptables/xtables"
)

// randomPacket draws the first packet of a flow.
func randomPacket(r *rand.Rand, a rulestest.Addresses) trace.Packet {
	pick := func(from ...netip.Addr) netip.Addr { return from[r.IntN(len(from))] }
	port := []uint16{22, 53, 80, 8005, 8010, 15008, 15021}[r.IntN(7)]
	p := trace.Packet{Protocol: []ruleset.Protocol{ruleset.TCP, ruleset.TCP, ruleset.UDP}[r.IntN(3)]}
	if r.IntN(3) == 0 {
		p.In = []string{"eth0", "eth1", "tun3", "vm0"}[r.IntN(4)]
		p.Src, p.Dst = a.Peer, netip.AddrPortFrom(pick(a.Pod, a.Pod, a.Elsewhere), port)
		return p
	}
	people := []uint32{0, 1000, 1003, 1005, 1337, 1342, 2000, 3000}
	p.UID, p.GID = people[r.IntN(len(people))], people[r.IntN(len(people))]
	local := pick(a.Pod, a.Localhost)
	if a.Family == ruleset.IPv4 {
		local = pick(a.Pod, a.Localhost, netip.MustParseAddr("127.0.0.2"))
	}
	if r.IntN(2) == 0 {
		p.Out, p.Src, p.Dst = ruleset.Loopback, a.Pod, netip.AddrPortFrom(local, port)
		if local != a.Pod {
			p.Src = a.Localhost
		}
	} else {
		p.Out = []string{"eth0", "eth0", "eth1", "tun3"}[r.IntN(4)]
		p.Src, p.Dst = a.Pod, netip.AddrPortFrom(pick(a.Elsewhere, a.Excluded, a.Peer), port)
	}
	return p
}

// judge returns the verdict for the first packet of a flow, from the spec alone and without tables and chains.
func judge(s capture.Spec, a rulestest.Addresses, p trace.Packet) trace.Verdict {
	portIn := func(ranges []capture.PortRange) bool {
		return slices.ContainsFunc(ranges, func(r capture.PortRange) bool { return r.Contains(p.Dst.Port()) })
	}
	netIn := func(prefixes []netip.Prefix) bool {
		return slices.ContainsFunc(prefixes, func(n netip.Prefix) bool { return n.Contains(p.Dst.Addr()) })
	}
	excludedInterface := func(name string) bool {
		return slices.ContainsFunc(s.InterfacesExcluded, func(pattern string) bool {
			stem, wildcard := strings.CutSuffix(pattern, "+")
			return pattern == name || wildcard && strings.HasPrefix(name, stem)
		})
	}
	captured := s.Outbound.All || netIn(s.Outbound.List)
	inboundPort := s.Inbound.Contains(p.Dst.Port()) && (!s.Inbound.All || !portIn(s.InboundExcluded))
	tunnel := p.Dst.Port() == s.TunnelPort && (s.Mode == capture.Redirect || !s.Compat)
	toAgent := rulestest.Inbound
	if s.Mode == capture.TPROXY {
		toAgent = rulestest.Given
	}

	if p.In != "" { // from outside
		switch {
		case p.Protocol != ruleset.TCP:
			return rulestest.Untouched
		case slices.Contains(s.VirtualInterfaces, p.In):
			if captured {
				return rulestest.Outbound
			}
			return rulestest.Untouched
		case excludedInterface(p.In), tunnel, !inboundPort:
			return rulestest.Untouched
		}
		return toAgent
	}

	user, group := contains(s.ProxyUIDs, p.UID), contains(s.ProxyGIDs, p.GID)
	localhost := p.Dst.Addr() == a.Localhost
	if a.Family == ruleset.IPv4 {
		localhost = s.Localhost4.Contains(p.Dst.Addr())
	}
	query := p.Dst.Port() == 53
	switch {
	case excludedInterface(p.Out):
		return rulestest.Untouched
	case user || group: // the agent calls a service of its own workload, or anybody else
		query := query && s.CapturesDNS()
		redirected := s.Mode == capture.Redirect
		if s.Compat {
			redirected = user || query || slices.ContainsFunc(s.Outbound.List, isLoopback)
		}
		switch {
		case p.Protocol != ruleset.TCP || p.Out != ruleset.Loopback || localhost || query && !s.Compat:
			return rulestest.Untouched
		case redirected && !(query && user) && !portIn(s.OutboundPortsExcluded) && p.Dst.Port() != s.TunnelPort:
			return rulestest.Inbound
		case s.Mode == capture.Redirect:
			return rulestest.Untouched
		case inboundPort && !tunnel:
			return rulestest.Given
		}
		return rulestest.Untouched
	case portIn(s.OutboundPortsExcluded):
		return rulestest.Untouched
	case !s.OwnerGroups.All && !contains(s.OwnerGroups.List, p.GID):
		return rulestest.Untouched
	case s.OwnerGroups.All && contains(s.OwnerGroupsExcluded, p.GID):
		return rulestest.Untouched
	case query && s.CapturesDNS() && (s.CaptureAllDNS || slices.Contains(s.DNSServers, p.Dst.Addr())):
		return rulestest.Dns
	case p.Protocol != ruleset.TCP:
		return rulestest.Untouched
	}
	loopbackIsJudged := slices.ContainsFunc(s.Outbound.List, isLoopback) || s.Compat && s.CapturesDNS() && query
	switch {
	case p.Out == ruleset.Loopback && (localhost || !loopbackIsJudged), netIn(s.OutboundExcluded):
		return rulestest.Untouched
	case portIn(s.OutboundPorts), captured:
		return rulestest.Outbound
	}
	return rulestest.Untouched
}

func contains(ranges []capture.IDRange, id uint32) bool {
	return slices.ContainsFunc(ranges, func(r capture.IDRange) bool { return r.Contains(id) })
}

// For any spec: verdicts are those of judge; the agent's connections return to it only by the inbound port; rendered rules
// are parsed back unchanged; IDs are unique; a plan from any spec to any other leaves exactly the wanted rules.
func TestRulesOfAnySpecKeepTheirPromises(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	met, verdicts := make(map[string]bool), make(map[trace.Verdict]int)
	var before [2]ruleset.Ruleset
	for range 450 {
		spec := rulestest.RandomSpec(r)
		if err := spec.Validate(); err != nil {
			t.Fatal(err)
		}
		for i, a := range rulestest.Families {
			rules := Rules(spec, a.Family)
			for range 20 {
				p := randomPacket(r, a)
				walk, want := trace.Of(rules, p), judge(spec, a, p)
				if walk.Verdict != want {
					t.Fatalf("%s, %+v\n%+v:\n%v, want %v; rules on the way: %s", a.Family, spec, p, walk.Verdict, want, strings.Join(walk.Path, " → "))
				}
				self := p.In == "" && (contains(spec.ProxyUIDs, p.UID) || contains(spec.ProxyGIDs, p.GID))
				back := walk.Verdict != rulestest.Untouched && (walk.Verdict.Port != capture.InboundPort || p.Out != ruleset.Loopback)
				if self && back {
					t.Fatalf("%s, %+v\n%+v:\nthe agent captures itself: %v", a.Family, spec, p, walk.Verdict)
				}
				verdicts[walk.Verdict]++
				for _, id := range walk.Path {
					met[kind(id)] = true
				}
			}
			checkRuleset(t, rules)
			checkTransition(t, before[i], rules, func() trace.Packet { return randomPacket(r, a) })
			before[i] = rules
		}
	}
	for _, verdict := range []trace.Verdict{rulestest.Untouched, rulestest.Inbound, rulestest.Outbound, rulestest.Dns, rulestest.Given} {
		if verdicts[verdict] < 100 {
			t.Errorf("%v only %d times: the draw is poor", verdict, verdicts[verdict])
		}
	}
	for _, sc := range rulestest.Scenarios {
		for _, r := range Rules(sc.Spec, ruleset.IPv6).All() {
			// These are about later packets of connections, marks and addresses that are not drawn.
			rare := slices.ContainsFunc([]string{"to-workload", "arriving/given", "original-source", "link-local", "known", "earlier", "divert", "invalid", "leaving/answer", "zone/agent-answer", "others", "virtual/tap"},
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

func checkRuleset(t *testing.T, rules ruleset.Ruleset) {
	t.Helper()
	if got := ruleset.Parse(rules.Family, rules.String()); !reflect.DeepEqual(got, rulestest.WithoutReasons(rules)) {
		t.Fatalf("not read back as the same:\n%s", rules)
	}
	ids, jumped := make(map[string]bool), make(map[ruleset.Place]bool)
	for at, r := range rules.All() {
		if r.ID == "" || r.Why == "" || ids[r.ID] {
			t.Fatalf("%+v: it needs a reason and an ID of its own", r)
		}
		ids[r.ID] = true
		if jump, ok := r.Target.(ruleset.Jump); ok {
			jumped[ruleset.Place{Table: at.Table, Chain: string(jump)}] = true
		}
	}
	for _, at := range ruleset.Places(rules) {
		own := strings.HasPrefix(at.Chain, ruleset.OwnPrefix)
		if own && !jumped[at] {
			t.Fatalf("nothing leads to %v", at)
		}
		if !own && len(rules.Chain(at).Rules) != 1 {
			t.Fatalf("%v has %d rules, want one jump", at, len(rules.Chain(at).Rules))
		}
		checkNothingIsDead(t, at, rules.Chain(at))
	}
	for at := range jumped {
		if rules.Find(at) == nil {
			t.Fatalf("%v is jumped to and not there", at)
		}
	}
}

// checkNothingIsDead finds rules behind one that takes every packet.
func checkNothingIsDead(t *testing.T, at ruleset.Place, c ruleset.Chain) {
	t.Helper()
	for i, r := range c.Rules[:max(len(c.Rules)-1, 0)] {
		if r.Final() {
			if r.Match == (ruleset.Match{}) {
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

// checkTransition applies a plan to text, table by table, like iptables-restore. A packet that goes to the same port of the
// agent before and after must be captured at every point in between. The exception is the agent's calls of its own
// workload: their rules move between tables.
func checkTransition(t *testing.T, have, want ruleset.Ruleset, draw func() trace.Packet) {
	t.Helper()
	result := ruleset.Ruleset{Family: want.Family}
	for _, at := range ruleset.Places(have) {
		c := have.Chain(at)
		result.AddChain(at.Table, ruleset.Chain{Name: c.Name, Policy: c.Policy, Rules: slices.Clone(c.Rules)})
	}
	var captured []trace.Packet
	for range 20 {
		p := draw()
		before, after := trace.Of(have, p).Verdict.Port, trace.Of(want, p).Verdict.Port
		if before != 0 && before == after && (p.In != "" || p.Out != ruleset.Loopback) {
			captured = append(captured, p)
		}
	}
	for commit := range strings.SplitAfterSeq(xtables.RestoreInput(want, have), "COMMIT\n") {
		if err := restore(&result, commit); err != nil {
			t.Fatal(err)
		}
		for _, p := range captured {
			if walk := trace.Of(result, p); walk.Verdict == rulestest.Untouched {
				t.Fatalf("%+v escapes on the way from\n%s\nto\n%s\nby\n%s", p, have, want, xtables.RestoreInput(want, have))
			}
		}
	}
	if changes := ruleset.Diff(want, result); len(changes) > 0 {
		t.Fatalf("from\n%s\nto\n%s\nthe plan leaves %v", have, want, changes)
	}
	if input := xtables.RestoreInput(want, result); input != "" {
		t.Fatalf("a second plan would do\n%s", input)
	}
}

func restore(rs *ruleset.Ruleset, input string) error {
	var table ruleset.TableName
	for line := range strings.Lines(input) {
		line = strings.TrimSpace(line)
		words := strings.Fields(line)
		switch {
		case line == "COMMIT":
		case line[0] == '*':
			table = ruleset.TableName(line[1:])
		case line[0] == ':':
			name := strings.TrimPrefix(words[0], ":")
			if c := rs.Find(ruleset.Place{Table: table, Chain: name}); c != nil {
				c.Rules = nil
			} else {
				rs.AddChain(table, ruleset.Chain{Name: name})
			}
		case words[0] == "-A":
			if rs.Find(ruleset.Place{Table: table, Chain: words[1]}) == nil {
				rs.AddChain(table, ruleset.Chain{Name: words[1], Policy: ruleset.PolicyAccept})
			}
			at := ruleset.Place{Table: table, Chain: words[1]}
			read := ruleset.Parse(rs.Family, fmt.Sprintf("*%s\n:%s - [0:0]\n%s\n", table, words[1], line))
			c := rs.Find(at)
			c.Rules = append(c.Rules, read.Chain(at).Rules...)
		case words[0] == "-D":
			c := rs.Find(ruleset.Place{Table: table, Chain: words[1]})
			i := slices.Index(c.Lines(), "-A"+strings.TrimPrefix(line, "-D"))
			if i < 0 {
				return fmt.Errorf("%s: there is no such rule", line)
			}
			c.Rules = slices.Delete(c.Rules, i, i+1)
		case words[0] == "-X":
			at := ruleset.Place{Table: table, Chain: words[1]}
			for other, r := range rs.All() {
				if other.Table == table && (r.Target == ruleset.Jump(at.Chain) || other == at) {
					return fmt.Errorf("%s: it is in use or not empty", line)
				}
			}
			for i := range rs.Tables {
				if rs.Tables[i].Name == table {
					rs.Tables[i].Chains = slices.DeleteFunc(rs.Tables[i].Chains, func(c ruleset.Chain) bool { return c.Name == at.Chain })
				}
			}
		}
	}
	return nil
}
