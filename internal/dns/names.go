package dns

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sort"
	"strings"
)

// Host is a host of the control plane, and what its name resolves to.
type Host struct {
	Name      string // fully qualified, without a final dot; "*.example.com" stands for all names below example.com
	Addresses []netip.Addr

	// Services of Kubernetes are also found by shorter names.
	Kubernetes           bool
	ShortName, Namespace string
}

// Scope is from where names are asked for. It determines the short names, as the search list of a pod does.
type Scope struct {
	Namespace string // of the workload: its services are found by their short name alone
	Domain    string // of the cluster's services, such as "svc.cluster.local": only they have shorter names
	Search    string // first domain of the search list, such as "shop.svc.cluster.local"; empty: no list
}

// Table has the names that the Server answers itself. It is immutable. Names are stored in wire format, in lower case and
// without the final root, one after another; most short names are the beginning of a longer one and share its bytes.
type Table struct {
	names       []byte
	exact, wild []tableName // sorted by name; the names of wild are without their first label, the star
	hosts       []tableHost // one more than there are hosts
	v4, v6      []byte      // addresses
	search      []byte      // name of Scope.Search
}

// tableName is a name of a host.
type tableName struct {
	offset uint32 // into Table.names
	host   uint32 // index into Table.hosts
	length uint8
	rank   uint8 // of names that are equal, the least counts
}

// tableHost is where the addresses of a host begin. They end where those of the next host begin.
type tableHost struct{ v4, v6 uint32 }

// Ranks of names. When two hosts have the same name, the full name comes before a short one, and Kubernetes before other
// registries, as in Istio's resolver.
const (
	rankShort = 1 << 1
	rankOther = 1 << 0
)

// nameTTL is the lifetime of answers from a Table, in seconds.
const nameTTL = 30

// NewTable compiles a table. It sorts hosts. A host without addresses is left out, so that upstreams are queried for it.
// Hosts whose name cannot be asked for in DNS are left out and returned.
func NewTable(hosts []Host, scope Scope) (table *Table, invalid []string) {
	sort.Slice(hosts, func(i, j int) bool { return hosts[i].Name < hosts[j].Name })
	b := tableBuilder{Table: new(Table), scope: scope}
	b.search, _ = appendName(nil, scope.Search)
	for i := range hosts {
		if len(hosts[i].Addresses) > 0 && !b.add(&hosts[i]) {
			invalid = append(invalid, hosts[i].Name)
		}
	}
	b.hosts = append(b.hosts, tableHost{uint32(len(b.v4)), uint32(len(b.v6))})
	b.exact, b.wild = b.sorted(b.exact), b.sorted(b.wild)
	b.names, b.hosts, b.v4, b.v6 = bytes.Clone(b.names), slices.Clone(b.hosts), bytes.Clone(b.v4), bytes.Clone(b.v6)
	return b.Table, invalid
}

// Hosts returns the number of hosts.
func (t *Table) Hosts() int { return len(t.hosts) - 1 }

type tableBuilder struct {
	*Table
	scope Scope
}

// add adds a host with all of its names. It returns false if its name is invalid.
func (b *tableBuilder) add(host *Host) bool {
	offset := len(b.names)
	names, ok := appendName(b.names, host.Name)
	if !ok || len(names) == offset || host.Name == "*" {
		return false
	}
	b.names = names
	rank := uint8(0)
	if !host.Kubernetes {
		rank = rankOther
	}
	full := names[offset:]
	b.insert(full, offset, rank)
	for _, short := range b.shortNames(host) {
		b.insertShort(short, full, offset, rank|rankShort)
	}
	b.hosts = append(b.hosts, tableHost{uint32(len(b.v4)), uint32(len(b.v6))})
	for _, address := range host.Addresses {
		if address = address.Unmap(); address.Is4() {
			b.v4 = append(b.v4, address.AsSlice()...)
		} else {
			b.v6 = append(b.v6, address.AsSlice()...)
		}
	}
	return true
}

// shortNames returns the shorter names of a host. Services of other clusters do not have any: the workload's own cluster
// may have a service of the same name and namespace.
func (b *tableBuilder) shortNames(host *Host) []string {
	if !host.Kubernetes || host.ShortName == "" || host.ShortName == "*" || host.Namespace == "" || b.scope.Domain == "" ||
		!strings.HasSuffix(strings.ToLower(host.Name), "."+strings.ToLower(b.scope.Domain)) {
		return nil
	}
	inNamespace := host.ShortName + "." + host.Namespace
	first, _, _ := strings.Cut(b.scope.Domain, ".")
	names := []string{inNamespace, inNamespace + "." + first}
	if host.Namespace == b.scope.Namespace {
		names = append(names, host.ShortName)
	}
	return names
}

