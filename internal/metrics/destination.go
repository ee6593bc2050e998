package metrics

import (
	"bytes"
	"math"
	"net/netip"
)

// kind is what a Host field names.
type kind uint8

const (
	noHost            kind = iota // the field is missing
	invalidHost                   // neither a name nor an address
	addressHost                   // an IP address
	otherHost                     // a name outside the cluster
	kubernetesService             // a Service of the cluster
)

// naming derives the destination service of a request from its Host field, as a resolver in a pod completes names.
type naming struct {
	inbound   bool
	namespace []byte // the workload's; empty: unknown
	domain    string // of the cluster
}

// clusterSetDomain is the domain of Services that several clusters share (Kubernetes Multi-Cluster Services API).
const clusterSetDomain = "clusterset.local"

// maxDestination is the longest name that destination appends.
const maxDestination = 253

// destination appends the name of the service that host refers to: in lower case, without port, and for a Service of the
// cluster as NAME.NAMESPACE.svc.DOMAIN. The name is empty unless host is a name. to is the original destination.
//
// The resolver of a pod completes a name with the domains of resolv.conf: NAMESPACE.svc.DOMAIN, svc.DOMAIN and DOMAIN.
// So NAME is a Service of the own namespace, and NAME.NAMESPACE.svc is one of that namespace. NAME.NAMESPACE cannot be
// distinguished from a domain such as example.com by its text. It counts as a Service if the namespace is the own one, or
// if the connection goes to an address that a cluster may use for its Services. An address of a pod of a stateful set,
// such as web-0.web, names the Service that governs the set.
func (n *naming) destination(dst, host []byte, to netip.Addr) ([]byte, kind) {
	if len(host) == 0 {
		return dst, noHost
	}
	name, ok := withoutPort(host)
	if !ok || len(name) == 0 || len(name) > maxDestination+len(".") {
		return dst, invalidHost
	}
	if name[0] == '[' {
		if !isIPv6(name) {
			return dst, invalidHost
		}
		return dst, addressHost
	}
	start, label, numeric := len(dst), 0, true
	dst = append(dst, name...)
	name = dst[start:]
	for i, c := range name {
		c = lowered[c]
		name[i] = c
		switch {
		case c == '.' && label > 0:
			label = 0
			continue
		case c == '.' || c == 0 || label == maxLabel:
			return dst[:start], invalidHost
		case c < '0' || c > '9':
			numeric = false
		}
		label++
	}
	absolute := label == 0
	if absolute {
		name = name[:len(name)-1]
		dst = dst[:len(dst)-1]
	}
	switch {
	case len(name) > maxDestination:
		return dst[:start], invalidHost
	case numeric:
		return dst[:start], addressHost
	}
	service, namespace, domain := n.service(name, absolute, to)
	if service == nil {
		return dst, otherHost
	}
	// The parts are within name, so they are copied before name is overwritten.
	var full [2*maxLabel + len(".")]byte
	parts := append(append(append(full[:0], service...), '.'), namespace...)
	dst = append(append(dst[:start], parts...), ".svc."...)
	if dst = append(dst, domain...); len(dst)-start > maxDestination {
		return dst[:start], invalidHost
	}
	return dst, kubernetesService
}

// service returns the Service that name refers to, or nil.
func (n *naming) service(name []byte, absolute bool, to netip.Addr) (service, namespace []byte, domain string) {
	rest, domain := name, n.domain
	qualified := false // by svc
	for _, d := range [...]string{n.domain, clusterSetDomain} {
		if before, found := cutSuffix(name, ".svc.", d); found {
			rest, domain, qualified = before, d, true
		}
	}
	if before, found := cutSuffix(name, ".svc", ""); found && !absolute && !qualified {
		rest, qualified = before, true
	}
	if absolute && !qualified {
		return nil, nil, ""
	}
	labels := bytes.Count(rest, dot) + 1
	first, others, _ := bytes.Cut(rest, dot)
	second, third, _ := bytes.Cut(others, dot)
	switch {
	case qualified && labels == 2:
		service, namespace = first, second
	case qualified && labels == 3: // a pod of a stateful set, or another with a hostname and a subdomain
		service, namespace = second, third
	case qualified || len(n.namespace) == 0:
	case labels == 1:
		service, namespace = first, n.namespace
	case labels == 2 && bytes.Equal(second, n.namespace):
		service, namespace = first, second
	case labels == 2 && (n.inbound || !mayBeInCluster(to) || isPrivateTLD(second)):
	case labels == 2 && hasOrdinal(first):
		service, namespace = second, n.namespace
	case labels == 2:
		service, namespace = first, second
	case labels == 3 && bytes.Equal(third, n.namespace) && hasOrdinal(first):
		service, namespace = second, third
	}
	if !isLabel(service) || !isLabel(namespace) || service[0] < 'a' || string(service) == "localhost" {
		return nil, nil, ""
	}
	return service, namespace, domain
}

