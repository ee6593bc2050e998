package istiod

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"istio.io/istio/pilot/pkg/features"
	"istio.io/istio/pkg/jwt"
)

// tokensRequired requires a token from clients of the pod nginx. The keys are those of a server that the agent reaches itself.
const tokensRequired = `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: keys, namespace: default}
spec:
  hosts: [keys.example]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 9000, name: http, protocol: HTTP}]
  endpoints: [{address: 203.0.113.8}]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: default}
spec:
  selector: {matchLabels: {app: nginx}}
  jwtRules: [{issuer: me, jwksUri: "http://keys.example:9000/keys"}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: tokens, namespace: default}
spec:
  selector: {matchLabels: {app: nginx}}
  rules: [{from: [{source: {requestPrincipals: ["me/you"]}}]}]
`

// tokenKey is a key of an issuer.
type tokenKey struct {
	kid string
	*ecdsa.PrivateKey
}

func newTokenKey(t *testing.T, kid string) tokenKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return tokenKey{kid, key}
}

// token returns a token of the issuer me for the subject you.
func (k tokenKey) token(t *testing.T) string {
	t.Helper()
	encode := base64.RawURLEncoding.EncodeToString
	text := encode([]byte(`{"alg":"ES256","kid":"`+k.kid+`"}`)) + "." + encode([]byte(`{"iss":"me","sub":"you"}`))
	digest := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, k.PrivateKey, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return text + "." + encode(signature)
}

// keySet returns keys as a JSON Web Key Set.
func keySet(t *testing.T, keys ...tokenKey) string {
	t.Helper()
	var texts []string
	for _, k := range keys {
		public, err := k.PublicKey.ECDH()
		if err != nil {
			t.Fatal(err)
		}
		point, encode := public.Bytes(), base64.RawURLEncoding.EncodeToString
		texts = append(texts, fmt.Sprintf(`{"kty":"EC","crv":"P-256","kid":%q,"x":%q,"y":%q}`, k.kid, encode(point[1:33]), encode(point[33:])))
	}
	return `{"keys":[` + strings.Join(texts, ",") + `]}`
}

// Keys that the agent fetches rotate while clients send tokens. The old key's tokens stay valid until its set is replaced. The new
// key's are valid from the fetch that the first of them causes. Forged ones never are.
func TestKeysRotateWhileRequestsRun(t *testing.T) {
	before := features.JwksFetchMode
	features.JwksFetchMode = jwt.Envoy
	t.Cleanup(func() { features.JwksFetchMode = before })
	c := newCouple(t, "PERMISSIVE")
	older, newer, forger := newTokenKey(t, "older"), newTokenKey(t, "newer"), newTokenKey(t, "older")
	var set atomic.Value
	var asked atomic.Int32
	set.Store(keySet(t, older))
	listener, served := c.pods[1].Listen(t, "tcp", "0.0.0.0:9000"), make(chan struct{})
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		io.WriteString(w, set.Load().(string))
	})}
	go func() { defer close(served); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-served })
	c.plane.apply(tokensRequired)
	old, fresh, forged := older.token(t), newer.token(t), forger.token(t)
	await(t, func() error { return c.present("", http.StatusForbidden) })
	await(t, func() error { return c.present(old, http.StatusOK) })

	stop, failed := make(chan struct{}), make(chan error, 4)
	var clients sync.WaitGroup
	for i := range cap(failed) {
		clients.Go(func() {
			token, want := old, http.StatusOK
			if i%4 == 3 {
				token, want = forged, http.StatusUnauthorized
			}
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := c.present(token, want); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	set.Store(keySet(t, older, newer))
	await(t, func() error { return c.present(fresh, http.StatusOK) })
	for range 200 {
		if err := c.present(fresh, http.StatusOK); err != nil {
			t.Fatalf("after the keys were fetched: %v", err)
		}
	}
	close(stop)
	clients.Wait()
	select {
	case err := <-failed:
		t.Error(err)
	default:
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("the keys were fetched %d times", n)
	}
}

// present sends a request to the pod nginx with a token, without one if that is empty. It compares the status.
func (c *couple) present(token string, want int) error {
	dial := func(context.Context, string, string) (net.Conn, error) {
		return c.pods[1].Dial("tcp", c.vip[0]+":8080", patience)
	}
	transport := &http.Transport{DialContext: dial, DisableKeepAlives: true}
	request, err := http.NewRequest(http.MethodGet, "http://back.default.svc.cluster.local:8080/", nil)
	if err != nil {
		return err
	}
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := (&http.Client{Transport: transport, Timeout: patience}).Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != want {
		err = fmt.Errorf("status %d %.200q, want %d", response.StatusCode, body, want)
	}
	return err
}
