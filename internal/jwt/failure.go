package jwt

import (
	"net/http"
	"strings"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/route"
)

// denial is why a token is not accepted, in Envoy's words.
type denial struct {
	text   string
	status int
}

// The failures. The texts are those of Envoy's library jwt_verify_lib, by which people search.
var (
	missing       = &denial{"Jwt is missing", http.StatusUnauthorized}
	malformed     = &denial{"Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections", http.StatusUnauthorized}
	badHeader     = &denial{"Jwt header is an invalid JSON", http.StatusUnauthorized}
	badAlgorithm  = &denial{"Header alg is not supported", http.StatusUnauthorized}
	badPayload    = &denial{"Jwt payload is an invalid JSON", http.StatusUnauthorized}
	badTime       = &denial{"Jwt payload [exp], [nbf] or [iat] field value is invalid", http.StatusUnauthorized}
	unknownIssuer = &denial{"Jwt issuer is not configured", http.StatusUnauthorized}
	expired       = &denial{"Jwt is expired", http.StatusUnauthorized}
	notYetValid   = &denial{"Jwt not yet valid", http.StatusUnauthorized}
	otherAudience = &denial{"Audiences in Jwt are not allowed", http.StatusForbidden}
	noKey         = &denial{"Jwks doesn't have key to match kid or alg from Jwt", http.StatusUnauthorized}
	badSignature  = &denial{"Jwt verification fails", http.StatusUnauthorized}
	noKeys        = &denial{"Jwks remote fetch is failed", http.StatusUnauthorized}
	awaited       = &denial{"Jwks are being fetched", http.StatusUnauthorized} // see Result.Awaited
	tooMany       = &denial{"Too many Jwts", http.StatusUnauthorized}
	notConfigured = &denial{"Jwt requirement is not understood", http.StatusUnauthorized}
)

// maxRealm bounds the URI in a challenge.
const maxRealm = 256

// deny returns the reply to a request whose tokens fail.
func (f *Filter) deny(failure *denial, r *route.Request) *route.Reply {
	reply := &route.Reply{
		Status:  failure.status,
		Details: "jwt_authn_access_denied{" + strings.ReplaceAll(failure.text, " ", "_") + "}",
		Reason:  flow.PolicyDenied,
		Edited:  true,
	}
	if !f.source.TerseFailures {
		reply.Body = failure.text
	}
	if failure.status == http.StatusUnauthorized {
		challenge := `Bearer realm="` + realm(r) + `"`
		if failure != missing {
			challenge += `, error="invalid_token"`
		}
		reply.Fields = []route.Field{{Name: "www-authenticate", Value: challenge}}
	}
	return reply
}

// realm returns the request's URI without its query, as far as it may stand in a quoted string.
func realm(r *route.Request) string {
	path := string(r.Path)
	if i := strings.IndexAny(path, "?#"); i >= 0 {
		path = path[:i]
	}
	uri := string(r.Scheme) + "://" + string(r.Authority) + path
	if len(uri) > maxRealm {
		uri = uri[:maxRealm]
	}
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			return -1
		}
		return c
	}, uri)
}
