package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// admin sends a request to the admin port from within the pod.
func (s *stage) admin(t testing.TB, method, path string) (status int, body string) {
	t.Helper()
	return send(t, s.pod, method, "http://127.0.0.1:15000"+path, nil)
}

// order sends a command to the admin port. It must be accepted.
func (s *stage) order(t testing.TB, path string) (body string) {
	t.Helper()
	status, body := s.admin(t, "POST", path)
	if status != 200 {
		t.Errorf("POST %s: %d %s", path, status, body)
	}
	return body
}

// busy makes requests in both directions, one of them fails, and leaves a connection open in each direction.
func (s *stage) busy(t *testing.T) {
	t.Helper()
	for _, w := range []way{s.inbound(), s.outbound()} {
		for _, http2 := range []bool{false, true} {
			d := newDialogue(t, w, http2, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/broken" {
					w.WriteHeader(500)
				}
			})
			for _, path := range []string{"/things/7?token=hunter-query", "/broken"} {
				request := d.request(t, "GET", path, nil)
				request.Host = "shop.example"
				request.Header.Set("Authorization", "Bearer hunter-header")
				request.Header.Set("Cookie", "session=hunter-cookie")
				request.Header.Set("User-Agent", "hunter-agent/1")
				text(t, d.do(t, request))
			}
		}
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
	}
	tryConnection(s.peer, podURL(9, "")[len("http://"):])
}

// istioctl and Kiali parse Envoy's own messages, and reject others.
func TestAdminAnswersAreEnvoysMessages(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "envoyjson")
	s := newInjectedStage(t, nil)
	s.busy(t)
	var given bytes.Buffer
	encoder := json.NewEncoder(&given)
	for path, message := range map[string]string{
		"/config_dump":                                               "ConfigDump",
		"/config_dump?include_eds=true":                              "ConfigDump",
		"/config_dump?resource=static_listeners":                     "ConfigDump",
		"/config_dump?resource=static_clusters&name_regex=.*Cluster": "ConfigDump",
		"/config_dump?include_eds&resource=static_endpoint_configs":  "ConfigDump",
		"/clusters?format=json":                                      "Clusters",
		"/listeners?format=json":                                     "Listeners",
		"/server_info":                                               "ServerInfo",
		"/certs":                                                     "Certificates",
		"/memory":                                                    "Memory",
		"/init_dump":                                                 "UnreadyTargetsDumps",
	} {
		status, body := s.admin(t, "GET", path)
		if status != 200 {
			t.Errorf("%s: %d %s", path, status, body)
		}
		encoder.Encode(map[string]string{"name": path, "type": "envoy.admin.v3." + message, "body": body})
	}
	judge := exec.Command(program)
	judge.Stdin = &given
	if out, err := judge.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("envoyjson: %v\n%s", err, out)
	}
	// The messages describe this agent.
	for path, wanted := range map[string][]string{
		"/server_info":                  {`"sidecar~198.51.100.2~reviews-v1-6d4b75cb6d-hswz6.shop~shop.svc.cluster.local"`, `"LIVE"`},
		"/config_dump?include_eds=true": {"PassthroughCluster", "virtualInbound", "virtualOutbound", "15006", "198.51.100.2"},
		"/clusters":                     {"PassthroughCluster::", nettest.Elsewhere4.String()},
		"/listeners":                    {"virtualInbound::0.0.0.0:15006\n", "virtualOutbound::127.0.0.1:15001\n", "15021", "15020", "15090"},
		"/stats?filter=istio_requests":  {"istio_requests_total"},
		"/stats/prometheus":             {`istio_requests_total{reporter="destination"`},
		"/ready":                        {"LIVE\n"},
		"/help":                         {"/config_dump"},
	} {
		_, body := s.admin(t, "GET", path)
		for _, want := range wanted {
			if !strings.Contains(body, want) {
				t.Errorf("%s has no %s:\n%.3000s", path, want, body)
			}
		}
	}
	if status, page := send(t, s.pod, "GET", "http://127.0.0.1:15000/", map[string]string{"Accept": "text/html,*/*;q=0.8"}); status != 200 ||
		!strings.HasPrefix(strings.ToLower(page), "<!doctype html>") {
		t.Errorf("a browser gets %d %.200s", status, page)
	}
	if _, body := s.admin(t, "GET", "/stats?format=json"); !json.Valid([]byte(body)) {
		t.Errorf("/stats?format=json is not JSON: %.500s", body)
	}
}

