package e2e

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Patterns for fields of the access log whose value varies.
const (
	aTime     = `\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\]`
	aNumber   = `\d+`
	aPort     = `[1-9]\d*`
	aUUID     = `"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"`
	refusedBy = "delayed_connect_error:_Connection_refused"
)

// accessFields splits a line of the default format at the spaces outside quotation marks.
func accessFields(line string) (fields []string) {
	quoted, start := false, 0
	for i, c := range line {
		switch {
		case c == '"':
			quoted = !quoted
		case c == ' ' && !quoted:
			fields = append(fields, line[start:i])
			start = i + 1
		}
	}
	return append(fields, line[start:])
}

// sameFields compares a line field by field with regular expressions. Istio's default format has 22 fields.
func sameFields(t *testing.T, line string, want ...string) {
	t.Helper()
	got := accessFields(line)
	if len(got) != 22 || len(want) != 22 {
		t.Errorf("%d fields, compared with %d, want 22: %s", len(got), len(want), line)
		return
	}
	for i := range want {
		if !regexp.MustCompile("^(?:" + want[i] + ")$").MatchString(got[i]) {
			t.Errorf("field %d is %s, want %s: %s", i+1, got[i], want[i], line)
		}
	}
}

// connectionLine compares the line of a connection. Only some of its fields have a value.
func connectionLine(t *testing.T, line, flags, failure, received, sent, upstream, cluster, upstreamLocal, local, remote, serverName string) {
	t.Helper()
	q := regexp.QuoteMeta
	sameFields(t, line, aTime, `"- - -"`, "0", flags, "-", "-", q(`"`+failure+`"`), received, sent, aNumber, "-", `"-"`, `"-"`, `"-"`, `"-"`,
		q(`"`+upstream+`"`), q(cluster), upstreamLocal, q(local), q(remote), q(serverName), "-")
}

// The two lines that Istio writes for a request through a gateway to a real nginx: that of nginx's sidecar and that of the
// client's. The latter has PassthroughCluster, because no control plane names clusters.
func TestAccessLogLinesAreIstios(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	const index = 615 // bytes of nginx's index
	server, client := netip.MustParseAddr("172.16.0.6"), netip.MustParseAddr("172.16.0.5")
	for _, c := range []struct {
		name     string
		own      netip.Addr // the pod's
		upstream string     // its own end towards nginx
		cluster  string
		route    string
	}{
		{"sidecar of the server", server, `127\.0\.0\.6`, `inbound\|80\|\|`, "default"},
		{"sidecar of the client", client, `172\.16\.0\.5`, "PassthroughCluster", "allow_any"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := &stage{}
			s.pod, s.peer = nettest.PodAndPeer(t)
			nginx, curl := s.pod, s.peer
			if c.own == client {
				nginx, curl = s.peer, s.pod
			}
			nginx.AddAddress(t, "eth0", netip.PrefixFrom(server, 24))
			curl.AddAddress(t, "eth0", netip.PrefixFrom(client, 24))
			initPod(t, s.pod, nft)
			s.agent = startAgent(t, s.pod)
			dir := userDir(t, workloadUID)
			writeFile(t, filepath.Join(dir, "index.html"), strings.Repeat("x", index-1)+"\n")
			nginx.MustRun(t, "sh", "-c", "echo 80 > /proc/sys/net/ipv4/ip_unprivileged_port_start")
			runNginx(t, nginx, dir, 80, "root "+dir+";")

			out, err := curl.Run(curl.Command(workloadUID, workloadUID, "curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "60",
				"--user-agent", "curl/7.81.0", "--header", "Host: www.ssoon.dev:30293", "--header", "X-Forwarded-For: 172.16.0.1", "http://172.16.0.6/"))
			if err != nil || len(out) != index {
				t.Fatalf("curl: %d bytes, %v", len(out), err)
			}
			sameFields(t, s.agent.access.await(t, "GET / HTTP/1.1"),
				aTime, `"GET / HTTP/1\.1"`, "200", "-", "via_upstream", "-", `"-"`, "0", "615", aNumber, aNumber,
				`"172\.16\.0\.1"`, `"curl/7\.81\.0"`, aUUID, `"www\.ssoon\.dev:30293"`,
				`"172\.16\.0\.6:80"`, c.cluster, c.upstream+":"+aPort, `172\.16\.0\.6:80`, `172\.16\.0\.1:0`, "-", c.route)
			if lines := s.agent.access.lines(""); len(lines) != 1 {
				t.Errorf("%d lines, want one:\n%s", len(lines), s.agent.access)
			}
		})
	}
}

