package sandbox

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/iptables/kernel"
)

// switches are settings of the kernel that forbid user namespaces, and the value that does.
var switches = []struct{ path, forbids, remedy string }{
	{"/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"},
	{"/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"},
	{"/proc/sys/user/max_net_namespaces", "0", "sysctl user.max_net_namespaces=10000"},
	{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1",
		"sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for pillion with the rule \"userns,\""},
}

// refused adds the setting that forbids namespaces to an error of making them.
func refused(err error, privileged bool) error {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return err
	}
	switch errno {
	case unix.EPERM, unix.EACCES, unix.ENOSPC, unix.EUSERS, unix.EINVAL:
	default:
		return err
	}
	for _, s := range switches {
		value, readErr := os.ReadFile(s.path)
		if readErr == nil && strings.TrimSpace(string(value)) == s.forbids && !privileged {
			return fmt.Errorf("%w; %s is %s: set %s, or run pillion as root", err, s.path, s.forbids, s.remedy)
		}
	}
	switch effective, readErr := kernel.EffectiveCapabilities(); {
	case privileged:
		return err
	case os.Getuid() == 0 && readErr == nil && effective&(1<<unix.CAP_SETFCAP) == 0: // see user_namespaces(7)
		return fmt.Errorf("%w; root without the capability SETFCAP, as inside of another pillion run, cannot make user namespaces: "+
			"run pillion, and the one around it, as another user, or as root with the capabilities SYS_ADMIN, NET_ADMIN and SETPCAP", err)
	}
	return fmt.Errorf("%w; user namespaces are not permitted here, as in a chroot, or in a container whose seccomp profile or "+
		"security module forbids them: allow them there (docker: --security-opt seccomp=unconfined), or run pillion as root with the "+
		"capabilities SYS_ADMIN, NET_ADMIN and SETPCAP", err)
}
