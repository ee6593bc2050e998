package jwt

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"math"
	"strconv"
	"strings"

	"github.com/go-jose/go-jose/v4"

	"github.com/pillion-proxy/pillion/internal/route"
)

// place is where a token is.
type place struct {
	kind placeKind
	name string // in lower case in a header
}

type placeKind uint8

const (
	inHeader placeKind = iota
	inParam
	inCookie
)

// token is a token as it was received.
type token struct {
	text  string
	place place
}

// algorithms are the signatures that are accepted; "none" is not one. Which of them a key verifies depends on its type.
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
	jose.ES256, jose.ES384, jose.ES512, jose.EdDSA, jose.HS256, jose.HS384, jose.HS512,
}

// parsed is a token whose signature is not verified yet.
type parsed struct {
	jws     *jose.JSONWebSignature
	payload map[string]any
	raw     []byte // of payload
}

// parse parses a token. Its content is not verified.
func parse(text string) (*parsed, *denial) {
	if strings.Count(text, ".") != 2 || strings.IndexFunc(text, notOfToken) >= 0 { // base64 ignores line breaks
		return nil, malformed
	}
	jws, err := jose.ParseSignedCompact(text, algorithms)
	if err != nil {
		return nil, whyNot(text)
	}
	p := &parsed{jws: jws, raw: jws.UnsafePayloadWithoutVerification()}
	decoder := json.NewDecoder(bytes.NewReader(p.raw))
	if err := decoder.Decode(&p.payload); err != nil || p.payload == nil || decoder.InputOffset() != int64(len(bytes.TrimRight(p.raw, " \t\r\n"))) {
		return nil, badPayload
	}
	return p, nil
}

// whyNot returns why a token cannot be parsed.
func whyNot(text string) *denial {
	encoded, _, _ := strings.Cut(text, ".")
	header, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(encoded, "="))
	if err != nil {
		return malformed
	}
	var h struct {
		Algorithm string `json:"alg"`
	}
	if json.Unmarshal(header, &h) != nil {
		return badHeader
	}
	for _, a := range algorithms {
		if string(a) == h.Algorithm {
			return malformed
		}
	}
	return badAlgorithm
}

func (p *parsed) issuer() string {
	issuer, _ := p.payload["iss"].(string)
	return issuer
}

// audiences returns the texts of the claim aud: a text or a list.
func (p *parsed) audiences() (audiences []string) {
	switch aud := p.payload["aud"].(type) {
	case string:
		return []string{aud}
	case []any:
		for _, a := range aud {
			if text, ok := a.(string); ok {
				audiences = append(audiences, text)
			}
		}
	}
	return audiences
}

// seconds returns a claim that is a time. present is false without it.
func (p *parsed) seconds(claim string) (seconds float64, present, ok bool) {
	value, present := p.payload[claim]
	if !present {
		return 0, false, true
	}
	seconds, ok = value.(float64)
	return seconds, true, ok && !math.IsNaN(seconds) && seconds >= 0
}

// encoded returns the payload as base64url.
func (p *parsed) encoded(pad bool) string {
	if pad {
		return base64.URLEncoding.EncodeToString(p.raw)
	}
	return base64.RawURLEncoding.EncodeToString(p.raw)
}

// primitive returns a claim that is a text, a number or a boolean. Names with dots lead into objects.
func (p *parsed) primitive(name string) (string, bool) {
	var value any = p.payload
	for key := range strings.SplitSeq(name, ".") {
		object, _ := value.(map[string]any)
		if value = object[key]; value == nil {
			return "", false
		}
	}
	switch v := value.(type) {
	case string:
		return v, isFieldValue(v)
	case bool:
		return strconv.FormatBool(v), true
	case float64:
		if v == math.Trunc(v) && math.Abs(v) < 1<<53 {
			return strconv.FormatInt(int64(v), 10), true
		}
		return strconv.FormatFloat(v, 'g', -1, 64), true
	}
	return "", false
}

// isFieldValue reports whether a text may be the value of a header field as it is.
func isFieldValue(text string) bool {
	for i := range len(text) {
		if c := text[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// maxTokens bounds the tokens of a request at the places of one provider.
const maxTokens = 8

// tokens returns the tokens at the places of a provider.
func (p *provider) tokens(r *route.Request) (tokens []token) {
	for i := range p.headers {
		h := &p.headers[i]
		for k := 0; r.Fields != nil && k < r.Fields.Len(); k++ {
			name, value := r.Fields.At(k)
			if len(name) != len(h.Name) || !strings.EqualFold(string(name), h.Name) {
				continue
			}
			if text, ok := extract(string(value), h.Prefix); ok {
				tokens = append(tokens, token{text, place{inHeader, h.Name}})
			}
		}
	}
	for _, name := range p.params {
		for value := range route.Parameters(r.Path, name) {
			tokens = append(tokens, token{string(value), place{inParam, name}})
		}
	}
	for _, name := range p.source.Cookies {
		if value, ok := route.Cookie(r.Fields, name); ok {
			tokens = append(tokens, token{string(value), place{inCookie, name}})
		}
	}
	return tokens
}

// extract returns the token behind a prefix of a header field's value: the first run of the bytes that tokens have. Without
// the prefix there is no token.
func extract(value, prefix string) (string, bool) {
	i := strings.Index(value, prefix)
	if i < 0 {
		return "", false
	}
	rest := value[i+len(prefix):]
	if prefix == "" {
		return rest, true
	}
	rest = strings.TrimLeftFunc(rest, notOfToken)
	if end := strings.IndexFunc(rest, notOfToken); end >= 0 {
		rest = rest[:end]
	}
	return rest, true
}

func notOfToken(c rune) bool {
	return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.')
}
