package kernel

import (
	"fmt"
	"os"
	"strconv"
	"strings"

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
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return 0, fmt.Errorf("reading capabilities: %w", err)
	}
	var effective uint64
	for line := range strings.Lines(string(status)) {
		if mask, ok := strings.CutPrefix(line, "CapEff:"); ok {
			effective, _ = strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
		}
	}
	return effective, nil
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
	return fmt.Sprintf("capability CAP_%s is missing: run as root with capabilities.add: [NET_ADMIN, NET_RAW] in the container's securityContext", string(e))
}
