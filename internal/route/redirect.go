package route

import (
	"bytes"
	"net/http"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

func redirectReply(status int, location string) *Reply {
	return &Reply{
		Status: status, Fields: []Field{{"location", location}},
		Details: envoy.DetailsDirectResponse, Reason: flow.Completed, Edited: true,
	}
}

// secureRedirect returns the redirect of a request that came without TLS to a virtual host that requires it.
func secureRedirect(r *Request) *Reply {
	if portStart(r.Authority) == 0 {
		return noHost
	}
	reply := redirectReply(http.StatusMovedPermanently, "https://"+string(r.Authority)+string(origin(r.Path)))
	reply.Edited = false
	return reply
}

// redirect returns the redirect of a request by the route.
func (c *Cluster) redirect(r *Request) *Reply {
	to := c.route.Redirect
	scheme, host := to.Scheme, to.Host
	if scheme == "" {
		scheme = requestScheme(r)
	}
	if host == "" {
		if portStart(r.Authority) == 0 {
			return noHost
		}
		host = redirectHost(to, r, scheme)
	}
	location := scheme + "://" + host
	if to.Port != 0 {
		location += ":" + strconv.Itoa(int(to.Port))
	}
	return redirectReply(to.Code, location+c.redirectPath(r))
}

func requestScheme(r *Request) string {
	if len(r.Scheme) > 0 {
		return strings.ToLower(string(r.Scheme))
	}
	if proto := forwardedProto(r); len(proto) > 0 {
		return string(proto)
	}
	return "http"
}

// redirectHost returns the host of a request. It has no port if the redirect has one, or if the redirect changes the scheme
// and the port is that of the old one.
func redirectHost(to *mesh.Redirect, r *Request, scheme string) string {
	host := r.Authority
	start := portStart(host)
	port, proto := string(host[start:]), string(forwardedProto(r))
	standard := proto == "https" && port == ":443" || proto == "http" && port == ":80"
	if to.Port != 0 || scheme != proto && standard {
		host = host[:start]
	}
	return string(host)
}

// redirectPath returns the path and the query of a redirect.
func (c *Cluster) redirectPath(r *Request) string {
	to := c.route.Redirect
	target := origin(r.Path)
	switch {
	case strings.Contains(to.Path, "?"):
		return rooted(to.Path) // its query is not stripped
	case to.Path != "":
		target = append([]byte(to.Path), target[queryStart(target):]...)
	case to.Prefix != "":
		w := pathRewrite{match: &c.route.Match, prefix: to.Prefix}
		target = w.append(nil, target)
	case to.Regex != nil:
		w := pathRewrite{regex: c.redirectRegex}
		target = w.append(nil, target)
	}
	if to.StripQuery {
		target = target[:queryStart(target)]
	}
	return rooted(string(target))
}

func queryStart(target []byte) int {
	if i := bytes.IndexByte(target, '?'); i >= 0 {
		return i
	}
	return len(target)
}

func rooted(path string) string {
	if strings.HasPrefix(path, "/") {
		return path
	}
	return "/" + path
}
