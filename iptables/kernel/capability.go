package kernel

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// MissingCapability returns a MissingCapabilityError if the calling thread lacks a capability. With legacy it also
// requires NET_RAW, for the raw socket of legacy iptables.
func MissingCapability(legacy bool) error {
	effective, err := EffectiveCapabilities()
	if err != nil {
		return err
	}
	needed := []capability{{unix.CAP_NET_ADMIN, "NET_ADMIN"}}
	if legacy {
		needed = append(needed, capability{unix.CAP_NET_RAW, NeedsNetRaw})
	}
	for _, c := range needed {
		if effective&(1<<c.bit) == 0 {
			return c.name
		}
	}
	return nil
}

// EffectiveCapabilities returns the calling thread's effective capabilities as bits.
func EffectiveCapabilities() (uint64, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var halves [2]unix.CapUserData
	if err := unix.Capget(&header, &halves[0]); err != nil {
		return 0, fmt.Errorf("reading capabilities: %w", err)
	}
	return uint64(halves[1].Effective)<<32 | uint64(halves[0].Effective), nil
}

type capability struct {
	bit  int
	name MissingCapabilityError
}

// NeedsNetRaw is the error for a missing NET_RAW.
const NeedsNetRaw = MissingCapabilityError("NET_RAW")

// MissingCapabilityError names a capability that reading or changing rules requires, without the prefix CAP_.
type MissingCapabilityError string

func (e MissingCapabilityError) Error() string {
	const granted = "capabilities.add: [NET_ADMIN, NET_RAW] in the container's securityContext"
	if os.Geteuid() == 0 {
		return fmt.Sprintf("capability CAP_%s is missing: set %s", string(e), granted)
	}
	return fmt.Sprintf("capability CAP_%s is missing: run as user 0 with %s", string(e), granted)
}

// Refused returns the cause for which the kernel refuses an operation (EPERM or EACCES) on the rules of the calling
// thread's network namespace. A capability counts only in the user namespace that owns the network namespace.
func Refused(legacy bool) error {
	if err := MissingCapability(legacy); err != nil {
		return err
	}
	if ownedElsewhere() {
		return errOwnedElsewhere
	}
	return errForbidden
}

var (
	errOwnedElsewhere = errors.New("this network namespace belongs to another user namespace, in which this process has no capability: " +
		"run in that user namespace, or in a network namespace that was created in this one")
	errForbidden = errors.New("the kernel refuses it although this process has the capabilities: " +
		"a seccomp, SELinux or AppArmor policy may forbid it")
)

// IsRefused reports whether err is a lack of permission: one of the errors of MissingCapability and Refused.
func IsRefused(err error) bool {
	return errors.As(err, new(MissingCapabilityError)) || errors.Is(err, errOwnedElsewhere) || errors.Is(err, errForbidden)
}

// ownedElsewhere reports whether the network namespace of the calling thread belongs to a user namespace that is neither
// the thread's own nor a descendant of it: ioctl_ns(2) returns EPERM then.
func ownedElsewhere() bool {
	namespace, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(namespace)
	owner, err := unix.IoctlRetInt(namespace, unix.NS_GET_USERNS)
	if err == nil {
		unix.Close(owner)
	}
	return errors.Is(err, unix.EPERM)
}
