package route

import (
	"bytes"
	"encoding/hex"
	"math/bits"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xxh64"
)

// hashing is the compiled hash policies of a route.
type hashing struct {
	policies []hashPolicy
	cookies  []Edit // that set the cookies of requests without them
}

type hashPolicy struct {
	source  *mesh.HashPolicy
	rewrite *rewrite // of header fields; may be nil
}

func compileHashing(policies []mesh.HashPolicy) *hashing {
	if len(policies) == 0 {
		return nil
	}
	h := &hashing{}
	for i := range policies {
		p := hashPolicy{source: &policies[i]}
		if p.source.Rewrite != nil {
			p.rewrite = compileRewrite(p.source.Rewrite)
		}
		h.policies = append(h.policies, p)
		if p.source.Kind == mesh.HashCookie && p.source.TTL != nil {
			h.setCookie(p.source)
		}
	}
	return h
}

// setCookie adds the edit of a cookie, unless there is one. istiod adds a policy for each destination of a route.
func (h *hashing) setCookie(p *mesh.HashPolicy) {
	attributes := "\""
	if seconds := int64(p.TTL.Seconds()); seconds != 0 {
		attributes += "; Max-Age=" + strconv.FormatInt(seconds, 10)
	}
	if p.Path != "" {
		attributes += "; Path=" + p.Path
	}
	for _, a := range p.Attributes {
		attributes += "; " + a.Name
		if a.Value != "" {
			attributes += "=" + a.Value
		}
	}
	edit := Edit{Name: "set-cookie", pieces: []piece{
		{text: p.Name + "=\""}, {kind: connectionHash, text: p.Name}, {text: attributes + "; HttpOnly"},
	}}
	if !slices.ContainsFunc(h.cookies, func(e Edit) bool { return slices.Equal(e.pieces, edit.pieces) }) {
		h.cookies = append(h.cookies, edit)
	}
}

// Hash returns the hash of a request that a host is chosen by. It returns false if the route has no hash policy, or if no
// policy yields a hash.
func (c *Cluster) Hash(r *Request) (hash uint64, ok bool) {
	if c.hash == nil {
		return 0, false
	}
	for i := range c.hash.policies {
		p := &c.hash.policies[i]
		if next, yields := p.hash(r); yields {
			hash, ok = bits.RotateLeft64(hash, 1)^next, true
		}
		if p.source.Terminal && ok {
			break
		}
	}
	return hash, ok
}

func (p *hashPolicy) hash(r *Request) (hash uint64, ok bool) {
	switch p.source.Kind {
	case mesh.HashHeader:
		return p.hashHeader(r)
	case mesh.HashCookie:
		return p.hashCookie(r)
	case mesh.HashSourceIP:
		if !r.Downstream.IsValid() {
			return 0, false
		}
		var b [maxAddress]byte
		return xxh64.Sum(r.Downstream.Addr().Unmap().WithZone("").AppendTo(b[:0]), 0), true
	case mesh.HashQuery:
		if value, present := parameter(r.Path, p.source.Name); present {
			return xxh64.Sum(value, 0), true
		}
	}
	return 0, false
}

// hashHeader hashes the values of a field, in their order by bytes. The hash of a value is the seed of the next.
func (p *hashPolicy) hashHeader(r *Request) (hash uint64, ok bool) {
	value, n := r.field(p.source.Name)
	switch {
	case n == 0:
		return 0, false
	case n == 1 && p.rewrite == nil:
		return xxh64.Sum(value, 0), true
	}
	var values [][]byte
	if n == 1 {
		values = append(values, value)
	} else {
		for i := range r.Fields.Len() {
			if name, value := r.Fields.At(i); equalFold(name, p.source.Name) {
				values = append(values, value)
			}
		}
	}
	if p.rewrite != nil {
		for i := range values {
			values[i] = p.rewrite.append(nil, values[i])
		}
	}
	slices.SortFunc(values, bytes.Compare)
	for _, value := range values {
		hash = xxh64.Sum(value, hash)
	}
	return hash, true
}

func (p *hashPolicy) hashCookie(r *Request) (hash uint64, ok bool) {
	if value, present := cookie(r.Fields, p.source.Name); present {
		return xxh64.Sum(value, 0), true
	}
	if p.source.TTL == nil {
		return 0, false
	}
	var b [16]byte
	return xxh64.Sum(appendConnectionHash(b[:0], r), 0), true
}

// maxAddress is the room for the text of an address with its port.
const maxAddress = 64

// appendConnectionHash appends the value of the cookie that a request without one is given: the hash of both ends of its
// connection, as Envoy makes it.
func appendConnectionHash(dst []byte, r *Request) []byte {
	var b [2 * maxAddress]byte
	ends := appendEndpoint(appendEndpoint(b[:0], r.Downstream), r.Local)
	var sum [8]byte
	hash := xxh64.Sum(ends, 0)
	for i := range sum {
		sum[i] = byte(hash >> (56 - 8*i))
	}
	return hex.AppendEncode(dst, sum[:])
}

func appendEndpoint(dst []byte, a netip.AddrPort) []byte {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port()).AppendTo(dst)
}

// cookie returns the value of a cookie, without quotes. An empty one counts as missing.
func cookie(fields Fields, name string) (value []byte, present bool) {
	if fields == nil {
		return nil, false
	}
	for i := range fields.Len() {
		field, rest := fields.At(i)
		if !equalFold(field, "cookie") {
			continue
		}
		for len(rest) > 0 {
			var pair []byte
			pair, rest, _ = bytes.Cut(rest, []byte(";"))
			key, value, found := bytes.Cut(bytes.TrimLeft(pair, " "), []byte("="))
			if !found || string(key) != name {
				continue
			}
			if n := len(value); n >= 2 && value[0] == '"' && value[n-1] == '"' {
				value = value[1 : n-1]
			}
			return value, len(value) > 0
		}
	}
	return nil, false
}

// rewrite is a compiled mesh.RegexRewrite.
type rewrite struct {
	regexp   *regexp.Regexp // nil: the expression is malformed, and texts stay as they are
	template []byte         // in the syntax of Regexp.Expand
}

func compileRewrite(source *mesh.RegexRewrite) *rewrite {
	re, err := regexp.Compile(source.Pattern)
	if err != nil {
		return &rewrite{}
	}
	var template strings.Builder
	for i := 0; i < len(source.Substitution); i++ {
		c := source.Substitution[i]
		switch {
		case c == '$':
			template.WriteString("$$")
		case c != '\\' || i+1 == len(source.Substitution):
			template.WriteByte(c)
		default:
			i++
			if c = source.Substitution[i]; '0' <= c && c <= '9' {
				template.WriteString("${" + string(c) + "}")
			} else {
				template.WriteByte(c)
			}
		}
	}
	return &rewrite{re, []byte(template.String())}
}

// append appends text to dst, with all matches replaced. It allocates memory.
func (w *rewrite) append(dst, text []byte) []byte {
	if w.regexp == nil {
		return append(dst, text...)
	}
	return append(dst, w.regexp.ReplaceAll(text, w.template)...)
}