// A connection that is not HTTP has a line when it ends.
func TestAccessLogOfConnections(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	clusters := map[string]func(port uint16) string{
		"inbound IPv4":  func(port uint16) string { return fmt.Sprintf("inbound|%d||", port) },
		"outbound IPv4": func(uint16) string { return "PassthroughCluster" },
	}
	s.eachDirection(t, func(t *testing.T, w way) {
		t.Parallel()
		ours := regexp.QuoteMeta(w.seenAs.String()) + ":" + aPort
		lineOf := func(conn net.Conn) string { return s.agent.access.await(t, " "+conn.LocalAddr().String()+" ") }

		t.Run("closed", func(t *testing.T) {
			downstream, upstream := w.connect(t)
			converse(t, downstream, upstream)
			halfClose(t, downstream, upstream)
			to := upstream.LocalAddr().(*net.TCPAddr).AddrPort()
			line := lineOf(downstream)
			connectionLine(t, line, "-", "-", aNumber, aNumber, to.String(), clusters[w.name](to.Port()), ours, to.String(), downstream.LocalAddr().String(), "-")
			if fields := accessFields(line); fields[7] == "0" || fields[8] == "0" {
				t.Errorf("no bytes: %s", line)
			}
		})
		t.Run("refused", func(t *testing.T) {
			to := netip.AddrPortFrom(w.address, 9).String()
			tryConnection(w.from, to) // which may be over before its port is known
			line := s.agent.access.await(t, to, "UF,URX")
			connectionLine(t, line, "UF,URX", refusedBy, "0", "0", to, clusters[w.name](9), "-", to, remoteOf(t, line, w), "-")
		})
		t.Run("TLS", func(t *testing.T) {
			listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
			serveEach(t, tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{selfSigned(t, "edition.example")}}),
				func(conn net.Conn) { io.Copy(conn, conn) })
			raw := w.dial(t, listener.Addr().String())
			conn := tls.Client(raw, &tls.Config{ServerName: "edition.example", InsecureSkipVerify: true})
			writes(t, conn, "hello")
			reads(t, conn, "hello")
			conn.Close()
			to := listener.Addr().(*net.TCPAddr).AddrPort()
			connectionLine(t, lineOf(raw), "-|DR", "-", `\d{3,}`, `\d{3,}`, to.String(), clusters[w.name](to.Port()), ours, to.String(), raw.LocalAddr().String(), "edition.example")
		})
	})
	t.Run("loop", func(t *testing.T) {
		to := netip.AddrPortFrom(nettest.PodIP4, capture.OutboundPort).String()
		tryConnection(s.peer, to)
		line := s.agent.access.await(t, to)
		connectionLine(t, line, "UH", "-", "0", "0", "-", "BlackHoleCluster", "-", to, remoteOf(t, line, s.inbound()), "-")
	})
}

// remoteOf returns the downstream address of a line. It must be one of the way's beginning.
func remoteOf(t *testing.T, line string, w way) string {
	t.Helper()
	remote, want := accessFields(line)[19], nettest.PeerIP4
	if w.to.Name != "pod" {
		want = nettest.PodIP4
	}
	if !strings.HasPrefix(remote, want.String()+":") {
		t.Errorf("downstream is %s, want %v: %s", remote, want, line)
	}
	return remote
}

// A real openssl sends a server name.
func TestAccessLogHasTheServerName(t *testing.T) {
	t.Parallel()
	program := requireProgram(t, "openssl")
	s := newStage(t)
	w := s.outbound()
	dir := userDir(t, workloadUID)
	writePEM(t, dir, selfSigned(t, "some.example"))
	address := w.startPeer(t, 8443, program, "s_server", "-accept", "8443", "-quiet", "-rev",
		"-cert", filepath.Join(dir, "certificate"), "-key", filepath.Join(dir, "key"))
	cmd := w.from.Command(workloadUID, workloadUID, program, "s_client", "-connect", address, "-servername", "some.example", "-quiet")
	cmd.Stdin = strings.NewReader("hello\nCLOSE\n")
	if out, err := w.from.Run(cmd); err != nil || !strings.Contains(out, "olleh") {
		t.Fatalf("openssl reports %q, %v", out, err)
	}
	if fields := accessFields(s.agent.access.await(t, address)); fields[20] != "some.example" || fields[16] != "PassthroughCluster" {
		t.Errorf("%q", fields)
	}
}

