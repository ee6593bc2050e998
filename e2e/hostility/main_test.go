package hostility

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// roleVariable makes the test binary, run once more, the origin or an attacker instead of the tests.
const roleVariable = "PILLION_HOSTILITY_ROLE"

// pillion is the path of the agent under test, built without the race detector: an agent with it needs far more memory.
var pillion string

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleVariable); role {
	case "":
		os.Exit(run(m))
	case "origin":
		runOrigin(os.Args[1:])
	case "attack":
		runAttack(os.Args[1], os.Args[2], os.Args[3])
	default:
		fmt.Fprintf(os.Stderr, "unknown %s %q\n", roleVariable, role)
		os.Exit(1)
	}
}

func run(m *testing.M) int {
	flag.Parse()
	dir, err := os.MkdirTemp("", "pillion-hostility-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = build(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return nettest.Main(m)
}

func build(dir string) error {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	pillion = filepath.Join(dir, "pillion")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", pillion, "../../cmd/pillion")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building pillion: %w\n%s", err, out)
	}
	return nil
}
