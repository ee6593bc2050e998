package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// RouteTo returns the interface that leads to address and the source address that the kernel selects.
func RouteTo(address, src netip.Addr, mark uint32) (link string, own netip.Addr, err error) {
	options := &netlink.RouteGetOptions{Mark: mark}
	if src.IsValid() {
		options.SrcAddr = src.AsSlice()
	}
	routes, err := netlink.RouteGetWithOptions(address.AsSlice(), options)
	if err == nil && len(routes) == 0 {
		err = unix.ENETUNREACH
	}
	if err != nil {
		return "", own, fmt.Errorf("looking for the route to %s: %w; to explain without a route, give the interface and the addresses", address, err)
	}
	own, _ = netip.AddrFromSlice(routes[0].Src)
	if routes[0].Type == unix.RTN_LOCAL {
		return ruleset.Loopback, own.Unmap(), nil
	}
	found, err := net.InterfaceByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", own, fmt.Errorf("looking for the interface to %s: %w", address, err)
	}
	return found.Name, own.Unmap(), nil
}

// Route is a part of the policy routing for TPROXY. A rule sends packets with the mark to a table of its own. The only
// route in that table delivers them locally, whatever their destination.
type Route struct {
	Family ruleset.Family
	// Mark selects the table. It is zero for the route in the table.
	Mark  uint32
	Table uint32
}

// String returns the arguments of ip(8) after "rule add" or "route add".
func (r Route) String() string {
	if r.Mark != 0 {
		return fmt.Sprintf("fwmark %#x lookup %d", r.Mark, r.Table)
	}
	return fmt.Sprintf("local default dev %s table %d", ruleset.Loopback, r.Table)
}

// RouteAction is what happens to a Route.
type RouteAction string

// The actions.
const (
	Add    RouteAction = "add"
	Remove RouteAction = "remove"
)

// RouteChange is one change of policy routing.
type RouteChange struct {
	Action RouteAction
	Route  Route
	found  Installed // what is removed
}

// Installed is a Route as it was found. A route that is not ours serves as well as ours, and stays.
type Installed struct {
	Route
	Ours     bool
	Priority int
}

// RouteProtocol identifies our rules and routes (rtm_protocol), whatever arguments they were made with. Neither
// rtnetlink.h nor rt_protos of iproute2 uses this number.
const RouteProtocol = 80

// RoutesFor returns the routes that spec needs, in the order in which they are added: the route before the rule that
// leads to it.
func RoutesFor(spec capture.Spec, families []ruleset.Family) []Route {
	if !spec.CapturesInboundByTPROXY() {
		return nil
	}
	var routes []Route
	for _, family := range families {
		routes = append(routes, Route{Family: family, Table: spec.TPROXYTable}, Route{family, spec.TPROXYMark, spec.TPROXYTable})
	}
	return routes
}

// RoutesByMark returns the installed rules for the mark and the routes that they lead to.
func RoutesByMark(mark uint32, families []ruleset.Family, have []Installed) []Route {
	var routes []Route
	for _, h := range have {
		if mark != 0 && h.Mark == mark && slices.Contains(families, h.Family) {
			routes = append(routes, Route{Family: h.Family, Table: h.Table}, h.Route)
		}
	}
	return routes
}

// DiffRoutes returns the changes that turn have into want. Duplicates of ours are removed.
func DiffRoutes(want []Route, have []Installed) []RouteChange {
	var changes []RouteChange
	for _, r := range want {
		if !slices.ContainsFunc(have, func(h Installed) bool { return h.Route == r }) {
			changes = append(changes, RouteChange{Action: Add, Route: r})
		}
	}
	for i, h := range have {
		again := slices.ContainsFunc(have[:i], func(earlier Installed) bool { return earlier.Route == h.Route })
		if h.Ours && (again || !slices.Contains(want, h.Route)) {
			changes = append(changes, RouteChange{Action: Remove, Route: h.Route, found: h})
		}
	}
	return changes
}

