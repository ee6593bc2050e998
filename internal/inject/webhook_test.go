package inject

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/certificate"
	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// ask wraps an object into an AdmissionReview.
func ask(object string) []byte {
	return fmt.Appendf(nil, `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u-1",`+
		`"namespace":"shop","operation":"CREATE","object":%s}}`, object)
}

func reviewed(t testing.TB, body []byte) *response {
	t.Helper()
	text, err := Review(body, Options{Image: "pillion"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var answer review
	if err := json.Unmarshal(text, &answer); err != nil {
		t.Fatal(err)
	}
	if answer.APIVersion != "admission.k8s.io/v1" || answer.Kind != "AdmissionReview" || answer.Response == nil || answer.Request != nil {
		t.Fatalf("%s", text)
	}
	return answer.Response
}

// patched applies a JSON Patch as an API server does.
func patched(t testing.TB, object string, steps []byte) any {
	t.Helper()
	tree, err := yamledit.DecodeJSON([]byte(object))
	if err != nil {
		t.Fatal(err)
	}
	var list []yamledit.PatchStep
	decoder := json.NewDecoder(bytes.NewReader(steps))
	decoder.UseNumber()
	if err := decoder.Decode(&list); err != nil {
		t.Fatal(err)
	}
	for _, step := range list {
		at := yamledit.ParsePointer(step.Path)
		if tree, err = do(tree, at, step); err != nil {
			t.Fatalf("%s %s: %v", step.Op, step.Path, err)
		}
	}
	return tree
}

func do(tree any, at []string, step yamledit.PatchStep) (any, error) {
	last := len(at) == 1
	switch v := tree.(type) {
	case map[string]any:
		below, has := v[at[0]]
		switch {
		case !last:
			changed, err := do(below, at[1:], step)
			v[at[0]] = changed
			return v, err
		case step.Op == "add":
			v[at[0]] = step.Value
			return v, nil
		case step.Op == "remove" && has:
			delete(v, at[0])
			return v, nil
		}
	case []any:
		i := len(v)
		if at[0] != "-" {
			var err error
			if i, err = strconv.Atoi(at[0]); err != nil {
				return nil, err
			}
		}
		switch {
		case !last && i < len(v):
			changed, err := do(v[i], at[1:], step)
			v[i] = changed
			return v, err
		case step.Op == "add" && i <= len(v):
			return slices.Insert(v, i, step.Value), nil
		case step.Op == "remove" && i < len(v):
			return slices.Delete(v, i, i+1), nil
		}
	}
	return nil, fmt.Errorf("%q does not exist in %v", at, tree)
}

// withoutStatus removes the status. It contains source text and so differs.
func withoutStatus(t testing.TB, tree any) any {
	t.Helper()
	for _, o := range objects(tree, nil) {
		annotations, _ := yamledit.Get(yamledit.Get(o.tree, o.template...), "metadata", "annotations").(map[string]any)
		delete(annotations, statusAnnotation)
	}
	return tree
}

func TestTheWebhooksPatchEqualsAnInjection(t *testing.T) {
	patches := 0
	for name, text := range inputs(t) {
		if strings.HasPrefix(name, "classic") {
			continue
		}
		for _, part := range yamledit.Split(strings.TrimPrefix(string(text), byteOrderMark)) {
			d, err := yamledit.Parse(part)
			if err != nil || d.Tree() == nil {
				continue
			}
			object := yamledit.JSON(d.Tree())
			answer := reviewed(t, ask(object))
			if !answer.Allowed || answer.UID != "u-1" {
				t.Fatalf("%s: %+v", name, answer)
			}
			options := Options{Image: "pillion", Namespace: "shop"}
			out, err := inject(object, name, options, ignore)
			if err != nil {
				t.Fatal(err)
			}
			if answer.Patch == nil {
				if out != object || answer.PatchType != "" {
					t.Errorf("%s: no patch", name)
				}
				continue
			}
			patches++
			want, err := yamledit.Parse(out)
			if err != nil {
				t.Fatal(err)
			}
			got := patched(t, object, answer.Patch)
			if back, err := uninject(yamledit.JSON(got), name, ignore); err != nil {
				t.Errorf("%s: %v", name, err)
			} else if tree, err := yamledit.Parse(back); err != nil || !reflect.DeepEqual(tree.Tree(), d.Tree()) {
				t.Errorf("%s: after the webhook, uninjection makes\n%s\n%v", name, back, err)
			}
			if !reflect.DeepEqual(withoutStatus(t, got), withoutStatus(t, want.Tree())) {
				t.Errorf("%s: the patch %s makes\n%s\nwant\n%s", name, answer.Patch, yamledit.JSON(got), yamledit.JSON(want.Tree()))
			}
		}
	}
	if patches < 25 {
		t.Errorf("%d patches", patches)
	}
}

func TestTheWebhookRefusesAPodThatItCannotInject(t *testing.T) {
	pod := `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","annotations":{%s}},"spec":{"containers":[{"name":"a"}]%s}}`
	answer := reviewed(t, ask(fmt.Sprintf(pod, `"pillion.dev/log-level":"loud"`, "")))
	if answer.Allowed || answer.Patch != nil || answer.Status.Code != 422 ||
		answer.Status.Message != `pillion: annotation pillion.dev/log-level: "loud" is not a level: use debug, info, warn or error` {
		t.Errorf("%+v %+v", answer, answer.Status)
	}
	answer = reviewed(t, ask(fmt.Sprintf(pod, "", `,"hostNetwork":true`)))
	if !answer.Allowed || answer.Patch != nil || len(answer.Warnings) != 1 || answer.Warnings[0] != "pillion: left alone: it uses the node's network (hostNetwork)" {
		t.Errorf("%+v", answer)
	}
	update := bytes.Replace(ask(fmt.Sprintf(pod, "", "")), []byte("CREATE"), []byte("UPDATE"), 1)
	if answer = reviewed(t, update); !answer.Allowed || answer.Patch != nil {
		t.Errorf("%+v", answer)
	}
	for _, body := range []string{``, `[]`, `{}`, `{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview","request":{}}`,
		`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`,
		string(ask(`{"kind":"Other","x":[` + strings.Repeat(`{"":1},`, maxValues/2) + `1]}`))} {
		if answer, err := Review([]byte(body), Options{Image: "x"}, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%s: %s", body, answer)
		}
	}
}

// Parsed values take far more memory than their text. Those in strings do not count.
func TestTheValuesOfAReviewAreBounded(t *testing.T) {
	if answer := reviewed(t, ask(`{"kind":"Other","x":"`+strings.Repeat(`\"{,[`, maxValues)+`"}`)); !answer.Allowed {
		t.Errorf("a string: %+v", answer)
	}
	if answer := reviewed(t, ask(`{"kind":"Other","x":[`+strings.Repeat(`1,`, maxValues-100)+`1]}`)); !answer.Allowed {
		t.Errorf("%d values: %+v", maxValues-100, answer)
	}
}

func FuzzReview(f *testing.F) {
	for _, text := range inputs(f) {
		if d, err := yamledit.Parse(strings.TrimPrefix(string(text), byteOrderMark)); err == nil {
			f.Add(ask(yamledit.JSON(d.Tree())))
		}
	}
	f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"operation":"CREATE"}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		text, err := Review(body, Options{Image: "pillion"}, slog.New(slog.DiscardHandler))
		if err != nil {
			return
		}
		var asked, answer review
		if err := json.Unmarshal(text, &answer); err != nil || answer.Response == nil {
			t.Fatalf("%v: %s", err, text)
		}
		if json.Unmarshal(body, &asked) != nil || answer.Response.Status != nil && answer.Response.Status.Code == 500 {
			t.Errorf("%s", text)
		}
		if answer.Response.Patch != nil {
			patched(t, string(asked.Request.Object), answer.Response.Patch)
		}
	})
}

