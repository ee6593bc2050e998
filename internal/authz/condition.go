package authz

import (
	"bytes"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// condition is a compiled mesh.Condition.
type condition struct {
	kind mesh.ConditionKind // that of Condition, where it costs no look into other memory
	name pseudo             // of a header
	*mesh.Condition
	of      []condition
	text    match.Text     // of its Text, or of its header's Text
	pattern *regexp.Regexp // of its template
}

func compile(c *mesh.Condition) condition {
	if len(c.Of) == 1 && (c.Kind == mesh.ConditionAll || c.Kind == mesh.ConditionAny) {
		return compile(&c.Of[0])
	}
	compiled := condition{kind: c.Kind, Condition: c, of: make([]condition, len(c.Of))}
	for i := range c.Of {
		compiled.of[i] = compile(&c.Of[i])
	}
	switch {
	case c.Text != nil:
		compiled.text = match.Compile(c.Text)
	case c.Header != nil:
		compiled.text, compiled.name = match.Compile(&c.Header.Text), pseudoOf(c.Header.Name)
	case c.Kind == mesh.ConditionTemplate:
		compiled.pattern = compileTemplate(c.Template)
	}
	return compiled
}

func (c *condition) looksAt(kind mesh.ConditionKind) bool {
	return c.kind == kind || slices.ContainsFunc(c.of, func(c condition) bool { return c.looksAt(kind) })
}

// met returns the value of a condition.
func (c *condition) met(s *Subject) value {
	switch c.kind {
	case mesh.ConditionTrue:
		return yes
	case mesh.ConditionAll:
		all := yes
		for i := 0; i < len(c.of) && all != no; i++ {
			all = min(all, c.of[i].met(s))
		}
		return all
	case mesh.ConditionAny:
		some := no
		for i := 0; i < len(c.of) && some != yes; i++ {
			some = max(some, c.of[i].met(s))
		}
		return some
	case mesh.ConditionNot:
		if len(c.of) != 1 {
			return unknown
		}
		return -c.of[0].met(s)
	case mesh.ConditionDestination:
		return truth(c.Addresses.Contains(s.Destination.Addr().Unmap()))
	case mesh.ConditionPeer:
		return c.address(s.Peer)
	case mesh.ConditionClient:
		return c.address(s.Client)
	case mesh.ConditionPort:
		port := int32(s.Destination.Port())
		return truth(c.Start <= port && port < c.End)
	case mesh.ConditionServerName:
		return c.text.MatchString(s.ServerName)
	case mesh.ConditionPrincipal:
		return c.principal(s)
	}
	if s.Request == nil {
		return unknown // of a request that is not known yet
	}
	return c.metByRequest(s.Request)
}

// address looks for the address of a client. One that is not known may be any.
func (c *condition) address(a netip.Addr) value {
	if !a.IsValid() {
		return unknown
	}
	return truth(c.Addresses.Contains(a.Unmap()))
}

// principal looks for a name in the client's certificate.
func (c *condition) principal(s *Subject) value {
	if !s.Secured || c.Text == nil {
		return truth(s.Secured)
	}
	some := no
	for _, name := range s.Names {
		some = max(some, c.text.MatchString(name))
	}
	return some
}

func (c *condition) metByRequest(r *Request) value {
	switch c.kind {
	case mesh.ConditionHeader:
		return c.header(r)
	case mesh.ConditionPath:
		if r.Path == nil {
			return no
		}
		return c.text.Match(r.plainPath())
	case mesh.ConditionTemplate:
		return c.template(r)
	case mesh.ConditionMetadata:
		if r.Metadata == nil {
			return truth(c.Metadata.Invert)
		}
		return r.Metadata.Match(c.Metadata)
	}
	return unknown
}

// plainPath returns the path without its query and fragment. It is looked for once.
func (r *Request) plainPath() []byte {
	if r.plain == nil {
		r.plain = pathOnly(r.Path)
	}
	return r.plain
}

// pathOnly returns a path without its query and fragment.
func pathOnly(path []byte) []byte {
	if i := bytes.IndexAny(path, "?#"); i >= 0 {
		return path[:i]
	}
	return path
}

// pathBytes are the bytes of a path segment (pchar of RFC 3986, section 3.3), with the percent sign of escapes.
const pathBytes = `a-zA-Z0-9\-._~%!$&'()*+,;=:@`

// compileTemplate returns the pattern of a template. A segment * stands for the bytes of one segment, at least one; ** for
// any bytes of a path.
func compileTemplate(template string) *regexp.Regexp {
	var b strings.Builder
	b.WriteString(`^`)
	for i, segment := range strings.Split(template, "/") {
		if i > 0 {
			b.WriteByte('/')
		}
		switch segment {
		case "*":
			b.WriteString(`[` + pathBytes + `]+`)
		case "**":
			b.WriteString(`[/` + pathBytes + `]*`)
		default:
			b.WriteString(regexp.QuoteMeta(segment))
		}
	}
	pattern, err := regexp.Compile(b.String() + `$`)
	if err != nil {
		return nil
	}
	return pattern
}

// template matches the path with a template. A path with bytes that no path has might be read in another way by a server.
func (c *condition) template(r *Request) value {
	path := r.plainPath()
	switch {
	case r.Path == nil:
		return no
	case c.pattern == nil:
		return unknown
	case c.pattern.Match(path):
		return yes
	}
	for _, b := range path {
		if b != '/' && !isPathByte(b) {
			return unknown
		}
	}
	return no
}

func isPathByte(b byte) bool {
	return 'a' <= b|0x20 && b|0x20 <= 'z' || '0' <= b && b <= '9' || strings.IndexByte("-._~%!$&'()*+,;=:@", b) >= 0
}
