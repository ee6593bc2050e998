package admin

import (
	"net/http"

	"github.com/pillion-proxy/pillion/internal/ownport"
)

const (
	maxRequests = 32       // answered at the same time
	maxBody     = 64 << 10 // of a request
)

// refuses returns the reason why the request is refused, or an empty string.
//
// Loopback keeps strangers' connections out, but not a browser on this machine, such as that of somebody who forwards
// the port from a cluster. A page from anywhere can make it POST to 127.0.0.1, and can be served under a name that
// later resolves to 127.0.0.1, so that what it asks counts as its own site's. The first kind of request carries the
// page's origin and the second kind the page's name as Host; tools carry neither.
func (h *handler) refuses(r *http.Request) string {
	if !ownport.FromLoopback(r) {
		return "Only requests from localhost are allowed"
	}
	if !ownport.NamesLoopback(r.Host) {
		return "the Host is neither localhost nor a loopback address: ask by such a name"
	}
	if h.foreign.Check(r) != nil { // which lets GET and HEAD pass; neither changes anything
		return "a page of another site asks for this: ask from this site, or with a tool"
	}
	return ""
}
