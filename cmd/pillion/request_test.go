package main

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// serveAt serves handler at a loopback port of the namespace until the test ends.
func serveAt(t *testing.T, ns *nettest.Namespace, port int, handler http.Handler) {
	t.Helper()
	var listener net.Listener
	ns.Do(t, func() (err error) {
		listener, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		return err
	})
	server := &http.Server{Handler: handler}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Close()
		<-served
	})
}

func TestRequestPrintsTheResponse(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	var level slog.LevelVar
	serveAt(t, ns, 15000, admin.NewHandler(admin.Config{
		Ready: func() (string, bool) { return "DRAINING", false }, Flows: flow.NewTable(),
		LogLevel: level.Level, SetLogLevel: level.Set, Log: slog.New(slog.DiscardHandler),
	}))
	serveAt(t, ns, 15020, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s", r.Method, r.URL, body)
	}))
	for _, c := range []struct {
		environment, args string
		want              outcome // stdout's end is enough
	}{
		{args: "GET certs", want: outcome{stdout: "{\n \"certificates\": []\n}\n\n"}},
		{args: "get /certs", want: outcome{stdout: "{\n \"certificates\": []\n}\n\n"}},
		{args: "POST logging?level=debug", want: outcome{stdout: "  wasm: debug\n  websocket: debug\n\n"}},
		{args: "GET nothing", want: outcome{stdout: "  /stats/prometheus: print metrics in prometheus format\n      filter, usedonly, type: as above\n\n"}},
		{args: "--debug-port=15020 PoSt drain a=b", want: outcome{stdout: "POST /drain a=b\n"}},
		{args: "POST quitquitquit?x --debug-port 15020", want: outcome{stdout: "POST /quitquitquit?x \n"}},
		{environment: "PILLION_REQUEST_DEBUG_PORT=15020", args: "GET a", want: outcome{stdout: "GET /a \n"}},
		{environment: "http_proxy=http://127.0.0.1:9", args: "GET a --debug-port 15020", want: outcome{stdout: "GET /a \n"}},
		{args: "GET ready", want: outcome{code: 1, stderr: "GET http://127.0.0.1:15000/ready: the agent answered 503 Service Unavailable: DRAINING"}},
		{args: "GET logging", want: outcome{code: 1, stderr: "GET http://127.0.0.1:15000/logging: the agent answered 405 Method Not Allowed: Method GET not allowed, POST required."}},
		{args: "GET a --debug-port 15021", want: outcome{code: 1, stderr: `sending the request: Get "http://127.0.0.1:15021/a": dial tcp 127.0.0.1:15021: connect: connection refused`}},
		{args: "GET a --debug-port 15001", want: outcome{code: 2, stderr: "--debug-port 15001 is not one of the agent's ports: use 15000, 15004, 15020 or 15021"}},
		{args: "GET a --debug-port x", want: outcome{code: 2, stderr: `invalid argument "x" for "--debug-port" flag: "x" is not a port: use a number from 1 to 65535`}},
		{args: "G(T a", want: outcome{code: 1, stderr: `making the request: net/http: invalid method "G(T"`}},
		{args: "GET", want: outcome{code: 2, stderr: "1 arguments: use METHOD PATH [BODY], such as GET config_dump"}},
		{args: "GET a b c", want: outcome{code: 2, stderr: "4 arguments: use METHOD PATH [BODY], such as GET config_dump"}},
	} {
		var environment []string
		if c.environment != "" {
			environment = append(environment, c.environment)
		}
		got := pillion(t, ns, environment, nil, append([]string{"request"}, strings.Fields(c.args)...)...)
		if c.want.stderr != "" {
			c.want.stderr = "pillion: error: " + c.want.stderr + "\n"
		}
		if got.code != c.want.code || got.stderr != c.want.stderr || !strings.HasSuffix(got.stdout, c.want.stdout) || c.want.stdout == "" && got.stdout != "" {
			t.Errorf("request %s: %+v, want %+v", c.args, got, c.want)
		}
	}
}
