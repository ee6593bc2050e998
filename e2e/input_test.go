package e2e

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Invalid input is reported by one line on stderr that names the flag or variable and the value. The exit
// status is 2, except for istio-iptables, which keeps the statuses of the program of that name.
func TestInvalidInputIsReportedInOneLine(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	for _, c := range []struct {
		args, env string
		code      int
		want      []string
	}{
		{args: "agent --outbound-port 0", code: 2, want: []string{"--outbound-port", "0"}},
		{args: "agent --outbound-port 70000", code: 2, want: []string{"--outbound-port", "70000"}},
		{args: "agent --inbound-port 80x", code: 2, want: []string{"--inbound-port", "80x"}},
		{args: "agent --inbound-port 15001", code: 2, want: []string{"--inbound-port", "15001"}},
		{args: "agent --readiness-port -1", code: 2, want: []string{"--readiness-port", "-1"}},
		{args: "agent --connect-timeout 5", code: 2, want: []string{"--connect-timeout", "5"}},
		{args: "agent --connect-timeout -5s", code: 2, want: []string{"--connect-timeout", "-5s"}},
		{args: "agent --idle-timeout soon", code: 2, want: []string{"--idle-timeout", "soon"}},
		{args: "agent --half-close-timeout never", code: 2, want: []string{"--half-close-timeout", "never"}},
		{args: "agent --max-connections many", code: 2, want: []string{"--max-connections", "many"}},
		{args: "agent --max-connections -1", code: 2, want: []string{"--max-connections", "-1"}},
		{args: "agent --drain-delay 1m", code: 2, want: []string{"--drain-delay", "1m"}},
		{args: "agent --drain-timeout x", code: 2, want: []string{"--drain-timeout", "x"}},
		{args: "agent --opaque-ports 5010:5000", code: 2, want: []string{"--opaque-ports", "5010:5000", "lower"}},
		{args: "agent --detection-delay -1ms", code: 2, want: []string{"--detection-delay", "-1ms", "negative"}},
		{args: "agent --detection-hold 1", code: 2, want: []string{"--detection-hold", "1", "unit"}},
		{args: "agent --inbound-proxy-protocol-ports 0", code: 2, want: []string{"--inbound-proxy-protocol-ports", "0"}},
		{args: "agent --max-head-bytes 64k", code: 2, want: []string{"--max-head-bytes", "64k"}},
		{args: "agent --max-head-bytes 1023", code: 2, want: []string{"--max-head-bytes", "1023", "1024 to 8388608"}},
		{args: "agent --max-head-fields 0", code: 2, want: []string{"--max-head-fields", "0", "1 to 100000"}},
		{args: "agent --metrics-max-series 4999", code: 2, want: []string{"--metrics-max-series", "4999", "5000 to 100000"}},
		{args: "agent --cluster-domain a_b", code: 2, want: []string{"--cluster-domain", "a_b", "cluster.local"}},
		{args: "agent --request-head-timeout x", code: 2, want: []string{"--request-head-timeout", "x"}},
		{args: "agent --request-timeout -1s", code: 2, want: []string{"--request-timeout", "-1s", "negative"}},
		{args: "agent --upstream-idle-timeout 3", code: 2, want: []string{"--upstream-idle-timeout", "3", "unit"}},
		{args: "agent --x-forwarded-for yes", code: 2, want: []string{"--x-forwarded-for", "yes", "set-if-absent, append, off"}},
		{args: "agent --x-forwarded-proto maybe", code: 2, want: []string{"--x-forwarded-proto", "maybe", "true or false"}},
		{args: "agent --x-request-id=2", code: 2, want: []string{"--x-request-id", "2", "true or false"}},
		{args: "agent --x-envoy-upstream-service-time", code: 2, want: []string{"--x-envoy-upstream-service-time", "needs an argument"}},
		{args: "agent --x-request-id false --drain-delay x", code: 2, want: []string{"--drain-delay", "x"}}, // nothing wrong with the first
		{args: "agent", env: "PILLION_X_REQUEST_ID=no", code: 2, want: []string{"PILLION_X_REQUEST_ID", "no", "true or false"}},
		{args: "agent --log-level loud", code: 2, want: []string{"--log-level", "loud"}},
		{args: "agent --log-format xml", code: 2, want: []string{"--log-format", "xml"}},
		{args: "agent", env: "PILLION_OUTBOUND_PORT=0", code: 2, want: []string{"PILLION_OUTBOUND_PORT", "0"}},
		{args: "agent", env: "PILLION_IDLE_TIMEOUT=soon", code: 2, want: []string{"PILLION_IDLE_TIMEOUT", "soon"}},
		{args: "agent", env: "PILLION_LOG_LEVEL=loud", code: 2, want: []string{"PILLION_LOG_LEVEL", "loud"}},
		{args: "agent --no-such-flag", code: 2, want: []string{"--no-such-flag"}},
		{args: "wait --no-such-flag", code: 2, want: []string{"--no-such-flag"}},
		{args: "wait --timeoutSeconds x", code: 2, want: []string{"--timeoutSeconds", "x"}},
		{args: "wait --periodMillis 0", code: 2, want: []string{"--periodMillis", "0"}},
		{args: "wait --url ::::", code: 2, want: []string{"--url", "::::"}},
		{args: "init -p 0", code: 2, want: []string{"--envoy-port", "0"}},
		{args: "init -z 70000", code: 2, want: []string{"--inbound-capture-port", "70000"}},
		{args: "init -b 80x", code: 2, want: []string{"--istio-inbound-ports", "80x"}},
		{args: "init -i 198.51.100.0", code: 2, want: []string{"--istio-service-cidr", "198.51.100.0"}},
		{args: "init -m BOGUS", code: 2, want: []string{"--istio-inbound-interception-mode", "BOGUS"}},
		{args: "init", env: "INBOUND_CAPTURE_PORT=x", code: 2, want: []string{"INBOUND_CAPTURE_PORT", "x"}},
		{args: "init", env: "DRY_RUN=maybe", code: 2, want: []string{"DRY_RUN", "maybe"}},
		{args: "istio-iptables --no-such-flag", code: 255, want: []string{"--no-such-flag"}},
		{args: "cleanup --no-such-flag", code: 2, want: []string{"--no-such-flag"}},
	} {
		t.Run(strings.TrimSpace(c.env+" "+c.args), func(t *testing.T) {
			var env []string
			if c.env != "" {
				env = append(env, c.env)
			}
			stdout, stderr, code := execute(t, pod, env, strings.Fields(c.args)...)
			if code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			if strings.Count(stderr, "\n") != 1 || stdout != "" {
				t.Errorf("stderr %q and stdout %q, want one line on stderr only", stderr, stdout)
			}
			for _, word := range c.want {
				if !strings.Contains(stderr, word) {
					t.Errorf("the line does not name %s: %s", word, stderr)
				}
			}
		})
	}
	if ruleset := pod.MustRun(t, "nft", "list", "ruleset"); ruleset != "" {
		t.Errorf("invalid input created rules:\n%s", ruleset)
	}
}

