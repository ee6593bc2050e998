package capture

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// All in a list means every port or every address. It must be the only item.
const All = "*"

// noID is (uid_t)-1. No process has it.
const noID = 1<<32 - 1

// maxQuoted is the number of characters of a value that an error repeats.
const maxQuoted = 64

// Quoted returns text as %q, cut after 64 characters.
func Quoted(text string) string {
	if utf8.RuneCountInString(text) <= maxQuoted {
		return strconv.Quote(text)
	}
	return strconv.Quote(string([]rune(text)[:maxQuoted])) + "…"
}

// PortRange is the ports from First to Last inclusive. They are equal for a single port.
type PortRange struct{ First, Last uint16 }

// String is the spelling of iptables: 80 or 8000:9000.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d:%d", r.First, r.Last)
}

// Contains reports whether port is in the range.
func (r PortRange) Contains(port uint16) bool { return r.First <= port && port <= r.Last }

// Ports selects all ports or a list. The zero value selects no port.
type Ports struct {
	All  bool
	List []PortRange
}

// None reports whether no port is selected.
func (p Ports) None() bool { return !p.All && len(p.List) == 0 }

// Contains reports whether port is selected.
func (p Ports) Contains(port uint16) bool {
	return p.All || slices.ContainsFunc(p.List, func(r PortRange) bool { return r.Contains(port) })
}

// Prefixes selects all addresses or a list of networks. The zero value selects no network.
type Prefixes struct {
	All  bool
	List []netip.Prefix
}

// None reports whether no network is selected.
func (p Prefixes) None() bool { return !p.All && len(p.List) == 0 }

// IDRange is the users or groups from First to Last inclusive. They are equal for a single one.
type IDRange struct{ First, Last uint32 }

// String is the spelling of iptables: 1337 or 1337-1340.
func (r IDRange) String() string {
	if r.First == r.Last {
		return strconv.FormatUint(uint64(r.First), 10)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Contains reports whether id is in the range.
func (r IDRange) Contains(id uint32) bool { return r.First <= id && id <= r.Last }

// Groups selects all groups or a list. The zero value selects no group.
type Groups struct {
	All  bool
	List []IDRange
}

// ParsePort reads a port other than 0: a number, or the name of a service in /etc/services.
func ParsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil && text != "" && !strings.ContainsAny(text[:1], "+-0123456789") {
		named, lookupErr := net.LookupPort("tcp", text)
		port, err = uint64(named), lookupErr
	}
	if err != nil || port == 0 {
		return 0, fmt.Errorf("%s is not a port: use a number from 1 to 65535", Quoted(text))
	}
	return uint16(port), nil
}

// ParsePorts reads "*", or a list as ParsePortList does.
func ParsePorts(text string) (Ports, error) {
	if strings.TrimSpace(text) == All {
		return Ports{All: true}, nil
	}
	list, err := ParsePortList(text)
	return Ports{List: list}, err
}

// ParsePortList reads ports and ranges such as 80,ssh,8000:9000,8000-9000. Empty items and repetitions are dropped.
func ParsePortList(text string) ([]PortRange, error) { return parseList(text, parsePortRange) }

func parsePortRange(item string) (PortRange, error) {
	if port, err := ParsePort(item); err == nil { // the name of a service may hold a dash
		return PortRange{port, port}, nil
	}
	first, last, isRange := strings.Cut(item, ":")
	if !isRange {
		first, last, _ = strings.Cut(item, "-")
	}
	low, errLow := ParsePort(first)
	high, errHigh := ParsePort(last)
	if errLow != nil || errHigh != nil {
		return PortRange{}, fmt.Errorf("%s is not a port: use a number from 1 to 65535, or a range such as 8000:9000", Quoted(item))
	}
	if high < low {
		return PortRange{}, fmt.Errorf("%s is an empty range: write the lower port first", Quoted(item))
	}
	return PortRange{low, high}, nil
}

// ParsePrefixes reads "*", or a list as ParsePrefixList does.
func ParsePrefixes(text string) (Prefixes, error) {
	if strings.TrimSpace(text) == All {
		return Prefixes{All: true}, nil
	}
	list, err := ParsePrefixList(text)
	return Prefixes{List: list}, err
}

// ParsePrefixList reads networks of both families such as 10.0.0.0/8,2001:db8::/32. Bits beyond the mask are cleared,
// as the kernel does. Empty items and repetitions are dropped.
func ParsePrefixList(text string) ([]netip.Prefix, error) { return parseList(text, parsePrefix) }

func parsePrefix(item string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(item)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s is not a network: write an address and a mask such as 10.0.0.0/8 or 2001:db8::/32", Quoted(item))
	}
	return prefix.Masked(), nil
}

