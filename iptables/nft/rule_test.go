package nft

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

// A rule written to nftables is read back unchanged, for any spec.
func TestRoundTripThroughExpressions(t *testing.T) {
	check := func(t *testing.T, rs ruleset.Ruleset) {
		t.Helper()
		for _, table := range rs.Tables {
			for _, c := range table.Chains {
				at, of := ruleset.Place{Table: table.Name, Chain: c.Name}, ruleset.Family(0)
				var encoded []kernelRule
				for _, r := range c.Rules {
					encoded = append(encoded, encode(rs.Family, at, r)...)
				}
				if c.Own() {
					of = rs.Family
				}
				decoded := decode(of, at, encoded)[rs.Family]
				if want := rulestest.WithoutReasons(ruleset.Ruleset{Tables: []ruleset.Table{{Name: table.Name, Chains: []ruleset.Chain{c}}}}).Tables[0].Chains[0].Rules; !reflect.DeepEqual(decoded, want) {
					t.Errorf("%v: got\n%+v\nwant\n%+v", at, decoded, want)
				}
				for i, r := range encoded {
					if len(r.comment) > 128 { // as much as nft shows
						t.Errorf("%v: the comment of rule %d has %d bytes", at, i, len(r.comment))
					}
				}
			}
		}
	}
	rulestest.ForEach(t, func(t *testing.T, sc rulestest.Scenario, a rulestest.Addresses) {
		check(t, policy.Rules(sc.Spec, a.Family))
	})
	random := rand.New(rand.NewPCG(1, 2))
	for range 120 {
		spec := rulestest.RandomSpec(random)
		for _, family := range ruleset.Families {
			check(t, policy.Rules(spec, family))
		}
	}
}

// A rule with one changed byte, or with a missing or duplicate expression, is not read as the original rule.
func TestARuleOfNFTablesThatIsAlmostOursIsNotOurs(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	seen := make(map[string]bool) // scenarios have many rules in common
	rulestest.ForEach(t, func(t *testing.T, sc rulestest.Scenario, a rulestest.Addresses) {
		for at, r := range policy.Rules(sc.Spec, a.Family).All() {
			r.Why = ""
			if key := fmt.Sprint(a.Family, at, r.Line(at.Chain)); seen[key] {
				continue
			} else {
				seen[key] = true
			}
			check := func(what string, change func(*kernelRule)) {
				rules := encode(a.Family, at, r)
				change(&rules[0])
				of := a.Family
				if !strings.HasPrefix(at.Chain, ruleset.OwnPrefix) {
					of = 0
				}
				if got := decode(of, at, rules)[a.Family]; len(got) > 0 && reflect.DeepEqual(got[0], r) {
					t.Errorf("%s, %s: it still counts as %+v", r.ID, what, r)
				}
			}
			check("another comment", func(rule *kernelRule) { rule.comment += "x" })
			for i, e := range encode(a.Family, at, r)[0].expressions {
				check(e.name+" missing", func(rule *kernelRule) { rule.expressions = slices.Delete(rule.expressions, i, i+1) })
				check(e.name+" twice", func(rule *kernelRule) { rule.expressions = slices.Insert(rule.expressions, i, e) })
				for number, attribute := range e.attributes {
					check(fmt.Sprintf("attribute %d of %s changed", attribute.kind, e.name), func(rule *kernelRule) {
						if e.name == "counter" {
							rule.comment = "" // its numbers may be any
							return
						}
						value := rule.expressions[i].attributes[number].value
						value[random.IntN(len(value))] ^= byte(1 + random.IntN(255))
					})
					check(fmt.Sprintf("attribute %d of %s missing", attribute.kind, e.name), func(rule *kernelRule) {
						changed := &rule.expressions[i]
						if changed.attributes = slices.Delete(changed.attributes, number, number+1); e.name == "counter" {
							rule.comment = ""
						}
					})
				}
			}
		}
	})
}

func TestChainNamesAreUnique(t *testing.T) {
	for name, want := range map[string]ruleset.Place{
		"nat_output": {Table: ruleset.NAT, Chain: ruleset.ChainBuiltOutput}, "mangle_prerouting": {Table: ruleset.Mangle, Chain: ruleset.ChainPrerouting},
		"ipv4_nat_in_redirect": {Table: ruleset.NAT, Chain: ruleset.ChainInboundRedirect}, "ipv6_raw_dns": {Table: ruleset.Raw, Chain: ruleset.ChainDNSCaptured},
	} {
		if _, at, ok := placeOf(name); !ok || at != want {
			t.Errorf("%s: got %v, %t", name, at, ok)
		}
	}
	for _, name := range []string{"", "nat", "nat_", "nat_input", "filter_output", "ipv4", "ipv4_nat", "ipv4_filter_x", "NAT_OUTPUT", "ipv5_nat_x", "theirs"} {
		if family, at, ok := placeOf(name); ok {
			t.Errorf("%s is taken for %s %v", name, family, at)
		}
	}
}

// Kernels with one bitwise operation omit the attribute that names it. Their rules equal those that name it.
func TestTheOnlyBitwiseOperationNeedsNoName(t *testing.T) {
	message, err := expr.Marshal(unix.NFPROTO_INET, masked([]byte{0xf0}))
	if err != nil {
		t.Fatal(err)
	}
	for name, operation := range map[string][]byte{"omitted": nil, "boolean": {0, 0, 0, 0}} {
		data := message
		if operation != nil {
			data = withAttribute(t, message, nftaBitwiseOp, operation)
		}
		e, err := readExpression(data)
		if err != nil || e.attributes.has(nftaBitwiseOp) || !e.equal(flatten(masked([]byte{0xf0}))) {
			t.Errorf("%s: %v, %v", name, e.attributes, err)
		}
	}
	if e, err := readExpression(withAttribute(t, message, nftaBitwiseOp, []byte{0, 0, 0, 1})); err != nil || e.equal(flatten(masked([]byte{0xf0}))) {
		t.Errorf("a shift equals a mask: %v, %v", e.attributes, err)
	}
}

// withAttribute replaces an attribute of an expression.
func withAttribute(t *testing.T, message []byte, kind int, value []byte) []byte {
	t.Helper()
	outer, err := nl.ParseRouteAttr(message)
	if err != nil {
		t.Fatal(err)
	}
	var changed []byte
	for _, a := range outer {
		attribute := nl.NewRtAttr(int(a.Attr.Type), a.Value)
		if a.Attr.Type&nl.NLA_TYPE_MASK == unix.NFTA_EXPR_DATA {
			inner, err := nl.ParseRouteAttr(a.Value)
			if err != nil {
				t.Fatal(err)
			}
			var data []byte
			for _, i := range inner {
				if int(i.Attr.Type&nl.NLA_TYPE_MASK) != kind {
					data = append(data, nl.NewRtAttr(int(i.Attr.Type), i.Value).Serialize()...)
				}
			}
			attribute = nl.NewRtAttr(int(a.Attr.Type), append(data, nl.NewRtAttr(kind, value).Serialize()...))
		}
		changed = append(changed, attribute.Serialize()...)
	}
	return changed
}
