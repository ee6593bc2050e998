package admin

import (
	"net/http"

	"github.com/pillion-proxy/pillion/internal/ownport"
)

const (
	maxRequests = 32       // in progress at the same time
	maxBody     = 64 << 10 // of a request
)

// refuses returns the reason why the request is refused, or an empty string.
//
// Loopback excludes connections from other machines, but not a browser on this machine, for example of a user who forwards
// the port from a cluster. Any page can make the browser POST to 127.0.0.1. A page whose name later resolves to 127.0.0.1
// can also read the responses. Requests of the first kind carry the page's origin, those of the second kind the page's name
// as Host. Tools send neither.
func (h *handler) refuses(r *http.Request) string {
	if !ownport.FromLoopback(r) {
		return "Only requests from localhost are allowed"
	}
	if !ownport.NamesLoopback(r.Host) {
		return "the Host is neither localhost nor a loopback address: use one of these"
	}
	if h.foreign.Check(r) != nil { // GET and HEAD pass: they change nothing
		return "the request comes from a page of another site: use this site or a tool"
	}
	return ""
}