// Ends of requests that got no answer, or that were upgraded.
func TestAccessLogOfFailedRequestsAndUpgrades(t *testing.T) {
	t.Parallel()
	s := newStage(t, patientWithClients...)
	ended := func(t *testing.T, path, head, status, flags, details, failure string) {
		t.Helper()
		line := s.agent.access.await(t, path)
		got := accessFields(line)
		if len(got) != 22 {
			t.Fatalf("%d fields: %s", len(got), line)
		}
		for i, want := range map[int]string{1: `"` + head + `"`, 2: status, 3: flags, 4: details, 5: "-", 6: `"` + failure + `"`} {
			if got[i] != want {
				t.Errorf("field %d is %s, want %s: %s", i+1, got[i], want, line)
			}
		}
	}
	s.eachDirection(t, func(t *testing.T, w way) {
		t.Parallel()
		at := "/" + strings.Fields(w.name)[0] + "/"
		t.Run("port closed", func(t *testing.T) {
			path := at + "refused"
			response := w.askRefused(t, false, path, "text/plain")
			if text(t, response); response.StatusCode != 503 {
				t.Errorf("status %d", response.StatusCode)
			}
			flags := "UF"
			if w == s.outbound() { // a dial is attempted three times
				flags = "UF,URX"
			}
			ended(t, path, "POST "+path+" HTTP/1.1", "503", flags,
				"upstream_reset_before_response_started{remote_connection_failure|"+refusedBy+"}", refusedBy)
		})
		t.Run("downstream leaves", func(t *testing.T) {
			path := at + "left"
			downstream, upstream := w.ask(t, "GET "+path+" HTTP/1.1\r\nHost: a\r\n\r\n")
			readMessage(t, upstream, "")
			reset(t, downstream)
			ended(t, path, "GET "+path+" HTTP/1.1", "0", "DC", "downstream_remote_disconnect", "-")
		})
		t.Run("upstream leaves", func(t *testing.T) {
			path := at + "gone"
			downstream, upstream := w.ask(t, "POST "+path+" HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
			readMessage(t, upstream, "")
			upstream.Close()
			readAnswer(t, bufio.NewReader(downstream))
			ended(t, path, "POST "+path+" HTTP/1.1", "503", "UC", "upstream_reset_before_response_started{connection_termination}", "-")
		})
		t.Run("websocket", func(t *testing.T) {
			path := at + "chat"
			downstream, upstream := w.ask(t, strings.Replace(upgrades[0].request, "/chat", path, 1))
			readMessage(t, upstream, "")
			writes(t, upstream, upgrades[0].answer)
			readMessage(t, downstream, "")
			converse(t, downstream, upstream)
			halfClose(t, downstream, upstream)
			ended(t, path, "GET "+path+" HTTP/1.1", "101", "-", "via_upstream", "-")
			if fields := accessFields(s.agent.access.await(t, path)); fields[7] == "0" || fields[8] == "0" {
				t.Errorf("no bytes: %q", fields)
			}
		})
		t.Run("malformed", func(t *testing.T) {
			downstream := w.dial(t, netip.AddrPortFrom(w.address, 9).String())
			writes(t, downstream, "GET /malformed HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
			if status, _ := readAnswer(t, bufio.NewReader(downstream)); status != "400" {
				t.Errorf("status %s", status)
			}
			line := s.agent.access.await(t, " "+downstream.LocalAddr().String()+" ")
			fields := accessFields(line)
			if len(fields) != 22 || fields[1] != `"GET /malformed HTTP/1.1"` || fields[2] != "400" || fields[3] != "DPE" ||
				fields[4] != "http1.codec_error{repeated_host}" {
				t.Errorf("%s", line)
			}
		})
	})
}

// The lines of gRPC's own interoperability test have the statuses of its trailers.
func TestAccessLogHasGRPCStatuses(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "grpc")
	// gRPC's servers speak first: a client that is held up would make the connection opaque.
	s := newStage(t, append([]string{"--access-log-format", "%PROTOCOL% %REQ(:PATH)% %RESPONSE_CODE% %GRPC_STATUS% %GRPC_STATUS_NUMBER%"}, patientWithClients...)...)
	w := s.outbound()
	w.runPeer(t, program, "call", w.startPeer(t, 50051, program, "serve", "ADDRESS"))
	const service = "HTTP/2 /grpc.testing.TestService/"
	for _, want := range []string{
		service + "EmptyCall 200 OK 0\n", service + "FullDuplexCall 200 OK 0\n", service + "UnaryCall 200 Unknown 2\n",
		service + "UnimplementedCall 200 Unimplemented 12\n",
	} {
		s.agent.access.await(t, want)
	}
}

// jsonKeys are Istio's, with whether their values are numbers.
var jsonKeys = map[string]bool{
	"start_time": false, "method": false, "path": false, "protocol": false, "response_code": true, "response_flags": false,
	"response_code_details": false, "connection_termination_details": false, "upstream_transport_failure_reason": false,
	"bytes_received": true, "bytes_sent": true, "duration": true, "upstream_service_time": true, "x_forwarded_for": false,
	"user_agent": false, "request_id": false, "authority": false, "upstream_host": false, "upstream_cluster": false,
	"upstream_local_address": false, "downstream_local_address": false, "downstream_remote_address": false,
	"requested_server_name": false, "route_name": false,
}

func TestAccessLogInJSON(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--access-log-encoding", "json")
	d := newDialogue(t, s.inbound(), false, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "answer") })
	request := d.request(t, "PUT", `/a?b=%22c%22`, strings.NewReader("question"))
	request.Header.Set("User-Agent", "\"é\\\t\xff")
	text(t, d.do(t, request))
	downstream, upstream := s.outbound().connect(t)
	converse(t, downstream, upstream)
	halfClose(t, downstream, upstream)

	parse := func(line string) (parsed map[string]any) {
		if err := json.Unmarshal([]byte(line), &parsed); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		for key, value := range parsed {
			number, known := jsonKeys[key]
			if _, is := value.(float64); !known || value != nil && is != number {
				t.Errorf("%s is %v", key, value)
			}
		}
		if len(parsed) != len(jsonKeys) {
			t.Errorf("%d keys, want %d: %s", len(parsed), len(jsonKeys), line)
		}
		return parsed
	}
	got := parse(s.agent.access.await(t, `"PUT"`))
	for key, want := range map[string]any{
		"method": "PUT", "path": `/a?b=%22c%22`, "protocol": "HTTP/1.1", "response_code": 200.0, "response_flags": "-",
		"response_code_details": "via_upstream", "bytes_received": 8.0, "bytes_sent": 6.0, "user_agent": "\"é\\\t\ufffd",
		"x_forwarded_for": nil, "requested_server_name": nil, "upstream_host": d.url[len("http://"):], "route_name": "default",
	} {
		if got[key] != want {
			t.Errorf("%s is %v, want %v", key, got[key], want)
		}
	}
	got = parse(s.agent.access.await(t, downstream.LocalAddr().String()))
	for key, want := range map[string]any{"method": nil, "path": nil, "protocol": nil, "response_code": 0.0, "authority": nil, "route_name": nil} {
		if got[key] != want {
			t.Errorf("%s is %v, want %v", key, got[key], want)
		}
	}
}

