package route

import (
	"slices"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// domains finds the virtual host of a request's host by one pass over its bytes in each direction that wildcards need.
type domains struct {
	hosts    []mesh.VirtualHost
	index    index // of hosts by the hash of a domain
	suffixes []int // the lengths of the domains that are suffixes, ascending
	prefixes []int
	any      int // the host of *; -1 without one
}

func indexDomains(hosts []mesh.VirtualHost) domains {
	d := domains{hosts: hosts, any: -1}
	n := 0
	for i := range hosts {
		n += len(hosts[i].Domains)
	}
	d.index = newIndex(n)
	for i := range hosts {
		for _, domain := range hosts[i].Domains {
			d.add(i, domain)
		}
	}
	for _, lengths := range []*[]int{&d.suffixes, &d.prefixes} {
		slices.Sort(*lengths)
		*lengths = slices.Clip(slices.Compact(*lengths))
	}
	return d
}

func (d *domains) add(host int, domain mesh.Domain) {
	h := hashStart(byte(domain.Kind))
	switch domain.Kind {
	case mesh.DomainAny:
		d.any = host
		return
	case mesh.DomainSuffix:
		for i := len(domain.Text) - 1; i >= 0; i-- {
			h = hashByte(h, domain.Text[i])
		}
		d.suffixes = append(d.suffixes, len(domain.Text))
	default:
		for _, c := range []byte(domain.Text) {
			h = hashByte(h, c)
		}
		if domain.Kind == mesh.DomainPrefix {
			d.prefixes = append(d.prefixes, len(domain.Text))
		}
	}
	d.index.add(h, host)
}

// find returns the index of the virtual host that is for name, or -1. An exact domain comes before suffixes, and these
// before prefixes. The longest one is used.
func (d *domains) find(name []byte) int {
	if i := d.exact(name); i >= 0 {
		return i
	}
	if i := d.suffix(name); i >= 0 {
		return i
	}
	if i := d.prefix(name); i >= 0 {
		return i
	}
	return d.any
}

func (d *domains) exact(name []byte) int {
	h := hashStart(byte(mesh.DomainExact))
	for _, c := range name {
		h = hashByte(h, lower(c))
	}
	return d.get(h, mesh.DomainExact, name)
}

func (d *domains) suffix(name []byte) (found int) {
	found = -1
	h, done := hashStart(byte(mesh.DomainSuffix)), 0
	for _, length := range d.suffixes {
		if length >= len(name) { // the star stands for at least one byte
			break
		}
		for ; done < length; done++ {
			h = hashByte(h, lower(name[len(name)-1-done]))
		}
		if i := d.get(h, mesh.DomainSuffix, name[len(name)-length:]); i >= 0 {
			found = i
		}
	}
	return found
}

func (d *domains) prefix(name []byte) (found int) {
	found = -1
	h, done := hashStart(byte(mesh.DomainPrefix)), 0
	for _, length := range d.prefixes {
		if length >= len(name) {
			break
		}
		for ; done < length; done++ {
			h = hashByte(h, lower(name[done]))
		}
		if i := d.get(h, mesh.DomainPrefix, name[:length]); i >= 0 {
			found = i
		}
	}
	return found
}

// get returns the host that has a domain, or -1. text may be in any case.
func (d *domains) get(hash uint64, kind mesh.DomainKind, text []byte) int {
	for p := d.index.probe(hash); p.next(&d.index); {
		for _, domain := range d.hosts[p.value].Domains {
			if domain.Kind == kind && equalFold(text, domain.Text) {
				return p.value
			}
		}
	}
	return -1
}

// index is a hash table from hashes to small numbers. It does not have the keys: its users compare them.
type index struct {
	slots []slot // a power of two of them, at most half of them used
}

type slot struct {
	hash  uint32
	value int32 // plus 1; 0: the slot is free
}

func newIndex(n int) index {
	size := 2
	for size < 2*n {
		size *= 2
	}
	return index{slots: make([]slot, size)}
}

func (x *index) add(hash uint64, value int) {
	i := int(hash) & (len(x.slots) - 1)
	for x.slots[i].value != 0 {
		i = (i + 1) & (len(x.slots) - 1)
	}
	x.slots[i] = slot{uint32(hash >> 32), int32(value) + 1}
}

// probe is a search in an index.
type probe struct {
	value int // that next found
	hash  uint64
	at    int
}

func (x *index) probe(hash uint64) probe { return probe{hash: hash, at: int(hash)} }

// next reports whether there is a further value with the hash.
func (p *probe) next(x *index) bool {
	for {
		s := x.slots[p.at&(len(x.slots)-1)]
		p.at++
		switch {
		case s.value == 0:
			return false
		case s.hash == uint32(p.hash>>32):
			p.value = int(s.value) - 1
			return true
		}
	}
}

// hashStart and hashByte are FNV-1a with a seed. Its low and high halves are both used. Keys are those of the control plane,
// and an index is at most half full, so that a chosen name cannot make a search long.
func hashStart(seed byte) uint64 { return hashByte(14695981039346656037, seed) }

func hashByte(h uint64, c byte) uint64 { return (h ^ uint64(c)) * 1099511628211 }
