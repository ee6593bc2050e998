package bench

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// controlPrograms are built from the module testdata/controlplane: a control plane that replays pushes, and what decodes
// them by hand and by generated types.
type controlPrograms struct{ istiod, decode string }

// controlPrograms builds them at the first call.
func (k *kit) controlPrograms(t testing.TB) controlPrograms {
	t.Helper()
	if k.control != (controlPrograms{}) {
		return k.control
	}
	built := func(name string) string {
		path := filepath.Join(k.dir, name)
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", path, "./"+name)
		cmd.Dir = "../testdata/controlplane"
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("building testdata/controlplane (make modules fetches what it needs): %v\n%s", err, out)
		}
		return path
	}
	k.control = controlPrograms{built("istiod"), built("decode")}
	return k.control
}

// decoded runs decode and returns its figures by name.
func (c controlPrograms) decoded(t testing.TB, arguments ...string) map[string]float64 {
	t.Helper()
	out, err := exec.Command(c.decode, arguments...).Output()
	if err != nil {
		t.Fatal(err)
	}
	figures := map[string]float64{}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), "\t")
		if figures[name], err = strconv.ParseFloat(value, 64); err != nil {
			t.Fatal(err)
		}
	}
	return figures
}

// meshPod is a pod with the volumes and variables of Istio's injector, whose control plane is at its loopback interface.
type meshPod struct {
	*nettest.Namespace
	k         *kit
	programs  controlPrograms
	directory string // the control plane's
	kept      string // what the agent keeps

	program string // the agent's
	enter   string // a command of the shell before it; may be empty
}

func newMeshPod(t testing.TB, k *kit, programs controlPrograms) *meshPod {
	t.Helper()
	kept, err := os.MkdirTemp("/dev/shm", "pillion-bench-kept-") // in memory: the agent keeps its key nowhere else
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(kept) })
	if err := os.Chown(kept, proxyUser, proxyUser); err != nil {
		t.Fatal(err)
	}
	p := &meshPod{k: k, programs: programs, program: k.pillion, directory: t.TempDir(), kept: kept}
	p.Namespace, _ = nettest.PodAndPeer(t)
	if out, err := exec.Command(programs.istiod, "-directory", p.directory, "-port", "0").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return p
}

// serve starts the control plane with a push.
func (p *meshPod) serve(t testing.TB, push string) *nettest.Process {
	t.Helper()
	cmd := p.Command(0, 0, p.programs.istiod, "-directory", p.directory, "-push", push)
	cmd.Stderr = os.Stderr
	return p.Start(t, cmd)
}

// command returns the words that run the agent as proxyUser, with the volumes and variables of the pod. The control plane
// replaces its root by the same one when it starts, on which cp would fail.
func (p *meshPod) command() []string {
	mounts := p.enter + "mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/tokens /run/secrets/istio && echo secret > /run/secrets/tokens/istio-token" +
		" && cat \"$0\"/root-cert.pem > /run/secrets/istio/root-cert.pem && exec setpriv --reuid=" + strconv.Itoa(proxyUser) + " --regid=" + strconv.Itoa(proxyUser) + " --clear-groups \"$@\""
	return []string{"env", "POD_NAME=reviews-v1", "POD_NAMESPACE=default", "SERVICE_ACCOUNT=reader", "INSTANCE_IP=" + nettest.PodIP4.String(),
		"ISTIO_META_CLUSTER_ID=Kubernetes", `PROXY_CONFIG={"discoveryAddress":"127.0.0.1:15012"}`,
		"unshare", "--mount", "--propagation", "private", "sh", "-c", mounts, p.directory, p.program, "agent", "--control-plane", "auto",
		"--kept-configuration", p.kept, "--log-level", "warn", "--drain-delay", "0s"}
}

// carrying is the command of an agent that carries traffic. It writes an access log, which the control plane does not configure,
// as the other contenders do.
func (p *meshPod) carrying() []string {
	return append(p.command(), "--outbound-port", "15001", "--inbound-port", "15006", "--access-log", "/dev/stdout")
}

// agent starts the agent, and returns the time until its readiness port answers and, if ready, until it is ready.
func (p *meshPod) agent(t testing.TB, ready bool) (took time.Duration, a *proxy) {
	t.Helper()
	words := p.command()
	cmd := p.Command(0, 0, words[0], words[1:]...)
	cmd.Stderr = os.Stderr
	begin := time.Now()
	process := p.Start(t, cmd)
	if ready {
		awaitReady(t, p.Namespace, "pillion", process)
	} else {
		p.awaitListening(t)
	}
	return time.Since(begin), &proxy{pid: process.Cmd.Process.Pid}
}

// putInto makes the agent run in a cgroup. The program is copied there, so that the cgroup is charged with its pages, as that
// of a node's first pod is.
func (p *meshPod) putInto(t testing.TB, c *nettest.Cgroup) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p.program = filepath.Join(dir, "pillion")
	out, err := exec.Command("sh", "-c", `echo $$ > "$0" && cp "$1" "$2" && exec sync "$2"`, c.Procs(), p.k.pillion, p.program).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	p.enter = "echo $$ > " + c.Procs() + " && "
}

