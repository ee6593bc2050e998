package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// The agent is the part that is exposed to untrusted clients. It runs without privileges: no root, no capability, no
// way to get one, and a file system that it cannot write to.
func TestAgentNeedsNoPrivilegeAndNoWritableFile(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	s := &stage{}
	s.pod, s.peer = nettest.PodAndPeer(t)
	initPod(t, s.pod, nft)
	// Every mount of the agent's own mount namespace becomes read-only; the machine's stay as they are.
	s.agent = launchAgent(t, s.pod, []string{"unshare", "--mount", "--propagation", "private", "sh", "-c",
		"for point in $(cut -d' ' -f5 /proc/self/mountinfo); do mount -o remount,bind,ro $point 2>/dev/null; done; exec \"$@\"", "sh",
		"chrt", "--other", "0"})
	awaitReady(t, s.pod, s.agent)

	for key, want := range map[string]string{
		"Uid":        "1337\t1337\t1337\t1337",
		"Gid":        "1337\t1337\t1337\t1337",
		"Groups":     "",
		"CapInh":     "0000000000000000",
		"CapPrm":     "0000000000000000",
		"CapEff":     "0000000000000000",
		"CapBnd":     "0000000000000000",
		"CapAmb":     "0000000000000000",
		"NoNewPrivs": "1",
	} {
		if got := s.agent.status(t, key); got != want {
			t.Errorf("%s is %q, want %q", key, got, want)
		}
	}
	// With the race detector it is a thread of that.
	nettest.Eventually(t, "the monitor of Go's runtime yields to the other threads", func() bool {
		threads, err := filepath.Glob(s.agent.proc("task/*"))
		if err != nil {
			t.Fatal(err)
		}
		return yielding(threads) == 1
	})
	mounts, err := os.ReadFile(s.agent.proc("mountinfo"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); fields[4] == "/" && !strings.HasPrefix(fields[5], "ro") {
			t.Errorf("the agent's root is writable: %s", line)
		}
	}
	s.everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
	})
}

// yielding returns how many of the threads, directories in /proc, do not interrupt others.
func yielding(threads []string) (n int) {
	for _, thread := range threads {
		id, err := strconv.Atoi(filepath.Base(thread))
		if err != nil {
			continue
		}
		attributes, err := unix.SchedGetAttr(id, 0)
		if err == nil && attributes.Policy == unix.SCHED_BATCH {
			n++
		}
	}
	return n
}
