package serve

import (
	"cmp"
	"errors"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/fault"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Fault carries out the fault that is drawn for a connection without requests: it is delayed or reset before anything is
// dialled, or its rate is limited. Its host is the server name of TLS; its address is the original destination. Requests get their faults one by one;
// see faulty.
func (c *Conn) Fault() bool {
	if len(c.role.faults) == 0 || c.Silent() || c.HTTP() {
		return true
	}
	var host string
	if c.role.decryption != nil && c.Record.Security != nil {
		host = c.Record.TLS().ServerName
	}
	if c.protocol == sniff.TLS {
		host = cmp.Or(c.sniffer.Hello.ServerName, host)
	}
	f := c.role.faults.Draw(host, c.Record.OriginalDestination.String())
	switch {
	case f.Reset:
		return c.abandon(flow.FaultInjected, nil)
	case f.Delay > 0:
		c.rate = f.Rate
		return c.pause(f.Delay)
	}
	c.rate = f.Rate
	return true
}

// Silent reports whether the protocol is undecided, because downstream has sent nothing yet. Fault then does nothing, and is
// called again after WatchBoth.
func (c *Conn) Silent() bool { return c.protocol == sniff.Undecided }

// pause waits while downstream lives.
func (c *Conn) pause(d time.Duration) bool {
	for until := time.Now().Add(d); ; {
		err := c.w.Wait(until, c.Down, nil)
		if err == nil {
			err = c.Down.Failed()
		}
		switch {
		case errors.Is(err, tcp.ErrDeadline):
			return true
		case err != nil:
			return c.abandon(sniff.Reason(err), err)
		}
	}
}

// faulty is the Router of HTTP connections with faults.
type faulty struct {
	faults  fault.Set
	address string             // the original destination
	next    httpforward.Router // nil: allowed
	allowed httpforward.Decision
}

// withFaults puts faults before a connection's router.
func (c *Conn) withFaults(next httpforward.Router, to *upstream.Target) httpforward.Router {
	return &faulty{
		faults: c.role.faults, address: c.Record.OriginalDestination.String(), next: next,
		allowed: httpforward.Decision{Target: *to, Cluster: c.Record.Cluster, Route: c.Record.Route},
	}
}

// Retired implements httpforward.Retirement.
func (r *faulty) Retired() bool {
	next, ok := r.next.(httpforward.Retirement)
	return ok && next.Retired()
}

// OnlyHTTP implements httpforward.OnlyHTTP.
func (r *faulty) OnlyHTTP() bool {
	next, ok := r.next.(httpforward.OnlyHTTP)
	return ok && next.OnlyHTTP()
}

// Route implements httpforward.Router. A retry has no further fault.
func (r *faulty) Route(request *httpforward.Request) httpforward.Decision {
	decision := r.allowed
	if r.next != nil {
		decision = r.next.Route(request)
	}
	if request.Attempt > 0 || decision.Reply != nil {
		return decision
	}
	f := r.faults.Draw(string(request.Authority), r.address)
	decision.Delay = max(decision.Delay, f.Delay)
	decision.RequestRate, decision.ResponseRate = f.Rate, cmp.Or(f.Rate, decision.ResponseRate)
	switch {
	case f.Reset:
		decision.Reply = &route.Reply{Reset: true, Reason: flow.FaultInjected}
	case f.Abort != 0:
		decision.Reply = &route.Reply{
			Status: f.Abort, Body: "pillion: fault\n", Flags: envoy.FlagFaultInjected, Details: envoy.DetailsFaultAbort, Reason: flow.Completed,
		}
	}
	return decision
}
