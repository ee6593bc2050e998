package nettest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// userNamespaceEnvironment is set in the processes that InUserNamespace starts.
const userNamespaceEnvironment = "NETTEST_USER_NAMESPACE"

// InUserNamespace runs the calling test once more, in a process with its own user, network and mount namespaces, and
// returns true there. The caller must return if it is false. The users have the same numbers inside and outside, so root
// keeps its access to files, but its capabilities are valid only for the namespaces that the process and its children
// create: as in a pod with hostUsers: false.
func InUserNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(userNamespaceEnvironment) != "" {
		return true
	}
	RequireRoot(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.count=1")
	cmd.Env = append(os.Environ(), userNamespaceEnvironment+"=1")
	cmd.SysProcAttr = UserNamespace(t)
	cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNET | syscall.CLONE_NEWNS
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	// The signal comes when this thread ends, not only when the process does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in a user namespace: %v\n%s", err, strings.TrimSpace(string(out)))
	}
	return false
}

// UserNamespace starts a process in its own user namespace, with the same numbers of users inside and outside.
func UserNamespace(t *testing.T) *syscall.SysProcAttr {
	t.Helper()
	return &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: identity(t, "/proc/self/uid_map"), GidMappings: identity(t, "/proc/self/gid_map"),
		GidMappingsEnableSetgroups: true,
	}
}

// identity maps each ID of this user namespace to itself. A range must lie in one range of this one (user_namespaces(7)).
func identity(t *testing.T, path string) []syscall.SysProcIDMap {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var ranges []syscall.SysProcIDMap
	for line := range strings.Lines(string(text)) {
		var first, outside, count int
		if _, err := fmt.Sscan(line, &first, &outside, &count); err != nil {
			t.Fatalf("%s: %q: %v", path, line, err)
		}
		ranges = append(ranges, syscall.SysProcIDMap{ContainerID: first, HostID: first, Size: count})
	}
	return ranges
}
