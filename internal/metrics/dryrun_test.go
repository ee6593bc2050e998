package metrics

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Policies that select requests for external authorization are not dry runs: they take no place of a port.
func TestOnlyDryRunsCountByPort(t *testing.T) {
	m := New(pod, Options{})
	in := connection(flow.NewTable(m), flow.Inbound, flow.HTTP11)
	closed := func(port uint16, prefix string) {
		r := request(in, "reviews", 200)
		r.OriginalDestination = netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port)
		r.HTTP.DryRun = &flow.DryRun{Prefix: prefix, Denied: true}
		m.Closed(r)
	}
	for port := range uint16(2 * maxDryRunPorts) {
		closed(1+port, "istio_ext_authz_")
	}
	if all := text(t, m); strings.Contains(all, "_rbac") {
		t.Error("an external authorization counts as a dry run")
	}
	for port := range uint16(2 * maxDryRunPorts) {
		closed(9000+port, "istio_dry_run_deny_")
	}
	closed(9000, "istio_dry_run_deny_")
	all := text(t, m)
	if n := strings.Count(all, "# TYPE envoy_http_inbound_0_0_0_0_"); n != maxDryRunPorts {
		t.Errorf("%d ports have counts, want %d", n, maxDryRunPorts)
	}
	if want := `envoy_http_inbound_0_0_0_0_9000_rbac{authz_dry_run_action="deny",authz_dry_run_result="denied"} 2`; !strings.Contains(all, want) {
		t.Errorf("no %s", want)
	}
}
