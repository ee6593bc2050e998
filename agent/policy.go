package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/pillion-proxy/pillion/internal/egress"
	"github.com/pillion-proxy/pillion/internal/serve"
)

// Policy is which destinations the workload may reach. The zero Policy allows all of them.
type Policy struct {
	DenyUnlisted bool // deny destinations that no rule is for
	Allow, Deny  []egress.Rule
	File         string // with further rules; it is read again when it changes. May be empty
}

// allowsAll reports whether every destination is allowed.
func (p *Policy) allowsAll() bool {
	return !p.DenyUnlisted && len(p.Allow)+len(p.Deny) == 0 && p.File == ""
}

func (p *Policy) validate() error {
	if len(p.Allow) > 0 && !p.DenyUnlisted && p.File == "" {
		return &FieldError{Field: "Policy.Allow", Err: fmt.Errorf("has no effect while other destinations are allowed; deny unlisted ones")}
	}
	return nil
}

// rules adds the rules of the file to those of the configuration.
func (p *Policy) rules() (egress.Rules, error) {
	rules := egress.Rules{Allow: p.Allow, Deny: p.Deny, DenyOthers: p.DenyUnlisted}
	if p.File == "" {
		return rules, nil
	}
	file, err := os.Open(p.File)
	if err != nil {
		return rules, err
	}
	defer file.Close()
	more, err := egress.Parse(file)
	if err != nil {
		return rules, fmt.Errorf("%s: %w", p.File, err)
	}
	rules.Allow = append(rules.Allow[:len(rules.Allow):len(rules.Allow)], more.Allow...)
	rules.Deny = append(rules.Deny[:len(rules.Deny):len(rules.Deny)], more.Deny...)
	rules.DenyOthers = rules.DenyOthers || more.DenyOthers
	return rules, nil
}

// addPolicy makes the policy, if there is one.
func (a *Agent) addPolicy() error {
	if a.config.Policy.allowsAll() {
		return nil
	}
	seen, _ := os.Stat(a.config.Policy.File) // before it is read, so that no later change is missed
	rules, err := a.config.Policy.rules()
	if err != nil {
		return &FieldError{Field: "Policy.File", Err: err}
	}
	a.policy = egress.New(rules, names{a})
	if a.config.Policy.File == "" {
		return nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	a.stopPolicy = func() {
		cancel()
		<-ended
	}
	go a.watchPolicy(ctx, seen, ended)
	return nil
}

// egressPolicy returns the policy as roles take it; nil without a policy.
func (a *Agent) egressPolicy() serve.Egress {
	if a.policy == nil {
		return nil
	}
	return a.policy
}

// policyInterval is the time between looks at the file of the policy. A volume of a ConfigMap is replaced by a rename of a
// directory above it; notifications about the file do not report that.
const policyInterval = time.Second

// watchPolicy applies the file of the policy when it has changed. Rules that cannot be read leave the ones in force.
func (a *Agent) watchPolicy(ctx context.Context, seen os.FileInfo, ended chan<- struct{}) {
	defer close(ended)
	ticker := time.NewTicker(policyInterval)
	defer ticker.Stop()
	missing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now, err := os.Stat(a.config.Policy.File)
		if err != nil && !missing {
			a.log.Error("cannot read the outbound policy, keeping the rules in force", "error", err)
		}
		if missing = err != nil; missing || unchanged(seen, now) {
			continue
		}
		seen = now
		rules, err := a.config.Policy.rules()
		if err != nil {
			a.log.Error("new outbound policy rejected, keeping the rules in force", "error", err)
			continue
		}
		a.policy.Apply(rules)
		a.log.Info("outbound policy applied", "allow", len(rules.Allow), "deny", len(rules.Deny), "deny_unlisted", rules.DenyOthers)
	}
}

func unchanged(seen, now os.FileInfo) bool {
	return seen != nil && os.SameFile(seen, now) && seen.ModTime().Equal(now.ModTime()) && seen.Size() == now.Size()
}

// names looks names up by the agent's resolver, so that a name has the same addresses for the policy and for the workload,
// and without it by the servers of the pod. The rules do not capture the agent's queries.
type names struct{ *Agent }

// LookupNetIP implements egress.Resolver.
func (n names) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	if n.resolver != nil {
		return n.resolver.LookupNetIP(ctx, network, host)
	}
	return net.DefaultResolver.LookupNetIP(ctx, network, host)
}