// insertShort adds a short name of the host whose full name has offset.
func (b *tableBuilder) insertShort(short string, full []byte, offset int, rank uint8) {
	end := len(b.names)
	names, ok := appendName(b.names, short)
	if !ok {
		return // the full name is longer, and valid
	}
	if name := names[end:]; bytes.HasPrefix(full, name) {
		b.insert(name, offset, rank)
	} else {
		b.names = names
		b.insert(name, end, rank)
	}
}

// insert adds a name of the next host.
func (b *tableBuilder) insert(name []byte, offset int, rank uint8) {
	n := tableName{uint32(offset), uint32(len(b.hosts)), uint8(len(name)), rank}
	if len(name) > 2 && name[0] == 1 && name[1] == '*' {
		n.offset, n.length = n.offset+2, n.length-2
		b.wild = append(b.wild, n)
		return
	}
	b.exact = append(b.exact, n)
}

// sorted returns names in order, each once.
func (b *tableBuilder) sorted(names []tableName) []tableName {
	sort.Sort(byText{b, names})
	return slices.Clone(slices.CompactFunc(names, func(x, y tableName) bool { return bytes.Equal(b.text(x), b.text(y)) }))
}

// byText sorts names by their text; of equal ones, the host with the lowest rank is the first.
type byText struct {
	*tableBuilder
	names []tableName
}

func (s byText) Len() int      { return len(s.names) }
func (s byText) Swap(i, k int) { s.names[i], s.names[k] = s.names[k], s.names[i] }

func (s byText) Less(i, k int) bool {
	x, y := s.names[i], s.names[k]
	return cmp.Or(bytes.Compare(s.text(x), s.text(y)), cmp.Compare(x.rank, y.rank), cmp.Compare(x.host, y.host)) < 0
}

// appendName appends a name in wire format, in lower case and without the root. It returns false if a label is empty or
// too long, or the whole name is too long.
func appendName(b []byte, name string) ([]byte, bool) {
	start := len(b)
	name = strings.TrimSuffix(name, ".")
	for rest := name; rest != ""; {
		label, after, more := strings.Cut(rest, ".")
		if label == "" || len(label) > 63 || more && after == "" {
			return b[:start], false
		}
		b = append(b, byte(len(label)))
		for i := range len(label) {
			b = append(b, lower(label[i]))
		}
		rest = after
	}
	if len(b)-start >= maxNameSize {
		return b[:start], false
	}
	return b, true
}

func (t *Table) text(n tableName) []byte { return t.names[n.offset:][:n.length] }

// lookup returns the host of a name in exact or wild. The search is written out, because with a comparison by function the
// name would escape to the heap.
func (t *Table) lookup(names []tableName, name []byte) (host uint32, ok bool) {
	low, high := 0, len(names)
	for low < high {
		middle := int(uint(low+high) / 2)
		switch bytes.Compare(t.text(names[middle]), name) {
		case 0:
			return names[middle].host, true
		case -1:
			low = middle + 1
		default:
			high = middle
		}
	}
	return 0, false
}

// find returns the host of a name. If the name is that of a host with the search domain appended, alias is the length of
// the name without that domain; otherwise it is 0. A name of a host always counts before one with the domain appended, and
// a name below a wildcard before one below its parent.
//
// The name is not the root.
func (t *Table) find(name []byte) (host uint32, alias int, ok bool) {
	if host, ok = t.lookup(t.exact, name); ok {
		return host, 0, true
	}
	base := t.cutSearch(name)
	if len(base) > 0 {
		if host, ok = t.lookup(t.exact, base); ok {
			return host, len(base), true
		}
	}
	if len(t.wild) == 0 {
		return 0, 0, false
	}
	for parent := afterLabel(name); len(parent) > 0; parent = afterLabel(parent) {
		if host, ok = t.lookup(t.wild, parent); ok {
			return host, 0, true
		}
		if base := t.cutSearch(parent); len(base) > 0 {
			if host, ok = t.lookup(t.wild, base); ok {
				return host, len(name) - len(t.search), true
			}
		}
	}
	return 0, 0, false
}

// cutSearch returns a name without the search domain, or nil if it does not end with it. A name that ends with the domain
// twice has not been made by a search list.
func (t *Table) cutSearch(name []byte) []byte {
	base := cutDomain(name, t.search)
	if base == nil || cutDomain(base, t.search) != nil {
		return nil
	}
	return base
}

