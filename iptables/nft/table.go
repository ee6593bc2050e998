package nft

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// TableName is the name of our table. All of it is ours, unless it has neither a chain nor a rule of ours: then it is a
// table of others that has the same name.
const TableName = "pillion"

// hooks are those of our base chains: where iptables has its tables.
var hooks = map[ruleset.Place]hook{
	{Table: ruleset.Raw, Chain: ruleset.ChainPrerouting}:     {"filter", unix.NF_INET_PRE_ROUTING, nfAccept, -300},
	{Table: ruleset.Raw, Chain: ruleset.ChainBuiltOutput}:    {"filter", unix.NF_INET_LOCAL_OUT, nfAccept, -300},
	{Table: ruleset.Mangle, Chain: ruleset.ChainPrerouting}:  {"filter", unix.NF_INET_PRE_ROUTING, nfAccept, -150},
	{Table: ruleset.Mangle, Chain: ruleset.ChainBuiltOutput}: {"route", unix.NF_INET_LOCAL_OUT, nfAccept, -150},
	{Table: ruleset.NAT, Chain: ruleset.ChainPrerouting}:     {"nat", unix.NF_INET_PRE_ROUTING, nfAccept, -100},
	{Table: ruleset.NAT, Chain: ruleset.ChainBuiltOutput}:    {"nat", unix.NF_INET_LOCAL_OUT, nfAccept, -100},
}

// Table is the content of our table.
type Table struct {
	Chains   []Chain            // empty if there is no table
	Dormant  bool               // the kernel skips its rules
	Rulesets [2]ruleset.Ruleset // in the order of Families
	// Foreign means that the table belongs to others. Its rules are not in Rulesets.
	Foreign bool
	// Others names what is in the table and is not ours.
	Others []string
}

func newTable() Table {
	return Table{Rulesets: [2]ruleset.Ruleset{{Family: ruleset.IPv4, Whole: true}, {Family: ruleset.IPv6, Whole: true}}}
}

// Read reads our table, given the chains of all tables.
func Read(chains []Chain) (Table, error) {
	state := newTable()
	for _, c := range chains {
		if c.protocol == unix.NFPROTO_INET && c.Table == TableName {
			state.Chains = append(state.Chains, c)
		}
	}
	dormant, uses, err := readTable()
	if err != nil || uses == 0 {
		return state, err
	}
	state.Dormant = dormant
	listed, err := readRules(unix.NFPROTO_INET, TableName)
	if err != nil {
		return state, err
	}
	ours := slices.ContainsFunc(state.Chains, Chain.isOurs)
	rules := make(map[string][]kernelRule)
	for _, r := range listed {
		rules[r.chain] = append(rules[r.chain], r)
		ours = ours || strings.HasPrefix(r.comment, ruleset.CommentPrefix)
	}
	for _, c := range state.Chains {
		if !c.isOurs() {
			state.Others = append(state.Others, "chain "+c.Name)
		}
	}
	if others := int(uses) - len(state.Chains); others > 0 {
		state.Others = append(state.Others, fmt.Sprintf("%d sets, maps or other objects", others))
	}
	if !ours {
		state.Foreign, state.Chains = true, nil
		return state, nil
	}
	for _, c := range state.Chains {
		if !dormant {
			state.addChain(c, rules[c.Name])
		}
	}
	return state, nil
}

// ReadNow lists the chains and reads our table.
func ReadNow() (Table, error) {
	chains, err := Chains()
	if err != nil {
		return Table{}, err
	}
	return Read(chains)
}

// Of returns the rules that act on one family.
func (s Table) Of(family ruleset.Family) ruleset.Ruleset {
	return s.Rulesets[slices.Index(ruleset.Families, family)]
}

