package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// RouteTo returns the interface that leads to address and the source address that the kernel selects.
func RouteTo(address, src netip.Addr, mark uint32) (link string, own netip.Addr, err error) {
	route, err := lookUp(address.Unmap(), src.Unmap(), mark)
	if err != nil {
		return "", own, fmt.Errorf("looking for the route to %s: %w; to explain without a route, give the interface and the addresses", address, err)
	}
	own, _ = netip.AddrFromSlice(route.attributes[unix.RTA_PREFSRC].Value)
	if route.Type == unix.RTN_LOCAL {
		return ruleset.Loopback, own, nil
	}
	found, err := net.InterfaceByIndex(int(route.number(unix.RTA_OIF)))
	if err != nil {
		return "", own, fmt.Errorf("looking for the interface to %s: %w", address, err)
	}
	return found.Name, own, nil
}

// IsLocal reports whether packets to an address are delivered here.
func IsLocal(address netip.Addr) (bool, error) {
	route, err := lookUp(address, netip.Addr{}, 0)
	return err == nil && route.Type == unix.RTN_LOCAL, err
}

// lookUp asks the kernel for the route of a packet. src may be invalid.
func lookUp(address, src netip.Addr, mark uint32) (route entry, err error) {
	header := &nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET, Dst_len: uint8(address.BitLen()), Flags: unix.RTM_F_LOOKUP_TABLE}}
	if address.Is6() {
		header.Family = unix.AF_INET6
	}
	attributes := []*nl.RtAttr{nl.NewRtAttr(unix.RTA_DST, address.AsSlice())}
	if src.IsValid() {
		header.Src_len = uint8(src.BitLen())
		attributes = append(attributes, nl.NewRtAttr(unix.RTA_SRC, src.AsSlice()))
	}
	if mark != 0 {
		attributes = append(attributes, number(unix.RTA_MARK, mark))
	}
	routes, err := entries(unix.RTM_GETROUTE, 0, unix.RTM_NEWROUTE, header, attributes...)
	switch {
	case err != nil:
		return route, err
	case len(routes) == 0:
		return route, unix.ENETUNREACH
	}
	return routes[0], nil
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
	Priority uint32 // of a rule
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
		header := &nl.RtMsg{RtMsg: unix.RtMsg{Family: familyNumber(family)}}
		rules, err := Whole(func() ([]entry, error) { return entries(unix.RTM_GETRULE, unix.NLM_F_DUMP, unix.RTM_NEWRULE, header) })
		if err != nil && !noRouting(err) {
			return nil, fmt.Errorf("listing %s routing rules: %w", family, err)
		}
		for _, r := range rules {
			if mark := r.number(nl.FRA_FWMARK); mark != 0 && r.isPlainRule() {
				protocol := r.attributes[nl.FRA_PROTOCOL].Value
				ours := len(protocol) > 0 && protocol[0] == RouteProtocol
				found = append(found, Installed{Route{family, mark, r.number(nl.FRA_TABLE)}, ours, r.number(nl.FRA_PRIORITY)})
			}
		}
		routes, err := Whole(func() ([]entry, error) { return entries(unix.RTM_GETROUTE, unix.NLM_F_DUMP, unix.RTM_NEWROUTE, header) })
		if err != nil && !noRouting(err) {
			return nil, fmt.Errorf("listing %s routes: %w", family, err)
		}
		for _, r := range routes {
			everywhere := r.Dst_len == 0 && r.Flags&unix.RTM_F_CLONED == 0
			if everywhere && r.Family == header.Family && r.Type == unix.RTN_LOCAL && r.number(unix.RTA_OIF) == loopbackIndex {
				found = append(found, Installed{Route{Family: family, Table: r.number(unix.RTA_TABLE)}, r.Protocol == RouteProtocol, 0})
			}
		}
	}
	return found, nil
}

// isPlainRule reports whether a rule has no other condition than a mark, all bits of it.
func (e entry) isPlainRule() bool {
	const inverted = 2 // FIB_RULE_INVERT
	for _, condition := range []uint16{nl.FRA_SRC, nl.FRA_DST, nl.FRA_IIFNAME, nl.FRA_OIFNAME, nl.FRA_IP_PROTO, nl.FRA_UID_RANGE} {
		if e.has(condition) {
			return false
		}
	}
	return e.Flags&inverted == 0 && (!e.has(nl.FRA_FWMASK) || e.number(nl.FRA_FWMASK) == 1<<32-1)
}

// noRouting reports whether the kernel lacks the family or policy routing.
func noRouting(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

func familyNumber(f ruleset.Family) uint8 {
	if f == ruleset.IPv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// Apply carries the change out.
func (c RouteChange) Apply() error {
	if c.Action == Remove {
		return c.found.remove()
	}
	if c.Route.Mark != 0 {
		if err := c.Route.changeRule(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL); err != nil {
			return fmt.Errorf("adding %s rule %s: %w", c.Route.Family, c.Route, c.Route.explain(err))
		}
		return nil
	}
	if err := c.Route.changeRoute(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL); err != nil {
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
		err = i.changeRule(unix.RTM_DELRULE, 0, number(nl.FRA_PRIORITY, i.Priority))
	} else {
		err = i.changeRoute(unix.RTM_DELROUTE, 0)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("removing %s %s: %w", i.Family, i.Route, err)
	}
	return nil
}

func (r Route) changeRule(message, flags int, attributes ...*nl.RtAttr) error {
	header := nl.NewRtMsg()
	header.Family, header.Table = familyNumber(r.Family), unix.RT_TABLE_UNSPEC
	return change(message, flags, header, append(attributes,
		number(nl.FRA_FWMARK, r.Mark), number(nl.FRA_TABLE, r.Table), nl.NewRtAttr(nl.FRA_PROTOCOL, nl.Uint8Attr(RouteProtocol)))...)
}

func (r Route) changeRoute(message, flags int) error {
	header := &nl.RtMsg{RtMsg: unix.RtMsg{Family: familyNumber(r.Family), Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Protocol: RouteProtocol}}
	return change(message, flags, header, number(unix.RTA_TABLE, r.Table), number(unix.RTA_OIF, loopbackIndex))
}
