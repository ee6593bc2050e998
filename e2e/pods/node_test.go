package pods

import (
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// node is a machine that runs pods.
type node struct {
	*nettest.Namespace
	first int    // the node's first process, in this process's numbers
	root  string // its file system, seen from here

	mu  sync.Mutex
	ids []string // of all pods that there have been
}

const (
	network    = "198.51.100.0/25" // of the pods
	podNetwork = "pods"
)

// Addresses of the node at which its tests serve. The rules of pods capture connections to the first. Some pods exclude
// the network of the second.
var (
	serving = netip.MustParseAddr("198.51.100.200")
	outside = netip.MustParseAddr("203.0.113.7")
)

// setUpNode gives podman directories of its own and then reaps orphaned processes. It ends when this process closes its
// standard input; all processes of the node end with it.
const setUpNode = `
for dir in /run /var/lib/containers /etc/containers /etc/cni /dev/shm; do
	[ ! -d "$dir" ] || mount -t tmpfs tmpfs "$dir"
done
cp "$1"/* /etc/containers/
exec catatonit -- cat`

// nodeFiles is podman's configuration. Limits cannot be raised everywhere, and crun refuses machines with both versions of
// cgroups.
var nodeFiles = map[string]string{
	"containers.conf": `[containers]
default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
pids_limit = 0
[network]
network_backend = "netavark"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
`,
	"policy.json": `{"default":[{"type":"insecureAcceptAnything"}]}`,
}

// newNode makes a node that has the images.
func newNode(t *testing.T) *node {
	t.Helper()
	requireWholeRoot(t)
	etc := t.TempDir()
	for name, text := range nodeFiles {
		write(t, filepath.Join(etc, name), text)
	}
	n := &node{Namespace: nettest.New(t, "node")}
	t.Cleanup(n.removeGroups)
	for _, address := range []netip.Addr{serving, outside} {
		n.AddAddress(t, "lo", netip.PrefixFrom(address, 32))
	}
	cmd := n.Command(0, 0, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private",
		"sh", "-c", setUpNode, "sh", etc)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	holder := n.Start(t, cmd)
	t.Cleanup(func() { // so that it is waited for by its parent, before that is killed
		stdin.Close()
		holder.Wait(nettest.Patience)
	})
	fmt.Fprintln(stdin, "ready")
	if _, err := stdout.Read(make([]byte, 6)); err != nil { // it comes back when all else is done
		t.Fatalf("the node does not start: %v", err)
	}
	n.first = childOf(t, holder.Cmd.Process.Pid)
	n.root = fmt.Sprintf("/proc/%d/root", n.first)

	n.podman(t, "network", "create", "--subnet", network, podNetwork)
	for target, tag := range map[string]string{"image": image, "image-iptables": imageIPTables} {
		name, _ := theImage(t, target)
		if out := n.podman(t, "load", "--quiet", "--input", name); !strings.Contains(out, tag) {
			t.Fatalf("%s is not %s: %s", target, tag, out)
		}
	}
	n.podman(t, "build", "--quiet", "--network=none", "--pull=never", "--tag", imageWorkload, workloadFiles(t))
	n.start(t, anchor, "anchor")
	n.pinBridge(t)
	return n
}

// anchor is a pod that stays, so that the bridge of all pods stays too.
const anchor = `apiVersion: v1
kind: Pod
metadata: {name: THIS-POD}
spec:
  containers:
  - name: echo
    image: localhost/workload:test
    command: [/workload, echo, ":9000"]
    securityContext: {runAsUser: 1000, runAsGroup: 1000}
`

// pinBridge fixes the bridge's hardware address. Otherwise it is the lowest one of its ports and changes when a pod ends;
// the other pods would use the old address until they resolve it again.
func (n *node) pinBridge(t *testing.T) {
	t.Helper()
	for line := range strings.Lines(n.MustRun(t, "ip", "-o", "link", "show", "type", "bridge")) {
		words := strings.Fields(line)
		name := strings.TrimSuffix(words[1], ":")
		address := words[slices.Index(words, "link/ether")+1]
		n.MustRun(t, "ip", "link", "set", "dev", name, "address", address)
		return
	}
	t.Fatal("there is no bridge")
}

// requireWholeRoot is nettest.RequireRoot outside user namespaces: containers need control groups.
func requireWholeRoot(t *testing.T) {
	t.Helper()
	nettest.RequireRoot(t)
	if uids, err := os.ReadFile("/proc/self/uid_map"); err != nil || strings.Join(strings.Fields(string(uids)), " ") != "0 0 4294967295" {
		if os.Getenv("CI") != "" {
			t.Fatal("this test needs the machine's root, and in CI it must not be skipped")
		}
		t.Skip("pods need the machine's root: run it as root")
	}
}

// workloadFiles prepares an image of nginx with its libraries and our workload.
func workloadFiles(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := build("./testdata/workload", "workload"); err != nil {
		t.Fatal(err)
	}
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Fatalf("%v; make test installs it", err)
	}
	libraries, err := exec.Command("ldd", nginx).Output()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"/usr/sbin/nginx": nginx, "/workload": filepath.Join(built, "workload"), "/etc/nginx.conf": "testdata/nginx.conf"}
	for _, library := range regexp.MustCompile(`/[^ )]*\.so[^ )]*`).FindAllString(string(libraries), -1) {
		files[library] = library
	}
	for place, source := range files {
		content, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "root", place), string(content))
	}
	// A volume takes the mode of the directory that it covers.
	tmp := filepath.Join(dir, "root/tmp")
	if err := os.Mkdir(tmp, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(tmp, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "Dockerfile"), "FROM scratch\nCOPY root/ /\n")
	return dir
}

