package iptables

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Summary returns the plan in one line, or "" for a cleanup that finds nothing to remove.
func (p *Plan) Summary() string {
	if p.Unchanged() {
		if p.cleanup {
			return ""
		}
		return "nothing to change: the rules are installed"
	}
	var parts []string
	for _, step := range p.Steps {
		what := "rules installed in"
		if len(step.want.Tables) == 0 {
			what = "rules removed from"
		}
		parts = append(parts, fmt.Sprintf("%s %s %s (%s)", step.Family, what, step.Flavour, count(len(step.Changes))))
	}
	if len(p.Routes) > 0 {
		parts = append(parts, fmt.Sprintf("policy routing (%s)", count(len(p.Routes))))
	}
	switch p.Address {
	case AddressAdded:
		parts = append(parts, fmt.Sprintf("%s added to %s", capture.InboundSource6, ruleset.Loopback))
	case AddressRemoved:
		parts = append(parts, fmt.Sprintf("%s removed from %s", capture.InboundSource6, ruleset.Loopback))
	}
	return strings.Join(parts, ", ")
}

func count(changes int) string {
	if changes == 1 {
		return "1 change"
	}
	return fmt.Sprintf("%d changes", changes)
}

// Script returns the plan as a shell script: the commands and input for ip, iptables-restore and nft, in the order of
// Commit.
func (p *Plan) Script() string {
	var text strings.Builder
	if p.Address == AddressAdded {
		fmt.Fprintf(&text, "ip address add %s/128 dev %s nodad preferred_lft 0\n", capture.InboundSource6, ruleset.Loopback)
	}
	p.routeScript(&text, kernel.Add, "add")
	for i, step := range p.Steps {
		input := p.Input(i)
		if step.Flavour == ruleset.Native {
			if input != "" {
				fmt.Fprintf(&text, "nft -f - <<END\n%sEND\n", input)
			}
			continue
		}
		name := map[ruleset.Family]string{ruleset.IPv4: "iptables", ruleset.IPv6: "ip6tables"}[step.Family]
		fmt.Fprintf(&text, "%s-%s-restore --noflush <<END\n%sEND\n", name, step.Flavour, input)
	}
	p.routeScript(&text, kernel.Remove, "del")
	if p.Address == AddressRemoved {
		fmt.Fprintf(&text, "ip address del %s/128 dev %s\n", capture.InboundSource6, ruleset.Loopback)
	}
	return text.String()
}

func (p *Plan) routeScript(text *strings.Builder, action kernel.RouteAction, verb string) {
	for _, c := range p.Routes {
		object := "rule"
		if c.Route.Mark == 0 {
			object = "route"
		}
		if c.Action == action {
			fmt.Fprintf(text, "ip -%d %s %s %s protocol %d\n", c.Route.Family, object, verb, c.Route, kernel.RouteProtocol)
		}
	}
}

// String returns the changes for people, each rule with its reason, or "" for a cleanup that finds nothing to remove.
func (p *Plan) String() string {
	var text strings.Builder
	if p.Unread != nil {
		fmt.Fprintf(&text, "cannot read the current state (%v); assuming an empty namespace:\n", p.Unread)
	}
	if p.Unchanged() {
		if summary := p.Summary(); summary != "" {
			text.WriteString(summary + "\n")
		}
		return text.String()
	}
	if p.Address != AddressKept {
		fmt.Fprintf(&text, "%s %s/128 on %s\n    source address of the agent's IPv6 connections to the workload\n", p.Address, capture.InboundSource6, ruleset.Loopback)
	}
	for _, change := range p.Routes {
		fmt.Fprintf(&text, "%s %s: %s\n    packets with TPROXY's mark are delivered locally, whatever their destination\n", change.Action, change.Route.Family, change.Route)
	}
	for _, step := range p.Steps {
		for _, table := range ruleset.TableNames {
			changes := slices.DeleteFunc(slices.Clone(step.Changes), func(c ruleset.Change) bool { return c.Table != table })
			if len(changes) == 0 {
				continue
			}
			fmt.Fprintf(&text, "%s, %s, %s table: %s\n", step.Family, step.Flavour, table, count(len(changes)))
			for _, change := range changes {
				describeChange(change, &text)
			}
		}
	}
	return text.String()
}

func describeChange(c ruleset.Change, text *strings.Builder) {
	switch {
	case c.Rule == "" && c.Found == "":
		fmt.Fprintf(text, "  %s chain %s\n", c.Kind, c.Chain)
	case c.Rule == "":
		fmt.Fprintf(text, "  %s: - %s\n", c.Kind, c.Found)
	case c.Found == "":
		fmt.Fprintf(text, "  %s: + %s\n", c.Kind, c.Rule)
	default:
		fmt.Fprintf(text, "  %s: - %s\n    wanted: + %s\n", c.Kind, c.Found, c.Rule)
	}
	if c.Why != "" {
		fmt.Fprintf(text, "      %s\n", c.Why)
	}
}

// MarshalJSON returns the plan for programs.
func (p *Plan) MarshalJSON() ([]byte, error) {
	type step struct {
		Family  string           `json:"family"`
		Flavour ruleset.Flavour  `json:"flavour"`
		Changes []ruleset.Change `json:"changes"`
		Input   string           `json:"input"`
	}
	type route struct {
		Action kernel.RouteAction `json:"action"`
		Family string             `json:"family"`
		Mark   uint32             `json:"mark,omitempty"`
		Table  uint32             `json:"table"`
	}
	report := struct {
		Changed  bool          `json:"changed"`
		Address  AddressChange `json:"address,omitempty"`
		Routes   []route       `json:"routes,omitempty"`
		Steps    []step        `json:"steps"`
		Warnings []string      `json:"warnings,omitempty"`
		Unread   string        `json:"unread,omitempty"`
	}{Changed: !p.Unchanged(), Address: p.Address, Steps: []step{}, Warnings: p.Warnings}
	for i, s := range p.Steps {
		report.Steps = append(report.Steps, step{Family: s.Family.String(), Flavour: s.Flavour, Changes: s.Changes, Input: p.Input(i)})
	}
	for _, c := range p.Routes {
		report.Routes = append(report.Routes, route{Action: c.Action, Family: c.Route.Family.String(), Mark: c.Route.Mark, Table: c.Route.Table})
	}
	if p.Unread != nil {
		report.Unread = p.Unread.Error()
	}
	return json.Marshal(report)
}
