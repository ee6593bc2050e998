package jwt

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

var (
	now       = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	rsaKey    = must(rsa.GenerateKey(rand.Reader, 2048))
	otherRSA  = must(rsa.GenerateKey(rand.Reader, 2048))
	ecKey     = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	_, edKey  = pair(ed25519.GenerateKey(rand.Reader))
	secretKey = []byte("a secret of at least thirty-two bytes")
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func pair(public ed25519.PublicKey, private ed25519.PrivateKey, err error) (ed25519.PublicKey, ed25519.PrivateKey) {
	must(private, err)
	return public, private
}

// sign returns a token. claims are JSON.
func sign(t *testing.T, algorithm jose.SignatureAlgorithm, key any, kid, claims string) string {
	t.Helper()
	options := &jose.SignerOptions{}
	if kid != "" {
		options = options.WithHeader("kid", kid)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: key}, options)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign([]byte(claims))
	if err != nil {
		t.Fatal(err)
	}
	return must(signed.CompactSerialize())
}

// raw returns a token with any header, and a signature of no key.
func raw(header, payload string) string {
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(header)) + "." + encode([]byte(payload)) + "." + encode([]byte("signature"))
}

// keySet returns keys as JSON.
func keySet(keys ...jose.JSONWebKey) []byte {
	return must(json.Marshal(jose.JSONWebKeySet{Keys: keys}))
}

func public(key crypto.Signer, kid string) jose.JSONWebKey {
	return jose.JSONWebKey{Key: key.Public(), KeyID: kid}
}

// list are header fields.
type list []string

func (l list) Len() int                      { return len(l) / 2 }
func (l list) At(i int) (name, value []byte) { return []byte(l[2*i]), []byte(l[2*i+1]) }

func request(path string, fields ...string) *route.Request {
	return &route.Request{Method: []byte("GET"), Scheme: []byte("http"), Authority: []byte("web"), Path: []byte(path), Fields: list(fields)}
}

func bearer(token string) *route.Request { return request("/", "Authorization", "Bearer "+token) }

func issuer(name string, keys []byte, change ...func(*mesh.JWTProvider)) mesh.JWTProvider {
	p := mesh.JWTProvider{Name: name, Issuer: name, Keys: keys, ClockSkew: time.Minute, Metadata: "payload", Forward: true}
	for _, c := range change {
		c(&p)
	}
	return p
}

var allowMissing = mesh.JWTRequirement{Kind: mesh.JWTAllowMissing}

func provided(name string) mesh.JWTRequirement {
	return mesh.JWTRequirement{Kind: mesh.JWTProvided, Name: name}
}

func anyOf(of ...mesh.JWTRequirement) mesh.JWTRequirement {
	return mesh.JWTRequirement{Kind: mesh.JWTAny, Of: of}
}

// requiring returns a filter with one rule for all requests.
func requiring(requires mesh.JWTRequirement, providers ...mesh.JWTProvider) *mesh.JWT {
	return &mesh.JWT{Providers: providers, Rules: []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: requires}}}
}

// istio returns what istiod makes of a RequestAuthentication for one issuer.
func istio(p mesh.JWTProvider) *mesh.JWT { return requiring(anyOf(provided(p.Name), allowMissing), p) }

// failing checks the reply to a request; an empty text passes.
func failing(t *testing.T, name string, j *mesh.JWT, r *route.Request, text string) Result {
	t.Helper()
	result := Of(j).Check(r, ByRules, now, nil)
	got := ""
	if result.Reply != nil {
		got = result.Reply.Body
	}
	if got != text {
		t.Errorf("%s: %q, want %q", name, got, text)
	}
	return result
}