// The admin port can change the agent, so it accepts only requests from the pod, and changes only by POST.
func TestAdminPortIsLocalAndChangesNeedPOST(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for _, own := range []netip.Addr{nettest.PodIP4, nettest.PodIP6} {
		for _, from := range []*nettest.Namespace{s.peer, s.pod} {
			if err := tryConnection(from, netip.AddrPortFrom(own, capture.AdminPort).String()); !isReset(err) && !isRefused(err) {
				t.Errorf("%s reaches %v:15000: %v", from.Name, own, err)
			}
		}
	}
	for _, path := range []string{
		"/logging?level=error", "/healthcheck/fail", "/drain_listeners", "/quitquitquit", "/reopen_logs",
	} {
		if status, body := s.admin(t, "GET", path); status != 405 || body != "Method GET not allowed, POST required." {
			t.Errorf("GET %s: %d %q, want 405", path, status, body)
		}
		for name, value := range map[string]string{"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site", "Host": "evil.example:15000"} {
			if status, _ := send(t, s.pod, "POST", "http://127.0.0.1:15000"+path, map[string]string{name: value}); status != 403 {
				t.Errorf("POST %s with %s: %s is answered %d, want 403", path, name, value, status)
			}
		}
	}
	if status, body := s.admin(t, "GET", "/no/such"); status != 404 || !strings.HasPrefix(body, "invalid path. admin commands are:\n") {
		t.Errorf("%d %q", status, body)
	}
	if status, body := s.admin(t, "POST", "/drain_listeners?skip_exit"); status != 400 || body != "skip_exit requires graceful\n" {
		t.Errorf("%d %q", status, body)
	}
	if status, _ := s.admin(t, "GET", "/ready"); status != 200 {
		t.Errorf("readiness = %d after rejected requests", status)
	}
}

func TestLogLevelIsChangedByRequest(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--log-level", "info")
	d := newDialogue(t, s.inbound(), false, func(http.ResponseWriter, *http.Request) {})
	requests := func(path string) []string { return s.agent.log.lines("msg=request", path) }
	one := func(path string) {
		text(t, d.do(t, d.request(t, "GET", path, nil)))
		s.agent.access.await(t, path) // its record is closed
	}
	one("/before")
	if body := s.order(t, "/logging?level=debug"); !strings.HasPrefix(body, "active loggers:\n  admin: debug\n") || !strings.Contains(body, "\n  pillion: debug\n") {
		t.Errorf("%q", body)
	}
	one("/debug")
	if body := s.order(t, "/logging?level=warning"); !strings.Contains(body, "\n  pillion: info\n") { // istioctl's --reset
		t.Errorf("%q", body)
	}
	one("/reset")
	if body := s.order(t, "/logging?http=debug"); !strings.Contains(body, "\n  http: debug\n") {
		t.Errorf("%q", body)
	}
	one("/http")
	if body := s.order(t, "/logging?paths=http:info,pillion:warning"); !strings.Contains(body, "\n  pillion: info\n") {
		t.Errorf("%q", body)
	}
	one("/after")
	if len(requests("/before")) != 0 || len(requests("/debug")) != 1 || len(requests("/reset")) != 0 ||
		len(requests("/http")) != 1 || len(requests("/after")) != 0 {
		t.Errorf("the log is\n%s", s.agent.log)
	}
	for _, bad := range []string{"level=loud", "envoy=debug", "level=info&paths=pillion:info"} {
		if status, body := s.admin(t, "POST", "/logging?"+bad); status != 400 {
			t.Errorf("%s: %d %s", bad, status, body)
		}
	}
}

func TestReadinessIsChangedByRequest(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for _, port := range []uint16{capture.ReadinessPort, capture.StatusPort} {
		for _, c := range []struct {
			order string
			want  int
		}{{"fail", 503}, {"ok", 200}} {
			s.order(t, "/healthcheck/"+c.order)
			if status, body := get(t, s.peer, podURL(port, "/healthz/ready")); status != c.want {
				t.Errorf("after %s, port %d: %d %s", c.order, port, status, body)
			}
			if status, _ := s.admin(t, "GET", "/ready"); status != c.want {
				t.Errorf("after %s, /ready = %d", c.order, status)
			}
		}
	}
	downstream, upstream := s.inbound().connect(t)
	converse(t, downstream, upstream)
}

