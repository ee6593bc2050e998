package sandbox

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) {
	if IsHelper(os.Args) {
		os.Exit(RunHelper(os.Args))
	}
	os.Exit(nettest.Main(m))
}

// A caller cannot know when the command starts, so a signal that arrives earlier waits for it.
func TestASignalBeforeTheStartReachesTheCommand(t *testing.T) {
	nettest.RequireRoot(t)
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGUSR1} {
		s := started(t)
		if err := s.Signal(signal); err != nil {
			t.Fatal(err)
		}
		if err := s.Await(); err != nil {
			t.Fatal(err)
		}
		if status, err := s.Run(Command{Path: "/bin/sleep", Arguments: []string{"sleep", "100"}}); status != 128+int(signal) || err != nil {
			t.Errorf("after %v: status %d, %v", signal, status, err)
		}
	}
}

// Names of files, arguments and variables may have any bytes but zero.
func TestArgumentsOfAnyBytes(t *testing.T) {
	nettest.RequireRoot(t)
	s := started(t)
	if err := s.Await(); err != nil {
		t.Fatal(err)
	}
	status, err := s.Run(Command{
		Path: "/bin/sh", Environment: []string{"ODD=\xe9<"},
		Arguments: []string{"sh", "-c", `test "$1$ODD" = "$(printf '\377\351<')" && test "$#" = 2 && test -z "$2"`, "sh", "\xff", ""},
	})
	if status != 0 || err != nil {
		t.Errorf("status %d, %v", status, err)
	}
}

// A terminal sends its signals to the helper as well. The command has the default actions of them.
func TestTheHelperOutlivesSignals(t *testing.T) {
	nettest.RequireRoot(t)
	s := started(t)
	if err := s.Await(); err != nil {
		t.Fatal(err)
	}
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2} {
		if err := unix.Kill(s.helper, signal); err != nil {
			t.Fatal(err)
		}
	}
	status, err := s.Run(Command{Path: "/bin/sh", Arguments: []string{"sh", "-c", "kill -QUIT $$"}})
	if status != 128+int(unix.SIGQUIT) || err != nil {
		t.Errorf("status %d, %v", status, err)
	}
}

func started(t *testing.T) *Sandbox {
	t.Helper()
	s, err := Start(Config{IPv6: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// A caller that fails meanwhile does not wait for the network.
func TestClosingEndsAHelperAtWork(t *testing.T) {
	nettest.RequireRoot(t)
	s := started(t)
	helper := s.helper
	s.Close()
	if err := unix.Kill(helper, 0); err != unix.ESRCH {
		t.Errorf("process %d after Close: %v", helper, err)
	}
}

func TestAHelperThatEndsIsReported(t *testing.T) {
	nettest.RequireRoot(t)
	s := started(t)
	if err := unix.Kill(s.helper, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	const want = "starting the sandbox: its first process ended"
	if err := s.Await(); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("Await = %v, want %s", err, want)
	}
}

func TestListeningSocketsAreFound(t *testing.T) {
	if !littleEndian {
		t.Skip("the text is that of a little-endian machine")
	}
	const text = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:1F91 0200007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   2: B80D0120000000000000000007000000:0050 00000000000000000000000000000000:0000 0A 0 0 0 0 0
   3: 0000000000000000FFFF00000100007F:0051 00000000000000000000000000000000:0000 0A 0 0 0 0 0
   4: broken:0050 0 0A
`
	want := []string{"127.0.0.1:8080", "[2001:db8::7]:80", "127.0.0.1:81"}
	if got := parseListening(text); !slices.Equal(got, want) {
		t.Errorf("parseListening = %q, want %q", got, want)
	}
}

// Reported packets are untrusted, and may be cut at any byte.
func TestDestinationsOfPackets(t *testing.T) {
	for packet, want := range map[string]string{
		"4500001d000040004011000001020304cb007107" + "c35001bb":                                                   "203.0.113.7:443",
		"4600001d000040004011000001020304cb007107" + "00000000" + "c3500035":                                      "203.0.113.7:53",
		"6000000000091140" + "20010db8000000000000000000000001" + "20010db8000200000000000000000007" + "c35001bb": "[2001:db8:2::7]:443",
	} {
		raw, err := hex.DecodeString(packet)
		if err != nil {
			t.Fatal(err)
		}
		if got := packetDestination(raw); got != want {
			t.Errorf("packetDestination(%s) = %q, want %q", packet, got, want)
		}
		for i := range raw {
			if got := packetDestination(raw[:i]); got != "" {
				t.Errorf("packetDestination(%s) = %q", packet[:2*i], got)
			}
		}
	}
}

func TestOnlyTheHelpersNameIsTheHelper(t *testing.T) {
	for _, args := range [][]string{{"pillion"}, {"pillion", "8"}, {marker}, {marker, "8", "9"}} {
		if IsHelper(args) {
			t.Errorf("IsHelper(%q)", args)
		}
	}
	if !IsHelper([]string{marker, "8"}) {
		t.Error("the helper is not recognised")
	}
	if status := RunHelper([]string{marker, "8"}); status != 1 {
		t.Errorf("outside a PID namespace, the helper ends with %d", status)
	}
}

// Errors that have other causes do not name a setting.
func TestOtherErrorsAreNotExplained(t *testing.T) {
	for _, err := range []error{unix.ENOMEM, unix.EAGAIN, os.ErrNotExist} {
		if got := refused(err, false); got != err {
			t.Errorf("refused(%v) = %v", err, got)
		}
	}
}

// Each setting that forbids user namespaces is named with its remedy, if it has the value that does.
func TestSettingsThatForbidNamespacesAreNamed(t *testing.T) {
	before := slices.Clone(switches)
	t.Cleanup(func() { switches = before })
	for _, test := range []struct{ path, forbids, permits, remedy string }{
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "1", "sysctl kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/user/max_user_namespaces", "0", "60000", "sysctl user.max_user_namespaces="},
		{"/proc/sys/user/max_net_namespaces", "0", "60000", "sysctl user.max_net_namespaces="},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "0", "AppArmor profile for pillion"},
	} {
		root := t.TempDir() // the other settings do not exist there
		switches = slices.Clone(before)
		for i := range switches {
			switches[i].path = root + switches[i].path
		}
		if err := os.MkdirAll(filepath.Dir(root+test.path), 0o755); err != nil {
			t.Fatal(err)
		}
		for value, named := range map[string]bool{test.forbids: true, test.permits: false} {
			if err := os.WriteFile(root+test.path, []byte(value+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			for _, errno := range []unix.Errno{unix.EPERM, unix.EACCES, unix.ENOSPC} {
				err := refused(fmt.Errorf("making namespaces: %w", errno), false)
				if text := err.Error(); strings.Contains(text, test.path+" is "+value) != named || strings.Contains(text, test.remedy) != named || !errors.Is(err, errno) {
					t.Errorf("%s is %s: %s", test.path, value, text)
				}
				if text := refused(errno, true).Error(); text != errno.Error() {
					t.Errorf("to a caller with capabilities: %s", text)
				}
			}
		}
	}
}