func TestTokens(t *testing.T) {
	keys := keySet(public(rsaKey, "r"), public(ecKey, "e"), public(edKey, "d"), jose.JSONWebKey{Key: secretKey, KeyID: "s"})
	j := istio(issuer("me", keys))
	rs := func(claims string) string { return sign(t, jose.RS256, rsaKey, "r", claims) }
	publicPEM := must(json.Marshal(public(rsaKey, "r")))
	for name, c := range map[string]struct{ token, want string }{
		"RS256":                    {rs(`{"iss":"me"}`), ""},
		"RS512":                    {sign(t, jose.RS512, rsaKey, "r", `{"iss":"me"}`), ""},
		"PS256":                    {sign(t, jose.PS256, rsaKey, "", `{"iss":"me"}`), ""},
		"ES256":                    {sign(t, jose.ES256, ecKey, "e", `{"iss":"me"}`), ""},
		"EdDSA":                    {sign(t, jose.EdDSA, edKey, "d", `{"iss":"me"}`), ""},
		"HS256":                    {sign(t, jose.HS256, secretKey, "s", `{"iss":"me"}`), ""},
		"not expired":              {rs(`{"iss":"me","exp":1772366400}`), ""}, // now
		"expired within the skew":  {rs(`{"iss":"me","exp":1772366341}`), ""},
		"expired":                  {rs(`{"iss":"me","exp":1772366339}`), "Jwt is expired"},
		"not yet valid":            {rs(`{"iss":"me","nbf":1772366461}`), "Jwt not yet valid"},
		"valid within the skew":    {rs(`{"iss":"me","nbf":1772366459}`), ""},
		"a time that is a text":    {rs(`{"iss":"me","exp":"1772366461"}`), badTime.text},
		"a negative time":          {rs(`{"iss":"me","exp":-1}`), badTime.text},
		"another issuer":           {rs(`{"iss":"you"}`), "Jwt issuer is not configured"},
		"no issuer":                {rs(`{}`), "Jwt issuer is not configured"},
		"an issuer that is a list": {rs(`{"iss":["me"]}`), "Jwt issuer is not configured"},
		"another key":              {sign(t, jose.RS256, otherRSA, "r", `{"iss":"me"}`), "Jwt verification fails"},
		"another key without kid":  {sign(t, jose.RS256, otherRSA, "", `{"iss":"me"}`), "Jwt verification fails"},
		"an unknown kid":           {sign(t, jose.RS256, rsaKey, "x", `{"iss":"me"}`), "Jwks doesn't have key to match kid or alg from Jwt"},
		"the kid of another type":  {sign(t, jose.RS256, rsaKey, "e", `{"iss":"me"}`), "Jwks doesn't have key to match kid or alg from Jwt"},
		"a public key as secret":   {sign(t, jose.HS256, publicPEM, "r", `{"iss":"me"}`), "Jwks doesn't have key to match kid or alg from Jwt"},
		"another secret":           {sign(t, jose.HS256, append([]byte("x"), secretKey...), "s", `{"iss":"me"}`), "Jwt verification fails"},
		"alg none":                 {raw(`{"alg":"none"}`, `{"iss":"me"}`), "Header alg is not supported"},
		"alg None":                 {raw(`{"alg":"None"}`, `{"iss":"me"}`), "Header alg is not supported"},
		"no alg":                   {raw(`{}`, `{"iss":"me"}`), "Header alg is not supported"},
		"a header that is text":    {raw(`x`, `{"iss":"me"}`), "Jwt header is an invalid JSON"},
		"a payload that is text":   {rs(`x`), "Jwt payload is an invalid JSON"},
		"a payload and more":       {rs(`{"iss":"me"}{}`), "Jwt payload is an invalid JSON"},
		"a payload that is null":   {rs(`null`), "Jwt payload is an invalid JSON"},
		"no token":                 {"", malformed.text},
		"two parts":                {"a.b", malformed.text},
		"four parts":               {"a.b.c.d", malformed.text},
		"no signature":             {rs(`{"iss":"me"}`)[:strings.LastIndex(rs(`{"iss":"me"}`), ".")+1], "Jwt verification fails"},
		"a changed payload":        {strings.Replace(rs(`{"iss":"me"}`), ".", ".e", 1), malformed.text},
	} {
		result := failing(t, name, j, bearer(c.token), c.want)
		if (result.Claims == nil) != (c.want != "") {
			t.Errorf("%s: claims %v", name, result.Claims)
		}
	}
}