// Envoy's order to drain: with skip_exit it announces and goes on accepting; without grace it stops listening at once.
func TestListenersAreDrainedByRequest(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.order(t, "/drain_listeners?inboundonly&graceful&skip_exit")
	if status, _ := ask(t, s, "/healthz/ready"); status != 503 {
		t.Errorf("readiness = %d", status)
	}
	if status, body := s.admin(t, "GET", "/ready"); status != 503 || body != "DRAINING\n" {
		t.Errorf("/ready = %d %q", status, body)
	}
	var kept [][2]net.Conn
	for _, w := range s.ways() {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
		kept = append(kept, [2]net.Conn{downstream, upstream})
	}
	s.order(t, "/drain_listeners?inboundonly")
	nettest.Eventually(t, "inbound is refused", func() bool {
		return isRefused(tryConnection(s.peer, netip.AddrPortFrom(nettest.PodIP4, 9).String()))
	})
	downstream, upstream := s.outbound().connect(t)
	converse(t, downstream, upstream)
	for _, ends := range kept { // connections that were open stay so
		converse(t, ends[0], ends[1])
	}
}

// The commands that inspect an agent, with an agent that has traffic.
func TestCommandsThatInspectTheAgent(t *testing.T) {
	t.Parallel()
	s := newInjectedStage(t, nil)
	s.busy(t)
	run := func(args ...string) string {
		t.Helper()
		stdout, stderr, code := execute(t, s.pod, nil, args...)
		if code != 0 || stderr != "" {
			t.Errorf("pillion %q: exit code %d: %s", args, code, stderr)
		}
		return stdout
	}
	wants := func(out string, parts ...string) {
		t.Helper()
		for _, part := range parts {
			if !regexp.MustCompile("(?m)" + part).MatchString(out) {
				t.Errorf("no %s in\n%s", part, out)
			}
		}
	}
	nettest.Eventually(t, "the records are there", func() bool { return strings.Count(run("request", "GET", "live/records"), `"number"`) >= 9 })

	var info struct{ State string }
	if err := json.Unmarshal([]byte(run("request", "GET", "server_info")), &info); err != nil || info.State != "LIVE" {
		t.Errorf("server_info: %q, %v", info.State, err)
	}
	run("request", "POST", "logging?level=info")
	wants(run("status"), `^ready +yes$`, `^connections +\d+ open`, `^errors +5 of 9 that ended`, `upstream_refused`)
	wants(run("top", "--once"), `^ +DESTINATION +↓PER S +TOTAL +SUCCESS`, `^in +shop\.example .* 50\.?0? ?%`, `^out +shop\.example `, `^out +203\.0\.113\.7`)
	var destinations []struct {
		Direction, Name string
		Flows, Errors   int
	}
	if err := json.Unmarshal([]byte(run("top", "-o", "json")), &destinations); err != nil || len(destinations) == 0 {
		t.Errorf("top: %v", err)
	}
	for _, d := range destinations {
		if d.Name == "shop.example" && (d.Flows != 4 || d.Errors != 2) {
			t.Errorf("%+v, want 4 flows of which 2 failed", d)
		}
	}

	// tap prints three of the matching records from now on, then exits.
	var out bytes.Buffer
	tap := s.pod.Command(workloadUID, workloadUID, pillion, "tap", "-n", "3", "-o", "json", "--direction", "inbound", "--path", "/tapped")
	tap.Stdout = &out
	tapping := s.pod.Start(t, tap)
	nettest.Eventually(t, "tap follows the records", func() bool {
		_, live := s.admin(t, "GET", "/live")
		return strings.Contains(live, `"followers":1`)
	})
	d := newDialogue(t, s.inbound(), false, func(http.ResponseWriter, *http.Request) {})
	for _, path := range []string{"/other", "/tapped/1", "/tapped/2", "/other", "/tapped/3", "/tapped/4"} {
		text(t, d.do(t, d.request(t, "GET", path, nil)))
	}
	if code, err := tapping.Wait(nettest.Patience); err != nil || code != 0 {
		t.Fatalf("tap: exit code %d, %v", code, err)
	}
	var paths []string
	for line := range strings.Lines(out.String()) {
		var record struct {
			Path, Direction, Upstream string
			Status                    int
		}
		if err := json.Unmarshal([]byte(line), &record); err != nil || record.Status != 200 || record.Direction != "inbound" {
			t.Errorf("%s: %v", line, err)
		}
		paths = append(paths, record.Path)
	}
	if !slices.Equal(paths, []string{"/tapped/1", "/tapped/2", "/tapped/3"}) {
		t.Errorf("tapped %q", paths)
	}

	for _, args := range [][]string{{"request", "GET", "server_info"}, {"status"}, {"top"}, {"tap"}} {
		if _, stderr, code := execute(t, s.peer, nil, args...); code != 1 || !strings.Contains(stderr, "refused") {
			t.Errorf("pillion %q where there is no agent: exit code %d: %s", args, code, stderr)
		}
	}
}