func TestOccupiedPortIsNamed(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	pod.Listen(t, "tcp4", "127.0.0.1:15001")
	_, stderr, code := execute(t, pod, nil, "agent")
	if code != 1 || !strings.Contains(stderr, "--outbound-port") || !strings.Contains(stderr, "address already in use") {
		t.Errorf("exit code %d, want 1 and the flag named:\n%s", code, stderr)
	}
}

func TestHelpNamesTheVariableOfEveryFlag(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	help, _, code := execute(t, pod, nil, "agent", "--help")
	if code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	flags := 0
	for line := range strings.Lines(help) {
		name, isFlag := strings.CutPrefix(strings.TrimSpace(line), "--")
		if !isFlag {
			continue
		}
		flags++
		name = strings.Fields(name)[0]
		twin := "PILLION_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		if !strings.Contains(line, "$"+twin) {
			t.Errorf("help of --%s does not name %s", name, twin)
		}
	}
	if flags < 11 {
		t.Errorf("help lists %d flags:\n%s", flags, help)
	}
}

func TestCommandLineOverridesEnvironment(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	a := launchAgent(t, pod, []string{"env", "PILLION_READINESS_PORT=4021", "PILLION_INBOUND_PORT=4006", "PILLION_OUTBOUND_PORT=x"},
		"--outbound-port", "4001")
	awaitListener(t, pod, 4021)
	awaitListener(t, pod, 4006)
	awaitListener(t, pod, 4001)
	a.Signal(syscall.SIGKILL)
}

func TestLogInJSON(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--log-format", "json", "--drain-delay", "0s")
	downstream, upstream := s.inbound().connect(t)
	converse(t, downstream, upstream)
	downstream.Close()
	upstream.Close()
	s.agent.log.await(t, `"msg":"connection closed"`, `"reason":"closed"`)
	s.agent.Signal(syscall.SIGTERM)
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	for line := range strings.Lines(s.agent.log.String()) {
		if !json.Valid([]byte(line)) {
			t.Errorf("not JSON: %s", line)
		}
	}
}
