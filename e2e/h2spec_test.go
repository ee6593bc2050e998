package e2e

import (
	"io"
	"log"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// laxer are tests of h2spec that fail through the agent although they pass at the server, with the reason.
var laxer = map[string]string{}

// A test of h2spec that the server passes must also pass through the agent.
func TestH2specPassesAsAtTheServer(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "h2spec")
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		t.Parallel() // the tests that fail take two seconds each
		port := serveHTTP2(t, w)
		h2specPasses(t, w, program, port, port)
	})
}

// h2specPasses runs the suite at the server and through the agent, and fails the test for what passes only at the server. It
// returns how many tests passed through the agent.
func h2specPasses(t *testing.T, w way, program string, server, agent uint16) (passed int) {
	t.Helper()
	var direct, through map[string]string
	var runs sync.WaitGroup
	runs.Go(func() { direct = h2spec(t, w.to, program, w.address, server) })
	runs.Go(func() { through = h2spec(t, w.from, program, w.address, agent) })
	runs.Wait()
	if len(direct) < 100 || len(through) != len(direct) {
		t.Fatalf("h2spec ran %d tests directly and %d through the agent", len(direct), len(through))
	}
	for test, verdict := range through {
		must := direct[test] != "fail" && laxer[test] == ""
		if verdict == "fail" && must {
			section, _, _ := strings.Cut(test, " ")
			verdict = h2spec(t, w.from, program, w.address, agent, section)[test] // two seconds may be too short on a busy machine
		}
		if verdict == "pass" {
			passed++
		} else if verdict != "skip" && must {
			t.Errorf("through the agent only: %s", test)
		}
	}
	return passed
}

// serveHTTP2 runs a server at the way's end that supports only HTTP/2 without TLS.
func serveHTTP2(t *testing.T, w way) (port uint16) {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	return serveGreetings(t, w, protocols)
}

// serveGreetings runs a server at the way's end.
func serveGreetings(t *testing.T, w way, protocols *http.Protocols) (port uint16) {
	listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
	server := &http.Server{
		Protocols: protocols,
		ErrorLog:  log.New(io.Discard, "", 0), // h2spec makes mistakes for a living
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			io.WriteString(w, "hello, world")
		}),
	}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return netip.MustParseAddrPort(listener.Addr().String()).Port()
}

// h2spec runs the suite from inside the namespace and returns its verdicts: pass, skip or fail for each test. If sections are
// given, it runs only these, with a timeout that a busy machine does not reach.
func h2spec(t *testing.T, from *nettest.Namespace, program string, address netip.Addr, port uint16, sections ...string) map[string]string {
	verdicts := make(map[string]string)
	arguments := append([]string{address.String(), strconv.Itoa(int(port))}, sections...)
	if len(sections) > 0 {
		arguments = append([]string{"-timeout", (nettest.Patience / 2).String()}, arguments...)
	}
	cmd := from.Command(workloadUID, workloadUID, program, arguments...)
	cmd.Stderr = io.Discard
	out, err := from.Run(cmd)
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(out) {
		verdict, test, _ := strings.Cut(strings.TrimSpace(line), " ")
		verdicts[test] = verdict
	}
	return verdicts
}