func TestAccessLogOfRequestAndResponseFields(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--access-log-format", "%REQ(:PATH)% trace=%REQ(TRACEPARENT)% cut=%REQ(TRACEPARENT):5% other=%REQ(X-NONE?X-TENANT)% "+
		"kind=%RESP(Content-Type)% %TRAFFIC_DIRECTION% %PILLION_REASON%")
	s.everyDialogue(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/thing")
	}, func(t *testing.T, d *dialogue) {
		path := "/" + strings.ReplaceAll(d.name, " ", "") + fmt.Sprint(d.http2)
		request := d.request(t, "GET", path, nil)
		request.Header = http.Header{"Traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, "X-Tenant": {"blue"}}
		text(t, d.do(t, request))
		s.agent.access.await(t, path+" trace=00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01 cut=00-0a other=blue "+
			"kind=application/thing "+strings.ToUpper(strings.Fields(d.name)[0])+" completed\n")
	})
}

// serveQuickly answers every request with 200 and an empty body.
func serveQuickly(conn net.Conn, r *bufio.Reader) error {
	_, err := readRequest(r)
	if err == nil {
		_, err = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	}
	return err
}

// askFor requests paths one after the other on one connection. Each must be answered.
func (w way) askFor(t *testing.T, address string, count int, path func(serial int) string) {
	t.Helper()
	downstream := w.dial(t, address)
	defer downstream.Close()
	r := bufio.NewReader(downstream)
	for serial := range count {
		downstream.SetDeadline(time.Now().Add(nettest.Patience)) // for each, as they are many
		writes(t, downstream, "GET "+path(serial)+" HTTP/1.1\r\nHost: a\r\n\r\n")
		if status, _ := readAnswer(t, r); status != "200" {
			t.Fatalf("request %d was answered %s", serial, status)
		}
	}
}

