package jwks

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/jwt"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
)

// clock is the Store's time. It moves when a test moves it.
type clock struct{ at atomic.Int64 }

func (c *clock) now() time.Time           { return time.Unix(0, c.at.Load()) }
func (c *clock) advance(d time.Duration)  { c.at.Add(int64(d)) }
func newClock() *clock                    { c := new(clock); c.at.Store(time.Now().UnixNano()); return c }
func address(s *httptest.Server) net.Addr { return s.Listener.Addr() }
func cluster(name string, at net.Addr) *mesh.Cluster {
	return &mesh.Cluster{
		Name: name, Discovery: mesh.Static, ConnectTimeout: nettest.Patience,
		Breakers: mesh.Breakers{Connections: 1024, Pending: 1024, Requests: 1024},
		Hosts: &mesh.Assignment{Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{
			Address: at.(*net.TCPAddr).AddrPort(), Weight: 1,
		}}}}},
	}
}

// storeOf returns a Store that fetches from clusters, its clock, and its log.
func storeOf(t testing.TB, clusters ...*mesh.Cluster) (*Store, *clock, *lockedLog) {
	t.Helper()
	edit := (*mesh.Snapshot)(nil).Edit()
	for _, c := range clusters {
		edit.SetCluster(c.Name, c)
	}
	snapshot, _ := edit.Snapshot()
	inForce := func() *mesh.Snapshot { return snapshot }
	client := callout.New(callout.Config{Snapshot: inForce, Balancer: balance.New(balance.Config{Snapshot: inForce})})
	log := new(lockedLog)
	s, c := New(client, slog.New(slog.NewTextHandler(log, nil))), newClock()
	s.now = c.now
	t.Cleanup(func() { s.Close(); client.Close() })
	return s, c, log
}

type lockedLog struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lockedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func remote(cluster, path string) *mesh.RemoteKeys {
	return &mesh.RemoteKeys{
		Service:  mesh.HTTPService{Cluster: cluster, URI: "http://issuer.example" + path, Timeout: nettest.Patience},
		CacheFor: time.Minute, Pause: time.Second,
	}
}

// filterOf returns a filter that requires a token of the issuer me.
func filterOf(from *mesh.RemoteKeys) *jwt.Filter {
	return jwt.Of(&mesh.JWT{
		Providers: []mesh.JWTProvider{{Name: "me", Issuer: "me", Remote: from, ClockSkew: time.Minute}},
		Rules:     []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTProvided, Name: "me"}}},
	})
}

type bearer string

func (b bearer) Len() int                    { return 1 }
func (b bearer) At(int) (name, value []byte) { return []byte("authorization"), []byte("Bearer " + b) }

// judge checks a request, and waits for keys as a request does. It returns the details of the denial; empty: the token is valid.
func judge(s *Store, f *jwt.Filter, token string) string {
	r := &route.Request{Method: []byte("GET"), Scheme: []byte("http"), Authority: []byte("web"), Path: []byte("/"), Fields: bearer(token)}
	for {
		result := f.Check(r, jwt.ByRules, time.Now(), s)
		switch {
		case result.Awaited == nil && result.Reply == nil:
			return ""
		case result.Awaited == nil:
			return result.Reply.Details
		}
		if fetched := s.Fetched(result.Awaited); fetched != nil {
			<-fetched
		}
	}
}

// signer is a key with a name.
type signer struct {
	kid string
	key *ecdsa.PrivateKey
}

func newSigner(t *testing.T, kid string) signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signer{kid, key}
}

func (s signer) token(t *testing.T) string {
	t.Helper()
	made, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: s.key}, (&jose.SignerOptions{}).WithHeader("kid", s.kid))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := made.Sign([]byte(`{"iss":"me"}`))
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func setOf(of ...signer) []byte {
	set := jose.JSONWebKeySet{}
	for _, s := range of {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: crypto.PublicKey(s.key.Public()), KeyID: s.kid})
	}
	b, err := json.Marshal(set)
	if err != nil {
		panic(err)
	}
	return b
}

// rotating serves a set that can be replaced. A nil set is answered 500.
type rotating struct {
	set   atomic.Pointer[[]byte]
	asked atomic.Int32
}

func (r *rotating) put(set []byte) { r.set.Store(&set) }

