package rulestest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// MachinePath is where the machine has its programs.
var MachinePath = os.Getenv("PATH")

// UsePrograms sets PATH to a directory with only the programs of these flavours, under their full names or under the
// plain ones, and returns the directory.
func UsePrograms(t *testing.T, plain bool, flavours ...ruleset.Flavour) string {
	t.Helper()
	t.Setenv("PATH", MachinePath)
	dir := t.TempDir()
	for _, flavour := range flavours {
		if flavour == ruleset.Native {
			continue // without a program
		}
		for _, name := range []string{"iptables", "ip6tables"} {
			for _, suffix := range []string{"", "-save", "-restore"} {
				real, err := exec.LookPath(name + "-" + string(flavour) + suffix)
				if err != nil {
					t.Fatal(err)
				}
				if real, err = filepath.EvalSymlinks(real); err != nil {
					t.Fatal(err)
				}
				link := name + "-" + string(flavour) + suffix
				if plain {
					link = name + suffix
				}
				if err := os.Symlink(real, filepath.Join(dir, link)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	t.Setenv("PATH", dir)
	return dir
}

func ForEachFlavour(t *testing.T, test func(t *testing.T, flavour ruleset.Flavour)) {
	forEachOf(t, []ruleset.Flavour{ruleset.NFT, ruleset.Legacy, ruleset.Native}, test)
}

// ForEachProgram omits the flavour without a program, for tests that use the program to meddle or that break it.
func ForEachProgram(t *testing.T, test func(t *testing.T, flavour ruleset.Flavour)) {
	forEachOf(t, []ruleset.Flavour{ruleset.NFT, ruleset.Legacy}, test)
}

func forEachOf(t *testing.T, flavours []ruleset.Flavour, test func(t *testing.T, flavour ruleset.Flavour)) {
	nettest.RequireRoot(t)
	for _, flavour := range flavours {
		t.Run(string(flavour), func(t *testing.T) {
			UsePrograms(t, false, flavour)
			test(t, flavour)
		})
	}
}
