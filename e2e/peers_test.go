package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// peer returns the path of a program in testdata/peers: third-party clients and servers. They are a separate module, so that
// pillion does not depend on their modules, and are built on first use.
func peer(t testing.TB, name string) string {
	t.Helper()
	dir, err := buildPeers()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

var buildPeers = sync.OnceValues(func() (dir string, err error) {
	dir = filepath.Join(filepath.Dir(pillion), "peers")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "./...")
	cmd.Dir = "testdata/peers"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building testdata/peers (make modules fetches what it needs): %w\n%s", err, out)
	}
	return dir, nil
})

// startPeer runs a program at the way's end as the workload's user, and returns when it listens on port. The argument
// ADDRESS is replaced by the address under which the way's beginning reaches it.
func (w way) startPeer(t testing.TB, port int, program string, arguments ...string) (address string) {
	t.Helper()
	address = netip.AddrPortFrom(w.address, uint16(port)).String()
	for i, argument := range arguments {
		if argument == "ADDRESS" {
			arguments[i] = address
		}
	}
	complaints := &logBook{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s stderr:\n%s", program, complaints)
		}
	})
	cmd := w.to.Command(workloadUID, workloadUID, program, arguments...)
	cmd.Stderr = complaints
	w.to.Start(t, cmd)
	awaitListener(t, w.to, port)
	return address
}

// runPeer runs a program at the way's beginning as the workload's user and returns its output. The program must succeed.
func (w way) runPeer(t testing.TB, program string, arguments ...string) string {
	t.Helper()
	out, err := w.from.Run(w.from.Command(workloadUID, workloadUID, program, arguments...))
	if err != nil {
		t.Fatalf("%s: %v", w.name, err)
	}
	return out
}
