package jwt

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// signRaw returns a token with any protected header, signed by a secret.
func signRaw(header, payload string) string {
	return mac(base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(payload)))
}

// Headers of tokens that lead to another key, another meaning or another algorithm are not accepted, although the signature is right.
func TestAttacksInTheHeaderOfAToken(t *testing.T) {
	keys := keySet(jose.JSONWebKey{Key: secretKey, KeyID: "s"})
	j := istio(issuer("me", keys))
	ownKey := string(must(json.Marshal(jose.JSONWebKey{Key: []byte("an attacker's own key of thirty-two bytes")})))
	for name, c := range map[string]struct{ token, want string }{
		"plain":                    {signRaw(`{"alg":"HS256"}`, `{"iss":"me"}`), ""},
		"typ":                      {signRaw(`{"typ":"JWT","alg":"HS256"}`, `{"iss":"me"}`), ""},
		"a key of its own":         {signRaw(`{"alg":"HS256","jwk":`+ownKey+`,"kid":"x"}`, `{"iss":"me"}`), malformed.text},
		"a URL of keys":            {signRaw(`{"alg":"HS256","jku":"http://198.51.100.1/"}`, `{"iss":"me"}`), ""}, // not fetched
		"critical, unknown":        {signRaw(`{"alg":"HS256","crit":["exp"],"exp":1}`, `{"iss":"me"}`), badSignature.text},
		"critical, empty":          {signRaw(`{"alg":"HS256","crit":[]}`, `{"iss":"me"}`), ""},
		"the payload unencoded":    {signRaw(`{"alg":"HS256","crit":["b64"],"b64":false}`, `{"iss":"me"}`), badSignature.text},
		"two algorithms":           {signRaw(`{"alg":"none","alg":"HS256"}`, `{"iss":"me"}`), malformed.text},
		"an algorithm in capitals": {signRaw(`{"ALG":"HS256"}`, `{"iss":"me"}`), malformed.text},
		"an algorithm in a list":   {signRaw(`{"alg":["HS256"]}`, `{"iss":"me"}`), badHeader.text},
		"a kid that is a number":   {signRaw(`{"alg":"HS256","kid":1}`, `{"iss":"me"}`), malformed.text},
		"control characters":       {signRaw(`{"alg":"HS256","kid":"s\u0000\r\n"}`, `{"iss":"me"}`), noKey.text},
		"a path":                   {signRaw(`{"alg":"HS256","kid":"../../dev/null"}`, `{"iss":"me"}`), noKey.text},
		"text behind it":           {signRaw(`{"alg":"HS256"} x`, `{"iss":"me"}`), badHeader.text},
	} {
		failing(t, name, j, bearer(c.token), c.want)
	}
}

// Payloads that two readers may understand differently, and times and audiences of other kinds.
func TestAttacksInThePayloadOfAToken(t *testing.T) {
	keys := keySet(jose.JSONWebKey{Key: secretKey})
	j := istio(issuer("me", keys, func(p *mesh.JWTProvider) { p.Audiences = []string{"a"} }))
	for claims, want := range map[string]string{
		`"exp":1772366400`:                   "",
		`"exp":1772366400.5`:                 "",
		`"exp":1.7723664e9`:                  "",
		`"exp":1e300`:                        "",
		`"exp":1e400`:                        badPayload.text,
		`"exp":-1e300`:                       badTime.text,
		`"exp":null`:                         badTime.text,
		`"exp":true`:                         badTime.text,
		`"exp":[1772366400]`:                 badTime.text,
		`"exp":0`:                            expired.text,
		`"nbf":1e300`:                        notYetValid.text,
		`"nbf":"0"`:                          badTime.text,
		`"iat":"x"`:                          badTime.text,
		`"exp":1,"exp":1772366400`:           "", // the last one counts (RFC 7519 section 4)
		`"o":{"x":1,"x":2}`:                  "",
		`"l":[{"x":1},{"x":1}]`:              "",
		`"EXP":1`:                            "",
		`"\u0065xp":1,"exp":1772366400`:      "",
		`"exp":1772366400,"exp":1`:           expired.text,
		`"x":` + strings.Repeat(`[`, 20_000): badPayload.text,
		`"x":"` + strings.Repeat(`x`, 1<<20) + `"`: "",
	} {
		name := claims[:min(len(claims), 40)]
		failing(t, name, j, bearer(signRaw(`{"alg":"HS256"}`, `{"iss":"me","aud":"a",`+claims+`}`)), want)
	}
	for audience, want := range map[string]string{
		`["b",["a"]]`: otherAudience.text, `{"a":"a"}`: otherAudience.text, `null`: otherAudience.text, `1`: otherAudience.text,
		`"A"`: otherAudience.text, `" a"`: otherAudience.text, `"a//"`: otherAudience.text, `[1,"a"]`: "", `""`: otherAudience.text,
		`"b a"`: otherAudience.text, `"http://https://a"`: otherAudience.text,
	} {
		failing(t, "audience "+audience, j, bearer(signRaw(`{"alg":"HS256"}`, `{"iss":"me","aud":`+audience+`}`)), want)
	}
}

