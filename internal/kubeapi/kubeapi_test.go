package kubeapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// identity is a self-signed client certificate.
func identity(t *testing.T, name string) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// server answers with who asks: the common name of the client's certificate and the token.
func server(t *testing.T) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/denied":
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `{"kind":"Status","message":"nodes is forbidden: User \"a\" cannot list resource \"nodes\""}`)
		case "/refused":
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `{"kind":"Status","message":"pods \"x\" is forbidden: violates PodSecurity"}`)
		case "/missing":
			http.Error(w, "not here", http.StatusNotFound)
		case "/away":
			http.Redirect(w, r, "http://elsewhere.example/", http.StatusFound)
		case "/text":
			io.WriteString(w, "no JSON")
		default:
			name := ""
			if len(r.TLS.PeerCertificates) > 0 {
				name = r.TLS.PeerCertificates[0].Subject.CommonName
			}
			body, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, `{"who":%q,"token":%q,"request":%q}`, name, r.Header.Get("Authorization"), r.Method+" "+r.URL.String()+" "+string(body))
		}
	}))
	s.Config.ErrorLog = nil
	s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func authority(s *httptest.Server) string {
	return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

// write writes a kubeconfig with one context, whose user is given in YAML.
func write(t *testing.T, directory, server, authority, user string) string {
	t.Helper()
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: here
contexts:
- name: here
  context: {cluster: c, user: u, namespace: shop}
clusters:
- name: c
  cluster: {server: %q, certificate-authority-data: %q}
users:
- name: u
  user: %s
`, server, authority, user)
	name := filepath.Join(directory, "config")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

type answer struct{ Who, Token, Request string }

func TestEachKindOfCredentialReachesTheServer(t *testing.T) {
	s := server(t)
	certificate, key := identity(t, "operator")
	directory := t.TempDir()
	for name, content := range map[string]string{"cert.pem": string(certificate), "key.pem": string(key), "token": "from-a-file\n",
		"plugin": "#!/bin/sh\nprintf '{\"status\":{\"token\":\"%s-%s\"}}' \"$1\" \"$EXTRA\"\n"} {
		nettest.WriteProgram(t, filepath.Join(directory, name), content)
	}
	encoded := base64.StdEncoding.EncodeToString
	for user, want := range map[string]answer{
		"{}":              {},
		"{token: secret}": {Token: "Bearer secret"},
		fmt.Sprintf("{client-certificate-data: %q, client-key-data: %q}", encoded(certificate), encoded(key)): {Who: "operator"},
		"{client-certificate: cert.pem, client-key: key.pem}":                                                 {Who: "operator"},
		"{tokenFile: token}": {Token: "Bearer from-a-file"},
		"{exec: {apiVersion: client.authentication.k8s.io/v1, command: ./plugin, args: [made], env: [{name: EXTRA, value: here}]}}": {Token: "Bearer made-here"},
	} {
		client, err := Open(t.Context(), write(t, directory, s.URL, authority(s), user), "")
		if err != nil {
			t.Errorf("%s: %v", user, err)
			continue
		}
		var got answer
		err = client.Get(t.Context(), "/version?a=b", &got)
		want.Request = "GET /version?a=b "
		if err != nil || got != want || client.Namespace != "shop" || client.Server != s.URL {
			t.Errorf("%s: %v %+v, want %+v; namespace %s", user, err, got, want, client.Namespace)
		}
	}
}

func TestPostSendsAndReadsObjects(t *testing.T) {
	s := server(t)
	client, err := Open(t.Context(), write(t, t.TempDir(), s.URL, authority(s), "{}"), "here")
	if err != nil {
		t.Fatal(err)
	}
	var got answer
	if err := client.Post(t.Context(), "/pods?dryRun=All", map[string]int{"a": 1}, &got); err != nil || got.Request != `POST /pods?dryRun=All {"a":1}` {
		t.Errorf("%v %+v", err, got)
	}
}

func TestPutAndPatchSendTheirForm(t *testing.T) {
	requests := make(chan string, 2)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		requests <- r.Method + " " + r.URL.Path + " " + r.Header.Get("Content-Type") + " " + string(body)
		if r.Method == http.MethodPatch {
			w.WriteHeader(http.StatusUnprocessableEntity)
			io.WriteString(w, `{"kind":"Status","message":"the test failed"}`)
		}
	}))
	defer s.Close()
	client, err := Open(t.Context(), write(t, t.TempDir(), s.URL, authority(s), "{}"), "here")
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Put(t.Context(), "/a", map[string]int{"a": 1}); err != nil {
		t.Error(err)
	}
	if err := client.Patch(t.Context(), "/a", "application/json-patch+json", []int{1}); !IsConflict(err) {
		t.Errorf("a failed test: %v", err)
	}
	for _, want := range []string{`PUT /a application/json {"a":1}`, "PATCH /a application/json-patch+json [1]"} {
		if got := <-requests; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestErrorsKeepTheServersMessage(t *testing.T) {
	s := server(t)
	client, err := Open(t.Context(), write(t, t.TempDir(), s.URL, authority(s), "{}"), "")
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]struct {
		text      string
		forbidden bool
	}{
		"/denied":  {`403: nodes is forbidden: User "a" cannot list resource "nodes"`, true},
		"/refused": {`403: pods "x" is forbidden: violates PodSecurity`, false},
		"/missing": {"404: not here", false},
		"/away":    {`302: <a href="http://elsewhere.example/">Found</a>.`, false},
		"/text":    {"reading " + s.URL + "/text: invalid character 'o' in literal null (expecting 'u')", false},
	} {
		err := client.Get(t.Context(), path, new(answer))
		if err == nil || err.Error() != want.text || IsForbidden(err) != want.forbidden {
			t.Errorf("%s: %v, forbidden %v", path, err, IsForbidden(err))
		}
	}
}

// A server whose certificate is not signed by the kubeconfig's authority gets no token.
func TestAServerThatIsNotTrustedGetsNothing(t *testing.T) {
	s := server(t)
	other, _ := identity(t, "another authority")
	client, err := Open(t.Context(), write(t, t.TempDir(), s.URL, base64.StdEncoding.EncodeToString(other), "{token: secret}"), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Get(t.Context(), "/version", new(answer)); err == nil || !strings.Contains(err.Error(), "x509: certificate signed by unknown authority") {
		t.Errorf("%v", err)
	}
}

func TestSeveralFilesAreMergedAsKubectlDoes(t *testing.T) {
	s := server(t)
	first, second := filepath.Join(t.TempDir(), "first"), write(t, t.TempDir(), s.URL, authority(s), "{token: second}")
	if err := os.WriteFile(first, []byte("users: [{name: u, user: {token: first}}]\ncontexts: [{name: bare, context: {cluster: c, user: u}}]"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", first+":"+second+":/nonexistent")
	for contextName, namespace := range map[string]string{"": "shop", "bare": "default"} {
		client, err := Open(t.Context(), "", contextName)
		if err != nil {
			t.Fatal(err)
		}
		var got answer
		if err := client.Get(t.Context(), "/", &got); err != nil || got.Token != "Bearer first" || client.Namespace != namespace {
			t.Errorf("%q: %v %+v %s", contextName, err, got, client.Namespace)
		}
	}
}

func TestABadKubeconfigIsNamed(t *testing.T) {
	directory := t.TempDir()
	good := func(user string) string { return write(t, directory, "https://127.0.0.1:1", "", user) }
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, []byte("contexts: {"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ file, context, want string }{
		{"/nonexistent", "", "reading the kubeconfig: open /nonexistent: no such file or directory"},
		{broken, "", "reading the kubeconfig " + broken + ": yaml: "},
		{empty, "", "the kubeconfig has no current-context: choose one by --context"},
		{good("{}"), "other", `the kubeconfig has no context "other"`},
		{write(t, t.TempDir(), "nowhere", "", "{}"), "", `context "here": server "nowhere" is not a URL`},
		{write(t, t.TempDir(), "ftp://a", "", "{}"), "", `context "here": server "ftp://a" is not a URL`},
		{write(t, t.TempDir(), "https://a", "AAAA", "{}"), "", `context "here": certificate-authority: no certificate in PEM`},
		{write(t, t.TempDir(), "https://a", "", "{username: a, password: b}"), "", `context "here": user "u": auth-provider and passwords are not supported: use a token, a client certificate or exec`},
		{write(t, t.TempDir(), "https://a", "", "{tokenFile: /nonexistent}"), "", `context "here": user "u": tokenFile: open /nonexistent`},
		{write(t, t.TempDir(), "https://a", "", "{exec: {command: /bin/false}}"), "", `context "here": user "u": exec /bin/false: exit status 1`},
		{write(t, t.TempDir(), "https://a", "", "{exec: {command: echo, args: ['{}']}}"), "", `exec echo: its answer has no credentials`},
		{write(t, t.TempDir(), "https://a", "", "{client-certificate-data: AAAA}"), "", `client-certificate: tls: `},
	} {
		if _, err := Open(t.Context(), c.file, c.context); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v\nwant %s", c.file, err, c.want)
		}
	}
	t.Setenv("KUBECONFIG", "/nonexistent")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := Open(context.Background(), "", ""); err == nil || err.Error() != "there is no kubeconfig in /nonexistent: name one by --kubeconfig" {
		t.Errorf("%v", err)
	}
}

func TestAPodUsesItsServiceAccount(t *testing.T) {
	s := server(t)
	account := t.TempDir()
	roots := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	for name, content := range map[string]string{"token": "of-the-pod\n", "ca.crt": string(roots)} {
		if err := os.WriteFile(filepath.Join(account, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	host, port, _ := strings.Cut(s.Listener.Addr().String(), ":")
	for _, namespace := range []string{"default", "shop"} {
		if namespace != "default" {
			if err := os.WriteFile(filepath.Join(account, "namespace"), []byte(namespace+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		client, err := inCluster(account, host, port)
		if err != nil {
			t.Fatal(err)
		}
		var got answer
		if err := client.Get(t.Context(), "/", &got); err != nil || got.Token != "Bearer of-the-pod" || client.Namespace != namespace {
			t.Errorf("%v %+v %s", err, got, client.Namespace)
		}
		// The kubelet replaces the token before it expires.
		if err := os.WriteFile(filepath.Join(account, "token"), []byte("the-next"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := client.Get(t.Context(), "/", &got); err != nil || got.Token != "Bearer the-next" {
			t.Errorf("with a new token: %v %+v", err, got)
		}
		if err := os.WriteFile(filepath.Join(account, "token"), []byte("of-the-pod\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := inCluster(t.TempDir(), host, port); err == nil {
		t.Error("a pod without a service account has a client")
	}
}