func TestAudiences(t *testing.T) {
	keys := keySet(public(ecKey, ""))
	for _, c := range []struct{ audience, want string }{
		{`"a"`, ""}, {`["x","a"]`, ""}, {`"https://a/"`, ""}, {`"b"`, otherAudience.text}, {`[]`, otherAudience.text}, {`{"a":1}`, otherAudience.text},
	} {
		j := istio(issuer("me", keys, func(p *mesh.JWTProvider) { p.Audiences = []string{"a", "c"} }))
		result := failing(t, c.audience, j, bearer(sign(t, jose.ES256, ecKey, "", `{"iss":"me","aud":`+c.audience+`}`)), c.want)
		if c.want != "" && (result.Reply.Status != 403 || result.Reply.Fields != nil) {
			t.Errorf("%s: the reply is %+v", c.audience, result.Reply)
		}
	}
}

func TestKeysThatCannotBeUsedVerifyNothing(t *testing.T) {
	token := bearer(sign(t, jose.ES256, ecKey, "", `{"iss":"me"}`))
	good := strings.TrimSuffix(strings.TrimPrefix(string(keySet(public(ecKey, "e"))), `{"keys":[`), `]}`)
	for name, c := range map[string]struct{ set, want string }{
		"none":                    {``, noKey.text},
		"not JSON":                {`x`, noKey.text},
		"an empty set":            {`{"keys":[]}`, noKey.text},
		"an unknown type":         {`{"keys":[{"kty":"x"}]}`, noKey.text},
		"an unknown type besides": {`{"keys":[{"kty":"x"},` + good + `]}`, ""},
		"for encryption":          {`{"keys":[` + strings.Replace(good, `{`, `{"use":"enc",`, 1) + `]}`, noKey.text},
		"another algorithm":       {`{"keys":[` + strings.Replace(good, `{`, `{"alg":"ES384",`, 1) + `]}`, noKey.text},
		"its algorithm":           {`{"keys":[` + strings.Replace(good, `{`, `{"alg":"ES256",`, 1) + `]}`, ""},
	} {
		failing(t, name, istio(issuer("me", []byte(c.set))), token, c.want)
	}
	remote := istio(issuer("me", nil, func(p *mesh.JWTProvider) { p.Remote = &mesh.RemoteKeys{} }))
	failing(t, "remote keys", remote, token, noKeys.text)
}