func (p *meshPod) awaitListening(t testing.TB) {
	t.Helper()
	p.Do(t, func() error {
		for deadline := time.Now().Add(nettest.Patience); ; time.Sleep(5 * time.Millisecond) {
			err := askReady()
			if err == nil || strings.HasPrefix(err.Error(), "unexpected answer") {
				return nil
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("the agent does not listen: %w", err)
			}
		}
	})
}

// awaitKept waits until the agent has saved its configuration and its certificate.
func (p *meshPod) awaitKept(t testing.TB) {
	t.Helper()
	for deadline := time.Now().Add(nettest.Patience); ; time.Sleep(50 * time.Millisecond) {
		entries, err := os.ReadDir(p.kept)
		if err != nil {
			t.Fatal(err)
		}
		entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool { return strings.HasSuffix(e.Name(), ".new") }) // being written
		if len(entries) >= 2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent has kept %v", entries)
		}
	}
}

// measureControlPlane measures what a control plane costs: the agent's memory with pushes of istiod, beside a program that
// decodes them by go-control-plane's generated types; the CPU time of decoding; and a restart with what was kept.
func measureControlPlane(t testing.TB, k *kit, s sizes) []*row {
	programs := k.controlPrograms(t)
	start := &row{title: "resident memory with a control plane, at start", unit: "MB", promises: []promise{{atMost: 14}}}
	sidecar := &row{title: "resident memory after a sidecar's push", unit: "MB", promises: []promise{{atMost: 15}}}
	thousand := &row{title: "resident memory after 1,000 services", unit: "MB", promises: []promise{{atMost: 20}}}
	counted := &row{title: "the same as a kubelet counts it", unit: "MB", promises: []promise{{atMost: 20}}}
	decoding := &row{title: "CPU to decode 1,000 services", unit: "ms", promises: []promise{{0.3, nameGenerated}}}
	endpoint := &row{title: "one endpoint changed, of a full push", unit: "%", promises: []promise{{atMost: 1}}}
	restart := &row{title: "restart with what was kept to ready", unit: "ms", promises: []promise{{atMost: 100}}}
	binary := &row{title: "size of the program", unit: "MB", promises: []promise{{atMost: 15.6}}}
	for range s.rounds {
		hand, generated := programs.decoded(t), programs.decoded(t, "-generated")
		decoding.add(namePillion, hand["thousand CPU ms"])
		decoding.add(nameGenerated, generated["thousand CPU ms"])
		endpoint.add(namePillion, hand["one endpoint %"])
		start.add(nameGenerated, generated["start"])
		sidecar.add(nameGenerated, generated["sidecar"])
		thousand.add(nameGenerated, generated["thousand"])
	}
	for push, r := range map[string]*row{"": start, "sidecar": sidecar, "thousand": thousand} {
		inScope(t, func(t testing.TB) {
			p := newMeshPod(t, k, programs)
			if push != "" {
				p.serve(t, push)
			}
			_, a := p.agent(t, push != "")
			time.Sleep(s.pushed)
			r.add(namePillion, float64(a.resident(t))/1e6)
		})
	}
	measureWorkingSet(t, k, s, programs, counted)
	inScope(t, func(t testing.TB) {
		p := newMeshPod(t, k, programs)
		istiod := p.serve(t, "thousand")
		inScope(t, func(t testing.TB) { p.agent(t, true); p.awaitKept(t) })
		istiod.Kill()
		for range s.rounds {
			inScope(t, func(t testing.TB) {
				took, _ := p.agent(t, true)
				restart.add(namePillion, milliseconds(took))
			})
		}
	})
	info, err := os.Stat(k.pillion)
	if err != nil {
		t.Fatal(err)
	}
	binary.add(namePillion, float64(info.Size())/1e6)
	rows := []*row{start, sidecar, thousand}
	if len(counted.samples) > 0 {
		rows = append(rows, counted)
	}
	return append(rows, decoding, endpoint, restart, binary)
}

// containerLimit is the memory limit of the agent's cgroup, in bytes.
const containerLimit = 128 << 20

// measureWorkingSet measures what a kubelet counts after 1,000 services, where a memory cgroup can be made.
func measureWorkingSet(t testing.TB, k *kit, s sizes, programs controlPrograms, counted *row) {
	inScope(t, func(t testing.TB) {
		p, c := newMeshPod(t, k, programs), nettest.NewCgroup(t, containerLimit)
		if c == nil {
			return
		}
		p.putInto(t, c)
		p.serve(t, "thousand")
		p.agent(t, true)
		time.Sleep(s.pushed)
		counted.add(namePillion, float64(c.WorkingSet())/1e6)
	})
}
