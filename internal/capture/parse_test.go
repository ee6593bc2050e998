package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// Each parser by the flag's text, what it means, and what is refused.
func TestListsAreRead(t *testing.T) {
	ids := func(text string) ([]IDRange, error) {
		return ParseIDs(text, func(name string) (string, error) {
			if name == "istio-proxy" {
				return "1337", nil
			}
			return "", errors.New("no such name")
		})
	}
	groups := func(text string) (Groups, error) {
		return ParseGroups(text, func(name string) (string, error) {
			if name == "istio-proxy" {
				return "1337", nil
			}
			return "", errors.New("no such name")
		})
	}
	servers := func(text string) ([]netip.Addr, error) { return ParseNameservers(text), nil }
	for _, test := range []struct {
		parser string
		parse  func(string) (any, error)
		text   string
		want   string // as %v prints it, or with "error: " the words of an error
	}{
		{"port", boxed(ParsePort), "15001", "15001"},
		{"port", boxed(ParsePort), "65535", "65535"},
		{"port", boxed(ParsePort), "0", `error: "0" is not a port: use a number from 1 to 65535`},
		{"port", boxed(ParsePort), "70000", `error: "70000" is not a port`},
		{"port", boxed(ParsePort), "", `error: "" is not a port`},
		{"port", boxed(ParsePort), "+80", `error: "+80" is not a port`},
		{"port", boxed(ParsePort), "0x50", `error: "0x50" is not a port`},
		{"port", boxed(ParsePort), "http", "80"},
		{"port", boxed(ParsePort), "no-such-service", `error: "no-such-service" is not a port`},

		{"ports", boxed(ParsePorts), "", "{false []}"},
		{"ports", boxed(ParsePorts), "*", "{true []}"},
		{"ports", boxed(ParsePorts), " * ", "{true []}"},
		{"ports", boxed(ParsePorts), "8080,,9090,", "{false [8080 9090]}"},
		{"ports", boxed(ParsePorts), "80, 90", "{false [80 90]}"},
		{"ports", boxed(ParsePorts), "80,80,080", "{false [80]}"},
		{"ports", boxed(ParsePorts), "8000:9000", "{false [8000:9000]}"},
		{"ports", boxed(ParsePorts), "*,8080", "error: * stands alone"},
		{"ports", boxed(ParsePorts), "80x", `error: "80x" is not a port: use a number from 1 to 65535, or a range such as 8000:9000`},
		{"ports", boxed(ParsePorts), "8000-9000", "{false [8000:9000]}"},
		{"ports", boxed(ParsePorts), "80-90:100", `error: "80-90:100" is not a port`},
		{"ports", boxed(ParsePorts), "9000-8000", "error: write the lower port first"},
		{"ports", boxed(ParsePorts), "8000:", `error: "8000:" is not a port`},
		{"ports", boxed(ParsePorts), ":9000", `error: ":9000" is not a port`},
		{"ports", boxed(ParsePorts), "0:9000", `error: "0:9000" is not a port`},
		{"ports", boxed(ParsePorts), "9000:8000", "error: write the lower port first"},
		{"ports", boxed(ParsePorts), "ssh,http", "{false [22 80]}"},
		{"ports", boxed(ParsePorts), "nothing-of-that-name", `error: "nothing-of-that-name" is not a port`},
		{"port list", boxed(ParsePortList), "*", "error: * stands alone"},

		{"networks", boxed(ParsePrefixes), "", "{false []}"},
		{"networks", boxed(ParsePrefixes), "*", "{true []}"},
		{"networks", boxed(ParsePrefixes), "198.51.100.10/25,2001:DB8::1/32", "{false [198.51.100.0/25 2001:db8::/32]}"},
		{"networks", boxed(ParsePrefixes), "10.0.0.1/8,10.0.0.2/8", "{false [10.0.0.0/8]}"},
		{"networks", boxed(ParsePrefixes), "10.0.0.0/8, 11.0.0.0/8", "{false [10.0.0.0/8 11.0.0.0/8]}"},
		{"networks", boxed(ParsePrefixes), "10.0.0.1", `error: "10.0.0.1" is not a network: write an address and a mask such as`},
		{"networks", boxed(ParsePrefixes), "10.0.0.0/33", `error: "10.0.0.0/33" is not a network`},
		{"networks", boxed(ParsePrefixes), "10.0.0.0/255.0.0.0", `error: is not a network`},
		{"networks", boxed(ParsePrefixes), "fe80::1%eth0/64", `error: is not a network`},
		{"networks", boxed(ParsePrefixes), "10.0.0.0/8,*", "error: * stands alone"},
		{"network list", boxed(ParsePrefixList), "*", "error: * stands alone"},

		{"ids", boxed(ids), "1337", "[1337]"},
		{"ids", boxed(ids), "0,1337,istio-proxy", "[0 1337]"},
		{"ids", boxed(ids), "", "[]"},
		{"ids", boxed(ids), "-1", `error: "-1" is neither a number nor a known name: use a number such as 1337`},
		{"ids", boxed(ids), "1337-1340,7", "[1337-1340 7]"},
		{"ids", boxed(ids), "1340-1337", "error: write the lower number first"},
		{"ids", boxed(ids), "1337-", `error: "1337-" is neither a number nor a known name`},
		{"ids", boxed(ids), "1-2-3", `error: "1-2-3" is not a user or group`},
		{"ids", boxed(ids), "1-4294967295", `error: "1-4294967295" is not a user or group`},

		{"groups", boxed(groups), "*", "{true []}"},
		{"groups", boxed(groups), "", "{false []}"},
		{"groups", boxed(groups), "istio-proxy,7-9", "{false [1337 7-9]}"},
		{"groups", boxed(groups), "*,7", "error: * stands alone"},

		{"number", boxed(ParseNumber), "1337", "1337"},
		{"number", boxed(ParseNumber), "0x539", "1337"},
		{"number", boxed(ParseNumber), "0XFFFFFFFF", "4294967295"},
		{"number", boxed(ParseNumber), "4294967296", `error: "4294967296" is not a number`},
		{"number", boxed(ParseNumber), "0539", "539"},
		{"number", boxed(ParseNumber), "main", `error: "main" is not a number: use a decimal one such as 1337 or a hexadecimal one such as 0x539`},
		{"number", boxed(ParseNumber), "", `error: "" is not a number`},

		{"localhost", boxed(ParseLocalhost4), "127.0.0.1/32", "127.0.0.1/32"},
		{"localhost", boxed(ParseLocalhost4), "127.1.2.3/8", "127.0.0.0/8"},
		{"localhost", boxed(ParseLocalhost4), "127.0.0.0/7", `error: "127.0.0.0/7" is not an IPv4 loopback network`},
		{"localhost", boxed(ParseLocalhost4), "10.0.0.0/8", `error: "10.0.0.0/8" is not an IPv4 loopback network`},
		{"localhost", boxed(ParseLocalhost4), "::1/128", `error: "::1/128" is not an IPv4 loopback network`},
		{"localhost", boxed(ParseLocalhost4), "127.0.0.1", `error: "127.0.0.1" is not an IPv4 loopback network`},

		{"name servers", boxed(servers), "nameserver 10.0.0.53\n#nameserver 1.1.1.1\nnameserver\t2001:db8::53 # x\nsearch a\nnameserver x\nnameserver 10.0.0.53", "[10.0.0.53 2001:db8::53]"},
		{"name servers", boxed(servers), "nameserver fe80::1%eth0\nnameserver ::ffff:10.0.0.1", "[fe80::1 10.0.0.1]"},
		{"name servers", boxed(servers), "", "[]"},

		{"ids", boxed(ids), "4294967295", `error: "4294967295" is not a user or group: use a number from 0 to 4294967294`},
		{"ids", boxed(ids), "99999999999", `error: "99999999999" is not a user or group`},

		{"interfaces", boxed(ParseInterfaces), "eth1,tun+,br-0.1@x", "[eth1 tun+ br-0.1@x]"},
		{"interfaces", boxed(ParseInterfaces), "a-name-of-sixteen", `error: "a-name-of-sixteen" is not an interface: use a name of at most 15`},
		{"interfaces", boxed(ParseInterfaces), "+", `error: "+" is not an interface`},
		{"interfaces", boxed(ParseInterfaces), "-j", `error: "-j" is not an interface`},
		{"interfaces", boxed(ParseInterfaces), "e+h0", `error: "e+h0" is not an interface`},
		{"interfaces", boxed(ParseInterfaces), `e"h`, `error: is not an interface`},
		{"interfaces", boxed(ParseInterfaces), "eth0 -j ACCEPT", `error: is not an interface`},
	} {
		value, err := test.parse(test.text)
		if words, wantError := strings.CutPrefix(test.want, "error: "); wantError {
			if err == nil || !strings.Contains(err.Error(), words) {
				t.Errorf("%s %q: got error %v, want %q", test.parser, test.text, err, words)
			}
			continue
		}
		if got := fmt.Sprint(value); err != nil || got != test.want {
			t.Errorf("%s %q: got %s, error %v, want %s", test.parser, test.text, got, err, test.want)
		}
	}
}

func boxed[T any](parse func(string) (T, error)) func(string) (any, error) {
	return func(text string) (any, error) { return parse(text) }
}

func TestARangeContainsItsEnds(t *testing.T) {
	r := PortRange{8000, 8002}
	for port, want := range map[uint16]bool{7999: false, 8000: true, 8001: true, 8002: true, 8003: false} {
		if r.Contains(port) != want {
			t.Errorf("%v contains %d: %t", r, port, !want)
		}
	}
}