// Spellings of a token around its three parts.
func TestAttacksInTheSpellingOfAToken(t *testing.T) {
	keys := keySet(jose.JSONWebKey{Key: secretKey})
	j := requiring(provided("me"), issuer("me", keys, func(p *mesh.JWTProvider) {
		p.Cookies = []string{"c"}
		p.Params = []string{"access_token"}
		p.Headers = []mesh.TokenHeader{{Name: "authorization", Prefix: "Bearer "}}
	}))
	good := signRaw(`{"alg":"HS256"}`, `{"iss":"me"}`)
	bad := good[:len(good)-4] + "AAAA"
	parts := strings.Split(good, ".")
	for name, c := range map[string]struct {
		fields []string
		path   string
		want   string
	}{
		"good":                        {[]string{"authorization", "Bearer " + good}, "/", ""},
		"in three places":             {[]string{"authorization", "Bearer " + good, "cookie", "c=" + good}, "/?access_token=" + good, ""},
		"a bad one in the cookie":     {[]string{"authorization", "Bearer " + good, "cookie", "c=" + bad}, "/", badSignature.text},
		"a bad one in the parameter":  {[]string{"authorization", "Bearer " + good}, "/?access_token=" + bad, badSignature.text},
		"a bad one in the header":     {[]string{"authorization", "Bearer " + bad, "cookie", "c=" + good}, "/", badSignature.text},
		"a bad one in another header": {[]string{"authorization", "Bearer " + good, "Authorization", "Bearer " + bad}, "/", badSignature.text},
		"a parameter, escaped":        {nil, "/?access%5Ftoken=" + bad, missing.text},
		"padded":                      {[]string{"authorization", "Bearer " + parts[0] + "=." + parts[1] + "." + parts[2]}, "/", malformed.text},
		"a line break within":         {[]string{"cookie", "c=" + parts[0] + ".\n" + parts[1] + "." + parts[2]}, "/", malformed.text},
		"a space within":              {[]string{"authorization", "Bearer " + parts[0] + ". " + parts[1] + "." + parts[2]}, "/", malformed.text},
		"spaces before":               {[]string{"authorization", "Bearer   \t" + good}, "/", ""},
		"the scheme in small letters": {[]string{"authorization", "bearer " + good}, "/", missing.text},
		"another signature's bits":    {[]string{"authorization", "Bearer " + good[:len(good)-1] + sibling(good[len(good)-1])}, "/", ""}, // the bits do not count
	} {
		failing(t, name, j, request(c.path, c.fields...), c.want)
	}
}

// Claims become fields of one line, at the names that the configuration has.
func TestAttacksInClaimsForFields(t *testing.T) {
	keys := keySet(jose.JSONWebKey{Key: secretKey})
	j := istio(issuer("me", keys, func(p *mesh.JWTProvider) {
		p.ClaimHeaders = []mesh.ClaimHeader{{Header: "x-a", Claim: "a"}, {Header: "x-deep", Claim: "o.x"}}
	}))
	for claims, want := range map[string]string{
		`"a":"v"`:               "x-a=v",
		`"a":"v\r\nx-admin: 1"`: "",
		`"a":"v\u0000"`:         "",
		`"a":"v\u007f"`:         "",
		`"a":{"b":1}`:           "",
		`"a":null`:              "",
		`"a":1e100`:             "x-a=1e+100",
		`"o":{"x":"y"}`:         "x-deep=y",
		`"o.x":"y"`:             "",
		`"o":["x"]`:             "",
		`"o":"x"`:               "",
	} {
		got := ""
		for _, e := range failing(t, claims, j, bearer(signRaw(`{"alg":"HS256"}`, `{"iss":"me",`+claims+`}`)), "").Edits {
			got += e.Name + "=" + string(e.AppendValue(nil, nil))
		}
		if got != want {
			t.Errorf("%s: fields %q, want %q", claims, got, want)
		}
	}
}

// mac returns a text and its signature by secretKey.
func mac(text string) string {
	h := hmac.New(sha256.New, secretKey)
	h.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// sibling returns another last letter of base64 whose bits that count are the same: a signature of 32 bytes leaves two.
func sibling(letter byte) string {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return string(letters[strings.IndexByte(letters, letter)^1])
}