var dot, hyphen = []byte{'.'}, []byte{'-'}

// cutSuffix is bytes.CutSuffix for a suffix in two parts.
func cutSuffix(name []byte, first, second string) (before []byte, found bool) {
	n := len(name) - len(first) - len(second)
	if n < 0 || string(name[n:n+len(first)]) != first || string(name[n+len(first):]) != second {
		return nil, false
	}
	return name[:n], true
}

// maxLabel is the longest label of a DNS name.
const maxLabel = 63

// isLabel reports whether a label in lower case can be the name of a namespace (RFC 1123). A Service's begins with a
// letter. Its characters are those of a name.
func isLabel(label []byte) bool {
	if len(label) == 0 || label[0] == '-' || label[len(label)-1] == '-' {
		return false
	}
	for _, c := range label {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// hasOrdinal reports whether a label ends in a number after a hyphen, as the names of pods of stateful sets do.
func hasOrdinal(label []byte) bool {
	name := bytes.TrimRight(label, "0123456789")
	return len(name) < len(label) && bytes.HasSuffix(name, hyphen)
}

// isPrivateTLD reports whether a label is a common top-level domain of private networks, and therefore not a namespace.
func isPrivateTLD(label []byte) bool {
	switch string(label) {
	case "local", "localdomain", "lan", "internal", "intranet", "private", "corp", "home":
		return true
	}
	return false
}

var (
	sharedAddresses = netip.MustParsePrefix("100.64.0.0/10")   // RFC 6598
	gkeServices     = netip.MustParsePrefix("34.118.224.0/20") // default range of Services in GKE
)

// mayBeInCluster reports whether a cluster may use the address for its Services or pods.
func mayBeInCluster(to netip.Addr) bool {
	return to.IsPrivate() || sharedAddresses.Contains(to) || gkeServices.Contains(to)
}

// maxBuffer is as much as destination appends before it checks the length.
const maxBuffer = 2*maxLabel + len(".") + len(".svc.") + maxDestination

// withoutPort returns host without its port, and false if the port is invalid.
func withoutPort(host []byte) (name []byte, ok bool) {
	i := bytes.LastIndexByte(host, ':')
	if i < 0 || host[len(host)-1] == ']' {
		return host, true
	}
	port := 0
	for _, c := range host[i+1:] {
		if c < '0' || c > '9' || port > math.MaxUint16 {
			return nil, false
		}
		port = 10*port + int(c-'0')
	}
	return host[:i], 0 < port && port <= math.MaxUint16
}

// isIPv6 reports whether host consists of brackets and the characters of an IPv6 address without a zone.
func isIPv6(host []byte) bool {
	if len(host) < len("[::]") || host[len(host)-1] != ']' {
		return false
	}
	for _, c := range host[1 : len(host)-1] {
		if l := lowered[c]; c != ':' && l != '.' && (l < '0' || l > '9') && (l < 'a' || l > 'f') {
			return false
		}
	}
	return true
}

// lowered maps the bytes of names to lower case, and others to 0.
var lowered = func() (table [256]byte) {
	for c := range 256 {
		switch c := byte(c); {
		case 'A' <= c && c <= 'Z':
			table[c] = c + 'a' - 'A'
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '.', c == '-', c == '_':
			table[c] = c
		}
	}
	return table
}()
