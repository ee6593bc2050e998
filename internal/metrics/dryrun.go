package metrics

import (
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// dryRuns counts verdicts of policies that are not enforced, by their action and result.
type dryRuns [len(dryRunActions)][len(dryRunResults)]atomic.Uint64

var (
	dryRunActions = [...]string{"allow", "deny"}
	dryRunResults = [...]string{"allowed", "denied"}
)

// maxDryRunPorts bounds the families with the names of Envoy, which have the port.
const maxDryRunPorts = 32

// count counts the verdicts of a record. It reports whether there are any: those that select requests for external
// authorization do not count.
func (c *dryRuns) count(r *flow.Record) (found bool) {
	for run := r.HTTP.DryRun; run != nil; run = run.Next {
		action, ok := strings.CutPrefix(run.Prefix, flow.DryRunPrefix)
		if i := slices.Index(dryRunActions[:], strings.TrimSuffix(action, "_")); ok && i >= 0 {
			result := 0
			if run.Denied {
				result = 1
			}
			c[i][result].Add(1)
			found = true
		}
	}
	return found
}

// dryRun counts the verdicts of a record, and those about inbound requests by their port as well.
func (d *direction) dryRun(r *flow.Record) {
	if !d.dryRuns.count(r) || !r.IsRequest() || r.Direction != flow.Inbound {
		return
	}
	if of := d.dryRunsOf(r.OriginalDestination.Port()); of != nil {
		of.count(r)
	}
}

// dryRunsOf returns the counts of a port; nil: there are too many ports.
func (d *direction) dryRunsOf(port uint16) *dryRuns {
	d.mu.RLock()
	of, full := d.dryRunPorts[port], len(d.dryRunPorts) >= maxDryRunPorts
	d.mu.RUnlock()
	if of != nil || full {
		return of
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if of = d.dryRunPorts[port]; of == nil && len(d.dryRunPorts) < maxDryRunPorts {
		if d.dryRunPorts == nil {
			d.dryRunPorts = make(map[uint16]*dryRuns)
		}
		of = new(dryRuns)
		d.dryRunPorts[port] = of
	}
	return of
}

// dryRuns adds the counts, also by the names of Envoy's counters under Istio.
func (m *Metrics) dryRuns(f *families) {
	all := f.counter("pillion_dry_runs_total", "Verdicts of AuthorizationPolicies with istio.io/dry-run, by action and result.")
	for i := range m.directions {
		d := &m.directions[i]
		d.dryRuns.each(func(action, result string, n uint64) {
			all.counts(n, label("direction", flow.Direction(i).String()), label("action", action), label("result", result))
		})
		d.mu.RLock()
		for port, of := range d.dryRunPorts {
			family := f.counter("envoy_http_inbound_0_0_0_0_"+strconv.Itoa(int(port))+"_rbac", "Verdicts of AuthorizationPolicies with istio.io/dry-run.")
			of.each(func(action, result string, n uint64) {
				family.counts(n, label("authz_dry_run_action", action), label("authz_dry_run_result", result))
			})
		}
		d.mu.RUnlock()
	}
}

func (c *dryRuns) each(do func(action, result string, n uint64)) {
	for i, action := range dryRunActions {
		for k, result := range dryRunResults {
			do(action, result, c[i][k].Load())
		}
	}
}