// write makes a file with mode 755.
func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	nettest.WriteProgram(t, name, text)
}

func childOf(t *testing.T, pid int) int {
	t.Helper()
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range children {
		text, _ := os.ReadFile(name)
		if child, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			return child
		}
	}
	t.Fatalf("process %d has no child", pid)
	return 0
}

// tryPodman runs podman on the node.
func (n *node) tryPodman(arguments ...string) (string, error) {
	return n.Run(n.Command(0, 0, "nsenter", append([]string{"--target", strconv.Itoa(n.first), "--mount", "--pid", "podman"}, arguments...)...))
}

func (n *node) podman(t testing.TB, arguments ...string) string {
	t.Helper()
	out, err := n.tryPodman(arguments...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// removeGroups removes the control groups that podman leaves. All processes of the node have ended.
func (n *node) removeGroups() {
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/libpod_parent")
	for _, group := range append(groups, "/sys/fs/cgroup/libpod_parent") {
		for _, id := range n.ids {
			var inside []string
			filepath.WalkDir(filepath.Join(group, id), func(name string, entry fs.DirEntry, err error) error {
				if err == nil && entry.IsDir() {
					inside = append(inside, name)
				}
				return nil
			})
			for _, name := range slices.Backward(inside) {
				os.Remove(name)
			}
		}
		os.Remove(group) // unless the machine's own podman uses it
	}
}

// pod is a started pod.
type pod struct {
	*nettest.Namespace // nil unless it was played to go on
	node               *node
	name               string
	address            netip.Addr
}

// start starts the pod of a manifest after applying replacements, pairs of old and new text. It may end at any time.
func (n *node) start(t testing.TB, text, name string, replacements ...string) *pod {
	t.Helper()
	file := filepath.Join(t.TempDir(), name+".yaml")
	text = strings.NewReplacer(append([]string{"THIS-POD", name}, replacements...)...).Replace(text)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, failed := n.tryPodman("kube", "play", "--network", podNetwork, file)
	n.remember(n.podman(t, "pod", "inspect", name, "--format", "{{.ID}}"))
	if failed != nil {
		t.Fatalf("%v\n%s", failed, out)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := n.tryPodman("pod", "logs", "--names", name)
			t.Logf("the containers of %s say\n%s", name, out)
		}
		n.tryPodman("pod", "rm", "--force", "--time", "0", name)
	})
	return &pod{node: n, name: name}
}

func (n *node) remember(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ids = append(n.ids, id)
}

// play starts a pod that does not end by itself and waits until its agent is ready.
func (n *node) play(t testing.TB, text, name string, replacements ...string) *pod {
	t.Helper()
	p := n.start(t, text, name, replacements...)
	infra := n.podman(t, "pod", "inspect", name, "--format", "{{.InfraContainerID}}")
	state := strings.Fields(n.podman(t, "inspect", infra, "--format", "{{.State.Pid}} {{.NetworkSettings.Networks."+podNetwork+".IPAddress}}"))
	p.Namespace = nettest.Open(t, name, filepath.Join(n.root, "proc", state[0], "ns/net"))
	p.address = netip.MustParseAddr(state[1])
	p.exec(t, "pilot-agent", "wait", "--timeoutSeconds", "120", "--periodMillis", "20")
	return p
}

// playFile is play for a manifest in testdata.
func (n *node) playFile(t testing.TB, file, name string, replacements ...string) *pod {
	t.Helper()
	return n.play(t, manifest(t, file), name, replacements...)
}

func manifest(t testing.TB, file string) string {
	t.Helper()
	text, err := os.ReadFile("testdata/" + file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// at returns the address of a port of the pod.
func (p *pod) at(port int) string { return netip.AddrPortFrom(p.address, uint16(port)).String() }

// container returns podman's name of a container of the pod.
func (p *pod) container(name string) string { return p.name + "-" + name }

// exec runs a program in the agent's container, as a kubelet's hooks do.
func (p *pod) exec(t testing.TB, words ...string) string {
	t.Helper()
	return p.node.podman(t, append([]string{"exec", p.container("istio-proxy")}, words...)...)
}

// signal sends a signal to a container.
func (p *pod) signal(t testing.TB, container, signal string) {
	t.Helper()
	p.node.podman(t, "kill", "--signal", signal, p.container(container))
}

// ends waits for the end of a container and returns its exit code.
func (p *pod) ends(t testing.TB, container string) string {
	t.Helper()
	return p.node.podman(t, "wait", "--interval", "50ms", p.container(container))
}

// dialer connects from inside a namespace.
func dialer(from *nettest.Namespace, address string) func() (net.Conn, error) {
	return func() (net.Conn, error) { return from.Dial("tcp", address, nettest.Patience) }
}
