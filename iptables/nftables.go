package iptables

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Rules without a program: one table of family inet, which is all ours, written and read by netlink.
const nftTable = "pillion"

// nftHooks are when our base chains are called: where iptables has its tables.
var nftHooks = map[Place]nftHook{
	{Raw, chainPrerouting}:     {"filter", unix.NF_INET_PRE_ROUTING, nfAccept, -300},
	{Raw, chainBuiltOutput}:    {"filter", unix.NF_INET_LOCAL_OUT, nfAccept, -300},
	{Mangle, chainPrerouting}:  {"filter", unix.NF_INET_PRE_ROUTING, nfAccept, -150},
	{Mangle, chainBuiltOutput}: {"route", unix.NF_INET_LOCAL_OUT, nfAccept, -150},
	{NAT, chainPrerouting}:     {"nat", unix.NF_INET_PRE_ROUTING, nfAccept, -100},
	{NAT, chainBuiltOutput}:    {"nat", unix.NF_INET_LOCAL_OUT, nfAccept, -100},
}

// nftState is what our table holds.
type nftState struct {
	chains   []nftChain // none if there is no table
	dormant  bool       // nothing in it acts
	rulesets [2]Ruleset // in the order of Families
}

// readNFTables reads our table, given the chains of all. It is not asked for when it has no chains.
func readNFTables(chains []nftChain) (nftState, error) {
	state := nftState{rulesets: [2]Ruleset{{Family: IPv4, Whole: true}, {Family: IPv6, Whole: true}}}
	for _, c := range chains {
		if c.protocol == unix.NFPROTO_INET && c.table == nftTable {
			state.chains = append(state.chains, c)
		}
	}
	if len(state.chains) == 0 {
		return state, nil
	}
	var err error
	if state.dormant, err = nftDormant(); err != nil || state.dormant {
		return state, err
	}
	rules, err := nftRules()
	if err != nil {
		return state, err
	}
	for _, c := range state.chains {
		state.addChain(c, rules[c.name])
	}
	return state, nil
}

// readNFTablesNow reads our table as it is at this moment.
func readNFTablesNow() (nftState, error) {
	chains, err := nftChains()
	if err != nil {
		return nftState{}, err
	}
	return readNFTables(chains)
}

// ruleset is what acts on one family.
func (s nftState) ruleset(family Family) Ruleset { return s.rulesets[slices.Index(Families, family)] }

// addChain reads a chain into the rulesets.
func (s *nftState) addChain(c nftChain, rules []nftRule) {
	family, at, ok := nftPlace(c.name)
	if !ok {
		family, at = IPv4, Place{NAT, c.name}
	}
	decoded := decode(family, at, rules)
	if !c.isOurs() {
		stranger := Rule{Foreign: fmt.Sprintf("-A %s [a chain of nftables that is not ours: %s]", at.Chain, c.describe())}
		decoded[max(family, IPv4)] = slices.Insert(decoded[max(family, IPv4)], 0, stranger)
	}
	for i, f := range Families {
		if family == f || family == 0 {
			chain := Chain{Name: at.Chain, Rules: decoded[f]}
			if c.base {
				chain.Policy = policyAccept
			}
			s.rulesets[i].addChain(at.Table, chain)
		}
	}
}

// isOurs tells whether the chain is called when one of ours of that name is.
func (c nftChain) isOurs() bool {
	family, at, ok := nftPlace(c.name)
	hook, base := nftHooks[at]
	return ok && base == (family == 0) && base == c.base && hook == c.hook
}

func (c nftChain) describe() string {
	if !c.base {
		return c.name
	}
	return fmt.Sprintf("%s, type %s, hook %d, priority %d, policy %d", c.name, c.hook.kind, c.hook.number, c.hook.priority, c.hook.policy)
}

// nftDormant tells whether somebody has put our table to sleep.
func nftDormant() (bool, error) {
	request := nftRequest(unix.NFT_MSG_GETTABLE, 0, unix.NFPROTO_INET, nftName(unix.NFTA_TABLE_NAME, nftTable))
	messages, err := request.Execute(unix.NETLINK_NETFILTER, uint16(nftMessage(unix.NFT_MSG_NEWTABLE)))
	if err != nil {
		return false, fmt.Errorf("reading nftables table %s: %w", nftTable, err)
	}
	dormant := false
	for _, message := range messages {
		attributes, err := nftAttributes(message)
		if err != nil {
			return false, err
		}
		dormant = dormant || bigEndian(attributes[unix.NFTA_TABLE_FLAGS])&unix.NFT_TABLE_F_DORMANT != 0
	}
	return dormant, nil
}