func (r *rotating) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	r.asked.Add(1)
	set := *r.set.Load()
	if set == nil {
		w.WriteHeader(http.StatusInternalServerError)
	}
	_, _ = w.Write(set)
}

const (
	fetchFailed = "jwt_authn_access_denied{Jwks_remote_fetch_is_failed}"
	noKey       = "jwt_authn_access_denied{Jwks_doesn't_have_key_to_match_kid_or_alg_from_Jwt}"
	badToken    = "jwt_authn_access_denied{Jwt_verification_fails}"
)

// Keys rotate while clients send tokens. A new key is fetched once, at the first token that names it. Old tokens are valid until the
// set without their key is fetched. Tokens of other signers never are.
func TestKeysRotateUnderLoad(t *testing.T) {
	issuer := new(rotating)
	server := httptest.NewServer(issuer)
	defer server.Close()
	s, clock, _ := storeOf(t, cluster("c", address(server)))
	f := filterOf(remote("c", "/"))
	older, newer, forger := newSigner(t, "older"), newSigner(t, "newer"), newSigner(t, "older")
	old, fresh, forged, stray := older.token(t), newer.token(t), forger.token(t), newSigner(t, "stray").token(t)
	const clients = 8
	load := func(phase string, want map[string]string) {
		t.Helper()
		var all sync.WaitGroup
		for range clients {
			all.Go(func() {
				for range 25 {
					for token, details := range want {
						if got := judge(s, f, token); got != details {
							t.Errorf("%s: %q, want %q", phase, got, details)
						}
					}
				}
			})
		}
		all.Wait()
	}
	asked := func(phase string, want int32) {
		t.Helper()
		if n := issuer.asked.Load(); n != want {
			t.Errorf("%s: the issuer was asked %d times, want %d", phase, n, want)
		}
	}
	issuer.put(setOf(older))
	load("before", map[string]string{old: "", fresh: noKey, forged: badToken, stray: noKey})
	asked("before", 1)
	issuer.put(setOf(older, newer))
	load("a new key, too early", map[string]string{old: "", fresh: noKey, forged: badToken})
	asked("a new key, too early", 1)
	clock.advance(renewalPause)
	load("a new key", map[string]string{old: "", fresh: "", forged: badToken, stray: noKey})
	asked("a new key", 2)
	issuer.put(setOf(newer))
	load("the old key is gone, the cache is in time", map[string]string{old: "", fresh: ""})
	clock.advance(time.Minute)
	judge(s, f, fresh) // begins the fetch; tokens do not wait for it
	if fetched := s.Fetched(remote("c", "/")); fetched != nil {
		<-fetched
	}
	load("the old key is gone", map[string]string{old: noKey, fresh: "", forged: noKey})
	asked("the old key is gone", 3)
}

// overtaken has the keys change behind the back of the token that reads them first.
type overtaken struct {
	*Store
	change func()
}

func (o *overtaken) Keys(from *mesh.RemoteKeys) (keys *jwt.KeySet, known bool) {
	keys, known = o.Store.Keys(from)
	if change := o.change; change != nil {
		o.change = nil
		change()
	}
	return keys, known
}

// Keys may be fetched while a token is checked with the ones before. They are too recent then to be fetched again.
func TestATokenIsCheckedWithKeysThatHaveComeMeanwhile(t *testing.T) {
	issuer := new(rotating)
	server := httptest.NewServer(issuer)
	defer server.Close()
	s, clock, _ := storeOf(t, cluster("c", address(server)))
	from := remote("c", "/")
	f, older, newer := filterOf(from), newSigner(t, "older"), newSigner(t, "newer")
	issuer.put(setOf(older))
	if got := judge(s, f, older.token(t)); got != "" {
		t.Fatal(got)
	}
	issuer.put(setOf(older, newer))
	clock.advance(renewalPause)
	o := &overtaken{Store: s, change: func() {
		if !s.Renew(from) {
			t.Fatal("the keys are not fetched")
		}
		if fetched := s.Fetched(from); fetched != nil {
			<-fetched
		}
	}}
	r := &route.Request{Method: []byte("GET"), Scheme: []byte("http"), Authority: []byte("web"), Path: []byte("/"), Fields: bearer(newer.token(t))}
	if result := f.Check(r, jwt.ByRules, time.Now(), o); result.Awaited != nil || result.Reply != nil {
		t.Errorf("awaited %v, reply %+v", result.Awaited, result.Reply)
	}
	stray := newSigner(t, "stray").token(t)
	r.Fields = bearer(stray)
	if result := f.Check(r, jwt.ByRules, time.Now(), o); result.Reply == nil || result.Reply.Details != noKey {
		t.Errorf("another key: awaited %v, reply %+v", result.Awaited, result.Reply)
	}
}

