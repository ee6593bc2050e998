package serve

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// chance is a random filter chain with a client. Its policies look at the port, the name in the client's certificate, the path
// and a field.
type chance struct {
	*rand.Rand
	chain *mesh.FilterChain
	port  uint16
	name  string
	path  string
	field string
}

func newChance(random *rand.Rand) *chance {
	c := &chance{Rand: random, chain: &mesh.FilterChain{HTTP: &mesh.HTTPManager{}}}
	c.port, c.name, c.path, c.field = 80+uint16(c.IntN(2)), c.letter(), "/"+c.letter(), c.letter()
	for range c.IntN(3) {
		c.chain.Policies = append(c.chain.Policies, mesh.NetworkFilter{RBAC: c.rbac()})
	}
	for range c.IntN(3) {
		c.chain.HTTP.Filters = append(c.chain.HTTP.Filters, mesh.HTTPFilter{RBAC: c.rbac()})
	}
	return c
}

func (c *chance) letter() string { return string(rune('a' + c.IntN(3))) }

func (c *chance) rbac() *mesh.RBAC {
	rules := &mesh.Rules{Action: mesh.Action(c.IntN(3))}
	for range c.IntN(4) {
		rules.Policies = append(rules.Policies, c.policy())
	}
	return &mesh.RBAC{Rules: rules}
}

func (c *chance) policy() mesh.AccessPolicy {
	return mesh.AccessPolicy{Name: c.letter(), Permission: c.condition(), Principal: c.condition(), Unknown: c.IntN(10) == 0}
}

func (c *chance) condition() mesh.Condition {
	switch c.IntN(7) {
	case 0:
		return onPath(exactly("/" + c.letter()))
	case 1:
		return onField("x", exactly(c.letter()))
	case 2:
		return onName(exactly(c.letter()))
	case 3:
		return mesh.Condition{Kind: mesh.ConditionPort, Start: 80, End: 81}
	case 4:
		return negated(c.condition())
	}
	return always
}

// passes reports whether a request of the client passes the chain: of an inbound connection, of an outbound one, or at a gateway.
func (c *chance) passes(chain *mesh.FilterChain, side string) bool {
	at := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), c.port)
	request := &httpforward.Request{
		Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte(c.path), Authority: []byte("a"), Fields: fieldList{"x", c.field},
	}
	s := &mesh.Snapshot{}
	if side == "inbound" {
		subject := authz.Subject{Destination: at, Secured: true, Names: []string{c.name}}
		if _, denied := authorize(chain.Policies, &subject); denied {
			return false
		}
		_, reply, _ := (&gate{subject: subject}).pass(s, chain.HTTP, request)
		return reply == nil
	}
	r := &routing{
		role: &Role{gateway: side == "gateway", flows: new(flow.Table)}, accepted: new(accepted), info: mesh.ConnInfo{Destination: at}, names: []string{c.name},
	}
	r.admit(s, chain)
	if r.refused != nil || r.gate == nil {
		return r.refused == nil
	}
	_, reply, _ := r.gate.pass(s, chain.HTTP, request)
	return reply == nil
}

// stricter returns a copy of the chain with a change after which no more may pass, or, if closed is set, nothing.
func (c *chance) stricter() (chain *mesh.FilterChain, change string, closed bool) {
	manager := *c.chain.HTTP
	manager.Filters = slices.Clone(manager.Filters)
	chain = &mesh.FilterChain{Policies: slices.Clone(c.chain.Policies), HTTP: &manager}
	deny := &mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{c.policy()}}}
	switch n, h := c.IntN(len(chain.Policies)+1), c.IntN(len(manager.Filters)+1); c.IntN(4) {
	case 0:
		chain.Policies = slices.Insert(chain.Policies, n, mesh.NetworkFilter{RBAC: deny})
		return chain, "a further filter of connections", false
	case 1:
		manager.Filters = slices.Insert(manager.Filters, h, mesh.HTTPFilter{RBAC: deny})
		return chain, "a further filter of requests", false
	case 2:
		if n < len(chain.Policies) {
			chain.Policies[n].RBAC, change, closed = c.changed(chain.Policies[n].RBAC)
		}
	case 3:
		if h < len(manager.Filters) {
			manager.Filters[h].RBAC, change, closed = c.changed(manager.Filters[h].RBAC)
			if c.IntN(5) == 0 {
				manager.Filters[h].Refused, change, closed = true, "a filter that is refused", true
			}
		}
	}
	return chain, change, closed
}

// changed returns a stricter copy of a filter's policy.
func (c *chance) changed(r *mesh.RBAC) (stricter *mesh.RBAC, change string, closed bool) {
	rules := *r.Rules
	rules.Policies = slices.Clone(rules.Policies)
	i := c.IntN(len(rules.Policies) + 1)
	switch {
	case c.IntN(5) == 0:
		return &mesh.RBAC{Rules: &rules, Refused: true}, "something unknown beside the rules", true
	case c.IntN(5) == 0:
		rules.Refused = true
		return &mesh.RBAC{Rules: &rules}, "something unknown in the rules", rules.Action != mesh.Log
	case i == len(rules.Policies):
		if rules.Action == mesh.Deny {
			rules.Policies = append(rules.Policies, c.policy())
		}
		return &mesh.RBAC{Rules: &rules}, "a further policy that denies", false
	case rules.Action == mesh.Allow && c.IntN(2) == 0:
		rules.Policies = slices.Delete(rules.Policies, i, i+1)
		return &mesh.RBAC{Rules: &rules}, "a policy less that allows", false
	}
	if rules.Policies[i].Unknown = true; c.IntN(2) == 0 {
		rules.Policies[i].Permission = mesh.Condition{}
	}
	return &mesh.RBAC{Rules: &rules}, "something unknown in a policy", false
}

// A policy that denies, a policy less that allows, and parts that are not understood let no further request pass, in filters of
// connections and of requests, wherever they stand in a chain.
func TestStricterChainsAllowNoMore(t *testing.T) {
	random := rand.New(rand.NewPCG(21, 1))
	for _, side := range []string{"inbound", "outbound", "gateway"} {
		opened, closed, denied := 0, 0, 0
		for range 3000 {
			c := newChance(random)
			before := c.passes(c.chain, side)
			chain, change, closes := c.stricter()
			after := c.passes(chain, side)
			switch {
			case after && (!before || closes):
				t.Fatalf("%s: a request passes with %s; before: %v; %+v", side, change, before, c)
			case after:
				opened++
			case before:
				closed++
			default:
				denied++
			}
		}
		if opened < 200 || closed < 100 || denied < 200 {
			t.Errorf("%s: %d requests pass, %d pass before the change only, %d never", side, opened, closed, denied)
		}
	}
}