// nftRules lists the rules of our table, by chain.
func nftRules() (map[string][]nftRule, error) {
	request := nftRequest(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.NFPROTO_INET, nftName(unix.NFTA_RULE_TABLE, nftTable))
	messages, err := whole(func() ([][]byte, error) {
		return request.Execute(unix.NETLINK_NETFILTER, uint16(nftMessage(unix.NFT_MSG_NEWRULE)))
	})
	if err != nil {
		return nil, fmt.Errorf("listing nftables rules: %w", err)
	}
	rules := make(map[string][]nftRule)
	for _, message := range messages {
		rule, err := readNFTRule(message)
		if err != nil {
			return nil, fmt.Errorf("listing nftables rules: %w", err)
		}
		rules[rule.chain] = append(rules[rule.chain], rule)
	}
	return rules, nil
}

func readNFTRule(message []byte) (nftRule, error) {
	var rule nftRule
	attributes, err := nftAttributes(message)
	if err != nil {
		return rule, err
	}
	rule.chain = unix.ByteSliceToString(attributes[unix.NFTA_RULE_CHAIN])
	rule.comment = nftComment(attributes[unix.NFTA_RULE_USERDATA])
	for _, b := range attributes[unix.NFTA_RULE_HANDLE] {
		rule.handle = rule.handle<<8 | uint64(b)
	}
	list, err := nl.ParseRouteAttr(attributes[unix.NFTA_RULE_EXPRESSIONS])
	for _, element := range list {
		e, err := readExpression(element.Value)
		if err != nil {
			return rule, err
		}
		rule.expressions = append(rule.expressions, e)
	}
	return rule, err
}

// nftComment finds the comment in what somebody's program left with a rule: a list of type, length and value.
func nftComment(data []byte) string {
	for len(data) >= 2 {
		kind, end := userdata.Type(data[0]), 2+int(data[1])
		if end > len(data) {
			break
		}
		if kind == userdata.TypeComment {
			return unix.ByteSliceToString(data[2:end])
		}
		data = data[end:]
	}
	return ""
}

// nftAttributes are the attributes behind a message's header, by type.
func nftAttributes(message []byte) (map[uint16][]byte, error) {
	if len(message) < nl.SizeofNfgenmsg {
		return nil, fmt.Errorf("a message of %d bytes is too short", len(message))
	}
	list, err := nl.ParseRouteAttr(message[nl.SizeofNfgenmsg:])
	attributes := make(map[uint16][]byte, len(list))
	for _, attribute := range list {
		attributes[attribute.Attr.Type&nl.NLA_TYPE_MASK] = attribute.Value
	}
	return attributes, err
}

func nftName(attribute int, name string) *nl.RtAttr {
	return nl.NewRtAttr(attribute, nl.ZeroTerminated(name))
}

// nftChange is a transaction that makes our table what it should be, and what each of its requests is for.
type nftChange struct {
	requests []*nl.NetlinkRequest
	subjects []nftSubject
}

// nftSubject is a chain or a rule, for the one that has to explain an error.
type nftSubject struct {
	hook nftHook
	id   string
	rule nftRule
}

func (c *nftChange) add(subject nftSubject, message, flags int, attributes ...*nl.RtAttr) {
	c.requests = append(c.requests, nftRequest(message, flags, unix.NFPROTO_INET, attributes...))
	c.subjects = append(c.subjects, subject)
}

// planNFTables turns the table as it is into one with the wanted rules. Base chains that are as they should be stay
// where they are, and every rule is written anew: a packet sees all of the old rules or all of the new. Where something
// is not ours the table is made anew instead.
func planNFTables(wanted [2]Ruleset, have nftState) nftChange {
	var change nftChange
	table := nftName(unix.NFTA_TABLE_NAME, nftTable)
	var keep []string
	chains := nftWantedChains(wanted)
	intact := len(have.chains) > 0 && !have.dormant && !slices.ContainsFunc(have.chains, func(c nftChain) bool { return !c.isOurs() })
	switch {
	case intact && len(chains) > 0:
		change.add(nftSubject{}, unix.NFT_MSG_DELRULE, 0, nftName(unix.NFTA_RULE_TABLE, nftTable))
		for _, c := range have.chains {
			if keep = append(keep, c.name); !slices.ContainsFunc(chains, func(w nftChain) bool { return w.name == c.name }) {
				change.add(nftSubject{}, unix.NFT_MSG_DELCHAIN, 0, nftName(unix.NFTA_CHAIN_TABLE, nftTable), nftName(unix.NFTA_CHAIN_NAME, c.name))
			}
		}
	case len(chains) > 0 || len(have.chains) > 0:
		// One without chains may be there, and asleep. It is made first so that it can be removed.
		change.add(nftSubject{}, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, table)
		change.add(nftSubject{}, unix.NFT_MSG_DELTABLE, 0, table)
		if len(chains) > 0 {
			change.add(nftSubject{}, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, table)
		}
	}
	for _, c := range chains {
		if !slices.Contains(keep, c.name) {
			change.addChain(c)
		}
	}
	for _, rs := range wanted {
		for at, r := range rs.All() {
			if r.Foreign != "" {
				continue // a stranger's rule in our table cannot be made again
			}
			for _, rule := range encode(rs.Family, at, r) {
				change.addRule(r, rule)
			}
		}
	}
	return change
}

