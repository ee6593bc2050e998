package kernel

import (
	"os"
	"testing"

	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

func TestMain(m *testing.M) { os.Exit(rulestest.Main(m)) }