// addChain adds a chain with its rules to the rulesets.
func (s *Table) addChain(c Chain, rules []kernelRule) {
	family, at, ok := placeOf(c.Name)
	if !ok {
		family, at = ruleset.IPv4, ruleset.Place{Table: ruleset.NAT, Chain: c.Name}
	}
	decoded := decode(family, at, rules)
	if !c.isOurs() {
		foreign := ruleset.Rule{Foreign: fmt.Sprintf("-A %s [a chain of nftables that is not ours: %s]", at.Chain, c.describe())}
		decoded[max(family, ruleset.IPv4)] = slices.Insert(decoded[max(family, ruleset.IPv4)], 0, foreign)
	}
	for i, f := range ruleset.Families {
		if family == f || family == 0 {
			chain := ruleset.Chain{Name: at.Chain, Rules: decoded[f]}
			if c.base {
				chain.Policy = ruleset.PolicyAccept
			}
			s.Rulesets[i].AddChain(at.Table, chain)
		}
	}
}

// isOurs reports whether the kernel calls the chain as it calls ours of that name.
func (c Chain) isOurs() bool {
	family, at, ok := placeOf(c.Name)
	hook, base := hooks[at]
	return ok && base == (family == 0) && base == c.base && hook == c.hook
}

func (c Chain) describe() string {
	if !c.base {
		return c.Name
	}
	return fmt.Sprintf("%s, type %s, hook %d, priority %d, policy %d", c.Name, c.hook.kind, c.hook.number, c.hook.priority, c.hook.policy)
}

// readTable returns whether our table has the flag dormant, so that the kernel skips its chains, and the number of its
// chains, sets, maps and other objects: 0 if there is no table.
func readTable() (dormant bool, uses uint32, err error) {
	request := newRequest(unix.NFT_MSG_GETTABLE, 0, unix.NFPROTO_INET, nameAttribute(unix.NFTA_TABLE_NAME, TableName))
	messages, err := request.Execute(unix.NETLINK_NETFILTER, uint16(messageType(unix.NFT_MSG_NEWTABLE)))
	if errors.Is(err, unix.ENOENT) {
		return false, 0, nil
	}
	if err != nil {
		return false, 0, fmt.Errorf("reading nftables table %s: %w", TableName, err)
	}
	for _, message := range messages {
		attributes, err := attributesOf(message)
		if err != nil {
			return false, 0, err
		}
		dormant = bigEndian(attributes.value(unix.NFTA_TABLE_FLAGS))&unix.NFT_TABLE_F_DORMANT != 0
		uses = bigEndian(attributes.value(unix.NFTA_TABLE_USE))
	}
	return dormant, uses, nil
}

// readRules lists the rules of a table, or with NFPROTO_UNSPEC and "" those of all tables.
func readRules(protocol uint8, table string) ([]kernelRule, error) {
	var selected []*nl.RtAttr
	if table != "" {
		selected = append(selected, nameAttribute(unix.NFTA_RULE_TABLE, table))
	}
	request := newRequest(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, protocol, selected...)
	messages, err := kernel.Whole(func() ([][]byte, error) {
		return request.Execute(unix.NETLINK_NETFILTER, uint16(messageType(unix.NFT_MSG_NEWRULE)))
	})
	if err != nil {
		return nil, fmt.Errorf("listing nftables rules: %w", err)
	}
	var rules []kernelRule
	for _, message := range messages {
		rule, err := readRule(message)
		if err != nil {
			return nil, fmt.Errorf("listing nftables rules: %w", err)
		}
		rules = append(rules, rule)
	}
	return rules, nil
}

func readRule(message []byte) (kernelRule, error) {
	var rule kernelRule
	attributes, err := attributesOf(message)
	if err != nil {
		return rule, err
	}
	rule.protocol = message[0]
	rule.table = unix.ByteSliceToString(attributes.value(unix.NFTA_RULE_TABLE))
	rule.chain = unix.ByteSliceToString(attributes.value(unix.NFTA_RULE_CHAIN))
	rule.comment = commentOf(attributes.value(unix.NFTA_RULE_USERDATA))
	for _, b := range attributes.value(unix.NFTA_RULE_HANDLE) {
		rule.handle = rule.handle<<8 | uint64(b)
	}
	list, err := readAttributes(attributes.value(unix.NFTA_RULE_EXPRESSIONS))
	if err != nil {
		return rule, err
	}
	rule.expressions = make([]expression, len(list))
	for i, element := range list {
		if rule.expressions[i], err = readExpression(element.value); err != nil {
			return rule, err
		}
	}
	return rule, nil
}