// The last good keys stay in force for twice the time that they are kept while fetches fail; then no token is accepted. With the
// server's recovery they are.
func TestKeysStayWhileFetchesFail(t *testing.T) {
	issuer := new(rotating)
	server := httptest.NewServer(issuer)
	defer server.Close()
	s, clock, _ := storeOf(t, cluster("c", address(server)))
	from := remote("c", "/")
	f, key := filterOf(from), newSigner(t, "k")
	token, stray := key.token(t), newSigner(t, "stray").token(t)
	step := func(name string, d time.Duration, want string) {
		t.Helper()
		clock.advance(d)
		judge(s, f, token)
		if fetched := s.Fetched(from); fetched != nil {
			<-fetched
		}
		if got := judge(s, f, token); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	issuer.put(nil)
	step("never fetched", 0, fetchFailed)
	if n := issuer.asked.Load(); n != 1 {
		t.Errorf("without a policy of retries, within the pause, the issuer was asked %d times", n)
	}
	issuer.put(setOf(key))
	step("within the pause", time.Second/2, fetchFailed)
	step("after the pause", time.Second, "")
	issuer.put(nil)
	step("a fetch fails", 61*time.Second, "")
	if got := judge(s, f, stray); got != noKey {
		t.Errorf("a token with an unknown key: %q", got)
	}
	step("it has failed for long", 58*time.Second, "")
	step("the keys are too old", 2*time.Second, fetchFailed)
	issuer.put(setOf(key))
	step("the server has recovered", 2*time.Second, "")
}

// Each answer that is not a set of keys denies tokens in Envoy's words, in bounded time and memory. Other issuers are not disturbed,
// nor is the next fetch.
func TestAnswersThatAreNotKeys(t *testing.T) {
	good := newSigner(t, "k")
	token := good.token(t)
	fine := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(setOf(good)) }))
	defer fine.Close()
	var sent atomic.Int64
	number := base64.RawURLEncoding.EncodeToString
	rsaKey := func(bytes int, low byte, exponent string) string {
		n := append([]byte{0xc0}, make([]byte, bytes-1)...)
		n[bytes-1] = low
		return `{"keys":[{"kty":"RSA","kid":"k","e":"` + exponent + `","n":"` + number(n) + `"}]}`
	}
	text := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		timeout time.Duration
		log     string
	}{
		"500":                  {text(500, string(setOf(good))), 0, "500"},
		"a redirect":           {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, fine.URL, http.StatusFound) }, 0, "302"},
		"404":                  {text(404, string(setOf(good))), 0, "404"},
		"HTML":                 {text(200, "<html>Sign in</html>"), 0, "not JSON"},
		"empty":                {text(200, ""), 0, "not JSON"},
		"half":                 {text(200, string(setOf(good)[:100])), 0, "not JSON"},
		"other JSON":           {text(200, `[1,2]`), 0, "no key"},
		"keys that are text":   {text(200, `{"keys":"x"}`), 0, "no key"},
		"too many keys":        {text(200, `{"keys":[`+strings.Repeat(`{"kty":"oct","k":"YQ"},`, 40_000)+`{"kty":"oct","k":"YQ"}]}`), 0, "40001 keys"},
		"100,000 keys":         {text(200, `{"keys":[`+strings.Repeat(`{"kty":"oct","k":"YQ"},`, 100_000)+`{"kty":"oct","k":"YQ"}]}`), 0, "more than"},
		"RSA, 16384 bits":      {text(200, rsaKey(2048, 1, "AQAB")), 0, "no key"},
		"RSA, a huge exponent": {text(200, rsaKey(256, 1, strings.Repeat("_", 300))), 0, "no key"},
		"endless": {func(w http.ResponseWriter, _ *http.Request) {
			for {
				n, err := w.Write(make([]byte, 64<<10))
				if sent.Add(int64(n)); err != nil {
					return
				}
			}
		}, 0, "more than"},
		"drips": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, " ")
				w.(http.Flusher).Flush()
				ticks := time.NewTicker(5 * time.Millisecond)
				<-ticks.C
				ticks.Stop()
			}
		}, 50 * time.Millisecond, "deadline"},
		"hangs": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 50 * time.Millisecond, "deadline"},
	} {
		server := httptest.NewServer(c.handler)
		s, _, log := storeOf(t, cluster("bad", address(server)), cluster("fine", address(fine)))
		from := remote("bad", "/")
		if c.timeout > 0 {
			from.Service.Timeout = c.timeout
		}
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				if got := judge(s, filterOf(from), token); got != fetchFailed {
					t.Errorf("%s: %q", name, got)
				}
				if got := judge(s, filterOf(remote("fine", "/")), token); got != "" {
					t.Errorf("%s: another issuer's token: %q", name, got)
				}
			})
		}
		all.Wait()
		if n := strings.Count(log.String(), "cannot fetch"); n != 1 || !strings.Contains(log.String(), c.log) {
			t.Errorf("%s: %d messages, want one with %q:\n%.500s", name, n, c.log, log)
		}
		server.CloseClientConnections()
		server.Close()
	}
	if n := sent.Load(); n > 64<<20 {
		t.Errorf("%d bytes of an endless answer were read", n)
	}
}

