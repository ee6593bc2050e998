package authz

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// oneByOne judges by each policy, without an index.
func (r *rules) oneByOne(s *Subject) Verdict {
	for i := range r.policies {
		if met := r.policies[i].met(s); met == yes || met == unknown && r.action == mesh.Deny {
			return Verdict{Denied: r.action == mesh.Deny, Matched: r.policies[i].name}
		}
	}
	return Verdict{Denied: r.action == mesh.Allow}
}

// TestTheIndexChangesNoVerdict compares verdicts of many policies by their index with those of a look at each policy.
func TestTheIndexChangesNoVerdict(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	evaluated, excluded, matched := 0, 0, map[value]int{}
	for range 500 {
		rbac := mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Action(random.IntN(2))}}
		for i := range 1 + random.IntN(20) {
			p := rule(fmt.Sprint(i), wideCondition(random, 3), wideCondition(random, 3))
			p.Unknown = random.IntN(10) == 0
			rbac.Rules.Policies = append(rbac.Rules.Policies, p)
		}
		r := compileRules(rbac.Rules)
		for range 10 {
			s := wideSubject(random)
			if got, want := r.judge(s), r.oneByOne(s); got != want {
				t.Fatalf("%+v: %+v, one by one %+v", s, got, want)
			}
			for i := range r.blocks {
				b := &r.blocks[i]
				left := b.unnamed
				if s.Secured && b.clients != nil {
					left = b.client(s).may
				}
				if s.Request != nil {
					b.exclude(s.Request, &left)
				}
				for k := range b.policies {
					met := b.policies[k].met(s)
					if left[k/64]>>(k%64)&1 == 0 {
						excluded++
					} else {
						evaluated++
						matched[met]++
					}
				}
			}
		}
	}
	if excluded < evaluated/2 || matched[yes] < 500 || matched[unknown] < 500 {
		t.Errorf("%d policies were excluded, %d evaluated: %v", excluded, evaluated, matched)
	}
}

var wideTexts = []string{"", "/", "/a", "/A", "/ab", "/abc", "/abd", "/ab/c", "b", "/ab\xff", "a", "A", "ab", "ba", "GET", "get", "spiffe://a/ns/b/sa/c"}

func wideText(random *rand.Rand) string { return wideTexts[random.IntN(len(wideTexts))] }

// wideCondition is a random condition with matchers of all kinds.
func wideCondition(random *rand.Rand, depth int) mesh.Condition {
	m := mesh.StringMatcher{Kind: mesh.MatchKind(random.IntN(5)), Text: wideText(random), IgnoreCase: random.IntN(4) == 0}
	if m.Kind == mesh.MatchRegex {
		m.Text = ".*" + m.Text + ".*"
	}
	kind := random.IntN(12)
	if depth == 0 {
		kind %= 8
	}
	switch kind {
	case 0, 1:
		return path(m)
	case 2, 3:
		return name(m)
	case 4, 5, 6:
		c := header([]string{":method", ":authority", "Host", "x-one", "X-Two"}[random.IntN(5)], m)
		c.Header.Kind, c.Header.Present = mesh.HeaderMatchKind(random.IntN(3)), random.IntN(2) == 0
		c.Header.Invert, c.Header.MissingIsEmpty = random.IntN(6) == 0, random.IntN(6) == 0
		return c
	case 7:
		return []mesh.Condition{riddle, anything, ports(8080, 8081), template("/a*"), {Kind: mesh.ConditionPrincipal}}[random.IntN(5)]
	case 8:
		return not(wideCondition(random, depth-1))
	}
	c := mesh.Condition{Kind: []mesh.ConditionKind{mesh.ConditionAll, mesh.ConditionAny}[kind%2]}
	for range random.IntN(4) {
		c.Of = append(c.Of, wideCondition(random, depth-1))
	}
	return c
}

func wideSubject(random *rand.Rand) *Subject {
	s := request()
	s.Names = nil
	for range random.IntN(3) {
		s.Names = append(s.Names, wideText(random))
	}
	if s.Secured = random.IntN(4) > 0; !s.Secured {
		s.Names = nil
	}
	text := func() []byte {
		if random.IntN(8) == 0 {
			return nil
		}
		return []byte(wideText(random))
	}
	s.Request.Path, s.Request.Method, s.Request.Authority = text(), text(), text()
	switch random.IntN(8) {
	case 0:
		s.Request = nil
	case 1:
		s.Request.Fields = nil
	default:
		s.Request.Fields = fields{{"X-ONE", wideText(random)}, {"x-two", wideText(random)}}[:random.IntN(3)]
	}
	return s
}

// Policies beyond the first block keep their order.
func TestMorePoliciesThanABlockHas(t *testing.T) {
	var policies []mesh.AccessPolicy
	for i := range 3*blockSize + 1 {
		policies = append(policies, rule(fmt.Sprint(i), path(exact(fmt.Sprint("/", i))), anything))
	}
	policies = append(policies, rule("last", path(prefix("/")), anything))
	p := Compile(&mesh.RBAC{Rules: &mesh.Rules{Policies: policies}})
	for _, i := range []int{0, 63, 64, blockSize - 1, blockSize, 3 * blockSize} {
		s := request()
		s.Request.Path = fmt.Append(nil, "/", i)
		if v := p.Judge(s); v.Matched != fmt.Sprint(i) {
			t.Errorf("%d: %+v", i, v)
		}
	}
	if v := p.Judge(request()); v.Matched != "last" {
		t.Errorf("%+v", v)
	}
}

// The index looks for a text only while a policy that needs one is left, and spreads clients.
func TestTheIndexSparesWork(t *testing.T) {
	var needing texts
	left := set{0, 1 << 5, 0, 1}
	needing.free = left
	if needing.excludes(&left) {
		t.Error("a text is looked for, and none is needed")
	}
	for _, i := range []int{64 + 5, 3 * 64} {
		needing.free = left
		needing.free[i/64] = 0
		if !needing.excludes(&left) {
			t.Errorf("no text is looked for, and policy %d needs one", i)
		}
	}
	used := map[uint32]bool{}
	for i := range 8 * ways {
		used[hash([]string{fmt.Sprintf("spiffe://cluster.local/ns/default/sa/%d", i)})] = true
	}
	if len(used) < ways*3/4 {
		t.Errorf("%d of %d places are used", len(used), ways)
	}
}

// Clients that share a place of the index are distinguished.
func TestManyClients(t *testing.T) {
	policies := []mesh.AccessPolicy{rule("own", anything, name(suffix("/even")))}
	p := Compile(&mesh.RBAC{Rules: &mesh.Rules{Policies: policies}})
	for i := range 2000 {
		s, kind := request(), []string{"even", "odd"}[i%2]
		s.Names = []string{fmt.Sprintf("spiffe://cluster.local/ns/%d/sa/%s", i%(4*ways), kind), strings.Repeat("x", i%3)}
		s.Names = s.Names[:1+i%2]
		if v := p.Judge(s); v.Denied != (kind == "odd") {
			t.Fatalf("%q: %+v", s.Names, v)
		}
	}
}
