package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// initEnvironment is the environment for runs of init. By default, the race detector would sleep for a second at exit.
const initEnvironment = "GORACE=atexit_sleep_ms=0"

// countedPath returns a PATH with one flavour of iptables. Each program in it records its name in a file before it runs.
func countedPath(t *testing.T, flavour string) (variable string, started func() []string) {
	t.Helper()
	dir, record := t.TempDir(), filepath.Join(t.TempDir(), "started")
	programs := strings.TrimPrefix(pathWith(t, flavour), "PATH=")
	entries, err := os.ReadDir(programs)
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range entries {
		script := fmt.Sprintf("#!/bin/sh\necho %[1]s >> %[2]s\nexec %[3]s/%[1]s \"$@\"\n", program.Name(), record, programs)
		nettest.WriteProgram(t, filepath.Join(dir, program.Name()), script)
	}
	return "PATH=" + dir, func() []string {
		text, err := os.ReadFile(record)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		os.Remove(record)
		return strings.Fields(string(text))
	}
}

// Most of the time of init is spent starting programs.
func TestInitStartsFewPrograms(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	for _, flavour := range []string{nft, legacy, native} {
		most := map[string]int{nft: 8, legacy: 8, native: 0}[flavour]
		for _, mode := range []string{"REDIRECT", "TPROXY"} {
			t.Run(flavour+"/"+mode, func(t *testing.T) {
				pod, _ := nettest.PodAndPeer(t)
				arguments := slices.Clone(initArguments)
				arguments[slices.Index(arguments, "REDIRECT")] = mode
				backend := "iptables-" + flavour
				programs := flavour
				if flavour == native {
					backend, programs = native, nft // there, and not needed
				}
				path, started := countedPath(t, programs)
				for _, run := range []string{"the first", "a second"} {
					if _, stderr, code := execute(t, pod, []string{path, initEnvironment}, append(arguments, "--backend", backend)...); code != 0 {
						t.Fatalf("exit code %d\n%s", code, stderr)
					}
					names := started()
					if len(names) > most || flavour != native && len(names) == 0 {
						t.Errorf("%s run started %d programs, want at most %d: %s", run, len(names), most, names)
					}
				}
			})
		}
	}
}

// init and check verify the rules by opening connections. They need no agent.
func TestInitVerifiesTheRules(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	validation := append(slices.Clone(initArguments), "--run-validation")
	for _, flavour := range []string{nft, legacy, native} {
		t.Run(flavour, func(t *testing.T) {
			pod, _ := nettest.PodAndPeer(t)
			path := pathWith(t, flavour)
			proofBy := func(wrapper []string, patience string) (output string, code int) {
				t.Helper()
				words := append(append(slices.Clone(wrapper), pillion), validation...)
				words = append(words, "--skip-rule-apply", "--probe-timeout", patience)
				cmd := pod.Command(0, 0, words[0], words[1:]...)
				cmd.Env = append(os.Environ(), initEnvironment)
				out, err := pod.Run(cmd)
				if cmd.ProcessState == nil {
					t.Fatal(err)
				}
				return fmt.Sprint(out, err), cmd.ProcessState.ExitCode()
			}
			if _, stderr, code := execute(t, pod, []string{path, initEnvironment}, append(slices.Clone(validation), "--probe-timeout=20s")...); code != 0 {
				t.Fatalf("init with its proof as root: exit code %d\n%s", code, stderr)
			}
			users := map[string][]string{"root": {"env"}, "user 1337": unprivileged(agentUID)}
			for name, wrapper := range users {
				if out, code := proofBy(wrapper, "20s"); code != 0 {
					t.Errorf("%s: exit code %d\n%s", name, code, out)
				}
			}
			if _, stderr, code := execute(t, pod, []string{initEnvironment}, "cleanup"); code != 0 {
				t.Fatalf("cleanup: exit code %d\n%s", code, stderr)
			}
			for name, wrapper := range users {
				if out, code := proofBy(wrapper, "1ms"); code != 126 || !strings.Contains(out, "not captured: inbound ipv4") {
					t.Errorf("%s, without rules: exit code %d, want 126\n%s", name, code, out)
				}
			}
		})
	}
}