// A bundle is sent to outsiders: it must not have secrets of users or operators.
func TestBundleHasNoSecrets(t *testing.T) {
	t.Parallel()
	secret := []string{"DATABASE_PASSWORD=hunter-variable", "PILLION_LOG_LEVEL=info"}
	s := newInjectedStage(t, secret)
	s.busy(t)
	stdout, stderr, code := execute(t, s.pod, append(secret, pathWith(t, nft)), "bundle", "-f", "-")
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	parts := unpack(t, stdout)
	for name, wanted := range map[string][]string{
		"version.txt":      {"pillion ", "Linux version"},
		"live.json":        {`"uptimeSeconds"`, "shop.example"},
		"records.json":     {`"/things/7"`, `"shop.example"`},
		"gates.txt":        {"ready: true\n", "inbound: open\n"},
		"log.txt":          {"carrying traffic"},
		"rules.txt":        {"15001", "15006"},
		"environment.txt":  {"DATABASE_PASSWORD\n", "PILLION_LOG_LEVEL=info\n"},
		"server_info.json": {"reviews-v1"},
		"config_dump.json": {"virtualInbound"},
		"metrics.txt":      {"istio_requests_total"},
		"goroutines.txt":   {"goroutine "},
	} {
		for _, want := range wanted {
			if !strings.Contains(parts[name], want) {
				t.Errorf("%s has no %q: %.1000s", name, want, parts[name])
			}
		}
	}
	if len(parts) != 12 {
		t.Errorf("%d parts, want 11", len(parts))
	}
	for name, content := range parts {
		if at := strings.Index(content, "hunter"); at >= 0 {
			t.Errorf("%s contains a secret: %s", name, content[max(0, at-100):min(len(content), at+100)])
		}
	}
	// The agent's own container may not read rules. A note takes their place, and the bundle succeeds.
	var out bytes.Buffer
	bundle := s.pod.Command(agentUID, agentUID, pillion, "bundle", "-f", "-")
	bundle.Stdout = &out
	if _, err := s.pod.Run(bundle); err != nil {
		t.Fatal(err)
	}
	if parts := unpack(t, out.String()); len(parts) != 12 || !strings.Contains(parts["rules.txt.note"], "NET_ADMIN") {
		t.Errorf("%d parts; the note is %q", len(parts), parts["rules.txt.note"])
	}
}

// unpack returns the parts of a bundle by name.
func unpack(t *testing.T, bundle string) map[string]string {
	t.Helper()
	unzipped, err := gzip.NewReader(strings.NewReader(bundle))
	if err != nil {
		t.Fatal(err)
	}
	parts := make(map[string]string)
	for archive := tar.NewReader(unzipped); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return parts
		} else if err != nil {
			t.Fatal(err)
		}
		name, content := strings.TrimPrefix(header.Name, "pillion-bundle/"), io.Reader(archive)
		if plain, packed := strings.CutSuffix(name, ".gz"); packed {
			name = plain
			if content, err = gzip.NewReader(archive); err != nil {
				t.Fatal(err)
			}
		}
		text, err := io.ReadAll(content)
		if err != nil {
			t.Fatal(err)
		}
		parts[name] = string(text)
	}
}
