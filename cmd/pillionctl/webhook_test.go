package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// apiServer has the objects that the chart makes for the webhook.
type apiServer struct {
	mu       sync.Mutex
	secret   map[string]any
	bundle   string // base64
	level    any
	refusals []string
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer the-token" {
		s.refusals = append(s.refusals, r.URL.Path)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	var answer any
	switch what := r.Method + " " + r.URL.Path; what {
	case "GET /api/v1/namespaces/mesh/secrets/pillion-webhook-authority":
		answer = s.secret
	case "PUT /api/v1/namespaces/mesh/secrets/pillion-webhook-authority":
		_ = json.NewDecoder(r.Body).Decode(&s.secret)
	case "GET /apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/pillion":
		answer = map[string]any{"metadata": map[string]any{"resourceVersion": "7"}, "webhooks": []any{map[string]any{"clientConfig": map[string]any{
			"caBundle": s.bundle, "service": map[string]any{"name": "pillion-webhook", "namespace": "mesh"}}}}}
	case "PATCH /apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/pillion":
		var patch []struct {
			Path  string
			Value string
		}
		_ = json.NewDecoder(r.Body).Decode(&patch)
		s.bundle = patch[1].Value
	case "GET /api/v1/namespaces/mesh":
		answer = map[string]any{"metadata": map[string]any{"name": "mesh", "labels": map[string]any{"name": "mesh"}}} // as Helm creates it
	case "PATCH /api/v1/namespaces/mesh":
		var patch struct {
			Metadata struct{ Labels map[string]any }
		}
		_ = json.NewDecoder(r.Body).Decode(&patch)
		s.level = patch.Metadata.Labels["pod-security.kubernetes.io/enforce"]
	default:
		s.refusals = append(s.refusals, what)
		w.WriteHeader(http.StatusForbidden)
	}
	_ = json.NewEncoder(w).Encode(answer)
}

// The program as the chart starts it, with a service account and an API server: no certificate is there before, and the API
// server that reads its configuration can call the webhook.
func TestTheWebhookNeedsNothingButItsPermissions(t *testing.T) {
	nettest.RequireRoot(t)
	api := &apiServer{secret: map[string]any{"metadata": map[string]any{"resourceVersion": "3"}, "type": "Opaque"}}
	server := httptest.NewTLSServer(api)
	defer server.Close()
	host, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	account := t.TempDir()
	for name, content := range map[string][]byte{
		"namespace": []byte("mesh"), "token": []byte("the-token"),
		"ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}),
	} {
		if err := os.WriteFile(filepath.Join(account, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Of the mounts of a pod, the process gets this one.
	const mounted = `mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/kubernetes.io && cp -r "$0" /run/secrets/kubernetes.io/serviceaccount && exec "$@"`
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", mounted, account,
		os.Args[0], "webhook", "--listen=127.0.0.1:0", "--image=registry.example/pillion:1", "--issue-certificate", "--pod-security=restricted", "--sidecar-log-level=warn")
	cmd.Env = append(os.Environ(), asPillionctl+"="+filepath.Join(t.TempDir(), "status"), "KUBERNETES_SERVICE_HOST="+host, "KUBERNETES_SERVICE_PORT="+port)
	log := &output{}
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer cmd.Process.Kill()
	var address string
	nettest.Eventually(t, "the webhook listens", func() bool {
		_, rest, found := strings.Cut(log.String(), `msg="webhook started" address=`)
		address, _, _ = strings.Cut(rest, "\n")
		return found && strings.HasSuffix(rest, "\n")
	})

	api.mu.Lock()
	bundle, err := base64.StdEncoding.DecodeString(api.bundle)
	level, refusals := api.level, api.refusals
	api.mu.Unlock()
	roots := x509.NewCertPool()
	if err != nil || !roots.AppendCertsFromPEM(bundle) || level != "restricted" || len(refusals) > 0 {
		t.Fatalf("%v, caBundle %q, Pod Security %v, refused %q\n%s", err, bundle, level, refusals, log)
	}
	client := &http.Client{Timeout: nettest.Patience, Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "pillion-webhook.mesh.svc"}}}
	review := `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"1","operation":"CREATE","namespace":"shop","object":` +
		`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"spec":{"containers":[{"name":"a"}]}}}}`
	response, err := client.Post("https://"+address+"/inject", "application/json", strings.NewReader(review))
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || !bytes.Contains(text, []byte(`"patchType":"JSONPatch"`)) {
		t.Errorf("%v %s", err, text)
	}
	var answer struct{ Response struct{ Patch []byte } }
	if err := json.Unmarshal(text, &answer); err != nil || !bytes.Contains(answer.Response.Patch, []byte(`{"name":"PILLION_LOG_LEVEL","value":"warn"}`)) {
		t.Errorf("%v %s", err, answer.Response.Patch)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("%v\n%s", err, log)
		}
	case <-time.After(nettest.Patience):
		t.Errorf("the webhook does not end\n%s", log)
	}
	if strings.Contains(log.String(), "level=WARN") {
		t.Errorf("warnings in the log\n%s", log)
	}
}

func TestGoUsesLessMemoryThanTheContainerMay(t *testing.T) {
	before := debug.SetMemoryLimit(256 << 20)
	defer debug.SetMemoryLimit(before)
	leaveRoom()
	if got := debug.SetMemoryLimit(-1); got != 224<<20 {
		t.Errorf("within 256 MiB the limit is %d", got)
	}
	debug.SetMemoryLimit(math.MaxInt64)
	leaveRoom()
	if got := debug.SetMemoryLimit(-1); got != math.MaxInt64 {
		t.Errorf("without GOMEMLIMIT the limit is %d", got)
	}
}

// output is what a process has written so far.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}
