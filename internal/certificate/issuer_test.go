package certificate

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/kubeapi"
)

const (
	secretPath        = "/api/v1/namespaces/pillion-system/secrets/authority"
	configurationPath = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/pillion"
	namespacePath     = "/api/v1/namespaces/pillion-system"
	host              = "pillion-webhook.pillion-system.svc"
)

// server is an API server with three objects and the rules of its resource versions.
type server struct {
	mu       sync.Mutex
	objects  map[string]object
	requests []string
	refuse   map[string]int    // status by "METHOD path"
	before   map[string]func() // runs once before a request, without the lock

	published []publication
}

// publication is a caBundle and the time since which the configuration has it.
type publication struct {
	at     time.Time
	bundle string
}

func newServer() *server {
	service := object{"name": "pillion-webhook", "namespace": "pillion-system"}
	s := &server{refuse: map[string]int{}, before: map[string]func(){}, objects: map[string]object{
		secretPath:    {"metadata": object{"name": "authority", "labels": object{"kept": "yes"}}, "type": "Opaque"},
		namespacePath: {"metadata": object{"name": "pillion-system"}},
		configurationPath: {"metadata": object{"name": "pillion"}, "webhooks": []any{
			object{"name": "other", "clientConfig": object{"url": "https://example.com"}},
			object{"name": "inject.pillion.dev", "clientConfig": object{"service": service}},
		}},
	}}
	for _, o := range s.objects {
		o["metadata"].(object)["resourceVersion"] = "1"
	}
	return s
}

func (s *server) Get(_ context.Context, path string, into any) error {
	return s.do(http.MethodGet, path, "", nil, into)
}

func (s *server) Put(_ context.Context, path string, body any) error {
	return s.do(http.MethodPut, path, "", body, nil)
}

func (s *server) Patch(_ context.Context, path, contentType string, patch any) error {
	return s.do(http.MethodPatch, path, contentType, patch, nil)
}

func (s *server) do(method, path, contentType string, content, into any) error {
	what := method + " " + path
	s.mu.Lock()
	before := s.before[what]
	delete(s.before, what)
	s.mu.Unlock()
	if before != nil {
		before()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, what)
	body, err := json.Marshal(content)
	if err != nil {
		return err
	}
	if code := s.refuse[what]; code != 0 {
		return &kubeapi.StatusError{Code: code, Message: what + " is forbidden"}
	}
	o := s.objects[path]
	if o == nil {
		return &kubeapi.StatusError{Code: http.StatusNotFound, Message: "not found"}
	}
	metadata := o["metadata"].(object)
	switch method {
	case http.MethodPut:
		var fresh object
		_ = json.Unmarshal(body, &fresh)
		if fresh["metadata"].(object)["resourceVersion"] != metadata["resourceVersion"] {
			return &kubeapi.StatusError{Code: http.StatusConflict, Message: "the object has been modified"}
		}
		s.objects[path] = fresh
	case http.MethodPatch:
		if contentType == "application/merge-patch+json" {
			var patch struct{ Metadata struct{ Labels object } }
			_ = json.Unmarshal(body, &patch)
			metadata["labels"] = patch.Metadata.Labels
			break
		}
		var patch []struct {
			Op, Path string
			Value    any
		}
		_ = json.Unmarshal(body, &patch)
		for _, step := range patch {
			if step.Op == "test" {
				if step.Value != metadata["resourceVersion"] {
					return &kubeapi.StatusError{Code: http.StatusUnprocessableEntity, Message: "the test failed"}
				}
				continue
			}
			var n int
			if _, err := fmt.Sscanf(step.Path, "/webhooks/%d/clientConfig/caBundle", &n); err != nil {
				return err
			}
			o["webhooks"].([]any)[n].(object)["clientConfig"].(object)["caBundle"] = step.Value
			s.published = append(s.published, publication{time.Now(), step.Value.(string)})
		}
	}
	if method != http.MethodGet {
		s.touch(path)
		return nil
	}
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}

// touch changes the version of an object.
func (s *server) touch(path string) {
	metadata := s.objects[path]["metadata"].(object)
	version, _ := strconv.Atoi(metadata["resourceVersion"].(string))
	metadata["resourceVersion"] = strconv.Itoa(version + 1)
}

func (s *server) bundle() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	text, _ := s.objects[configurationPath]["webhooks"].([]any)[1].(object)["clientConfig"].(object)["caBundle"].(string)
	bundle, _ := base64.StdEncoding.DecodeString(text)
	return bundle
}

func (s *server) config(log io.Writer) IssuerConfig {
	return IssuerConfig{
		API: s, Namespace: "pillion-system", Service: "pillion-webhook", Secret: "authority", Configuration: "pillion", PodSecurity: "restricted",
		Log: slog.New(slog.NewTextHandler(log, nil)),
	}
}