// ReadRoutes lists the rules that have a mark, and the local default routes. A rule comes before the route that it
// leads to. It needs no capability.
func ReadRoutes() ([]Installed, error) {
	var found []Installed
	for _, family := range ruleset.Families {
		rules, err := Whole(func() ([]netlink.Rule, error) { return netlink.RuleList(familyNumber(family)) })
		if err != nil && !noRouting(err) {
			return nil, fmt.Errorf("listing %s routing rules: %w", family, err)
		}
		for _, r := range rules {
			plain := r.Src == nil && r.Dst == nil && r.IifName == "" && r.OifName == "" && !r.Invert && r.IPProto == 0 && r.UIDRange == nil
			whole := r.Mask == nil || *r.Mask == 1<<32-1
			if r.Mark != 0 && plain && whole {
				found = append(found, Installed{Route{family, r.Mark, uint32(r.Table)}, r.Protocol == RouteProtocol, r.Priority})
			}
		}
		all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Type: unix.RTN_LOCAL, LinkIndex: loopbackIndex}
		routes, err := Whole(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(familyNumber(family), all, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE|netlink.RT_FILTER_OIF)
		})
		if err != nil && !noRouting(err) {
			return nil, fmt.Errorf("listing %s routes: %w", family, err)
		}
		for _, r := range routes {
			if everywhere := r.Dst == nil || maskBits(r.Dst) == 0; everywhere && r.Type == unix.RTN_LOCAL && r.LinkIndex == loopbackIndex {
				found = append(found, Installed{Route{Family: family, Table: uint32(r.Table)}, r.Protocol == RouteProtocol, r.Priority})
			}
		}
	}
	return found, nil
}

func maskBits(network *net.IPNet) int {
	ones, _ := network.Mask.Size()
	return ones
}

// noRouting reports whether the kernel lacks the family or policy routing.
func noRouting(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

func familyNumber(f ruleset.Family) int {
	if f == ruleset.IPv6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// Apply carries the change out.
func (c RouteChange) Apply() error {
	if c.Action == Remove {
		return c.found.remove()
	}
	if c.Route.Mark != 0 {
		if err := netlink.RuleAdd(c.Route.rule()); err != nil {
			return fmt.Errorf("adding %s rule %s: %w", c.Route.Family, c.Route, c.Route.explain(err))
		}
		return nil
	}
	if err := netlink.RouteAdd(c.Route.route()); err != nil {
		return fmt.Errorf("adding %s route %s: %w", c.Route.Family, c.Route, c.Route.explain(err))
	}
	return nil
}

// explain adds the remedy to an error of netlink, and the field of the Spec that has to change.
func (r Route) explain(err error) error {
	switch {
	case errors.Is(err, unix.EEXIST):
		return &capture.FieldError{Field: "TPROXYTable", Value: fmt.Sprint(r.Table),
			Err: fmt.Errorf("%w: another program uses this routing table; use another one", err)}
	case noRouting(err):
		return &capture.FieldError{Field: "Mode", Value: string(capture.TPROXY),
			Err: fmt.Errorf("%w: the kernel lacks policy routing; use %s", err, capture.Redirect)}
	}
	return err
}

// Undo reverts the change, given what is installed now.
func (c RouteChange) Undo(now []Installed) error {
	at := slices.IndexFunc(now, func(h Installed) bool { return h.Ours && h.Route == c.Route })
	switch {
	case c.Action == Add && at >= 0:
		return now[at].remove()
	case c.Action == Remove && at < 0:
		return RouteChange{Action: Add, Route: c.Route}.Apply()
	}
	return nil
}

// RemoveRoute removes our copy of the route, if there is one.
func RemoveRoute(r Route) error {
	now, err := ReadRoutes()
	return cmp.Or(err, RouteChange{Action: Add, Route: r}.Undo(now))
}

func (i Installed) remove() error {
	var err error
	if i.Mark != 0 {
		rule := i.rule()
		rule.Priority = i.Priority
		err = netlink.RuleDel(rule)
	} else {
		err = netlink.RouteDel(i.route())
	}
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("removing %s %s: %w", i.Family, i.Route, err)
	}
	return nil
}

func (r Route) rule() *netlink.Rule {
	rule := netlink.NewRule()
	rule.Family, rule.Mark, rule.Table, rule.Protocol = familyNumber(r.Family), r.Mark, int(r.Table), RouteProtocol
	return rule
}

func (r Route) route() *netlink.Route {
	everywhere := ruleset.AddressesOf(r.Family).Anywhere
	return &netlink.Route{
		LinkIndex: loopbackIndex, Table: int(r.Table), Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Protocol: RouteProtocol,
		Dst: &net.IPNet{IP: everywhere.AsSlice(), Mask: net.CIDRMask(0, everywhere.BitLen())},
	}
}
