package httpforward

import (
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// planned is a Router whose decisions are a test's. Requests go to the connection's target, unless decide changes that.
type planned struct {
	decide func(r *Request, d *Decision)
	leases *leases // nil: no request has one
}

func (p *planned) Route(r *Request) Decision {
	d := Decision{Target: upstream.Target{Address: r.Connection.OriginalDestination}, Cluster: "planned", Route: "a-route"}
	if p.leases != nil {
		d.Lease = p.leases.open()
	}
	p.decide(r, &d)
	return d
}

// withPlan routes all requests with a plan.
func withPlan(plan *route.Plan) func(*rig) {
	return func(r *rig) { r.router = &planned{decide: func(_ *Request, d *Decision) { d.Plan = plan }} }
}

// withReply answers all requests.
func withReply(reply *route.Reply, plan *route.Plan) func(*rig) {
	return func(r *rig) {
		r.router = &planned{decide: func(_ *Request, d *Decision) { d.Target, d.Reply, d.Plan = upstream.Target{}, reply, plan }}
	}
}

// planOf compiles the plan of a route.
func planOf(t testing.TB, forward mesh.Forward, edits mesh.Edits, change ...func(*mesh.VirtualHost)) *route.Plan {
	t.Helper()
	if forward.Clusters == nil {
		forward.Clusters = []mesh.WeightedCluster{{Name: "planned", Weight: 1}}
	}
	host := mesh.VirtualHost{
		Domains: []mesh.Domain{{Kind: mesh.DomainAny}},
		Routes:  []mesh.Route{{Name: "a-route", Match: mesh.RouteMatch{Path: "/"}, Forward: &forward, Edits: edits}},
	}
	for _, change := range change {
		change(&host)
	}
	r := &route.Request{Method: []byte("GET"), Path: []byte("/"), Authority: []byte("a"), Fields: &headFields{}}
	choice := route.Of(&mesh.Routes{Hosts: []mesh.VirtualHost{host}}).Find(r)
	outcome := choice.Outcome(r, false)
	if outcome.Plan == nil {
		t.Fatal("the route has no plan")
	}
	return outcome.Plan
}

// leases counts leases.
type leases struct {
	mu       sync.Mutex
	opened   int
	twice    int
	outcomes []Outcome
}

type lease struct {
	of    *leases
	ended bool
}

func (l *leases) open() Lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.opened++
	return &lease{of: l}
}

func (l *lease) End(o Outcome) {
	l.of.mu.Lock()
	defer l.of.mu.Unlock()
	if l.ended {
		l.of.twice++
	}
	l.ended = true
	l.of.outcomes = append(l.of.outcomes, o)
}

// check fails unless each lease has ended once, with these outcomes in their order; nil: with any.
func (l *leases) check(t testing.TB, want []Outcome) {
	t.Helper()
	within(t, "the leases end", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.outcomes) >= l.opened
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.twice > 0 || len(l.outcomes) != l.opened {
		t.Errorf("%d leases, %d ends, %d of them second ones", l.opened, len(l.outcomes), l.twice)
	}
	for i, got := range l.outcomes {
		if got.Duration < 0 {
			t.Errorf("outcome %d: duration %v", i, got.Duration)
		}
		if want == nil {
			continue
		}
		got.Duration = 0
		if i >= len(want) || got != want[i] {
			t.Errorf("outcome %d is %+v, want %+v", i, got, want)
		}
	}
	if want != nil && len(want) != len(l.outcomes) {
		t.Errorf("%d outcomes, want %d", len(l.outcomes), len(want))
	}
}

// retrying is a policy whose pauses are short.
func retrying(on mesh.RetryConditions, retries uint32) *mesh.RetryPolicy {
	return &mesh.RetryPolicy{On: on, Retries: retries, BackOff: time.Millisecond, MaxBackOff: time.Millisecond, HostChoices: 1}
}

// answered is the record of a request that upstream answered.
func answered(status int, sent uint64) recorded {
	return recorded{reason: flow.Completed, status: status, sent: sent}
}
