package serve

import (
	"bytes"
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

// Fault carries out the fault that is drawn for a connection: it is delayed or reset before anything is dialled. Its host is the
// server name of TLS, Host of a first request of HTTP/1, or the original destination. Requests are delayed and aborted one by
// one instead; see faulty.
func (c *Conn) Fault() bool {
	if len(c.role.faults) == 0 || c.Silent() {
		return true
	}
	host := c.Record.OriginalDestination.String()
	if c.role.decryption != nil && c.Record.Security != nil {
		host = cmp.Or(c.Record.TLS.ServerName, host)
	}
	switch c.protocol {
	case sniff.TLS:
		host = cmp.Or(c.sniffer.Hello.ServerName, host)
	case sniff.HTTP1:
		host = cmp.Or(firstHost(c.sniffer.Read.Bytes()), host)
	}
	f := c.role.faults.Draw(host)
	switch {
	case f.Reset:
		return c.abandon(flow.FaultInjected, nil)
	case f.Delay > 0 && !c.HTTP():
		return c.pause(f.Delay)
	}
	return true
}

// Silent reports whether the protocol is undecided, because downstream has sent nothing yet. Fault then does nothing, and is
// called again after WatchBoth.
func (c *Conn) Silent() bool { return c.protocol == sniff.Undecided }

// firstHost returns Host of the request in the first bytes of a connection, as far as they have arrived.
func firstHost(b []byte) string {
	head, _, _ := bytes.Cut(b, []byte("\r\n\r\n"))
	for line := range bytes.Lines(head) {
		if name, value, found := bytes.Cut(line, []byte(":")); found && bytes.EqualFold(name, []byte("host")) {
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}

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
	next    httpforward.Router // nil: allowed
	allowed httpforward.Decision
}

// withFaults puts faults before a connection's router.
func (c *Conn) withFaults(next httpforward.Router, to *upstream.Target) httpforward.Router {
	return &faulty{
		faults: c.role.faults, next: next,
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
	f := r.faults.Draw(string(request.Authority))
	decision.Delay = max(decision.Delay, f.Delay)
	if f.Abort != 0 {
		decision.Reply = &route.Reply{
			Status: f.Abort, Body: "pillion: fault\n", Flags: envoy.FlagFaultInjected, Details: envoy.DetailsFaultAbort, Reason: flow.Completed,
		}
	}
	return decision
}