// TestRequirements has the trees that istiod makes, and the others of the API.
func TestRequirements(t *testing.T) {
	keys := keySet(public(ecKey, ""))
	a, b := issuer("a", keys), issuer("b", keys)
	for _, p := range []*mesh.JWTProvider{&a, &b} {
		p.Headers = []mesh.TokenHeader{{Name: "X-" + p.Name}}
	}
	ofA, ofB := sign(t, jose.ES256, ecKey, "", `{"iss":"a"}`), sign(t, jose.ES256, ecKey, "", `{"iss":"b"}`)
	all := func(of ...mesh.JWTRequirement) mesh.JWTRequirement {
		return mesh.JWTRequirement{Kind: mesh.JWTAll, Of: of}
	}
	two := anyOf(provided("a"), provided("b"), all(anyOf(provided("a"), allowMissing), anyOf(provided("b"), allowMissing)))
	named := requiring(mesh.JWTRequirement{Kind: mesh.JWTNamed, Name: "n"}, a, b)
	anyIssuer := issuer("", keys)
	anyIssuer.Headers = []mesh.TokenHeader{{Name: "X-c"}}
	forX, forY := provided("a"), a // the audiences of a requirement take the place of those of its provider
	forX.Audiences, forY.Audiences = []string{"x"}, []string{"y"}
	forZ := provided("a")
	forZ.Audiences = []string{"z"}
	named.Named = []mesh.NamedRequirement{{Name: "n", JWTRequirement: provided("a")}}
	for name, c := range map[string]struct {
		filter  *mesh.JWT
		request *route.Request
		want    string
	}{
		"a provider":                          {requiring(provided("a"), a, b), request("/", "x-a", ofA), ""},
		"a provider, no token":                {requiring(provided("a"), a, b), request("/"), "Jwt is missing"},
		"a provider, at another's place":      {requiring(provided("a"), a, b), request("/", "x-b", ofA), "Jwt is missing"},
		"a provider, of another":              {requiring(provided("a"), a, b), request("/", "x-a", ofB), unknownIssuer.text},
		"a provider, two tokens":              {requiring(provided("a"), a, b), request("/", "x-a", ofA, "X-A", raw(`x`, `{}`)), badHeader.text},
		"two issuers, none":                   {requiring(two, a, b), request("/"), ""},
		"two issuers, the first":              {requiring(two, a, b), request("/", "x-a", ofA), ""},
		"two issuers, the second":             {requiring(two, a, b), request("/", "x-b", ofB), ""},
		"two issuers, swapped":                {requiring(two, a, b), request("/", "x-a", ofB, "x-b", ofA), unknownIssuer.text},
		"missing, of an unknown issuer":       {requiring(allowMissing, a), request("/", "x-a", sign(t, jose.ES256, ecKey, "", `{"iss":"c"}`)), unknownIssuer.text},
		"missing, at the place of another":    {requiring(allowMissing, a, b), request("/", "x-a", ofB), unknownIssuer.text},
		"missing, invalid":                    {requiring(allowMissing, a, b), request("/", "x-a", "x"), malformed.text},
		"missing or failed, invalid":          {requiring(mesh.JWTRequirement{Kind: mesh.JWTAllowMissingOrFailed}, a), request("/", "x-a", "x"), ""},
		"missing, where any issuer's are not": {requiring(allowMissing, a, anyIssuer), request("/", "x-a", sign(t, jose.ES256, ecKey, "", `{"iss":"c"}`)), unknownIssuer.text},
		"missing, where any issuer's are":     {requiring(allowMissing, a, anyIssuer), request("/", "x-c", sign(t, jose.ES256, ecKey, "", `{"iss":"c"}`)), ""},
		"all of two":                          {requiring(all(provided("a"), provided("b")), a, b), request("/", "x-a", ofA, "x-b", ofB), ""},
		"all of two, without the first":       {requiring(all(provided("a"), provided("b")), a, b), request("/", "x-b", ofB), "Jwt is missing"},
		"all of two, without the second":      {requiring(all(provided("a"), provided("b")), a, b), request("/", "x-a", ofA), "Jwt is missing"},
		"audiences of its own":                {requiring(forX, a), request("/", "x-a", sign(t, jose.ES256, ecKey, "", `{"iss":"a","aud":"x"}`)), ""},
		"audiences of its own, another":       {requiring(forX, forY), request("/", "x-a", sign(t, jose.ES256, ecKey, "", `{"iss":"a","aud":"y"}`)), otherAudience.text},
		"two audiences, one of them":          {requiring(all(forX, forZ), a), request("/", "x-a", sign(t, jose.ES256, ecKey, "", `{"iss":"a","aud":"x"}`)), otherAudience.text},
		"not required":                        {requiring(mesh.JWTRequirement{Kind: mesh.JWTNotRequired}, a), request("/", "x-a", "x"), ""},
		"a name":                              {named, request("/", "x-a", ofA), ""},
		"a name, no token":                    {named, request("/"), "Jwt is missing"},
		"a name that does not exist":          {requiring(mesh.JWTRequirement{Kind: mesh.JWTNamed, Name: "x"}, a), request("/", "x-a", ofA), notConfigured.text},
		"a provider that does not exist":      {requiring(provided("x"), a), request("/", "x-a", ofA), notConfigured.text},
		"a kind that is not understood":       {requiring(mesh.JWTRequirement{}, a), request("/", "x-a", ofA), notConfigured.text},
		"no rule for the path":                {&mesh.JWT{Providers: []mesh.JWTProvider{a}, Rules: []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/x"}, Requires: provided("a")}}}, request("/"), ""},
		"a filter that is not understood":     {&mesh.JWT{Refused: true}, request("/"), ""},
	} {
		result := Of(c.filter).Check(c.request, ByRules, now, nil)
		got := ""
		if result.Reply != nil {
			got = result.Reply.Body
		}
		if refused := c.filter.Refused; got != c.want || (result.Reply == route.Refused) != refused {
			t.Errorf("%s: %q, want %q; refused %v", name, got, c.want, refused)
		}
	}
}

func TestPlaces(t *testing.T) {
	keys := keySet(public(ecKey, ""))
	token := sign(t, jose.ES256, ecKey, "", `{"iss":"me"}`)
	elsewhere := func(p *mesh.JWTProvider) {
		p.Headers = []mesh.TokenHeader{{Name: "X-Token", Prefix: "T="}, {Name: "x-plain"}}
		p.Params, p.Cookies = []string{"t"}, []string{"session"}
	}
	for name, c := range map[string]struct {
		provider mesh.JWTProvider
		request  *route.Request
		found    bool
	}{
		"the default header":           {issuer("me", keys), bearer(token), true},
		"another scheme":               {issuer("me", keys), request("/", "authorization", "Basic "+token), false},
		"text behind it":               {issuer("me", keys), request("/", "authorization", "Bearer "+token+", x"), true},
		"the default parameter":        {issuer("me", keys), request("/?a=b&access_token=" + token), true},
		"the default, configured else": {issuer("me", keys, elsewhere), request("/?access_token="+token, "authorization", "Bearer "+token), false},
		"a header with a prefix":       {issuer("me", keys, elsewhere), request("/", "x-token", "T="+token), true},
		"a header without its prefix":  {issuer("me", keys, elsewhere), request("/", "x-token", token), false},
		"a header":                     {issuer("me", keys, elsewhere), request("/", "X-Plain", token), true},
		"a parameter":                  {issuer("me", keys, elsewhere), request("/?t=" + token), true},
		"a cookie":                     {issuer("me", keys, elsewhere), request("/", "cookie", "a=b; session="+token), true},
	} {
		result := failing(t, name, istio(c.provider), c.request, "")
		if found := result.Claims != nil; found != c.found {
			t.Errorf("%s: found %v, want %v", name, found, c.found)
		}
	}
	// A second token beside a valid one is verified as well.
	failing(t, "two parameters", istio(issuer("me", keys)), request("/?access_token="+token+"&access_token=x"), malformed.text)
}

func TestWhatBecomesOfATokenAndItsClaims(t *testing.T) {
	keys := keySet(public(ecKey, ""))
	claims := `{"iss":"me","sub":"you","n":17,"f":1.5,"b":true,"o":{"x":"deep"},"l":["a"],"bad":"a\nb"}`
	token := sign(t, jose.ES256, ecKey, "", claims)
	j := istio(issuer("me", keys, func(p *mesh.JWTProvider) {
		p.Forward, p.PayloadHeader = false, "X-Payload"
		for _, c := range []string{"sub", "n", "f", "b", "o.x", "l", "bad", "none"} {
			p.ClaimHeaders = append(p.ClaimHeaders, mesh.ClaimHeader{Header: "X-" + c, Claim: c})
		}
		p.Reroute = true
	}))
	forged := []string{"x-payload", "forged", "X-SUB", "forged", "x-none", "forged", "x-other", "kept"}
	result := failing(t, "a token", j, request("/", append(forged, "authorization", "Bearer "+token)...), "")
	want := map[string]string{
		"authorization": "removed", "x-none": "removed", "x-payload": base64.RawURLEncoding.EncodeToString([]byte(claims)),
		"x-sub": "you", "x-n": "17", "x-f": "1.5", "x-b": "true", "x-o.x": "deep",
	}
	got := map[string]string{}
	for _, e := range result.Edits {
		if e.Remove {
			got[e.Name] = "removed"
			continue
		}
		got[e.Name] = string(e.AppendValue(nil, nil))
	}
	for name := range want {
		if got[name] != want[name] {
			t.Errorf("%s becomes %q, want %q", name, got[name], want[name])
		}
	}
	if len(got) != len(want) || !result.Reroute {
		t.Errorf("edits %v; want %v; reroute %v", got, want, result.Reroute)
	}
	// Without a token, a client's own fields are removed as well.
	result = failing(t, "no token", j, request("/", forged...), "")
	if len(result.Edits) != 3 || result.Claims != nil {
		t.Errorf("edits %+v, claims %v", result.Edits, result.Claims)
	}
}

func TestClaims(t *testing.T) {
	keys := keySet(public(ecKey, ""))
	token := sign(t, jose.ES256, ecKey, "", `{"iss":"me","scope":"read write","groups":["a","b"],"o":{"k":"v"},"b":true,"z":null,"extra":"x y"}`)
	j := istio(issuer("me", keys, func(p *mesh.JWTProvider) { p.SpaceClaims = []string{"extra"} }))
	claims := failing(t, "a token", j, bearer(token), "").Claims
	text := func(s string) mesh.ValueMatcher {
		return mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Text: s}}
	}
	some := func(m mesh.ValueMatcher) mesh.ValueMatcher {
		return mesh.ValueMatcher{Kind: mesh.ValueList, Any: []mesh.ValueMatcher{m}}
	}
	of := func(kind mesh.MatchKind, s string) mesh.ValueMatcher {
		return mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Kind: kind, Text: s}}
	}
	for _, c := range []struct {
		path  string
		value mesh.ValueMatcher
		want  bool
	}{
		{"payload.iss", text("me"), true},
		{"payload.iss", text("m"), false},
		{"payload.iss", of(mesh.MatchPrefix, "m"), true},
		{"payload.iss", of(mesh.MatchSuffix, "e"), true},
		{"payload.iss", of(mesh.MatchContains, "e"), true},
		{"payload.iss", of(mesh.MatchRegex, "m."), true},
		{"payload.iss", of(mesh.MatchRegex, "m"), false},
		{"payload.iss", of(mesh.MatchRegex, "you"), false},
		{"payload.iss", mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Text: "ME", IgnoreCase: true}}, true},
		{"other.iss", text("me"), false},
		{"payload.groups", some(text("b")), true},
		{"payload.groups", some(text("c")), false},
		{"payload.groups", text("b"), false},
		{"payload.scope", some(text("write")), true},
		{"payload.extra", some(text("y")), true},
		{"payload.o.k", text("v"), true},
		{"payload.o.k.x", text("v"), false},
		{"payload.b", mesh.ValueMatcher{Kind: mesh.ValueBool, Bool: true}, true},
		{"payload.b", mesh.ValueMatcher{Kind: mesh.ValueBool}, false},
		{"payload.z", mesh.ValueMatcher{Kind: mesh.ValueNull}, true},
		{"payload.none", mesh.ValueMatcher{Kind: mesh.ValueNull}, false},
		{"payload.iss", mesh.ValueMatcher{Kind: mesh.ValuePresence, Bool: true}, true},
		{"payload.none", mesh.ValueMatcher{Kind: mesh.ValuePresence, Bool: true}, false},
		{"payload.none", mesh.ValueMatcher{Kind: mesh.ValuePresence}, true},
		{"payload.iss", mesh.ValueMatcher{Kind: mesh.ValueOr, Any: []mesh.ValueMatcher{text("x"), text("me")}}, true},
	} {
		m := &mesh.MetadataMatcher{Filter: filterName, Path: strings.Split(c.path, "."), Value: c.value}
		if got := claims.Match(m); got != match.Of(c.want) {
			t.Errorf("%s %+v: %v", c.path, c.value, got)
		}
		m.Invert = true
		if got := claims.Match(m); got != match.Of(!c.want) {
			t.Errorf("%s %+v, inverted: %v", c.path, c.value, got)
		}
	}
	elsewhere := &mesh.MetadataMatcher{Filter: "another", Path: []string{"payload", "iss"}, Value: text("me")}
	if claims.Match(elsewhere) != match.No || (*Claims)(nil).Match(&mesh.MetadataMatcher{Filter: filterName, Path: []string{"payload"}, Value: text("")}) != match.No {
		t.Error("values match that are not there")
	}
}

