//go:build !race

package authz

import (
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// slices are header fields that cost no allocation.
type raw [][2][]byte

func (r raw) Len() int                      { return len(r) }
func (r raw) At(i int) (name, value []byte) { return r[i][0], r[i][1] }

// twentyPolicies returns 20 policies of 10 rules, of which the last one allows.
func twentyPolicies() *Policy {
	var policies []mesh.AccessPolicy
	for range 20 {
		rules := make([]mesh.Condition, 10)
		for k := range rules {
			rules[k] = all(
				header(":method", exact("DELETE")),
				some(path(prefix("/"+strings.Repeat("a", 60)+"/x")), path(suffix("/z")), path(regex("/[0-9]+/.*"))),
				not(header("x-many", suffix("b"))),
			)
		}
		policies = append(policies, rule("never", some(rules...), some(name(exact("spiffe://cluster.local/ns/other/sa/x")), name(regex(".*/ns/other/.*")))))
	}
	policies = append(policies, rule("always", header("x-many", exact("a,b")), name(regex(".+"))))
	return Compile(&mesh.RBAC{Rules: &mesh.Rules{Policies: policies}})
}

func bulky() *Subject {
	s := request()
	s.Request.Path = []byte("/" + strings.Repeat("a", 100) + "?" + strings.Repeat("b", 100))
	s.Request.Authority = []byte(strings.Repeat("host", 50))
	s.Request.Fields = raw{
		{[]byte("x-Very-Long-Name-That-Does-Not-Fit-A-Buffer-On-The-Stack"), []byte(strings.Repeat("v", 100))},
		{[]byte("X-Many"), []byte("a")},
		{[]byte("x-many"), []byte("b")},
	}
	return s
}

func TestJudgeDoesNotAllocate(t *testing.T) {
	p, s := twentyPolicies(), bulky()
	if n := testing.AllocsPerRun(1000, func() {
		if v := p.Judge(s); v.Denied || v.Matched != "always" {
			t.Fatalf("judged %+v", v)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkJudge(b *testing.B) {
	p, s := twentyPolicies(), bulky()
	for b.Loop() {
		p.Judge(s)
	}
}
