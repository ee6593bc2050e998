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
	var head []byte
	if c.req.keep && !c.tunnel { // otherwise it is too long, or does not end
		head = h.appendHTTP1(nil, c)
	}
	if head == nil {
		endMirrors(mirrors, flow.Overload)
		h.engine.config.Pool.Stats.CopiesDropped.Add(uint64(len(mirrors)))
		return
	}
	limit := c.total
	if limit <= 0 {
		limit = copyTime
	}
	h.engine.mirror(mirrors, h.settings, limit, head, c.req.queue, nil)
	if c.begun {
		c.req.keep = false
	}
}

// appendHTTP1 appends the head of a whole request as one of HTTP/1, with the edits of its route. It returns nil if HTTP/1 cannot
// express the request.
func (h *hub) appendHTTP1(dst []byte, c *call) []byte {
	h.takePeers(c)
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
	request := http2.Request{Method: string(h.routed.Method), Path: string(path), Authority: string(authority)}
	if request.Path == "" || !expressible(&request) {
		return nil
	}
	var e *edited
	if c.plan != nil {
		e = h.editRequest(c.stream, c.sent.has)
	}
	kept := make([]http2.Field, 0, len(h.fields.list))
	for i := range h.fields.list {
		f := &h.fields.list[i]
		if e == nil && !h.Peers.drops(f.Name) || e != nil && !e.gone[i] {
			kept = append(kept, *f)
		}
	}
	dst = appendHeadHTTP1(dst, &request, kept)
	if e != nil {
		dst = e.appendLines(dst)
	}
	if c.request.declared >= 0 || len(c.req.queue) > 0 {
		dst = append(strconv.AppendInt(append(dst, "content-length: "...), int64(len(c.req.queue)), 10), "\r\n"...)
	}
	return append(dst, "\r\n"...)
}

// dropMirrors ends the leases of copies that are not sent.
func (h *hub) dropMirrors(c *call) {
	if mirrors := c.decision.Mirrors; len(mirrors) > 0 {
		c.decision.Mirrors = nil
		endMirrors(mirrors, flow.Overload)
		h.engine.config.Pool.Stats.CopiesDropped.Add(uint64(len(mirrors)))
	}
}