// Odd sets that have a key of the token verify it: further ones, broken, doubled or unknown, do not count.
func TestOddSetsOfKeys(t *testing.T) {
	good, other := newSigner(t, "k"), newSigner(t, "k")
	inner := func(s signer) string {
		return strings.TrimSuffix(strings.TrimPrefix(string(setOf(s)), `{"keys":[`), `]}`)
	}
	even := base64.RawURLEncoding.EncodeToString(append([]byte{0xc0}, make([]byte, 255)...))
	for name, body := range map[string]string{
		"a name twice":         `{"keys":[` + inner(other) + `,` + inner(good) + `]}`,
		"a broken key":         `{"keys":[1,{"kty":"EC","kid":"k","crv":"P-256","x":"AA","y":"AA"},{"kty":"RSA","kid":"k"},` + inner(good) + `]}`,
		"an even modulus":      `{"keys":[{"kty":"RSA","kid":"k","e":"AQAB","n":"` + even + `"},` + inner(good) + `]}`,
		"an even exponent":     `{"keys":[{"kty":"RSA","kid":"k","e":"Ag","n":"` + even + `"},` + inner(good) + `]}`,
		"an exponent of one":   `{"keys":[{"kty":"RSA","kid":"k","e":"AQ","n":"` + even + `"},` + inner(good) + `]}`,
		"a modulus of zero":    `{"keys":[{"kty":"RSA","kid":"k","e":"AQAB","n":"AA"},` + inner(good) + `]}`,
		"fields of the issuer": `{"x":[{}],"keys":[` + inner(good) + `]}`,
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			_, _ = io.WriteString(w, body)
		}))
		s, _, _ := storeOf(t, cluster("c", address(server)))
		f := filterOf(remote("c", "/"))
		if got := judge(s, f, good.token(t)); got != "" {
			t.Errorf("%s: %q", name, got)
		}
		header := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","kid":"k"}`))
		for _, signature := range []string{"AQ", even} {
			if got := judge(s, f, header+".eyJpc3MiOiJtZSJ9."+signature); got == "" {
				t.Errorf("%s: a forged signature is accepted", name)
			}
		}
		server.Close()
	}
}

// A fetch is repeated as the policy allows, at most maxRetries times, after failures that may pass.
func TestRetriesOfFetches(t *testing.T) {
	key := newSigner(t, "k")
	for name, c := range map[string]struct {
		retries  uint32
		failures int32
		status   int
		asked    int32
		want     string
	}{
		"no policy":              {0, 1, 503, 1, fetchFailed},
		"enough":                 {2, 2, 503, 3, ""},
		"too few":                {2, 9, 503, 3, fetchFailed},
		"more than are possible": {1 << 30, 1 << 30, 500, 1 + maxRetries, fetchFailed},
		"a client's fault":       {2, 1, 401, 1, fetchFailed},
		"a connection is cut":    {2, 2, 0, 3, ""},
	} {
		var asked atomic.Int32
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			switch {
			case asked.Add(1) > c.failures:
				_, _ = w.Write(setOf(key))
			case c.status == 0:
				panic(http.ErrAbortHandler)
			default:
				w.WriteHeader(c.status)
			}
		}))
		s, _, _ := storeOf(t, cluster("c", address(server)))
		from := remote("c", "/")
		from.Retries, from.BackOff, from.MaxBackOff = c.retries, time.Microsecond, nettest.Patience
		if got := judge(s, filterOf(from), key.token(t)); got != c.want || asked.Load() != c.asked {
			t.Errorf("%s: %q after %d requests; want %q after %d", name, got, asked.Load(), c.want, c.asked)
		}
		server.Close()
	}
}