// trusted checks that an API server with the current configuration accepts the issuer's certificate.
func (s *server) trusted(t *testing.T, i *Issuer) {
	t.Helper()
	certificate, err := i.Get(nil)
	if err != nil {
		t.Fatal(err)
	}
	trustedBy(t, certificate.Leaf, s.bundle())
}

func trustedBy(t *testing.T, leaf *x509.Certificate, bundle []byte) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: host, CurrentTime: time.Now()}); err != nil {
		t.Errorf("at %v the certificate is not trusted: %v", time.Now(), err)
	}
}

// trustedByAll is trusted for every API server: each may use a configuration that was changed less than spread ago.
func (s *server) trustedByAll(t *testing.T, i *Issuer) {
	t.Helper()
	certificate, err := i.Get(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, p := range s.published {
		if n+1 == len(s.published) || time.Since(s.published[n+1].at) < spread {
			bundle, _ := base64.StdEncoding.DecodeString(p.bundle)
			trustedBy(t, certificate.Leaf, bundle)
		}
	}
}

func (s *server) issuer(t *testing.T) *Issuer {
	t.Helper()
	i, err := NewIssuer(t.Context(), s.config(io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestReplicasShareAnAuthorityThatIsPublished(t *testing.T) {
	s := newServer()
	first := s.issuer(t)
	bundle := s.bundle()
	second := s.issuer(t)
	if !bytes.Equal(bundle, s.bundle()) || bytes.Count(bundle, []byte("BEGIN")) != 1 {
		t.Errorf("the second replica changed the configuration from\n%s\nto\n%s", bundle, s.bundle())
	}
	for _, i := range []*Issuer{first, second} {
		s.trusted(t, i)
	}
	one, _ := first.Get(nil)
	two, _ := second.Get(nil)
	if one.Leaf.Equal(two.Leaf) {
		t.Error("the replicas have the same certificate")
	}
	if labels := s.objects[secretPath]["metadata"].(object)["labels"]; labels == nil {
		t.Error("the Secret lost its labels")
	}
	if s.objects[configurationPath]["webhooks"].([]any)[0].(object)["clientConfig"].(object)["caBundle"] != nil {
		t.Error("the webhook of another service was changed")
	}
	// The authority can sign for the webhook only.
	other, err := first.authority(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wrong := &Issuer{IssuerConfig: first.IssuerConfig}
	wrong.Service = "kubernetes"
	roots := x509.NewCertPool()
	roots.AddCert(other.Leaf)
	if _, err := wrong.issue(other); err == nil {
		t.Error("the authority can sign for another name, or a certificate that is not trusted was issued")
	}
	for _, address := range []string{"203.0.113.1", "2001:db8::1"} {
		key := other.PrivateKey.(*ecdsa.PrivateKey)
		template := &x509.Certificate{IPAddresses: []net.IP{net.ParseIP(address)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
		der, err := sign(template, other.Leaf, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		forged, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := forged.Verify(x509.VerifyOptions{Roots: roots, DNSName: address}); err == nil {
			t.Errorf("the authority can sign for %s", address)
		}
	}
}

func TestReplicasThatStartTogetherAgree(t *testing.T) {
	s := newServer()
	var other *Issuer
	// The other replica is faster between reading and writing, at both objects.
	s.before["PUT "+secretPath] = func() { other = s.issuer(t) }
	s.before["PATCH "+configurationPath] = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.touch(configurationPath)
	}
	i := s.issuer(t)
	s.trusted(t, i)
	s.trusted(t, other)
	if !bytes.Equal(i.of, other.of) {
		t.Error("the replicas have different authorities")
	}
}

// Replicas that check at different times, two of them shortly after each other, are trusted at every moment while the
// authority and certificates are renewed.
func TestRenewalIsNeverNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer()
		s.issuer(t)
		<-time.After(authorityLife - authorityRenew - 24*time.Hour) // synctest's clock
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var replicas []*Issuer
		var running sync.WaitGroup
		for _, delay := range []time.Duration{0, checkEvery / 2, spread / 3} {
			<-time.After(delay)
			i := s.issuer(t)
			replicas = append(replicas, i)
			running.Go(func() { i.Run(ctx) })
		}
		certificates, authorities, most := map[string]bool{}, map[string]bool{}, 0
		for begin := time.Now(); time.Since(begin) < 23*24*time.Hour && !t.Failed(); {
			step := 50 * time.Minute
			if at := time.Since(begin); at > 22*time.Hour && at < 27*time.Hour { // the authority is renewed
				step = 15 * time.Second
				if at > 24*time.Hour-2*checkEvery && at < 24*time.Hour+2*checkEvery {
					step = time.Second
				}
			}
			<-time.After(step)
			for _, i := range replicas {
				s.trustedByAll(t, i)
				certificate, _ := i.Get(nil)
				certificates[certificate.Leaf.SerialNumber.String()] = true
				authorities[string(certificate.Leaf.AuthorityKeyId)] = true
			}
			most = max(most, bytes.Count(s.bundle(), []byte("BEGIN")))
		}
		if len(certificates) < 6 || len(authorities) != 2 || most != 2 || bytes.Count(s.bundle(), []byte("BEGIN")) != 1 {
			t.Errorf("%d certificates of %d authorities, at most %d published, %d in the end", len(certificates), len(authorities), most,
				bytes.Count(s.bundle(), []byte("BEGIN")))
		}
		cancel()
		running.Wait()
	})
}

func TestADamagedStateIsRepaired(t *testing.T) {
	for name, damage := range map[string]func(*testing.T, *server){
		"the bundle is overwritten": func(_ *testing.T, s *server) {
			s.objects[configurationPath]["webhooks"].([]any)[1].(object)["clientConfig"].(object)["caBundle"] = "AAAA"
		},
		"the bundle is removed": func(_ *testing.T, s *server) {
			delete(s.objects[configurationPath]["webhooks"].([]any)[1].(object)["clientConfig"].(object), "caBundle")
		},
		"the Secret is emptied": func(_ *testing.T, s *server) { delete(s.objects[secretPath], "data") },
		"the Secret is nonsense": func(_ *testing.T, s *server) {
			s.objects[secretPath]["data"] = object{"ca.crt": "AAAA", "ca.key": "AAAA"}
		},
		"the key is another one": func(t *testing.T, s *server) { data(s)["ca.key"] = data(newServerWithAuthority(t))["ca.key"] },
		"the authority is of the future": func(t *testing.T, s *server) {
			s.objects[secretPath]["data"] = authorityFrom(t, time.Now().Add(24*time.Hour))
		},
		"a foreign authority": func(t *testing.T, s *server) { s.objects[secretPath]["data"] = data(foreignAuthority(t)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer()
				i := s.issuer(t)
				damage(t, s)
				if err := i.check(t.Context()); err != nil {
					t.Fatal(err)
				}
				s.trusted(t, i)
				s.trusted(t, s.issuer(t))
			})
		})
	}
}

// authorityFrom returns the data of a Secret with an authority that is valid from a time on.
func authorityFrom(t *testing.T, begin time.Time) object {
	t.Helper()
	pair, _, key, err := (&Issuer{IssuerConfig: newServer().config(io.Discard)}).newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	template := *pair.Leaf
	template.NotBefore = begin
	der, err := sign(&template, &template, pair.Leaf.PublicKey, pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return object{"ca.crt": base64.StdEncoding.EncodeToString(certificate), "ca.key": base64.StdEncoding.EncodeToString(key)}
}

// A replica that has read the Secret before it was replaced, and is slow to publish, does not undo the replacement.
func TestASlowReplicaKeepsTheNewerAuthority(t *testing.T) {
	for _, age := range []time.Duration{0, 2 * overlap} { // of the older one
		now := time.Now()
		s := newServer()
		s.objects[secretPath]["data"] = authorityFrom(t, now.Add(-backdate-age))
		slow := s.issuer(t)
		old, err := slow.authority(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s.objects[secretPath]["data"] = authorityFrom(t, now.Add(-backdate+time.Minute))
		fresh := s.issuer(t)
		if err := slow.publish(t.Context(), old.Leaf); err != nil {
			t.Fatal(err)
		}
		s.trusted(t, fresh)
		s.trusted(t, slow)
	}
}

func TestTheNewestAuthoritiesArePublished(t *testing.T) {
	s := newServer()
	var last *Issuer
	for n := range maxAuthorities + 2 {
		s.objects[secretPath]["data"] = authorityFrom(t, time.Now().Add(-backdate+time.Duration(n)*time.Minute/2))
		last = s.issuer(t)
	}
	s.trusted(t, last)
	if n := bytes.Count(s.bundle(), []byte("BEGIN")); n != maxAuthorities {
		t.Errorf("%d authorities, want %d", n, maxAuthorities)
	}
}

// The procedure of docs/kubernetes.md for a leaked key.
func TestALeakedAuthorityIsReplacedAtOnce(t *testing.T) {
	s := newServer()
	leaked := s.issuer(t)
	delete(s.objects[secretPath], "data")
	delete(s.objects[configurationPath]["webhooks"].([]any)[1].(object)["clientConfig"].(object), "caBundle")
	s.trusted(t, s.issuer(t))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.bundle())
	if _, err := leaked.leaf.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: host}); err == nil {
		t.Error("API servers still trust the leaked authority")
	}
}

func data(s *server) object { return s.objects[secretPath]["data"].(object) }

func newServerWithAuthority(t *testing.T) *server {
	s := newServer()
	s.issuer(t)
	return s
}

// foreignAuthority has an authority for another service in its Secret.
func foreignAuthority(t *testing.T) *server {
	s := newServer()
	s.objects[configurationPath]["webhooks"].([]any)[1].(object)["clientConfig"].(object)["service"].(object)["name"] = "other"
	config := s.config(io.Discard)
	config.Service = "other"
	if _, err := NewIssuer(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestARefusalNamesTheRequest(t *testing.T) {
	for what, want := range map[string]string{
		"GET " + secretPath:          "reading the Secret pillion-system/authority: 403: ",
		"PUT " + secretPath:          "updating the Secret pillion-system/authority: 403: ",
		"GET " + configurationPath:   "reading the MutatingWebhookConfiguration pillion: 403: ",
		"PATCH " + configurationPath: "patching the MutatingWebhookConfiguration pillion: 403: ",
	} {
		s := newServer()
		s.refuse[what] = http.StatusForbidden
		if _, err := NewIssuer(t.Context(), s.config(io.Discard)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v", what, err)
		}
		if len(s.requests) > 8 {
			t.Errorf("%s: %d requests", what, len(s.requests))
		}
	}
	s := newServer()
	s.refuse["PUT "+secretPath] = http.StatusConflict
	if _, err := NewIssuer(t.Context(), s.config(io.Discard)); err == nil || len(s.requests) != 2*attempts {
		t.Errorf("endless conflicts: %v after %d requests", err, len(s.requests))
	}
	s = newServer()
	config := s.config(io.Discard)
	config.Service = "elsewhere"
	if _, err := NewIssuer(t.Context(), config); err == nil || !strings.Contains(err.Error(), "no webhook for the service pillion-system/elsewhere") {
		t.Errorf("another service: %v", err)
	}
}

// move changes the namespace of the webhook's service and Secret.
func (s *server) move(namespace string) {
	s.objects["/api/v1/namespaces/"+namespace+"/secrets/authority"] = s.objects[secretPath]
	s.objects[configurationPath]["webhooks"].([]any)[1].(object)["clientConfig"].(object)["service"].(object)["namespace"] = namespace
}

func TestTheNamespaceGetsItsLevelUnlessItHasOne(t *testing.T) {
	level := func(s *server) any {
		labels, _ := s.objects[namespacePath]["metadata"].(object)["labels"].(object)
		return labels[podSecurityLabel]
	}
	s := newServer()
	s.issuer(t)
	if got := level(s); got != "restricted" {
		t.Errorf("without a level: %v", got)
	}
	for _, c := range []struct {
		labels object
		want   any
	}{
		{object{"team": "web"}, nil},
		{object{"name": "shared"}, nil},
		{object{"name": "elsewhere"}, "restricted"}, // Helm created it
		{object{"name": "elsewhere", podSecurityLabel: "baseline"}, "baseline"},
	} {
		s := newServer()
		s.move("elsewhere")
		s.objects["/api/v1/namespaces/elsewhere"] = object{"metadata": object{"resourceVersion": "1", "labels": c.labels}}
		config := s.config(io.Discard)
		config.Namespace = "elsewhere"
		if _, err := NewIssuer(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		labels := s.objects["/api/v1/namespaces/elsewhere"]["metadata"].(object)["labels"].(object)
		if got := labels[podSecurityLabel]; got != c.want {
			t.Errorf("namespace elsewhere with labels %v: %v, want %v", c.labels, got, c.want)
		}
	}
	s = newServer()
	s.objects[namespacePath]["metadata"].(object)["labels"] = object{podSecurityLabel: "privileged"}
	s.issuer(t)
	if got := level(s); got != "privileged" {
		t.Errorf("with a level: %v", got)
	}
	s = newServer()
	s.refuse["PATCH "+namespacePath] = http.StatusForbidden
	var log bytes.Buffer
	if _, err := NewIssuer(t.Context(), s.config(&log)); err != nil || !strings.Contains(log.String(), "cannot set the Pod Security level") {
		t.Errorf("without permission: %v, log %s", err, &log)
	}
	s = newServer()
	config := s.config(io.Discard)
	config.PodSecurity = ""
	if _, err := NewIssuer(t.Context(), config); err != nil || level(s) != nil {
		t.Errorf("without PodSecurity: %v, %v", err, level(s))
	}
}