func TestReplies(t *testing.T) {
	j := istio(issuer("me", nil))
	r := bearer("x")
	r.Path, r.Authority = []byte(`/a"b?c`), []byte("web:80")
	reply := failing(t, "a reply", j, r, malformed.text).Reply
	if reply.Status != 401 || reply.Details != "jwt_authn_access_denied{Jwt_is_not_in_the_form_of_Header.Payload.Signature_with_two_dots_and_3_sections}" ||
		reply.Fields[0] != (route.Field{Name: "www-authenticate", Value: `Bearer realm="http://web:80/ab", error="invalid_token"`}) {
		t.Errorf("reply %+v", reply)
	}
	missed := requiring(provided("me"), issuer("me", nil))
	missed.TerseFailures = true
	reply = failing(t, "a terse reply", missed, request("/"+strings.Repeat("x", 300)), "").Reply
	if value := reply.Fields[0].Value; !strings.HasPrefix(value, `Bearer realm="http://web/x`) || !strings.HasSuffix(value, `x"`) || len(value) > 300 {
		t.Errorf("a challenge of %d bytes: %s", len(value), value)
	}
}

func TestPreflightRequests(t *testing.T) {
	j := requiring(provided("me"), issuer("me", nil))
	j.AllowPreflight = true
	r := request("/", "Origin", "a", "Access-Control-Request-Method", "GET")
	failing(t, "GET", j, r, "Jwt is missing")
	r.Method = []byte("OPTIONS")
	failing(t, "a preflight request", j, r, "")
	failing(t, "without Origin", j, &route.Request{Method: r.Method, Path: r.Path, Fields: list{"access-control-request-method", "GET"}}, "Jwt is missing")
}

