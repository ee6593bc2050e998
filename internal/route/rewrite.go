package route

import (
	"bytes"
	"slices"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// pathRewrite is how a path is rewritten.
type pathRewrite struct {
	match  *mesh.RouteMatch
	prefix string   // takes the place of the part that matched
	regex  *rewrite // of the path without its query; nil: prefix counts
}

func (w *pathRewrite) rewrites() bool { return w.prefix != "" || w.regex != nil }

// append appends a request's target, with its path rewritten, to dst. Query and fragment stay.
func (w *pathRewrite) append(dst, target []byte) []byte {
	path := origin(target)
	dst = append(dst, target[:max(len(target)-len(path), 0)]...)
	whole := plain(path)
	if w.regex != nil {
		dst = w.regex.append(dst, whole)
		return append(dst, path[len(whole):]...)
	}
	matched := len(w.match.Path)
	if w.match.Kind == mesh.PathRegex {
		matched = len(whole)
	}
	dst = append(dst, w.prefix...)
	return append(dst, path[min(matched, len(path)):]...)
}

// compileRewrites sets the rewrites of a plan, and the edits that tell the original values.
func (p *Plan) compileRewrites(r *mesh.Route, host string) {
	f := r.Forward
	p.path = pathRewrite{match: &r.Match, prefix: f.PrefixRewrite}
	if f.RegexRewrite != nil {
		p.path.regex = compileRewrite(f.RegexRewrite)
	}
	p.host = host
	p.RewritesPath, p.RewritesHost = p.path.rewrites(), host != ""
	if p.RewritesHost && f.ForwardedHost {
		p.RequestEdits = append(p.RequestEdits, Edit{Name: forwardedHost, pieces: []piece{{kind: originalHost}}})
	}
	if p.RewritesPath {
		p.RequestEdits = append(p.RequestEdits, compileEdit("x-envoy-original-path", "%REQ(:path)%", mesh.OverwriteOrAdd, false))
	}
}

const forwardedHost = "x-forwarded-host"

// AppendPath appends the target that is sent, with its query, to dst. The path is that of Request.Path. Only a rewrite by a
// regular expression allocates memory.
func (p *Plan) AppendPath(dst, path []byte) []byte {
	if !p.RewritesPath {
		return append(dst, path...)
	}
	return p.path.append(dst, path)
}

// AppendHost appends the authority that is sent to dst.
func (p *Plan) AppendHost(dst, authority []byte) []byte {
	if !p.RewritesHost {
		return append(dst, authority...)
	}
	return append(dst, p.host...)
}

// MirrorHost returns the authority of a copy of a request for a mirror. authority is the one that the request is sent with.
func MirrorHost(m *mesh.Mirror, authority []byte) []byte {
	switch {
	case m.HostRewrite != "":
		return []byte(m.HostRewrite)
	case m.KeepHost, len(authority) == 0:
		return authority
	}
	port := bytes.LastIndexByte(authority, ':')
	if port < 0 || bytes.IndexByte(authority[port:], ']') >= 0 { // a colon in an address of IPv6
		port = len(authority)
	}
	return slices.Concat(authority[:port], shadow, authority[port:])
}

// shadow is Envoy's suffix of the hosts of copies.
var shadow = []byte("-shadow")
