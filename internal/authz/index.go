package authz

import (
	"math/bits"
	"slices"
	"sort"
	"strings"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// A block is some policies, in their order, and an index. The index excludes policies of which a necessary condition is not met:
// one on the client's names, or on a text of the request. Only the others are evaluated. The policies of a mesh are many and
// differ by path, host, method and client, so that few are left.
type block struct {
	policies   []policy // blockSize at most
	dimensions [dimensions]texts
	unnamed    set        // policies that a client without names may meet
	clients    *[ways]way // by the hash of names; nil: no policy looks at them
}

const blockSize = 256

// set is a set of the policies in a block.
type set [blockSize / 64]uint64

func (s *set) add(i int) { s[i/64] |= 1 << (i % 64) }

func (s *set) join(other *set) {
	for i := range s {
		s[i] |= other[i]
	}
}

// dimension is a part of requests by whose texts policies are excluded.
type dimension uint8

const (
	byPath  dimension = iota
	byField           // names of fields that have to be present
	byAuthority
	byMethod
	dimensions
)

func newBlocks(policies []policy) (blocks []block) {
	for len(policies) > 0 {
		n := min(len(policies), blockSize)
		blocks, policies = append(blocks, newBlock(policies[:n])), policies[n:]
	}
	return blocks
}

func newBlock(policies []policy) block {
	b := block{policies: policies}
	for i := range policies {
		p := &policies[i]
		if p.may(&Subject{}) != no {
			b.unnamed.add(i)
		}
		if b.clients == nil && p.looksAt(mesh.ConditionPrincipal) {
			b.clients = new([ways]way)
		}
		for d := range dimensions {
			b.dimensions[d].place(i, p, d)
		}
	}
	for d := range dimensions {
		b.dimensions[d].link()
	}
	return b
}

// match returns the first policy that s meets, or, if perhaps is set, that it may meet, or nil.
func (b *block) match(s *Subject, perhaps bool) *policy {
	left := b.unnamed
	if s.Secured && b.clients != nil {
		left = b.client(s).may
	}
	if s.Request != nil {
		b.exclude(s.Request, &left)
	}
	for i, word := range left {
		for ; word != 0; word &= word - 1 {
			p := &b.policies[i*64+bits.TrailingZeros64(word)]
			if met := p.met(s); met == yes || met == unknown && perhaps {
				return p
			}
		}
	}
	return nil
}

// exclude removes policies that a request does not meet.
func (b *block) exclude(r *Request, left *set) {
	for d := range dimensions {
		t := &b.dimensions[d]
		if !t.excludes(left) {
			continue
		}
		kept := t.free
		switch d {
		case byPath:
			if r.Path != nil {
				t.find(r.plainPath(), &kept)
			}
		case byField:
			for i := 0; r.Fields != nil && i < r.Fields.Len(); i++ {
				if name, _ := r.Fields.At(i); t.lengths>>min(len(name), 63)&1 != 0 {
					t.begin.find(name, false, &kept)
				}
			}
		case byAuthority:
			t.find(r.Authority, &kept)
		case byMethod:
			t.find(r.Method, &kept)
		}
		for i := range left {
			left[i] &= kept[i]
		}
	}
}

// texts are those of which policies need one in a dimension.
type texts struct {
	free       set // policies that need no text
	begin, end sorted
	lengths    uint64 // bit n: a text of begin has n bytes; bit 63: or more
}

// excludes reports whether one of the policies that are left needs a text.
func (t *texts) excludes(left *set) bool {
	for i := range left {
		if left[i]&^t.free[i] != 0 {
			return true
		}
	}
	return false
}

// find adds the policies that need no other text than value has.
func (t *texts) find(value []byte, kept *set) {
	t.begin.find(value, false, kept)
	t.end.find(value, true, kept)
}

// place adds the texts that a policy needs.
func (t *texts) place(i int, p *policy, d dimension) {
	needs, ok := p.permission.needs(d)
	if !ok {
		needs, ok = p.principal.needs(d)
	}
	if !ok {
		t.free.add(i)
		return
	}
	for _, m := range needs {
		list, want := &t.begin, []byte(m.Want)
		for i, c := range want {
			want[i] = lower(c)
		}
		if m.Kind == mesh.MatchSuffix {
			list = &t.end
			slices.Reverse(want)
		} else {
			t.lengths |= 1 << min(len(want), 63)
		}
		e := text{want: string(want)}
		if m.Kind == mesh.MatchExact {
			e.whole.add(i)
		} else {
			e.part.add(i)
		}
		*list = append(*list, e)
	}
}

func (t *texts) link() {
	t.begin.link()
	t.end.link()
}

// sorted is a list of texts in their order, each of them once.
type sorted []text

// text is a text in lower case. In a list of ends it is reversed.
type text struct {
	want  string
	whole set // policies for values that are the text
	part  set // policies for values that begin with the text, or with one that it begins with
	up    int // index of the longest other text that want begins with, or -1
}

// link sorts the texts, joins equal ones, and adds to each the policies of those that it begins with.
func (l *sorted) link() {
	list := *l
	sort.Slice(list, func(i, k int) bool { return list[i].want < list[k].want })
	n := 0
	for i := range list {
		if n > 0 && list[n-1].want == list[i].want {
			list[n-1].whole.join(&list[i].whole)
			list[n-1].part.join(&list[i].part)
			continue
		}
		list[n] = list[i]
		n++
	}
	list = slices.Clip(list[:n])
	for i := range list {
		up := i - 1
		for up >= 0 && !strings.HasPrefix(list[i].want, list[up].want) {
			up = list[up].up
		}
		if list[i].up = up; up >= 0 {
			list[i].part.join(&list[up].part)
		}
	}
	*l = list
}

// find adds the policies of the texts that a value has. A text that a value begins with is the last one that is not behind
// the value in the order, or that one begins with it.
func (l sorted) find(value []byte, back bool, kept *set) {
	low, high, common := 0, len(l), 0
	for low < high {
		middle := int(uint(low+high) / 2)
		n, before := compare(l[middle].want, value, back)
		if before {
			low, common = middle+1, n
		} else {
			high = middle
		}
	}
	i := low - 1
	for i >= 0 && len(l[i].want) > common {
		i = l[i].up
	}
	if i < 0 {
		return
	}
	kept.join(&l[i].part)
	if len(l[i].want) == len(value) {
		kept.join(&l[i].whole)
	}
}

// compare returns how many bytes want and value have in common, and whether value is equal to want or behind it. The bytes
// of value are read in lower case; from its end if back is set.
func compare(want string, value []byte, back bool) (n int, before bool) {
	for n < len(want) && n < len(value) {
		c := value[n]
		if back {
			c = value[len(value)-1-n]
		}
		if c = lower(c); c != want[n] {
			return n, want[n] < c
		}
		n++
	}
	return n, n == len(want)
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// needs returns texts of which a request must have one, or c is not met. It is not ok if there are no such texts.
func (c *condition) needs(d dimension) (texts []match.Text, ok bool) {
	switch c.kind {
	case mesh.ConditionAll:
		for i := range c.of {
			if texts, ok = c.of[i].needs(d); ok {
				return texts, true
			}
		}
		return nil, false
	case mesh.ConditionAny:
		for i := range c.of {
			some, ok := c.of[i].needs(d)
			if !ok {
				return nil, false
			}
			texts = append(texts, some...)
		}
		return texts, true
	case mesh.ConditionPath:
		return []match.Text{c.text}, d == byPath && c.text.Kind <= mesh.MatchSuffix
	case mesh.ConditionHeader:
		return c.needsField(d)
	}
	return nil, false
}

func (c *condition) needsField(d dimension) (texts []match.Text, ok bool) {
	h := c.Header
	switch {
	case h.Invert || h.MissingIsEmpty:
		return nil, false
	case c.name == notPseudo:
		return []match.Text{{Want: h.Name}}, d == byField && (h.Kind != mesh.HeaderPresence || h.Present)
	case h.Kind != mesh.HeaderText || c.text.Kind > mesh.MatchSuffix:
		return nil, false
	}
	return []match.Text{c.text}, d == byMethod && c.name == pseudoMethod || d == byAuthority && c.name == pseudoAuthority
}

// way has the clients whose names have one hash. A further one replaces the oldest.
type way struct {
	clients [4]atomic.Pointer[client]
	next    atomic.Uint32
}

const ways = 32

// client is what the names of a client exclude.
type client struct {
	names []string
	may   set // policies that it may meet
}

// client returns what is kept for the names of s, a connection with TLS.
func (b *block) client(s *Subject) *client {
	w := &b.clients[hash(s.Names)]
	for i := range w.clients {
		if c := w.clients[i].Load(); c != nil && slices.Equal(c.names, s.Names) {
			return c
		}
	}
	c := &client{names: s.Names}
	for i := range b.policies {
		if b.policies[i].may(s) != no {
			c.may.add(i)
		}
	}
	w.clients[w.next.Add(1)%uint32(len(w.clients))].Store(c)
	return c
}

// hash returns a hash of the end of the first name, where workloads differ.
func hash(names []string) uint32 {
	if len(names) == 0 {
		return 0
	}
	sum := uint32(len(names[0]))
	for i := max(0, len(names[0])-24); i < len(names[0]); i++ {
		sum = (sum ^ uint32(names[0][i])) * 16777619 // as in FNV-1a
	}
	return (sum>>16 ^ sum) % ways
}

// may returns the highest value that p can have for the names of s, whatever the rest of s is.
func (p *policy) may(s *Subject) value { return min(p.permission.may(s), p.principal.may(s)) }

func (c *condition) may(s *Subject) value {
	switch {
	case c.kind == mesh.ConditionAll:
		all := yes
		for i := range c.of {
			all = min(all, c.of[i].may(s))
		}
		return all
	case c.kind == mesh.ConditionAny:
		some := no
		for i := range c.of {
			some = max(some, c.of[i].may(s))
		}
		return some
	case c.onNames():
		return c.met(s)
	}
	return yes
}

// onNames reports whether c depends on the names of the client only.
func (c *condition) onNames() bool {
	switch c.kind {
	case mesh.ConditionPrincipal:
		return true
	case mesh.ConditionAll, mesh.ConditionAny, mesh.ConditionNot:
		return len(c.of) > 0 && !slices.ContainsFunc(c.of, func(c condition) bool { return !c.onNames() })
	}
	return false
}