// A program repeatedly renames the file and sends SIGHUP while requests pass. Each request has one line in one of the files.
func TestAccessLogRotation(t *testing.T) {
	t.Parallel()
	const rounds, perRound = 8, 250
	name := filepath.Join(userDir(t, agentUID), "access.log")
	s := newStage(t, "--access-log", name, "--access-log-format", "<%REQ(:PATH)%>", "--drain-delay", "0s", "--log-level", "info")
	w := s.inbound()
	address := w.serveScript(t, serveQuickly)
	path := func(serial int) string { return fmt.Sprintf("/%d?%s", serial, strings.Repeat("x", 400)) } // more than one write in a round
	for round := range rounds {
		moved := make(chan error, 1)
		go func() { // a round of requests passes while the file is moved
			err := os.Rename(name, fmt.Sprint(name, ".", round))
			s.agent.Signal(syscall.SIGHUP)
			moved <- err
		}()
		w.askFor(t, address, perRound, func(serial int) string { return path(round*perRound + serial) })
		if err := <-moved; err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(name); err != nil && !nettest.Within(nettest.Patience, func() bool { _, err := os.Stat(name); return err == nil }) {
			t.Fatalf("round %d: SIGHUP made no new file", round)
		}
	}
	s.agent.Signal(syscall.SIGTERM)
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d", code)
	}
	files, _ := filepath.Glob(name + "*")
	seen := make(map[string]int)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			seen[line]++
		}
	}
	for serial := range rounds * perRound {
		if n := seen["<"+path(serial)+">\n"]; n != 1 {
			t.Errorf("request %d has %d lines", serial, n)
		}
	}
	if len(files) != rounds+1 || len(seen) != rounds*perRound {
		t.Errorf("%d files and %d different lines, want %d and %d", len(files), len(seen), rounds+1, rounds*perRound)
	}
}

// The log has no reader. Requests still pass, dropped lines are counted and reported, and the agent ends.
func TestAccessLogWithoutReaderDoesNotDelayTraffic(t *testing.T) {
	t.Parallel()
	name := filepath.Join(userDir(t, agentUID), "fifo")
	if err := syscall.Mkfifo(name, 0o622); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(name, agentUID, agentUID); err != nil {
		t.Fatal(err)
	}
	s := newStage(t, "--access-log", name, "--drain-delay", "0s", "--log-level", "info")
	w := s.inbound()
	address := w.serveScript(t, serveQuickly)
	long := strings.Repeat("x", 1000) // so that 2,000 lines are more than the queue holds
	w.askFor(t, address, 2000, func(serial int) string { return fmt.Sprintf("/%d%s", serial, long) })
	if dropped := sample(s.scrape(t), "pillion_access_log_dropped_total"); dropped < 100 || dropped > 2000 {
		t.Errorf("%v lines are dropped", dropped)
	}
	s.agent.log.await(t, "dropping access log lines")
	s.agent.Signal(syscall.SIGTERM)
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestAccessLogFilter(t *testing.T) {
	t.Parallel()
	s := newStage(t, append([]string{"--access-log-format", "%REQ(:PATH)%", "--access-log-filter", "errors; status=404,direction=inbound",
		"--drain-delay", "0s"}, patientWithClients...)...)
	s.everyDialogue(t, func(w http.ResponseWriter, r *http.Request) {
		var status int
		fmt.Sscanf(r.URL.Path, "/%d", &status)
		w.WriteHeader(status)
	}, func(t *testing.T, d *dialogue) {
		for _, status := range []int{200, 404, 500, 204} {
			text(t, d.do(t, d.request(t, "GET", fmt.Sprintf("/%d/%s/%v", status, strings.Fields(d.name)[0], d.http2), nil)))
		}
	})
	text(t, s.outbound().askRefused(t, false, "/last", "text/plain"))
	s.agent.Signal(syscall.SIGTERM) // its end completes the log
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d; log:\n%s", code, s.agent.log)
	}
	want := []string{"/404/inbound/false", "/404/inbound/true", "/500/inbound/false", "/500/inbound/true", "/500/outbound/false", "/500/outbound/true", "/last"}
	got := strings.Fields(s.agent.access.String())
	if slices.Sort(got); !slices.Equal(got, want) { // streams and connections may end in any order
		t.Errorf("the log has %q, want %q", got, want)
	}
}

