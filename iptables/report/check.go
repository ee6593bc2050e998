package report

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Difference is one way in which the namespace differs from the wanted state.
type Difference struct {
	Family  string          `json:"family"`
	Flavour ruleset.Flavour `json:"flavour,omitempty"`
	ruleset.Change
	// Means is the difference's effect on traffic.
	Means string `json:"means"`
}

// Findings are the result of a check.
type Findings struct {
	Equal bool `json:"equal"`
	// Installed is false if rules are wanted and no rule of ours exists.
	Installed   bool         `json:"installed"`
	Differences []Difference `json:"differences"`
	// Warnings name rules and chains of others that may have the effect of a difference.
	Warnings []string `json:"warnings"`
}

// Check compares the network namespace of the calling thread with the rules that init would install for a valid spec in
// that backend. Rules that init keeps for open connections are not differences, even after those connections have
// ended. Check changes nothing.
func Check(ctx context.Context, spec capture.Spec, backend iptables.Backend) (Findings, error) {
	plan, err := iptables.PlanCheck(ctx, spec, backend)
	if err == nil {
		err = plan.Unread
	}
	if err != nil {
		return Findings{}, err
	}
	found := Findings{Equal: plan.Unchanged(), Differences: []Difference{}, Warnings: append([]string{}, plan.Warnings...)}
	for _, step := range plan.Steps {
		for _, change := range step.Changes {
			found.Differences = append(found.Differences, Difference{step.Family.String(), step.Flavour, change, meaning(change)})
		}
	}
	for _, change := range plan.Routes {
		found.Differences = append(found.Differences, routeDifference(change))
	}
	if plan.Address != iptables.AddressKept {
		found.Differences = append(found.Differences, addressDifference(plan.Address))
	}
	installed := false
	for _, h := range plan.Live() {
		found.Warnings = append(found.Warnings, ahead(h)...)
		installed = installed || len(ruleset.Diff(ruleset.Ruleset{}, h.Rules)) > 0
	}
	found.Installed = installed || found.Equal
	foreign, err := plan.Foreign()
	if err != nil {
		return Findings{}, err
	}
	for _, c := range foreign {
		if warning := beside(c); warning != "" {
			found.Warnings = append(found.Warnings, warning)
		}
	}
	return found, nil
}

// beside warns of a chain of others that may decide about captured packets.
func beside(c ruleset.ForeignChain) string {
	switch {
	case c.Hook == ruleset.HookForward, !c.Decides(c.Families[0], true):
		return ""
	case c.Kind == "nat":
		return fmt.Sprintf("%s precedes our rules or has their priority, and may decide about packets first: %s", c, c.Effects())
	}
	return fmt.Sprintf("%s may decide about captured packets: %s", c, c.Effects())
}

// String returns one line for each difference and warning. One line replaces the differences if no rule of ours is
// installed.
func (f Findings) String() string {
	var text strings.Builder
	if !f.Installed {
		text.WriteString("no rules of pillion are installed: nothing is captured\n")
	} else {
		for _, d := range f.Differences {
			text.WriteString(d.String() + "\n")
		}
	}
	for _, warning := range f.Warnings {
		text.WriteString("warning: " + warning + "\n")
	}
	if f.Equal {
		text.WriteString("the rules match\n")
	}
	return text.String()
}

func (d Difference) String() string {
	what := []string{d.Family, string(d.Flavour), string(d.Table), d.Chain}
	what = slices.DeleteFunc(what, func(word string) bool { return word == "" })
	line := fmt.Sprintf("%s: %s: ", d.Kind, strings.Join(what, " "))
	if d.ID != "" {
		line += d.ID + ", "
	}
	body := func(rule string) string {
		return ownComment().ReplaceAllString(strings.TrimPrefix(rule, "-A "+d.Chain+" "), "")
	}
	switch {
	case d.Rule == "" && d.Found == "":
	case d.Kind == ruleset.Tampered, d.Kind == ruleset.Reordered:
		line += fmt.Sprintf("found %s, ", body(d.Found))
	default:
		line += body(d.Rule+d.Found) + ", "
	}
	return strings.TrimSuffix(strings.TrimSuffix(line, ", "), ": ") + ": " + d.Means
}

// ownComment matches the comment with the ID of a rule of ours. It is compiled on first use: init does not need it.
var ownComment = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`-m comment --comment "` + ruleset.CommentPrefix + `[^"]*" `)
})

// meaning is the effect of a difference on traffic.
func meaning(c ruleset.Change) string {
	wanted, found := effectOf(c, c.Rule), effectOf(c, c.Found)
	switch {
	case c.Rule == "" && c.Found == "" && c.Kind == ruleset.Missing:
		return "packets for this chain are no longer matched"
	case c.Rule == "" && c.Found == "":
		return "the chain is not needed and has no effect by itself"
	case c.Kind == ruleset.Missing:
		return wanted.lost
	case c.Kind == ruleset.Extra:
		return found.does
	case c.Kind == ruleset.Duplicate:
		return "the rule exists more than once, and the first one decides"
	case c.Kind == ruleset.Reordered && !ownComment().MatchString(c.Found):
		return "it is not ours and precedes our jump: DNS queries may be lost"
	case c.Kind == ruleset.Tampered:
		return fmt.Sprintf("%s; instead, %s", wanted.lost, found.does)
	}
	return "it is in the place of another rule, and the first match decides: " + found.does
}