// FuzzCheck: a token that no key has signed is never accepted, whatever its bytes are.
func FuzzCheck(f *testing.F) {
	keys := keySet(public(ecKey, ""), jose.JSONWebKey{Key: secretKey})
	j := requiring(provided("me"), issuer("me", keys))
	for _, seed := range []string{"", "..", raw(`{"alg":"none"}`, `{"iss":"me"}`), raw(`{"alg":"HS256","jwk":{}}`, `{"iss":"me"}`), raw(`{"alg":"ES256","crit":["b64"],"b64":false}`, `{}`)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if result := Of(j).Check(bearer(token), ByRules, now, nil); result.Reply == nil || result.Claims != nil {
			t.Errorf("accepted: %q", token)
		}
	})
}

// A request has a bounded number of tokens, whether or not one is required.
func TestTooManyTokens(t *testing.T) {
	_, key := pair(ed25519.GenerateKey(nil))
	token := sign(t, jose.EdDSA, key, "", `{"iss":"me"}`)
	p := issuer("me", keySet(public(key, "")))
	for _, requires := range []mesh.JWTRequirement{provided("me"), allowMissing} {
		for _, n := range []int{maxTokens, maxTokens + 1} {
			r := request("/", slices.Repeat([]string{"Authorization", "Bearer " + token}, n)...)
			if reply := Of(requiring(requires, p)).Check(r, ByRules, time.Now(), nil).Reply; (reply != nil) != (n > maxTokens) {
				t.Errorf("%d tokens: %+v", n, reply)
			}
		}
	}
}