// A long connection has a line when it begins and one at each interval.
func TestAccessLogOfOpenConnections(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--access-log-tcp-start", "--access-log-interval", "500ms",
		"--access-log-format", "%DOWNSTREAM_REMOTE_ADDRESS% %DURATION% %BYTES_RECEIVED% reason=%PILLION_REASON%")
	s.eachDirection(t, func(t *testing.T, w way) {
		t.Parallel()
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
		own := downstream.LocalAddr().String()
		s.agent.access.await(t, own+" 0 0 reason=-\n")
		nettest.Eventually(t, "the open connection is logged twice", func() bool { return len(s.agent.access.lines(own, " 8 reason=-")) >= 2 })
		halfClose(t, downstream, upstream)
		s.agent.access.await(t, own, "reason=closed\n")
	})
}

// Text in a request cannot forge a field or a line, nor control a terminal.
func TestClientsCannotForgeTheAccessLog(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	w := s.inbound()
	address := w.serveScript(t, serveQuickly)
	hostile := []string{
		`" 200 - via_upstream`, `\" x`, `\`, `\\"`, "\"\t\"", "é\u2028\u202e", "\xff\xfe\xc0\x80", `"`, `%22`, `%0a[2024-10-15T11:56:10.219Z]`,
		"\x1b[31m", "a\rb", "a\x00b", `-`, "", `%s%n%RESPONSE_CODE%`, strings.Repeat(`"`, 20_000),
	}
	asked := 0
	for i, text := range hostile {
		for _, request := range []string{
			fmt.Sprintf("GET /%s HTTP/1.1\r\nHost: a\r\nUser-Agent: path%d\r\n\r\n", text, i),
			fmt.Sprintf("GET /%d HTTP/1.1\r\nHost: a\r\nUser-Agent: %s\r\nX-Forwarded-For: %s\r\nX-Request-Id: %s\r\n\r\n", i, text, text, text),
			fmt.Sprintf("GET / HTTP/1.1\r\nHost: %s\r\n\r\n", text),
			fmt.Sprintf("G%s / HTTP/1.1\r\nHost: a\r\n\r\n", text),
		} {
			downstream := w.dial(t, address)
			writes(t, downstream, request)
			downstream.CloseWrite()
			io.Copy(io.Discard, downstream)
			asked++
		}
	}
	lines := func() []string { return s.agent.access.lines("") }
	nettest.Eventually(t, fmt.Sprintf("%d lines", asked), func() bool { return len(lines()) >= asked })
	for _, line := range lines() {
		if fields := accessFields(line); len(fields) != 22 || !regexp.MustCompile("^"+aTime+"$").MatchString(fields[0]) ||
			fields[17] != "-" && !strings.HasPrefix(fields[17], "127.0.0.6:") {
			t.Errorf("%d fields: %q", len(fields), line)
		}
		if strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\ufffd' || r == '\u202e' || r == '\u2028' }) {
			t.Errorf("the line has control characters: %q", line)
		}
	}
	if len(lines()) != asked {
		t.Errorf("%d lines for %d requests", len(lines()), asked)
	}
}

func TestInvalidAccessLogSettingsAreRejected(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	for _, c := range []struct {
		args, want []string
	}{
		{[]string{"--access-log-format", "%PROTOCOL% %RESPONCE_CODE%"}, []string{"--access-log-format", "%RESPONCE_CODE%", "column 12", "%RESPONSE_CODE%"}},
		{[]string{"--access-log-format", "%REQ()%"}, []string{"--access-log-format", "%REQ%", "column 1"}},
		{[]string{"--access-log-encoding", "json", "--access-log-format", `{"a":"%NO_SUCH%"}`}, []string{"--access-log-format", "%NO_SUCH%", `"a"`}},
		{[]string{"--access-log-filter", "status=abc"}, []string{"--access-log-filter", "status=abc"}},
		{[]string{"--access-log", "/no/such/directory/log"}, []string{"--access-log", "/no/such/directory/log"}},
		{[]string{"--access-log-interval", "-1s"}, []string{"--access-log-interval", "-1s"}},
	} {
		_, stderr, code := execute(t, pod, nil, append([]string{"agent"}, c.args...)...)
		status := 2
		if strings.Contains(stderr, "no such file or directory") { // a failure, not a mistake in the value
			status = 1
		}
		if code != status || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: exit code %d, want %d and one line:\n%s", c.args, code, status, stderr)
		}
		for _, want := range c.want {
			if !strings.Contains(stderr, want) {
				t.Errorf("%q: %q missing in: %s", c.args, want, stderr)
			}
		}
	}
}
