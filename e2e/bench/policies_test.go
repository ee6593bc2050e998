package bench

import (
	"fmt"
	"os"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// namePermissive is pillion with a control plane that has no policies.
const namePermissive = "no policies"

// policies is the number of policies. Each has 10 rules, and the load's requests are decided by the last one of all.
const policies = 20

// measurePolicies compares the agent with policies for requests inside mutual TLS with one without policies.
func measurePolicies(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: fmt.Sprintf("CPU per HTTP/1.1 request inside inbound TLS, %d policies of 10 rules", policies), unit: "µs", promises: []promise{{1.05, namePermissive}}}
	p := newMeshPod(t, k, k.controlPrograms(t))
	turns := turns{"policies", []contender{p.judged(namePillion, policies), p.judged(namePermissive, 0)}, s.connectionRounds}
	turns.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, a *proxy) {
		w.certificates = p.directory
		cpu := cpuOf(t, a, w.startLoad(t, "tls-http1", s.requests, 32))
		r.add(c.name, microseconds(cpu)/float64(s.requests))
	})
	return []*row{r}
}

// judged is the agent with a number of policies for requests inside mutual TLS.
func (p *meshPod) judged(name string, policies int) contender {
	return contender{
		name: name, root: true,
		command: p.carrying(),
		before: func(t testing.TB, ns *nettest.Namespace) {
			cmd := ns.Command(0, 0, p.programs.istiod, "-directory", p.directory, "-mtls", "STRICT", "-policies", fmt.Sprint(policies))
			cmd.Stderr = os.Stderr
			ns.Start(t, cmd)
		},
	}
}