// OPTIONS about the whole server needs the tokens of its paths. A requirement of a route takes the place of all rules.
func TestWhatARequestRequires(t *testing.T) {
	p := issuer("me", []byte(`{"keys":[]}`))
	j := requiring(provided("me"), p)
	j.Named = []mesh.NamedRequirement{{Name: "open", JWTRequirement: allowMissing}, {Name: "loop", JWTRequirement: mesh.JWTRequirement{Kind: mesh.JWTNamed, Name: "open"}}}
	whole := request("*")
	whole.Method = []byte("OPTIONS")
	for name, c := range map[string]struct {
		r        *route.Request
		required Requirement
		passes   bool
	}{
		"a path":                       {request("/"), ByRules, false},
		"the whole server":             {whole, ByRules, false},
		"nothing":                      {request("/"), Requirement{Own: true}, true},
		"a named requirement":          {request("/"), Requirement{Own: true, Name: "open"}, true},
		"a name that is not there":     {request("/"), Requirement{Own: true, Name: "other"}, false},
		"a name that leads to another": {request("/"), Requirement{Own: true, Name: "loop"}, false},
	} {
		if reply := Of(j).Check(c.r, c.required, now, nil).Reply; (reply == nil) != c.passes {
			t.Errorf("%s: %+v", name, reply)
		}
	}
}