// A server that is down denies tokens. The time of the whole fetch bounds its attempts.
func TestAServerThatIsDown(t *testing.T) {
	token := newSigner(t, "k").token(t)
	nettest.UnderLimit(t, 50*time.Millisecond, func(t testing.TB, limit time.Duration) { // in which a refusal comes
		s, _, log := storeOf(t, cluster("c", net.TCPAddrFromAddrPort(nettest.Refusing(t))))
		from := remote("c", "/")
		from.Service.Timeout = limit
		from.Retries, from.BackOff, from.MaxBackOff = maxRetries, time.Hour, time.Hour
		if got := judge(s, filterOf(from), token); got != fetchFailed || !strings.Contains(log.String(), "refused") {
			t.Errorf("%q; log:\n%s", got, log)
		}
	})
}

// A push changes a provider while its keys are fetched: the answer to the old request never becomes the new provider's keys.
func TestAChangedProviderDoesNotUseTheFetchOfTheOldOne(t *testing.T) {
	before, after := newSigner(t, "k"), newSigner(t, "k")
	arrived, release := make(chan struct{}, 1), make(chan struct{})
	var fresh atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/old" {
			arrived <- struct{}{}
			<-release
			_, _ = w.Write(setOf(before))
			return
		}
		fresh.Add(1)
		_, _ = w.Write(setOf(after))
	}))
	defer server.Close()
	s, clock, _ := storeOf(t, cluster("c", address(server)), cluster("d", address(server)))
	result := make(chan string)
	go func() { result <- judge(s, filterOf(remote("c", "/old")), before.token(t)) }()
	<-arrived
	changed := filterOf(remote("c", "/new"))
	for i, c := range []struct{ token, want string }{{after.token(t), ""}, {before.token(t), badToken}} {
		if got := judge(s, changed, c.token); got != c.want {
			t.Errorf("token %d, while the old keys are fetched: %q, want %q", i, got, c.want)
		}
	}
	close(release)
	if got := <-result; got != "" {
		t.Errorf("the old provider's token: %q", got)
	}
	if got := judge(s, changed, before.token(t)); got != badToken {
		t.Errorf("the old provider's token, after its fetch: %q", got)
	}
	// Another cluster with the same URI is another source, and a shorter time counts at once.
	if judge(s, filterOf(remote("d", "/new")), after.token(t)); fresh.Load() != 2 {
		t.Errorf("the new URI was fetched %d times from two clusters", fresh.Load())
	}
	clock.advance(3 * time.Second)
	shorter := remote("c", "/new")
	shorter.CacheFor = time.Second
	if got := judge(s, filterOf(shorter), after.token(t)); got != "" || fresh.Load() != 3 {
		t.Errorf("with a shorter time: %q, %d fetches", got, fresh.Load())
	}
}

// Tokens that name keys which are not there cannot make the agent ask the issuer as often as they come.
func TestUnknownKeysDoNotFloodTheIssuer(t *testing.T) {
	issuer := new(rotating)
	issuer.put(setOf(newSigner(t, "k")))
	server := httptest.NewServer(issuer)
	defer server.Close()
	s, clock, _ := storeOf(t, cluster("c", address(server)))
	f := filterOf(remote("c", "/"))
	for i := range 5 { // 0 s, 4 s, … 16 s: fetched at the first, and at 12 s
		for k := range 20 {
			judge(s, f, newSigner(t, fmt.Sprint(i, k)).token(t))
		}
		clock.advance(4 * time.Second)
	}
	if n := issuer.asked.Load(); n != 2 {
		t.Errorf("within 16 s, the issuer was asked %d times", n)
	}
}
