package gateway

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/accesslog"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/metrics"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

// sinks is a serve.Recorder for all chains.
type sinks []flow.Sink

func (s sinks) Logs([]mesh.AccessLog) []flow.Sink { return s }
func (sinks) Metrics(*mesh.Stats) any             { return nil }

// recordTo returns sinks for records, and functions that return the lines of their log and the metrics so far.
func recordTo(t *testing.T, format string) (s sinks, lines, counts func() string) {
	t.Helper()
	parsed, err := accesslog.ParseFormat(format)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "log")
	log, err := accesslog.New(accesslog.Config{Path: path, Format: parsed})
	if err != nil {
		t.Fatal(err)
	}
	counted := metrics.New(podinfo.Pod{}, metrics.Options{})
	lines = func() string {
		if err := log.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	counts = func() string {
		var text strings.Builder
		if err := counted.Write(&text, false); err != nil {
			t.Fatal(err)
		}
		return text.String()
	}
	return sinks{log, counted}, lines, counts
}

// A request for a host of another server is answered 421 where istiod's filter is in the chain, over both versions of HTTP. The
// record, the log that the control plane asks for, and the metrics have that answer, and no server.
func TestAHostOfAnotherServerIsMisdirected(t *testing.T) {
	p := newPushed(t, 443)
	p.secrets(t)
	own := []*mesh.Misdirected{{Own: []string{shop}}, {Own: []string{mutual}}}
	recorder, lines, counts := recordTo(t, "%REQ(:AUTHORITY)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %UPSTREAM_HOST% %UPSTREAM_CLUSTER% %ROUTE_NAME%\n")
	fixed := &fixed{Store: p.Store, recorder: recorder}
	fixed.snapshot.Store(p.changed(func(l *mesh.Listener) {
		for i, c := range l.Chains {
			own[i].All = []string{shop, mutual}
			h := *c.HTTP
			h.Filters = append([]mesh.HTTPFilter{{Name: "misdirected", Misdirected: own[i]}}, h.Filters...)
			c.HTTP = &h
		}
	}))
	r := fixed.start(t, 443)
	serveAt(t, r, 9001)
	var wanted strings.Builder
	for _, protocol := range []string{"http/1.1", "h2"} {
		config := p.partner(shop, nil)
		config.NextProtos = []string{protocol}
		conn := tls.Client(r.Dial(t, r.At(443)), config)
		if err := conn.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		transport := &http.Transport{ForceAttemptHTTP2: protocol == "h2", DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			return conn, nil
		}}
		for _, c := range []struct {
			host   string
			status int
			line   string
		}{
			{mutual, 421, " 421 - misdirected_request - - -\n"},
			{"MUTUAL.example.test:443", 421, " 421 - misdirected_request - - -\n"},
			{"unknown.test", 404, " 404 NR route_not_found - - -\n"},
			{shop, 200, ""},
		} {
			request, err := http.NewRequest("GET", "https://"+shop+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Host = c.host
			response, err := transport.RoundTrip(request)
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			got := r.Await(t)
			if response.StatusCode != c.status || (c.status != 200) != (got.Cluster == "" && !got.Upstream.IsValid() && !got.UpstreamEnd.IsValid()) {
				t.Errorf("%s %s: %s; the record is %+v", protocol, c.host, response.Status, got)
			}
			if c.line != "" {
				wanted.WriteString(c.host + c.line)
			}
		}
		transport.CloseIdleConnections()
	}
	var logged strings.Builder
	for line := range strings.Lines(lines()) {
		if !strings.Contains(line, " 200 ") {
			logged.WriteString(line)
		}
	}
	if logged.String() != wanted.String() {
		t.Errorf("the log has\n%s, want\n%s", logged.String(), wanted.String())
	}
	found := ""
	for series := range strings.Lines(counts()) {
		if strings.HasPrefix(series, "istio_requests_total") && strings.Contains(series, `response_code="421"`) {
			found += series
		}
	}
	if strings.Count(found, "\n") != 1 || !strings.Contains(found, `destination_service="unknown"`) ||
		!strings.Contains(found, `response_flags="-"`) || !strings.HasSuffix(found, " 4\n") {
		t.Errorf("the metrics have %s", found)
	}
}