// ParseIDs reads users or groups: numbers, ranges such as 1337-1340, and names that lookup resolves. Empty items and
// repetitions are dropped.
func ParseIDs(text string, lookup func(name string) (string, error)) ([]IDRange, error) {
	return parseList(text, func(item string) (IDRange, error) {
		first, last, isRange := strings.Cut(item, "-")
		switch {
		case strings.Trim(item, "0123456789-") != "" || first == "" || isRange && last == "":
			found, err := lookup(item)
			if err != nil {
				return IDRange{}, fmt.Errorf("%s is neither a number nor a known name: use a number such as %d, or a range such as 1337-1340", Quoted(item), DefaultProxyID)
			}
			first, last = found, found
		case !isRange:
			last = first
		}
		low, errLow := strconv.ParseUint(first, 10, 32)
		high, errHigh := strconv.ParseUint(last, 10, 32)
		if errLow != nil || errHigh != nil || high == noID {
			return IDRange{}, fmt.Errorf("%s is not a user or group: use a number from 0 to %d", Quoted(item), uint32(noID-1))
		}
		if high < low {
			return IDRange{}, fmt.Errorf("%s is an empty range: write the lower number first", Quoted(item))
		}
		return IDRange{uint32(low), uint32(high)}, nil
	})
}

// ParseGroups reads "*", or a list as ParseIDs does.
func ParseGroups(text string, lookup func(name string) (string, error)) (Groups, error) {
	if strings.TrimSpace(text) == All {
		return Groups{All: true}, nil
	}
	list, err := ParseIDs(text, lookup)
	return Groups{List: list}, err
}

// ParseNumber reads a mark or the number of a routing table, decimal or, with 0x in front, hexadecimal.
func ParseNumber(text string) (uint32, error) {
	digits, hexadecimal := strings.CutPrefix(strings.ToLower(text), "0x")
	base := 10
	if hexadecimal {
		base = 16
	}
	number, err := strconv.ParseUint(digits, base, 32)
	if err != nil {
		return 0, fmt.Errorf("%s is not a number: use a decimal one such as 1337 or a hexadecimal one such as 0x539, of 32 bits", Quoted(text))
	}
	return uint32(number), nil
}

// ParseLocalhost4 reads the workload's own IPv4 loopback network.
func ParseLocalhost4(text string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(text)
	if err != nil || !prefix.Addr().Is4() || !prefix.Addr().IsLoopback() || prefix.Bits() < 8 {
		return netip.Prefix{}, fmt.Errorf("%s is not an IPv4 loopback network: use one in 127.0.0.0/8, such as 127.0.0.1/32", Quoted(text))
	}
	return prefix.Masked(), nil
}

// ParseNameservers returns the servers in the text of a resolv.conf(5). Like resolvers, it skips malformed lines.
func ParseNameservers(text string) []netip.Addr {
	var servers []netip.Addr
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		server, err := netip.ParseAddr(fields[1])
		server = server.Unmap().WithZone("")
		if err == nil && !slices.Contains(servers, server) && len(servers) < maxNameservers {
			servers = append(servers, server)
		}
	}
	return servers
}

// maxNameservers limits the rules for a resolv.conf. Resolvers use three servers.
const maxNameservers = 64

// ParseInterfaces reads interface names such as eth1,tun+.
func ParseInterfaces(text string) ([]string, error) { return parseList(text, ParseInterface) }

// maxInterface is IFNAMSIZ without the terminating zero.
const maxInterface = 15

// ParseInterface validates one interface name. It is stricter than the kernel, since the kernel accepts quotes and
// Unicode blanks, and the name becomes part of the input of iptables-restore, where it must not add options.
func ParseInterface(name string) (string, error) {
	const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.@-"
	stem := strings.TrimSuffix(name, "+")
	if stem == "" || len(name) > maxInterface || stem[0] == '-' || strings.Trim(stem, allowed) != "" {
		return "", fmt.Errorf("%s is not an interface: use a name of at most %d letters, digits, \"_\", \".\", \"@\" and \"-\"; a \"+\" at its end is a wildcard", Quoted(name), maxInterface)
	}
	return name, nil
}

// parseList splits text at commas and parses each item without surrounding blanks.
func parseList[T comparable](text string, parse func(string) (T, error)) ([]T, error) {
	var list []T
	for item := range strings.SplitSeq(text, ",") {
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		if item == All {
			return nil, fmt.Errorf("%s: %s stands alone, and only where everything can be chosen; list values instead", Quoted(text), All)
		}
		value, err := parse(item)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(list, value) {
			list = append(list, value)
		}
	}
	return list, nil
}
