package bench

import (
	"fmt"
	"os"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// roleVariable makes the test binary run as the workload or the load instead of the tests. Each then is a separate process
// that is pinned to a core and is entirely inside its namespace.
const roleVariable = "PILLION_BENCH_ROLE"

func TestMain(m *testing.M) {
	var err error
	switch role := os.Getenv(roleVariable); role {
	case "":
		os.Exit(nettest.Main(m))
	case "workload":
		err = runWorkload(os.Args[1:])
	case "load":
		err = runLoad(os.Args[1:])
	default:
		err = fmt.Errorf("unknown %s %q", roleVariable, role)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Getenv(roleVariable), err)
		os.Exit(1)
	}
}
