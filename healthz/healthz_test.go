package healthz_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/healthz"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func Example() {
	handler := healthz.NewHandler(
		healthz.Gate{Name: "listeners", Open: func() error { return nil }},
		healthz.Gate{Name: "addresses", Open: func() error { return errors.New("not listed yet") }},
	)
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, httptest.NewRequest("GET", "/healthz/ready", nil))
	fmt.Println(answer.Code)
	fmt.Print(answer.Body)
	// Output:
	// 503
	// not ready
	// addresses: not listed yet
}

func TestPathsAndMethods(t *testing.T) {
	open, closed := func() error { return nil }, func() error { return errors.New("because") }
	for _, c := range []struct {
		method, path string
		gates        []healthz.Gate
		code         int
		body         string
	}{
		{"GET", "/healthz/ready", nil, 200, "ready\n"},
		{"GET", "/healthz/ready", []healthz.Gate{{"a", open}, {"b", open}}, 200, "ready\n"},
		{"GET", "/healthz/ready", []healthz.Gate{{"a", open}, {"b", closed}}, 503, "not ready\nb: because\n"},
		{"GET", "/healthz/ready", []healthz.Gate{{"a", closed}, {"b", closed}}, 503, "not ready\na: because\nb: because\n"},
		{"HEAD", "/healthz/ready", []healthz.Gate{{"a", closed}}, 503, ""},
		{"GET", "/healthz/live", []healthz.Gate{{"a", closed}}, 200, "alive\n"},
		{"POST", "/healthz/ready", nil, 405, ""},
		{"GET", "/", nil, 404, ""},
		{"GET", "/healthz", nil, 404, ""},
	} {
		server := httptest.NewServer(healthz.NewHandler(c.gates...))
		request, _ := http.NewRequest(c.method, server.URL+c.path, nil)
		response, err := server.Client().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		body := make([]byte, 1000)
		n, _ := response.Body.Read(body)
		response.Body.Close()
		server.Close()
		if response.StatusCode != c.code || c.body != "" && string(body[:n]) != c.body {
			t.Errorf("%s %s with %d gates: %d %q, want %d %q", c.method, c.path, len(c.gates), response.StatusCode, body[:n], c.code, c.body)
		}
	}
}

func TestGatesAreAskedForEachAnswer(t *testing.T) {
	var asked atomic.Int32
	handler := healthz.NewHandler(healthz.Gate{Name: "odd", Open: func() error {
		if asked.Add(1)%2 == 1 {
			return errors.New("odd")
		}
		return nil
	}})
	for _, want := range []int{503, 200, 503, 200} {
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, httptest.NewRequest("GET", "/healthz/ready", nil))
		if answer.Code != want {
			t.Errorf("answer %d: %d, want %d", asked.Load(), answer.Code, want)
		}
	}
}

func TestWaitReturnsWhenTheAnswerIsYes(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer server.Close()
	if err := healthz.Wait(t.Context(), server.URL, nettest.Patience, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if n := asked.Load(); n != 3 {
		t.Errorf("asked %d times, want 3", n)
	}
}

func TestWaitTellsTheLastAnswerWhenTheTimeIsUp(t *testing.T) {
	server := httptest.NewServer(healthz.NewHandler(healthz.Gate{Name: "door", Open: func() error { return errors.New("locked") }}))
	defer server.Close()
	nettest.UnderLimit(t, 100*time.Millisecond, func(t testing.TB, limit time.Duration) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		err := healthz.Wait(ctx, server.URL+"/healthz/ready", nettest.Patience, limit/10)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "door: locked") {
			t.Errorf("Wait: %v", err)
		}
	})
}

func TestWaitGivesEachRequestItsOwnTime(t *testing.T) {
	hang := make(chan struct{})
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		if asked.Add(1) == 1 {
			<-hang
		}
	}))
	defer server.Close()
	defer close(hang)
	if err := healthz.Wait(t.Context(), server.URL, 50*time.Millisecond, time.Millisecond); err != nil {
		t.Fatal(err)
	}
}