// cutDomain returns a name without a domain at its end, or nil if it does not end with domain.
func cutDomain(name, domain []byte) []byte {
	if len(domain) == 0 {
		return nil
	}
	rest := name
	for len(rest) > len(domain) {
		rest = afterLabel(rest)
	}
	if !bytes.Equal(rest, domain) {
		return nil
	}
	return name[:len(name)-len(rest)]
}

// afterLabel returns a name in wire format without its first label.
func afterLabel(name []byte) []byte { return name[1+int(name[0]):] }

// answer returns the answer to a query, or nil if upstreams are to be queried: for names that the table does not have, and
// for types other than A and AAAA. A known name without an address of the type has an empty answer; NXDOMAIN would make
// resolvers that query both types drop the other answer.
func (t *Table) answer(q *message) []byte {
	kind := q.kind()
	if kind != typeA && kind != typeAAAA || q.class() != classINET || q.opcode() != opcodeQuery || q.extra {
		return nil
	}
	var lowered [maxNameSize]byte
	name := lowered[:copy(lowered[:], q.name())-1] // without the root
	if len(name) == 0 {
		return nil
	}
	for i := range name {
		name[i] = lower(name[i])
	}
	host, alias, ok := t.find(name)
	if !ok {
		return nil
	}
	addresses, size := t.addresses(host, kind)
	raw := begin(q, rcodeSuccess, maxNameSize+headerSize+len(addresses)/size*(recordSize+size)+optSize)
	raw[2] |= bitAA
	if len(addresses) > 0 {
		owner := uint16(headerSize)
		if alias > 0 {
			raw, owner = appendAlias(raw, q.name(), alias)
		}
		raw = appendAddresses(raw, owner, kind, addresses, size)
	}
	return end(raw, q)
}

// addresses returns the addresses of a host, at most as many as a message holds, and the size of one.
func (t *Table) addresses(host uint32, kind uint16) (addresses []byte, size int) {
	from, to := t.hosts[host], t.hosts[host+1]
	if kind == typeA {
		return t.v4[from.v4:to.v4], 4
	}
	return t.v6[from.v6:to.v6], 16
}

// recordSize is the size of a record whose owner is a pointer, without its data.
const recordSize = 12

// appendRecord appends a record of class IN without its data.
func appendRecord(raw []byte, owner, kind uint16, size int) []byte {
	binary.BigEndian.PutUint16(raw[6:], binary.BigEndian.Uint16(raw[6:])+1)
	raw = binary.BigEndian.AppendUint16(raw, 0xc000|owner)
	raw = binary.BigEndian.AppendUint16(raw, kind)
	raw = binary.BigEndian.AppendUint16(raw, classINET)
	raw = binary.BigEndian.AppendUint32(raw, nameTTL)
	return binary.BigEndian.AppendUint16(raw, uint16(size))
}

// appendAlias appends a CNAME from the question's name to its first length bytes. It returns the offset of that name. The
// end of the target that is also the end of the question is a pointer.
func appendAlias(raw, name []byte, length int) (out []byte, target uint16) {
	own := length // bytes of the target before the pointer
	shared := 0   // offset in name that the pointer refers to; 0: no pointer
	for at := 0; at < length; at += 1 + int(name[at]) {
		if from, ok := suffix(name, length-at); ok && sameName(name[from:len(name)-1], name[at:length]) {
			own, shared = at, from
			break
		}
	}
	size := own + 1
	if shared > 0 {
		size = own + 2
	}
	raw = appendRecord(raw, headerSize, typeCNAME, size)
	target = uint16(len(raw))
	raw = append(raw, name[:own]...)
	if shared == 0 {
		return append(raw, 0), target
	}
	return binary.BigEndian.AppendUint16(raw, 0xc000|uint16(headerSize+shared)), target
}

// suffix returns the offset of the last labels of a name that have length bytes together, without the root.
func suffix(name []byte, length int) (offset int, ok bool) {
	for at := 0; name[at] != 0; at += 1 + int(name[at]) {
		if len(name)-1-at == length {
			return at, true
		}
	}
	return 0, false
}

// maxData bounds the bytes of addresses' records, so that a message has room for them and all else.
const maxData = maxMessage - 3*maxNameSize

// appendAddresses appends a record for each address, beginning with a random one: clients prefer the first.
func appendAddresses(raw []byte, owner, kind uint16, addresses []byte, size int) []byte {
	n := len(addresses) / size
	first := rand.IntN(n)
	for i := range min(n, maxData/(recordSize+size)) {
		raw = appendRecord(raw, owner, kind, size)
		raw = append(raw, addresses[(first+i)%n*size:][:size]...)
	}
	return raw
}
