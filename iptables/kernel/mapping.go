package kernel

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Unmapped returns an error for a user or group of the spec that this user namespace does not have. A rule for it would be
// refused, or would match no process.
func Unmapped(spec capture.Spec) error {
	for _, ids := range []struct {
		field, file string
		list        []capture.IDRange
	}{
		{"ProxyUIDs", "uid_map", spec.ProxyUIDs}, {"ProxyGIDs", "gid_map", spec.ProxyGIDs},
		{"OwnerGroups", "gid_map", spec.OwnerGroups.List}, {"OwnerGroupsExcluded", "gid_map", spec.OwnerGroupsExcluded},
	} {
		if len(ids.list) == 0 {
			continue
		}
		mapping, err := os.ReadFile("/proc/thread-self/" + ids.file)
		if err != nil {
			return fmt.Errorf("reading the users of this user namespace: %w", err)
		}
		for _, r := range ids.list {
			if !mapped(string(mapping), r.First) || !mapped(string(mapping), r.Last) {
				return &capture.FieldError{Field: ids.field, Value: r.String(),
					Err: errors.New("this user namespace has no such ID: use one that /proc/self/" + ids.file + " maps, for the agent as well")}
			}
		}
	}
	return nil
}

// mapped reports whether a mapping (user_namespaces(7)) contains an ID.
func mapped(mapping string, id uint32) bool {
	for line := range strings.Lines(mapping) {
		var inside, outside, count uint64
		if _, err := fmt.Sscan(line, &inside, &outside, &count); err == nil && inside <= uint64(id) && uint64(id) < inside+count {
			return true
		}
	}
	return false
}
