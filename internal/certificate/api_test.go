package certificate

import (
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// account writes the files of a service account.
func account(t *testing.T, files map[string]string) string {
	t.Helper()
	directory := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(directory, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return directory
}

func TestTheAPIUsesTheServiceAccount(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/plain":
			http.Error(w, "no JSON", http.StatusBadGateway)
		case "/refused":
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, `{"kind":"Status","message":"secrets is forbidden"}`)
		default:
			fmt.Fprintf(w, `{"token":%q}`, r.Header.Get("Authorization"))
		}
	}))
	defer server.Close()
	at, _ := url.Parse(server.URL)
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	directory := account(t, map[string]string{"namespace": "mesh\n", "token": "first\n", "ca.crt": ca})
	api, namespace, err := inCluster(directory, at.Hostname(), at.Port())
	if err != nil || namespace != "mesh" {
		t.Fatal(namespace, err)
	}
	for _, token := range []string{"first", "second"} { // the kubelet replaces it
		if err := os.WriteFile(filepath.Join(directory, "token"), []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		var got struct{ Token string }
		if err := api.do(t.Context(), http.MethodGet, "/", "", nil, &got); err != nil || got.Token != "Bearer "+token {
			t.Errorf("%+v, %v, want the token %s", got, err, token)
		}
	}
	for path, want := range map[string]string{"/refused": "GET /refused: secrets is forbidden", "/plain": "GET /plain: 502 Bad Gateway"} {
		if err := api.do(t.Context(), http.MethodGet, path, "", nil, nil); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", path, err, want)
		}
	}
	if _, _, err := inCluster(directory, "", ""); err == nil || !strings.Contains(err.Error(), "run it in a pod") {
		t.Errorf("outside a pod: %v", err)
	}
	for _, missing := range []string{"namespace", "ca.crt"} {
		files := map[string]string{"namespace": "mesh", "token": "x", "ca.crt": ca}
		delete(files, missing)
		if _, _, err := inCluster(account(t, files), "127.0.0.1", "1"); err == nil || !strings.Contains(err.Error(), missing) {
			t.Errorf("without %s: %v", missing, err)
		}
	}
	if _, _, err := inCluster(account(t, map[string]string{"namespace": "mesh", "ca.crt": "none"}), "127.0.0.1", "1"); err == nil {
		t.Error("an authority without a certificate is accepted")
	}
}

func TestAnotherAuthorityIsNotTrusted(t *testing.T) {
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	at, _ := url.Parse(server.URL)
	i := newServer().issuer(t)
	authority, err := i.authority(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Leaf.Raw}))
	api, _, err := inCluster(account(t, map[string]string{"namespace": "mesh", "token": "secret", "ca.crt": ca}), at.Hostname(), at.Port())
	if err != nil {
		t.Fatal(err)
	}
	if err := api.do(t.Context(), http.MethodGet, "/", "", nil, nil); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("%v", err)
	}
}