// effect is what a rule does to traffic, and what is lost without it.
type effect struct{ does, lost string }

// lostJump is what is lost without the jump from a built-in chain.
var lostJump = map[ruleset.Place]string{
	{Table: ruleset.NAT, Chain: ruleset.ChainBuiltOutput}:    "no outbound connection is captured",
	{Table: ruleset.NAT, Chain: ruleset.ChainPrerouting}:     "no inbound connection is captured",
	{Table: ruleset.Mangle, Chain: ruleset.ChainPrerouting}:  "incoming packets are neither passed to the agent nor dropped as INVALID",
	{Table: ruleset.Mangle, Chain: ruleset.ChainBuiltOutput}: "outgoing packets lack the marks of TPROXY, and answers bypass the agent",
	{Table: ruleset.Raw, Chain: ruleset.ChainBuiltOutput}:    "captured and other DNS queries share a conntrack zone",
}

// captureEffect is the effect of jumps and targets that lead to the agent.
func captureEffect(direction string) effect {
	return effect{"matching packets are captured " + direction, "matching packets are not captured " + direction}
}

func arrival(port uint16) effect {
	return effect{fmt.Sprintf("matching packets go to port %d", port), fmt.Sprintf("matching packets do not reach port %d", port)}
}

func effectOf(c ruleset.Change, line string) effect {
	rule, known := ruleset.Interpret(line)
	if !known {
		return effect{"its effect is not known", ""}
	}
	switch target := rule.Target.(type) {
	case ruleset.Return, ruleset.Accept:
		return effect{"matching packets are not captured", "an exception is missing, and matching packets may be captured"}
	case ruleset.Drop:
		return effect{"matching packets are dropped", "matching packets are no longer dropped"}
	case ruleset.Redirect:
		return arrival(uint16(target))
	case ruleset.ToSocket:
		return arrival(target.To.Port())
	case ruleset.Jump:
		if lost := lostJump[ruleset.Place{Table: c.Table, Chain: c.Chain}]; lost != "" {
			return effect{fmt.Sprintf("matching packets go to chain %s", target), lost}
		}
		switch string(target) {
		case ruleset.ChainRedirect:
			return captureEffect("outbound")
		case ruleset.ChainInboundRedirect, ruleset.ChainTPROXY:
			return captureEffect("inbound")
		}
		return effect{fmt.Sprintf("matching packets go to chain %s", target), fmt.Sprintf("matching packets do not go to chain %s", target)}
	case ruleset.Zone:
		return effect{"matching packets get a different conntrack zone", "matching packets are not in their conntrack zone"}
	}
	return effect{"matching packets get a different mark", "matching packets do not get their mark"}
}

func routeDifference(c kernel.RouteChange) Difference {
	d := Difference{Family: c.Route.Family.String(), Change: ruleset.Change{Kind: ruleset.Missing, Rule: c.Route.String()}}
	d.Means = "packets with TPROXY's mark are not delivered locally: captured inbound connections hang"
	if c.Action == kernel.Remove {
		d.Kind, d.Rule, d.Found, d.Means = ruleset.Extra, "", c.Route.String(), "packets with this mark are delivered locally, but TPROXY is not in use"
	}
	return d
}

func addressDifference(a iptables.AddressChange) Difference {
	address := fmt.Sprintf("%s on %s", capture.InboundSource6, ruleset.Loopback)
	d := Difference{Family: ruleset.IPv6.String(), Change: ruleset.Change{Kind: ruleset.Missing, Rule: address}}
	d.Means = "the agent cannot dial the workload: captured inbound connections are reset"
	if a == iptables.AddressRemoved {
		d.Kind, d.Rule, d.Found, d.Means = ruleset.Extra, "", address, "left over and harmless"
	}
	return d
}

// ahead warns of rules of others that precede our jump and may decide about a packet.
func ahead(h ruleset.Held) []string {
	var warnings []string
	for _, table := range h.Rules.Tables {
		for _, c := range table.Chains {
			jump := slices.IndexFunc(c.Rules, ruleset.Rule.JumpsToOwn)
			if c.Own() || jump < 0 {
				continue
			}
			for _, r := range c.Rules[:jump] {
				if fate := fate(r, c.Name); fate != "" {
					warnings = append(warnings, fmt.Sprintf("%s %s %s %s: %s precedes our jump: %s",
						h.Rules.Family, h.Flavour, table.Name, c.Name, r.Body(c.Name), fate))
				}
			}
		}
	}
	return warnings
}

// fate is what happens to a matching packet that our rules may then not see.
func fate(r ruleset.Rule, chain string) string {
	switch target := r.TargetName(); {
	case r.Continues(chain):
		return ""
	case target == "DROP", target == "REJECT":
		return "matching packets are dropped before our rules see them"
	case slices.Contains(ends, target):
		return "our rules do not see matching packets"
	default:
		return "matching packets go to " + target + ", and may not reach our rules"
	}
}

// ends are targets of iptables that decide about a packet.
var ends = []string{"ACCEPT", "RETURN", "DNAT", "SNAT", "MASQUERADE", "NETMAP", "REDIRECT", "TPROXY", "QUEUE", "NFQUEUE"}
