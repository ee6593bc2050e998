package nft

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// families are the families of nftables whose chains see the packets of a workload.
var families = map[uint8]struct {
	name string
	of   []ruleset.Family
}{
	unix.NFPROTO_INET:   {"inet", ruleset.Families},
	unix.NFPROTO_IPV4:   {"ip", []ruleset.Family{ruleset.IPv4}},
	unix.NFPROTO_IPV6:   {"ip6", []ruleset.Family{ruleset.IPv6}},
	unix.NFPROTO_NETDEV: {"netdev", ruleset.Families},
}

// hookNames are the hooks by number. Those of the family netdev differ.
var hookNames = []string{ruleset.HookPrerouting, ruleset.HookInput, ruleset.HookForward, ruleset.HookOutput, ruleset.HookPostrouting, ruleset.HookIngress}

func (c Chain) hookName() string {
	names := hookNames
	if c.protocol == unix.NFPROTO_NETDEV {
		names = []string{ruleset.HookIngress, ruleset.HookEgress}
	}
	if int(c.hook.number) < len(names) {
		return names[c.hook.number]
	}
	return fmt.Sprint(c.hook.number)
}

// Foreign reads the rules of all tables and returns the base chains that may decide about packets, given the chains of all
// tables. except selects chains to leave out.
func Foreign(chains []Chain, except func(Chain) bool) ([]ruleset.ForeignChain, error) {
	if !slices.ContainsFunc(chains, func(c Chain) bool { return c.base && !c.untouched && !except(c) }) {
		return nil, nil
	}
	rules, err := readRules(unix.NFPROTO_UNSPEC, "")
	if err != nil {
		return nil, err
	}
	byChain := make(map[chainKey][]kernelRule)
	for _, r := range rules {
		key := chainKey{r.protocol, r.table, r.chain}
		byChain[key] = append(byChain[key], r)
	}
	var foreign []ruleset.ForeignChain
	for _, c := range chains {
		family, seen := families[c.protocol]
		if !seen || !c.base || c.untouched || except(c) {
			continue
		}
		does := effects(byChain, chainKey{c.protocol, c.Table, c.Name}, make(map[chainKey]bool))
		if c.hook.policy != nfAccept {
			does = append(does, "policy drop")
		}
		if len(does) > 0 {
			foreign = append(foreign, ruleset.ForeignChain{
				Flavour: ruleset.NFT, Families: family.of, Table: family.name + " " + c.Table, Name: c.Name,
				Kind: c.hook.kind, Hook: c.hookName(), Priority: int(c.hook.priority), Does: does,
			})
		}
	}
	return foreign, nil
}

// chainKey identifies a chain.
type chainKey struct {
	protocol    uint8
	table, name string
}

// effects lists what the rules of a chain, and of those to which they jump, may do to a packet. Each effect is listed once.
// Chains that were seen before are not listed again: without that, the time would be exponential in the depth of jumps.
func effects(rules map[chainKey][]kernelRule, at chainKey, seen map[chainKey]bool) []string {
	seen[at] = true
	var all []string
	for _, r := range rules[at] {
		for _, e := range r.expressions {
			effect, chain := e.effect()
			next := chainKey{at.protocol, at.table, chain}
			found := []string{effect}
			if chain != "" && !seen[next] {
				found = effects(rules, next, seen)
			}
			for _, effect := range found {
				if effect != "" && !slices.Contains(all, effect) {
					all = append(all, effect)
				}
			}
		}
	}
	return all
}

// effect returns what an expression does to a packet, or the chain to which it jumps. Conditions, counters, marks and
// verdicts that only end a chain have no effect.
func (e expression) effect() (effect, chain string) {
	switch e.name {
	case "immediate":
		verdict := e.value(unix.NFTA_IMMEDIATE_DATA)
		if e.number(unix.NFTA_IMMEDIATE_DREG) != unix.NFT_REG_VERDICT || len(verdict) < 4 {
			return "", ""
		}
		switch code := int32(bigEndian(verdict)); {
		case code == unix.NFT_JUMP, code == unix.NFT_GOTO:
			return "", unix.ByteSliceToString(verdict[4:])
		case code == int32(expr.VerdictDrop):
			return "drop", ""
		case code >= 0 && code&0xff == int32(expr.VerdictQueue):
			return "queue", ""
		}
	case "nat":
		if e.number(unix.NFTA_NAT_TYPE) == unix.NFT_NAT_DNAT {
			return "dnat", ""
		}
	case "lookup":
		if e.attributes.has(unix.NFTA_LOOKUP_DREG) && e.number(unix.NFTA_LOOKUP_DREG) == unix.NFT_REG_VERDICT {
			return "verdict map", ""
		}
	case "target": // of iptables
		name := unix.ByteSliceToString(e.value(unix.NFTA_TARGET_NAME))
		target := ruleset.Rule{Foreign: "-A CHAIN -j " + name}
		if !target.Continues("") && name != "SNAT" && name != "MASQUERADE" {
			return strings.ToLower(name), ""
		}
	case "redir":
		return "redirect", ""
	case "payload":
		if e.attributes.has(unix.NFTA_PAYLOAD_SREG) {
			return "rewrite", ""
		}
	case "fwd":
		return "forward", ""
	case "reject", "queue", "tproxy", "notrack", "synproxy", "dup":
		return e.name, ""
	}
	return "", ""
}
