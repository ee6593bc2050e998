package agent

import (
	"path/filepath"

	"golang.org/x/sys/unix"
)

// keptIdentity is the directory with the workload's certificate and key, below that of the kept configuration.
const keptIdentity = "pillion-identity"

// identityDirectory returns where the identity is kept, or "" if it is not kept: the key must not reach a disk.
func identityDirectory(kept string) string {
	var system unix.Statfs_t
	if kept == "" || unix.Statfs(kept, &system) != nil {
		return ""
	}
	switch system.Type {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		return filepath.Join(kept, keptIdentity)
	}
	return ""
}