// certify writes a self-signed certificate for localhost and returns a pool that trusts it.
func certify(t *testing.T, dir, name string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "tls.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	write(t, filepath.Join(dir, "tls.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	pool := x509.NewCertPool()
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(certificate)
	return pool
}

// write replaces a file and advances its modification time even where clocks are coarse.
func write(t *testing.T, name string, content []byte) {
	t.Helper()
	changed := time.Now()
	if info, err := os.Stat(name); err == nil && !changed.After(info.ModTime()) {
		changed = info.ModTime().Add(time.Millisecond)
	}
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(name, changed, changed); err != nil {
		t.Fatal(err)
	}
}

// served starts a webhook. end stops it and returns the result of Serve.
func served(t *testing.T, dir string) (address string, end func() error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	files, err := certificate.FromFiles(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, WebhookConfig{listener, files.Get, Options{Image: "pillion"}, log}) }()
	ended := false
	end = func() error {
		ended = true
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if !ended {
			_ = end()
		}
	})
	return listener.Addr().String(), end
}

// trusting returns a client that trusts one authority and opens a connection for each request.
func trusting(pool *x509.CertPool) *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "localhost"},
	}}
}

func TestTheWebhookServesTLSAndReloadsItsCertificate(t *testing.T) {
	dir := t.TempDir()
	old := certify(t, dir, "old")
	address, end := served(t, dir)
	post := func(client *http.Client, kind, body string) (int, string) {
		response, err := client.Post("https://"+address+"/inject", kind, strings.NewReader(body))
		if err != nil {
			return 0, err.Error()
		}
		defer response.Body.Close()
		text, _ := io.ReadAll(response.Body)
		return response.StatusCode, string(text)
	}
	review := string(ask(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"spec":{"containers":[{"name":"a"}]}}`))
	if code, text := post(trusting(old), "application/json", review); code != 200 || !strings.Contains(text, `"patchType":"JSONPatch"`) {
		t.Errorf("%d %s", code, text)
	}
	for _, c := range []struct {
		kind, body string
		code       int
	}{
		{"text/plain", review, http.StatusUnsupportedMediaType},
		{"application/json", "{", http.StatusBadRequest},
		{"application/json", `{"x":"` + strings.Repeat("x", maxReview) + `"}`, http.StatusRequestEntityTooLarge},
	} {
		if code, text := post(trusting(old), c.kind, c.body); code != c.code {
			t.Errorf("%d %.100s, want %d", code, text, c.code)
		}
	}
	for path, want := range map[string]int{"/healthz": 200, "/inject": 405, "/": 404} {
		response, err := trusting(old).Get("https://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != want {
			t.Errorf("%s: %d", path, response.StatusCode)
		}
	}

	// The next handshake uses the new certificate.
	fresh := certify(t, dir, "fresh")
	if code, text := post(trusting(fresh), "application/json", review); code != 200 {
		t.Errorf("after the rotation: %d %s", code, text)
	}
	if code, _ := post(trusting(old), "application/json", review); code != 0 {
		t.Error("the old certificate is still used")
	}
	// Half a rotation and missing files leave the last valid certificate in use.
	write(t, filepath.Join(dir, "tls.crt"), []byte("half"))
	if code, text := post(trusting(fresh), "application/json", review); code != 200 {
		t.Errorf("with a broken file: %d %s", code, text)
	}
	os.Remove(filepath.Join(dir, "tls.key"))
	if code, text := post(trusting(fresh), "application/json", review); code != 200 {
		t.Errorf("without a file: %d %s", code, text)
	}
	last := certify(t, dir, "last")
	if code, text := post(trusting(last), "application/json", review); code != 200 {
		t.Errorf("after the second rotation: %d %s", code, text)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

// begun sends the head of a review and returns when its handler waits for the body.
func begun(t *testing.T, address string, pool *x509.CertPool, length int) (*tls.Conn, *bufio.Reader) {
	t.Helper()
	connection, err := tls.Dial("tcp", address, &tls.Config{RootCAs: pool, ServerName: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() })
	fmt.Fprintf(connection, "POST /inject HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n", length)
	answers := bufio.NewReader(connection)
	if line, err := answers.ReadString('\n'); err != nil || line != "HTTP/1.1 100 Continue\r\n" {
		t.Fatal(line, err)
	}
	_, _ = answers.ReadString('\n')
	return connection, answers
}

func TestSlowSendersDoNotDelayOthers(t *testing.T) {
	dir := t.TempDir()
	pool := certify(t, dir, "x")
	address, _ := served(t, dir)
	for range 2 * maxReviews {
		connection, _ := begun(t, address, pool, maxReview)
		if _, err := connection.Write(make([]byte, smallReview+1)); err != nil {
			t.Fatal(err)
		}
	}
	response, err := trusting(pool).Post("https://"+address+"/inject", "application/json", bytes.NewReader(ask(`{"kind":"Other"}`)))
	if err != nil || response.StatusCode != 200 {
		t.Fatalf("%+v %v", response, err)
	}
	response.Body.Close()
}

func TestTheWebhookFinishesRequestsInProgress(t *testing.T) {
	dir := t.TempDir()
	pool := certify(t, dir, "x")
	address, end := served(t, dir)
	review := ask(`{"apiVersion":"v1","kind":"Pod"}`)
	connection, answers := begun(t, address, pool, len(review))
	// The handler waits for the body.
	ended := make(chan error, 1)
	go func() { ended <- end() }()
	for { // until the listener is closed
		probe, err := net.Dial("tcp", address)
		if err != nil {
			break
		}
		probe.Close()
	}
	connection.Write(review)
	response, err := http.ReadResponse(answers, nil)
	if err != nil || response.StatusCode != 200 {
		t.Errorf("%+v %v", response, err)
	} else if text, err := io.ReadAll(response.Body); err != nil || !bytes.Contains(text, []byte("AdmissionReview")) {
		t.Errorf("%s %v", text, err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// Without HTTP/2 the number of connections bounds the number of requests.
func TestAConnectionHasOneRequestAtATime(t *testing.T) {
	dir := t.TempDir()
	pool := certify(t, dir, "x")
	address, _ := served(t, dir)
	connection, err := tls.Dial("tcp", address, &tls.Config{RootCAs: pool, ServerName: "localhost", NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	if got := connection.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("the webhook chose %q", got)
	}
}

// stalled is a request whose body ends when end is closed, or when its read deadline is set.
type stalled struct {
	*httptest.ResponseRecorder
	bytes      int
	begun      chan<- bool
	end        <-chan struct{}
	terminated chan struct{}
}

func (s *stalled) Read(b []byte) (int, error) {
	if s.bytes > 0 {
		n := min(len(b), s.bytes)
		s.bytes -= n
		return n, nil
	}
	s.begun <- true
	select {
	case <-s.end:
		return 0, io.EOF
	case <-s.terminated:
		return 0, os.ErrDeadlineExceeded
	}
}

func (s *stalled) SetReadDeadline(time.Time) error { close(s.terminated); return nil }

// Requests of any number and speed hold at most maxHeld bytes. The oldest make room for others.
func TestUnfinishedRequestsHoldABoundedMemory(t *testing.T) {
	handler := NewWebhook(Options{Image: "pillion"}, slog.New(slog.DiscardHandler))
	post := func(w http.ResponseWriter, body io.Reader) {
		r := httptest.NewRequest(http.MethodPost, "/inject", body)
		r.Header.Set("Content-Type", "application/json")
		handler.ServeHTTP(w, r)
	}
	begun, end := make(chan bool), make(chan struct{})
	const requests = maxConnections - 1
	evicted := make(chan int, requests)
	var running sync.WaitGroup
	var before, during runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for n := range requests {
		running.Go(func() {
			s := &stalled{httptest.NewRecorder(), smallReview - 1, begun, end, make(chan struct{})}
			post(s, s)
			if s.Code == http.StatusServiceUnavailable {
				evicted <- n
			}
		})
		<-begun
	}
	const room = maxHeld / smallReview
	for range requests - room {
		if n := <-evicted; n >= requests-room {
			t.Errorf("request %d of %d was evicted, though older ones were there", n, requests)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&during)
	if grown := int64(during.HeapAlloc) - int64(before.HeapAlloc); grown > maxHeld*3/2 {
		t.Errorf("they hold %d MiB", grown>>20)
	}
	w := httptest.NewRecorder()
	post(w, bytes.NewReader(ask(`{"kind":"Other"}`)))
	if w.Code != http.StatusOK {
		t.Errorf("a quick request: %d %s", w.Code, w.Body)
	}
	if n := <-evicted; n != requests-room {
		t.Errorf("request %d made room, want the oldest, %d", n, requests-room)
	}
	close(end)
	running.Wait()
	if len(evicted) > 0 {
		t.Errorf("%d more requests were evicted", len(evicted))
	}
}

func TestAFloodOfSlowSendersDoesNotStopOthers(t *testing.T) {
	dir := t.TempDir()
	pool := certify(t, dir, "x")
	address, _ := served(t, dir)
	for _, bytes := range []int{smallReview - 1, smallReview + 1} {
		for range maxHeld/smallReview + 10 {
			connection, _ := begun(t, address, pool, maxReview)
			if _, err := connection.Write(make([]byte, bytes)); err != nil {
				t.Fatal(err)
			}
		}
	}
	response, err := trusting(pool).Post("https://"+address+"/inject", "application/json", bytes.NewReader(ask(`{"kind":"Other"}`)))
	if err != nil || response.StatusCode != 200 {
		t.Fatalf("%+v %v", response, err)
	}
	response.Body.Close()
}
