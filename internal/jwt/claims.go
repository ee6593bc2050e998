package jwt

import (
	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Claims are the payloads of the verified tokens of a request. A nil Claims is without any.
type Claims struct {
	payloads match.Metadata // by the keys that providers have for them
}

// filterName is the name under which policies and routes look for claims.
const filterName = "envoy.filters.http.jwt_authn"

// Match compares a claim. A missing claim does not match; m.Invert inverts that as well.
func (c *Claims) Match(m *mesh.MetadataMatcher) match.Value {
	if c == nil || m.Filter != filterName {
		return match.Metadata(nil).Match(m)
	}
	return c.payloads.Match(m)
}
