package jwt

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// provider is a compiled mesh.JWTProvider.
type provider struct {
	source  *mesh.JWTProvider
	headers []mesh.TokenHeader // names in lower case
	params  []string
	keys    *KeySet // nil: they are fetched
}

func compileProvider(p *mesh.JWTProvider) *provider {
	c := &provider{source: p, params: p.Params}
	if p.Remote == nil {
		c.keys = ParseKeys(p.Keys)
	}
	for _, h := range p.Headers {
		c.headers = append(c.headers, mesh.TokenHeader{Name: strings.ToLower(h.Name), Prefix: h.Prefix})
	}
	if len(p.Headers)+len(p.Params)+len(p.Cookies) == 0 {
		c.headers = []mesh.TokenHeader{{Name: "authorization", Prefix: "Bearer "}}
		c.params = []string{"access_token"}
	}
	return c
}

// KeySet has the keys of a JSON Web Key Set that can be used: public ones, and secrets. It is never changed.
type KeySet struct{ keys []jose.JSONWebKey }

// Len returns the number of keys.
func (k *KeySet) Len() int { return len(k.keys) }

// ParseKeys returns the keys of a JSON Web Key Set. A set that cannot be parsed is empty, and verifies no token.
func ParseKeys(set []byte) *KeySet { return &KeySet{parseKeys(set)} }

// maxRSABits bounds RSA keys: the cost of a verification grows with the square of their size.
const maxRSABits = 8192

func parseKeys(set []byte) (keys []jose.JSONWebKey) {
	var raw struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if json.Unmarshal(set, &raw) != nil {
		return nil
	}
	for _, text := range raw.Keys {
		var key jose.JSONWebKey
		if json.Unmarshal(text, &key) != nil || key.Use == "enc" {
			continue
		}
		secret, symmetric := key.Key.([]byte)
		if !symmetric && !key.IsPublic() {
			key = key.Public()
		}
		if public, ok := key.Key.(*rsa.PublicKey); ok && public.N.BitLen() > maxRSABits {
			continue
		}
		if key.Valid() || len(secret) > 0 {
			keys = append(keys, key)
		}
	}
	return keys
}

// ownFields returns the names of the header fields that the provider's claims are sent in.
func (p *provider) ownFields() (names []string) {
	if p.source.PayloadHeader != "" {
		names = append(names, strings.ToLower(p.source.PayloadHeader))
	}
	for _, h := range p.source.ClaimHeaders {
		names = append(names, strings.ToLower(h.Header))
	}
	return names
}

// has reports whether the provider's tokens may be at a place.
func (p *provider) has(at place) bool {
	switch at.kind {
	case inHeader:
		return slices.ContainsFunc(p.headers, func(h mesh.TokenHeader) bool { return h.Name == at.name })
	case inParam:
		return slices.Contains(p.params, at.name)
	}
	return slices.Contains(p.source.Cookies, at.name)
}

// verify verifies a token, in Envoy's order: form, issuer, times, audience, signature. audiences replace the provider's.
func (p *provider) verify(text string, audiences []string, now time.Time, remote Keys) (*parsed, *denial) {
	t, failure := parse(text)
	if failure != nil {
		return nil, failure
	}
	if p.source.Issuer != "" && t.issuer() != p.source.Issuer {
		return nil, unknownIssuer
	}
	if failure := p.checkTimes(t, now); failure != nil {
		return nil, failure
	}
	if len(audiences) == 0 {
		audiences = p.source.Audiences
	}
	if len(audiences) > 0 && !slices.ContainsFunc(t.audiences(), func(a string) bool { return hasAudience(audiences, a) }) {
		return nil, otherAudience
	}
	keys := p.keys
	if keys == nil {
		if remote == nil {
			return nil, noKeys
		}
		known := false
		switch keys, known = remote.Keys(p.source.Remote); {
		case !known:
			return nil, awaited
		case keys == nil:
			return nil, noKeys
		}
	}
	failure = checkSignature(t, keys)
	if failure == noKey && p.keys == nil && t.jws.Signatures[0].Protected.KeyID != "" {
		if remote.Renew(p.source.Remote) {
			return t, awaited
		}
		if newer, _ := remote.Keys(p.source.Remote); newer != nil && newer != keys { // they have come meanwhile
			failure = checkSignature(t, newer)
		}
	}
	return t, failure
}

// Keys has the keys of issuers that are fetched from servers.
type Keys interface {
	// Keys returns the keys of an issuer, and nil if they could not be fetched. known is false while they are being fetched.
	Keys(from *mesh.RemoteKeys) (keys *KeySet, known bool)

	// Renew fetches keys because a token names one that is not among them. It returns false if they are too recent for
	// that: everybody can make such tokens.
	Renew(from *mesh.RemoteKeys) bool
}

func (p *provider) checkTimes(t *parsed, now time.Time) *denial {
	at, skew := float64(now.UnixNano())/1e9, p.source.ClockSkew.Seconds()
	until, expires, ok1 := t.seconds("exp")
	from, begins, ok2 := t.seconds("nbf")
	_, _, ok3 := t.seconds("iat")
	switch {
	case !ok1 || !ok2 || !ok3:
		return badTime
	case begins && at+skew < from:
		return notYetValid
	case expires && at > until+skew:
		return expired
	}
	return nil
}

// hasAudience compares audiences without their scheme and a slash at their end, as Envoy does.
func hasAudience(allowed []string, audience string) bool {
	return slices.ContainsFunc(allowed, func(a string) bool { return bare(a) == bare(audience) })
}

func bare(audience string) string {
	audience = strings.TrimPrefix(strings.TrimPrefix(audience, "https://"), "http://")
	return strings.TrimSuffix(audience, "/")
}

// checkSignature tries the keys with the token's kid, or those that fit its algorithm if one of the two has no kid.
func checkSignature(t *parsed, set *KeySet) *denial {
	header := t.jws.Signatures[0].Protected
	why := noKey
	for i := range set.keys {
		key := &set.keys[i]
		if header.KeyID != "" && key.KeyID != "" && key.KeyID != header.KeyID || !fits(key, jose.SignatureAlgorithm(header.Algorithm)) {
			continue
		}
		if _, err := t.jws.Verify(key.Key); err == nil {
			return nil
		}
		why = badSignature
	}
	return why
}

// curves are the sizes in bits of the curves of algorithms.
var curves = map[jose.SignatureAlgorithm]int{jose.ES256: 256, jose.ES384: 384, jose.ES512: 521}

// fits reports whether a key is one of an algorithm. A public key is never taken for a secret.
func fits(key *jose.JSONWebKey, algorithm jose.SignatureAlgorithm) bool {
	if key.Algorithm != "" && key.Algorithm != string(algorithm) {
		return false
	}
	switch k := key.Key.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(string(algorithm), "RS") || strings.HasPrefix(string(algorithm), "PS")
	case *ecdsa.PublicKey:
		return curves[algorithm] == k.Curve.Params().BitSize
	case ed25519.PublicKey:
		return algorithm == jose.EdDSA
	case []byte:
		return strings.HasPrefix(string(algorithm), "HS")
	}
	return false
}

// split returns the payload with the texts of some claims as lists of their words.
func (p *provider) split(payload map[string]any) map[string]any {
	for _, claim := range append([]string{"scope", "permission"}, p.source.SpaceClaims...) {
		text, ok := payload[claim].(string)
		if !ok {
			continue
		}
		var words []any
		for word := range strings.SplitSeq(text, " ") {
			if word != "" {
				words = append(words, word)
			}
		}
		payload[claim] = words
	}
	return payload
}
