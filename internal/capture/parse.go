package capture

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// All is how a list says "every port" or "every address". It stands alone.
const All = "*"

// noID is (uid_t)-1, which no process has.
const noID = 1<<32 - 1

// PortRange is the ports from First to Last, both included; they are equal for a single port.
type PortRange struct{ First, Last uint16 }

// String is the spelling of iptables: 80 or 8000:9000.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d:%d", r.First, r.Last)
}

// Contains tells whether port is one of the range.
func (r PortRange) Contains(port uint16) bool { return r.First <= port && port <= r.Last }

// Ports is a choice of ports: all of them or a list. The zero value chooses none.
type Ports struct {
	All  bool
	List []PortRange
}

// None tells whether no port is chosen.
func (p Ports) None() bool { return !p.All && len(p.List) == 0 }

// Contains tells whether port is chosen.
func (p Ports) Contains(port uint16) bool {
	return p.All || slices.ContainsFunc(p.List, func(r PortRange) bool { return r.Contains(port) })
}

// Prefixes is a choice of networks: all addresses or a list. The zero value chooses none.
type Prefixes struct {
	All  bool
	List []netip.Prefix
}

// None tells whether no network is chosen.
func (p Prefixes) None() bool { return !p.All && len(p.List) == 0 }

// ParsePort reads one port, which cannot be 0.
func ParsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("%q is not a port: use a number from 1 to 65535", text)
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

// ParsePortList reads ports and ranges such as 80,8000:9000. Empty items and repetitions are dropped.
func ParsePortList(text string) ([]PortRange, error) { return parseList(text, parsePortRange) }

func parsePortRange(item string) (PortRange, error) {
	first, last, isRange := strings.Cut(item, ":")
	if !isRange {
		last = first
	}
	low, errLow := ParsePort(first)
	high, errHigh := ParsePort(last)
	if errLow != nil || errHigh != nil {
		return PortRange{}, fmt.Errorf("%q is not a port: use a number from 1 to 65535, or a range such as 8000:9000", item)
	}
	if high < low {
		return PortRange{}, fmt.Errorf("%q is an empty range: write the lower port first", item)
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

// ParsePrefixList reads networks of both families such as 10.0.0.0/8,2001:db8::/32. Bits beyond the mask are cleared, as
// the kernel does. Empty items and repetitions are dropped.
func ParsePrefixList(text string) ([]netip.Prefix, error) { return parseList(text, parsePrefix) }

func parsePrefix(item string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(item)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is not a network: write an address and a mask such as 10.0.0.0/8 or 2001:db8::/32", item)
	}
	return prefix.Masked(), nil
}

// ParseIDs reads users or groups: numbers, and names that lookup turns into numbers. Empty items and repetitions are
// dropped.
func ParseIDs(text string, lookup func(name string) (string, error)) ([]uint32, error) {
	return parseList(text, func(item string) (uint32, error) {
		number := item
		if strings.Trim(item, "0123456789") != "" {
			found, err := lookup(item)
			if err != nil {
				return 0, fmt.Errorf("%q is neither a number nor a known name: use a number such as %d", item, DefaultProxyID)
			}
			number = found
		}
		id, err := strconv.ParseUint(number, 10, 32)
		if err != nil || id == noID {
			return 0, fmt.Errorf("%q is not a user or group: use a number from 0 to %d", item, uint32(noID-1))
		}
		return uint32(id), nil
	})
}

// ParseInterfaces reads interface names such as eth1,tun+.
func ParseInterfaces(text string) ([]string, error) { return parseList(text, ParseInterface) }

// maxInterface is IFNAMSIZ without the terminating zero.
const maxInterface = 15

// ParseInterface checks one interface name. It is stricter than the kernel, which accepts blanks' cousins and quotes: a
// name is pasted into the input of iptables-restore, and nothing else must get there with it.
func ParseInterface(name string) (string, error) {
	const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.@-"
	stem := strings.TrimSuffix(name, "+")
	if stem == "" || len(name) > maxInterface || stem[0] == '-' || strings.Trim(stem, allowed) != "" {
		return "", fmt.Errorf("%q is not an interface: use a name of at most %d letters, digits, \"_\", \".\", \"@\" and \"-\"; a \"+\" at its end is a wildcard", name, maxInterface)
	}
	return name, nil
}

// parseList splits text at commas and parses each item without the blanks around it.
func parseList[T comparable](text string, parse func(string) (T, error)) ([]T, error) {
	var list []T
	for item := range strings.SplitSeq(text, ",") {
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		if item == All {
			return nil, fmt.Errorf("%q: %s stands alone, and only where everything can be chosen; list values instead", text, All)
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
