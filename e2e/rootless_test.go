package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// In a user namespace, as of a pod with hostUsers: false, root's capabilities do not extend to the machine. Each back end
// installs and removes its rules there, and the agent carries connections in both modes.
func TestInitAgentAndCleanupWorkInAUserNamespace(t *testing.T) {
	t.Parallel()
	if !nettest.InUserNamespace(t) {
		return
	}
	for _, flavour := range []string{nft, legacy, native} {
		for _, tproxy := range []bool{false, true} {
			name := flavour + "/REDIRECT"
			if tproxy {
				name = flavour + "/TPROXY"
			}
			t.Run(name, func(t *testing.T) {
				s := &stage{tproxy: tproxy}
				s.pod, s.peer = nettest.PodAndPeer(t)
				arguments, wrapper, flags := initArguments, unprivileged(agentUID), []string(nil)
				if tproxy {
					arguments = append(append([]string{}, initArguments...), "-m", "TPROXY")
					wrapper, flags = borrowing(0), []string{"--interception-mode", "TPROXY"}
				}
				if stdout, stderr, code := execute(t, s.pod, []string{pathWith(t, flavour)}, arguments...); code != 0 || stderr != "" {
					t.Fatalf("init: exit code %d\n%s%s", code, stdout, stderr)
				}
				s.agent = launchAgentBy(t, s.pod, wrapper, flags...)
				awaitReady(t, s.pod, s.agent)
				s.everyWay(t, func(t *testing.T, w way) {
					downstream, upstream := w.connect(t)
					converse(t, downstream, upstream)
				})
				s.agent.Kill()
				if stdout, stderr, code := execute(t, s.pod, nil, "cleanup"); code != 0 || stderr != "" {
					t.Fatalf("cleanup: exit code %d\n%s%s", code, stdout, stderr)
				}
				trafficIsDirect(t, s.pod, s.peer)
			})
		}
	}
}

// An ordinary user with a range of subordinate uids needs no root for the demo.
func TestTheDemoWorksAsAnOrdinaryUser(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	// That user reads no file of a checkout that is root's own.
	dir := filepath.Dir(pillion)
	script, err := os.ReadFile("../scripts/demo")
	if err != nil {
		t.Fatal(err)
	}
	demo := filepath.Join(dir, "demo")
	ranges := filepath.Join(dir, "subordinate")
	for path, text := range map[string]string{demo: string(script), ranges: "nobody:100000:65536\n"} {
		nettest.WriteProgram(t, path, text)
	}
	out, err := asNobody(t, ranges, demo)
	if err != nil || !strings.Contains(out, "pillion cleanup") || !strings.Contains(out, "0 rules left") {
		t.Errorf("%v\n%s", err, out)
	}
}

// asNobody runs the script with the file of subordinate uids and gids in place of the machine's. It runs it as user nobody,
// unless the tests are rootless already.
func asNobody(t *testing.T, ranges, script string) (string, error) {
	t.Helper()
	words := []string{script, pillion}
	if !rootless(t) {
		words = append([]string{"unshare", "--mount", "sh", "-c",
			"mount --bind " + ranges + " /etc/subuid && mount --bind " + ranges + " /etc/subgid && exec setpriv --reuid nobody --regid nogroup --clear-groups \"$@\"", "sh"}, words...)
	}
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Dir, cmd.Env = filepath.Dir(script), append(os.Environ(), initEnvironment, "TMPDIR=/tmp")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Without a range, the demo must name it as what is missing: the user may well create namespaces.
func TestTheDemoNamesAMissingRangeOfUIDs(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	if rootless(t) {
		return // there the demo runs as root
	}
	directory := filepath.Dir(pillion)
	script, err := os.ReadFile("../scripts/demo")
	if err != nil {
		t.Fatal(err)
	}
	demo, ranges := filepath.Join(directory, "demo-without-range"), filepath.Join(directory, "no-range")
	nettest.WriteProgram(t, demo, string(script))
	if err := os.WriteFile(ranges, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := asNobody(t, ranges, demo)
	if err == nil || !strings.Contains(out, "but this user has no range of uids in /etc/subuid") || !strings.Contains(out, "sudo make demo") {
		t.Errorf("%v\n%s", err, out)
	}
}

// rootless reports whether the tests run in a user namespace.
func rootless(t *testing.T) bool {
	t.Helper()
	mapping, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(mapping))
	return len(fields) != 3 || fields[2] != "4294967295"
}
