package httpforward

import (
	"strconv"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// mirrorCall sends the copies of a request that has been passed on. They are made as HTTP/1, and translated where their
// endpoints speak HTTP/2: see Engine.mirror.
func (h *hub) mirrorCall(c *call) {
	mirrors := c.decision.Mirrors
	c.decision.Mirrors = nil
	if !c.req.keep || c.tunnel { // it is too long, or does not end
		endMirrors(mirrors, flow.Overload)
		h.engine.config.Pool.Stats.CopiesDropped.Add(uint64(len(mirrors)))
		return
	}
	limit := c.total
	if limit <= 0 {
		limit = copyTime
	}
	h.engine.mirror(mirrors, h.settings, limit, h.appendHTTP1(nil, c), c.req.queue, nil)
	if c.begun {
		c.req.keep = false
	}
}

// appendHTTP1 appends the head of a request as one of HTTP/1, with the edits of its route.
func (h *hub) appendHTTP1(dst []byte, c *call) []byte {
	h.view(c.stream, &c.sent.Request, c.sent.fields)
	path, authority := h.routed.Path, h.routed.Authority
	if c.sent.path != nil {
		path = c.sent.path
	}
	h.routed.Path = path
	if p := c.plan; p != nil {
		h.takeEdited(c.stream)
		if p.RewritesPath {
			path = p.AppendPath(nil, path)
		}
		if p.RewritesHost {
			authority = p.AppendHost(nil, authority)
		}
	}
	dst = append(append(append(append(dst, h.routed.Method...), ' '), path...), " HTTP/1.1\r\nhost: "...)
	dst = append(append(dst, authority...), "\r\n"...)
	if c.plan != nil {
		e := h.editRequest(c.stream, c.sent.has)
		for i := range h.fields.list {
			if !e.gone[i] {
				dst = appendField(dst, &h.fields.list[i])
			}
		}
		dst = e.appendLines(dst)
	} else {
		for i := range h.fields.list {
			if !h.Peers.drops(h.fields.list[i].Name) {
				dst = appendField(dst, &h.fields.list[i])
			}
		}
	}
	if c.request.declared < 0 && len(c.req.queue) > 0 {
		dst = append(strconv.AppendInt(append(dst, "content-length: "...), int64(len(c.req.queue)), 10), "\r\n"...)
	}
	return append(dst, "\r\n"...)
}

// appendField appends a field as a line of HTTP/1. The host is a line of its own.
func appendField(dst []byte, f *http2.Field) []byte {
	switch f.Name {
	case "host":
		return dst
	case "te":
		dst = append(dst, "connection: te\r\n"...)
	}
	return appendLine(dst, f.Name, f.Value)
}

// dropMirrors ends the leases of copies that are not sent.
func (h *hub) dropMirrors(c *call) {
	if mirrors := c.decision.Mirrors; len(mirrors) > 0 {
		c.decision.Mirrors = nil
		endMirrors(mirrors, flow.Overload)
		h.engine.config.Pool.Stats.CopiesDropped.Add(uint64(len(mirrors)))
	}
}
