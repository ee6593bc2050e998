package e2e

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// What istiod configured is shown as it came, in Envoy's messages and in short.
func TestTheConfigurationOfTheControlPlaneIsShown(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "envoyjson")
	s, control := newMeshStage(t)
	control.start(t, "STRICT")
	awaitReady(t, s.pod, s.agent)
	var given bytes.Buffer
	encoder := json.NewEncoder(&given)
	for path, shown := range map[string]struct {
		message string
		parts   []string
	}{
		"/config_dump?include_eds": {"ConfigDump", []string{`"dynamic_listeners"`, `"name": "virtualInbound"`, `"name": "mutual"`,
			`"cluster_name": "outbound|80||web.shop.svc.cluster.local"`, `"name": "ROOTCA"`, `"inline_bytes": "W3JlZGFjdGVkXQ=="`}},
		"/clusters?format=json": {"Clusters", []string{`"name": "outbound|80||web.shop.svc.cluster.local"`}},
		"/certs":                {"Certificates", []string{`"uri": "spiffe://cluster.local/ns/`}},
		"/init_dump":            {"UnreadyTargetsDumps", nil},
	} {
		status, body := s.admin(t, "GET", path)
		for _, part := range shown.parts {
			if !strings.Contains(body, part) {
				t.Errorf("%s: %d, no %s in\n%s", path, status, part, body)
			}
		}
		encoder.Encode(map[string]string{"name": path, "type": "envoy.admin.v3." + shown.message, "body": body})
	}
	judge := exec.Command(program)
	judge.Stdin = &given
	if out, err := judge.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("envoyjson: %v\n%s", err, out)
	}
	for command, want := range map[string]string{
		"config show cluster":                 "outbound|80||web.shop.svc.cluster.local  EDS",
		"config show listener virtualInbound": "chain TLS\n    name       mutual\n    TLS        mutual\n    to         InboundPassthroughCluster\n",
		"config show route":                   "no routes\n",
		"config findings":                     "no findings",
	} {
		stdout, stderr, code := execute(t, s.pod, nil, strings.Fields(command)...)
		if code != 0 || stderr != "" || !strings.Contains(stdout, want) {
			t.Errorf("pillion %s: exit code %d, %s, no %q in\n%s", command, code, stderr, want, stdout)
		}
	}
}
