package nettest

import (
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
	everybody := []syscall.SysProcIDMap{{Size: 1 << 16}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, UidMappings: everybody, GidMappings: everybody,
		GidMappingsEnableSetgroups: true, Pdeathsig: syscall.SIGKILL,
	}
	// The signal comes when this thread ends, not only when the process does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in a user namespace: %v\n%s", err, strings.TrimSpace(string(out)))
	}
	return false
}