// commentOf returns the comment in the user data of a rule: a list of type, length and value. Other programs may have
// written it, so lengths are checked.
func commentOf(data []byte) string {
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

// attributesOf returns the attributes of a message of nftables.
func attributesOf(message []byte) (attributes, error) {
	if len(message) < nl.SizeofNfgenmsg {
		return nil, fmt.Errorf("a message of %d bytes is too short", len(message))
	}
	return readAttributes(message[nl.SizeofNfgenmsg:])
}

func nameAttribute(attribute int, name string) *nl.RtAttr {
	return nl.NewRtAttr(attribute, nl.ZeroTerminated(name))
}

// Change is a transaction on our table, with the subject of each request.
type Change struct {
	requests []*nl.NetlinkRequest
	subjects []subject
}

// subject is the chain or rule of a request, for error messages.
type subject struct {
	hook hook
	id   string
	rule kernelRule
}

func (c *Change) add(subject subject, message, flags int, attributes ...*nl.RtAttr) {
	c.requests = append(c.requests, newRequest(message, flags, unix.NFPROTO_INET, attributes...))
	c.subjects = append(c.subjects, subject)
}

// Transition returns the transaction that turns our table from have into wanted. Base chains that are right stay, and every
// rule is written again: a packet meets all of the old rules or all of the new ones. If the table holds a chain that is not
// ours, or is dormant, it is deleted and created again in the same transaction.
func Transition(wanted [2]ruleset.Ruleset, have Table) Change {
	var change Change
	table := nameAttribute(unix.NFTA_TABLE_NAME, TableName)
	var keep []string
	chains := wantedChains(wanted)
	intact := len(have.Chains) > 0 && !have.Dormant && !slices.ContainsFunc(have.Chains, func(c Chain) bool { return !c.isOurs() })
	switch {
	case intact && len(chains) > 0:
		change.add(subject{}, unix.NFT_MSG_DELRULE, 0, nameAttribute(unix.NFTA_RULE_TABLE, TableName))
		for _, c := range have.Chains {
			if keep = append(keep, c.Name); !slices.ContainsFunc(chains, func(w Chain) bool { return w.Name == c.Name }) {
				change.add(subject{}, unix.NFT_MSG_DELCHAIN, 0, nameAttribute(unix.NFTA_CHAIN_TABLE, TableName), nameAttribute(unix.NFTA_CHAIN_NAME, c.Name))
			}
		}
	case len(chains) > 0 || len(have.Chains) > 0:
		// A table without chains may exist and be dormant. It is created first so that it can be deleted.
		change.add(subject{}, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, table)
		change.add(subject{}, unix.NFT_MSG_DELTABLE, 0, table)
		if len(chains) > 0 {
			change.add(subject{}, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, table)
		}
	}
	for _, c := range chains {
		if !slices.Contains(keep, c.Name) {
			change.addChain(c)
		}
	}
	for _, rs := range wanted {
		for at, r := range rs.All() {
			if r.Foreign != "" {
				continue // a foreign rule in our table cannot be recreated
			}
			for _, rule := range encode(rs.Family, at, r) {
				change.addRule(r, rule)
			}
		}
	}
	return change
}

// wantedChains returns the chains of both families.
func wantedChains(wanted [2]ruleset.Ruleset) []Chain {
	var chains []Chain
	for _, rs := range wanted {
		for _, t := range rs.Tables {
			for _, c := range t.Chains {
				at := ruleset.Place{Table: t.Name, Chain: c.Name}
				hook, base := hooks[at]
				chain := Chain{Name: chainName(rs.Family, at), base: base, hook: hook}
				if (len(c.Rules) > 0 || !base) && !slices.Contains(chains, chain) {
					chains = append(chains, chain)
				}
			}
		}
	}
	return chains
}

func (c *Change) addChain(chain Chain) {
	attributes := []*nl.RtAttr{nameAttribute(unix.NFTA_CHAIN_TABLE, TableName), nameAttribute(unix.NFTA_CHAIN_NAME, chain.Name)}
	if chain.base {
		hook := nl.NewRtAttr(unix.NFTA_CHAIN_HOOK|unix.NLA_F_NESTED, nil)
		hook.AddRtAttr(unix.NFTA_HOOK_HOOKNUM, nl.BEUint32Attr(chain.hook.number))
		hook.AddRtAttr(unix.NFTA_HOOK_PRIORITY, nl.BEUint32Attr(uint32(chain.hook.priority)))
		attributes = append(attributes, hook,
			nl.NewRtAttr(unix.NFTA_CHAIN_POLICY, nl.BEUint32Attr(chain.hook.policy)), nameAttribute(unix.NFTA_CHAIN_TYPE, chain.hook.kind))
	}
	c.add(subject{hook: chain.hook}, unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, attributes...)
}

func (c *Change) addRule(r ruleset.Rule, rule kernelRule) {
	list := nl.NewRtAttr(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, nil)
	for _, e := range rule.expressions {
		list.AddRtAttr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, e.message)
	}
	c.add(subject{id: r.ID, rule: rule}, unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND,
		nameAttribute(unix.NFTA_RULE_TABLE, TableName), nameAttribute(unix.NFTA_RULE_CHAIN, rule.chain), list,
		nl.NewRtAttr(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, rule.comment)))
}