// nftWantedChains are the chains of both families.
func nftWantedChains(wanted [2]Ruleset) []nftChain {
	var chains []nftChain
	for _, rs := range wanted {
		for _, t := range rs.Tables {
			for _, c := range t.Chains {
				at := Place{t.Name, c.Name}
				hook, base := nftHooks[at]
				chain := nftChain{name: nftChainName(rs.Family, at), base: base, hook: hook}
				if (len(c.Rules) > 0 || !base) && !slices.Contains(chains, chain) {
					chains = append(chains, chain)
				}
			}
		}
	}
	return chains
}

func (c *nftChange) addChain(chain nftChain) {
	attributes := []*nl.RtAttr{nftName(unix.NFTA_CHAIN_TABLE, nftTable), nftName(unix.NFTA_CHAIN_NAME, chain.name)}
	if chain.base {
		hook := nl.NewRtAttr(unix.NFTA_CHAIN_HOOK|unix.NLA_F_NESTED, nil)
		hook.AddRtAttr(unix.NFTA_HOOK_HOOKNUM, nl.BEUint32Attr(chain.hook.number))
		hook.AddRtAttr(unix.NFTA_HOOK_PRIORITY, nl.BEUint32Attr(uint32(chain.hook.priority)))
		attributes = append(attributes, hook,
			nl.NewRtAttr(unix.NFTA_CHAIN_POLICY, nl.BEUint32Attr(chain.hook.policy)), nftName(unix.NFTA_CHAIN_TYPE, chain.hook.kind))
	}
	c.add(nftSubject{hook: chain.hook}, unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, attributes...)
}

func (c *nftChange) addRule(r Rule, rule nftRule) {
	list := nl.NewRtAttr(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, nil)
	for _, e := range rule.expressions {
		list.AddRtAttr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, e.message)
	}
	c.add(nftSubject{id: r.ID, rule: rule}, unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND,
		nftName(unix.NFTA_RULE_TABLE, nftTable), nftName(unix.NFTA_RULE_CHAIN, rule.chain), list,
		nl.NewRtAttr(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, rule.comment)))
}

func (c nftChange) apply() error {
	err := nftTransaction(c.requests)
	if err == nil {
		return nil
	}
	var refused nftError
	if errors.As(err, &refused) && refused.request >= 0 {
		return fmt.Errorf("changing nftables rules: %w", c.subjects[refused.request].explain(refused.errno))
	}
	return fmt.Errorf("changing nftables rules: %w", nftSubject{}.explain(err))
}

// nftFeatures are the modules of the kernel that give expressions, those that are missing most first.
var nftFeatures = []struct{ expression, module string }{
	{"tproxy", "nft_tproxy"}, {"redir", "nft_redir"}, {"ct", "nft_ct, with marks and zones of connection tracking"}, {"range", "nf_tables"},
}

// explain says what the kernel lacks.
func (s nftSubject) explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return MissingCapabilityError("NET_ADMIN")
	case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EAFNOSUPPORT):
	case s.hook.kind != "":
		return fmt.Errorf("a chain of type %s in family inet: %w: %w; load nft_chain_nat and nf_tables_inet on the node, or use --backend iptables", s.hook.kind, err, errNoKernelSupport)
	case s.id != "":
		var needs string
		for _, feature := range nftFeatures {
			if slices.ContainsFunc(s.rule.expressions, func(e expression) bool { return e.name == feature.expression }) {
				needs = cmp.Or(needs, feature.module)
			}
		}
		return fmt.Errorf("rule %s: %w: %w; load %s on the node, or use --backend iptables", s.id, err, errNoKernelSupport, cmp.Or(needs, "nf_tables"))
	}
	if s.id != "" {
		return fmt.Errorf("rule %s: %w", s.id, err)
	}
	return err
}
