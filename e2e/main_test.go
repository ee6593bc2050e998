package e2e

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// The uids of the pod's processes.
const (
	agentUID    = 1337
	workloadUID = 1000
)

// pillion is the path of the binary under test. All users may read it.
var pillion string

// binaryEnvironment passes the path on to the processes that nettest.InUserNamespace starts.
const binaryEnvironment = "PILLION_E2E_BINARY"

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	flag.Parse()
	// Most of these tests wait for the network most of the time. With 16 at a time on two processors, servers of theirs took longer
	// than the agent waits.
	flag.Set("test.parallel", "6")
	if pillion = os.Getenv(binaryEnvironment); pillion != "" { // a test of ours in namespaces of its own
		return nettest.Main(m)
	}
	dir, err := os.MkdirTemp("", "pillion-e2e-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = build(dir)
		os.Setenv(binaryEnvironment, pillion)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return nettest.Main(m)
}

// build builds the binary in dir: static as in a release, or with the race detector if the tests have it.
func build(dir string) error {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	pillion = filepath.Join(dir, "pillion")
	args := []string{"build", "-buildvcs=false", "-o", pillion}
	cgo := "CGO_ENABLED=0"
	if raceDetector {
		args, cgo = append(args, "-race"), "CGO_ENABLED=1"
	}
	cmd := exec.Command("go", append(args, "../cmd/pillion")...)
	cmd.Env = append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building pillion: %w\n%s", err, out)
	}
	return nil
}
