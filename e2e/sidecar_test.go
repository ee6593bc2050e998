package e2e

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// manifest is the part of a pod that matters to the sidecar.
type manifest struct {
	Metadata struct {
		Name, Namespace     string
		Labels, Annotations map[string]string
	}
	Spec struct {
		ServiceAccountName string      `yaml:"serviceAccountName"`
		InitContainers     []container `yaml:"initContainers"`
		Containers         []container
	}
}

type container struct {
	Name string
	Args []string
	Env  []struct {
		Name, Value string
		ValueFrom   struct {
			FieldRef struct {
				FieldPath string `yaml:"fieldPath"`
			} `yaml:"fieldRef"`
			ResourceFieldRef struct{ Resource string } `yaml:"resourceFieldRef"`
		} `yaml:"valueFrom"`
	}
	Lifecycle struct {
		PostStart hook `yaml:"postStart"`
		PreStop   hook `yaml:"preStop"`
	}
	SecurityContext struct {
		RunAsUser    int `yaml:"runAsUser"`
		RunAsGroup   int `yaml:"runAsGroup"`
		Capabilities struct{ Add []string }
	} `yaml:"securityContext"`
}

type hook struct {
	Exec struct{ Command []string }
}

func readManifest(t *testing.T, name string) (m manifest) {
	t.Helper()
	text, err := os.ReadFile("testdata/pods/" + name + ".yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// container returns the container or init container of that name.
func (m manifest) container(t *testing.T, name string) container {
	t.Helper()
	for _, c := range slices.Concat(m.Spec.InitContainers, m.Spec.Containers) {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no container %s", name)
	return container{}
}

// environment returns a container's environment, with the values that the kubelet fills in.
func (m manifest) environment(c container) (env []string) {
	known := map[string]string{
		"metadata.name": m.Metadata.Name, "metadata.namespace": m.Metadata.Namespace, "status.podIP": nettest.PodIP4.String(),
		"spec.serviceAccountName": m.Spec.ServiceAccountName, "status.hostIP": nettest.PeerIP4.String(), "spec.nodeName": "node-1",
		"limits.cpu": "2", "limits.memory": "1073741824",
	}
	for _, v := range c.Env {
		env = append(env, v.Name+"="+v.Value+known[v.ValueFrom.FieldRef.FieldPath]+known[v.ValueFrom.ResourceFieldRef.Resource])
	}
	return env
}

// arguments returns a container's arguments with its variables expanded.
func (m manifest) arguments(c container) (args []string) {
	for _, argument := range c.Args {
		for _, variable := range m.environment(c) {
			name, value, _ := strings.Cut(variable, "=")
			argument = strings.ReplaceAll(argument, "$("+name+")", value)
		}
		args = append(args, argument)
	}
	return args
}

// setInjectedStage runs the containers of a manifest as a kubelet does: the rules, then the agent. env comes on top.
func setInjectedStage(t *testing.T, m manifest, env ...string) *stage {
	t.Helper()
	nettest.RequireRoot(t)
	rules, sidecar := m.container(t, "istio-init"), m.container(t, "istio-proxy")
	s := &stage{tproxy: slices.Contains(rules.Args, "TPROXY")}
	s.pod, s.peer = nettest.PodAndPeer(t)
	if stdout, stderr, code := execute(t, s.pod, append(m.environment(rules), pathWith(t, native)), m.arguments(rules)...); code != 0 {
		t.Fatalf("istio-init: exit code %d\n%s%s", code, stdout, stderr)
	}
	annotations := t.TempDir() + "/annotations"
	var text strings.Builder
	for name, value := range m.Metadata.Annotations {
		fmt.Fprintf(&text, "%s=%q\n", name, value)
	}
	if err := os.WriteFile(annotations, []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	env = append([]string{"PILLION_CONTROL_PLANE=off"}, env...) // the pod has no credentials
	words := append(append([]string{"env"}, append(m.environment(sidecar), env...)...), "unshare", "--mount", "--propagation", "private", "sh", "-c",
		"cat "+annotations+" > /dev/shm/$$ && mount -t tmpfs tmpfs /etc && mkdir -p /etc/istio/pod && mv /dev/shm/$$ /etc/istio/pod/annotations && chmod 644 /etc/istio/pod/annotations && exec \"$@\"", "sh")
	if len(sidecar.SecurityContext.Capabilities.Add) > 0 {
		words = append(words, borrowing(sidecar.SecurityContext.RunAsUser)...)
	} else {
		words = append(words, unprivileged(sidecar.SecurityContext.RunAsUser)...)
	}
	s.agent = launchCommand(t, s.pod, append(append(words, pillion), m.arguments(sidecar)...))
	awaitReady(t, s.pod, s.agent)
	return s
}

// A pod written by Istio's injector works unchanged except for the image's name.
func TestInjectedPodWorksUnchanged(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"redirect", "native", "tproxy"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := readManifest(t, name)
			sidecar := m.container(t, "istio-proxy")
			s := setInjectedStage(t, m)
			// GOMAXPROCS, without the race detector's own threads. Three settings of the pod set it to one.
			line := s.agent.log.await(t, "running as Istio's sidecar")
			if got := attribute(t, line, "cores"); got != "1" {
				t.Errorf("%s cores, want 1: %s", got, line)
			}
			// istio-iptables installs no rules for IPv6 if the first address is IPv4.
			s.eachDirection(t, func(t *testing.T, w way) {
				downstream, upstream := w.connect(t)
				converse(t, downstream, upstream)
			})
			for _, http2 := range []bool{false, true} {
				d := newDialogue(t, s.inbound(), http2, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "served") })
				if got := text(t, d.do(t, d.request(t, "GET", "/", nil))); got != "served" {
					t.Errorf("HTTP/2 %v: %q", http2, got)
				}
			}
			// The peer plays the kubelet: probes come from outside the pod.
			web := s.pod.Listen(t, "tcp", netip.AddrPortFrom(nettest.PodIP4, 8080).String())
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/ready" {
					http.NotFound(w, r)
				}
			})}
			go server.Serve(web)
			t.Cleanup(func() { server.Close() })
			for address, path := range map[string]string{":15021": "/healthz/ready", ":15020": "/app-health/web/readyz"} {
				if out, err := s.peer.Run(s.peer.Command(0, 0, "curl", "-sSf", "http://"+nettest.PodIP4.String()+address+path)); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
			}
			for _, h := range []hook{sidecar.Lifecycle.PostStart, sidecar.Lifecycle.PreStop} {
				if command := h.Exec.Command; len(command) > 0 {
					if out, complaint, code := execute(t, s.pod, nil, command[1:]...); code != 0 {
						t.Errorf("%v: exit code %d\n%s%s", command, code, out, complaint)
					}
				}
			}
			s.agent.Signal(syscall.SIGTERM)
			if code := s.agent.ends(t, nettest.Patience); code != 0 {
				t.Errorf("exit code %d; log:\n%s", code, s.agent.log)
			}
		})
	}
}

// Settings without effect are logged once, and do not stop the agent.
func TestSettingsWithoutEffectAreLoggedOnce(t *testing.T) {
	t.Parallel()
	m := readManifest(t, "native")
	sidecar := &m.Spec.InitContainers[1]
	sidecar.Args = append(sidecar.Args, "--novel=1")
	s := setInjectedStage(t, m, "XDS_HEADER_NOVEL=1")
	line := s.agent.log.await(t, "running as Istio's sidecar")
	if !strings.Contains(line, `without_effect="[discoveryAddress tracing --proxyLogLevel --proxyComponentLogLevel --novel CA_ADDR PILOT_CERT_PROVIDER XDS_HEADER_NOVEL]"`) {
		t.Errorf("log: %s", line)
	}
}