// Base is a base chain that accepts what its rules do not decide.
type Base struct {
	Name, Kind string // kind is nat, filter or route
	Hook       uint32 // such as unix.NF_INET_LOCAL_OUT
	Priority   int32
	Rules      [][]expr.Any
}

// Create creates our table in a namespace that does not have it, with other chains than those of the capture.
func Create(chains ...Base) error {
	var change Change
	change.add(subject{}, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, nameAttribute(unix.NFTA_TABLE_NAME, TableName))
	for _, c := range chains {
		change.addChain(Chain{Name: c.Name, base: true, hook: hook{c.Kind, c.Hook, nfAccept, c.Priority}})
		for _, expressions := range c.Rules {
			change.addRule(ruleset.Rule{}, newRule(c.Name, "", expressions))
		}
	}
	return transact(change.requests)
}

// Apply carries the transaction out. An error names the refused chain or rule.
func (c Change) Apply() error {
	err := transact(c.requests)
	if err == nil {
		return nil
	}
	var refused refusal
	if errors.As(err, &refused) && refused.request >= 0 {
		return fmt.Errorf("changing nftables rules: %w", c.subjects[refused.request].explain(refused.errno))
	}
	return fmt.Errorf("changing nftables rules: %w", subject{}.explain(err))
}

// features are the kernel modules of expressions, beginning with the one that is missing most often.
var features = []struct{ expression, module string }{
	{"tproxy", "nft_tproxy"}, {"redir", "nft_redir"}, {"ct", "nft_ct, with marks and zones of connection tracking"}, {"range", "nf_tables"},
}

// explain adds what the kernel lacks.
func (s subject) explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return kernel.Refused(false)
	case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EAFNOSUPPORT):
	case s.hook.kind != "":
		return fmt.Errorf("a chain of type %s in family inet: %w: %w; load nft_chain_nat and nf_tables_inet on the node, or use iptables", s.hook.kind, err, kernel.ErrNoKernelSupport)
	case s.id != "":
		var needs string
		for _, feature := range features {
			if slices.ContainsFunc(s.rule.expressions, func(e expression) bool { return e.name == feature.expression }) {
				needs = cmp.Or(needs, feature.module)
			}
		}
		return fmt.Errorf("rule %s: %w: %w; load %s on the node, or use iptables", s.id, err, kernel.ErrNoKernelSupport, cmp.Or(needs, "nf_tables"))
	}
	if s.id != "" {
		return fmt.Errorf("rule %s: %w", s.id, err)
	}
	return err
}
