package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
)

// controlGroup is where the container's control group is mounted.
const controlGroup = "/sys/fs/cgroup"

// limitMemory sets the runtime's soft memory limit below bytes, or if that is zero below the container's limit, so that
// the garbage collector works harder before the kernel kills the process. root is the mount point of the container's
// control group, version 1 or 2. If inherited, the value of GOMEMLIMIT, is set, the runtime has applied it already, and it
// takes the place of the container's limit.
func limitMemory(bytes int64, inherited, root string) error {
	if bytes == 0 && inherited == "" {
		var err error
		if bytes, err = memoryLimit(root); err != nil {
			return err
		}
	}
	if bytes == 0 {
		return nil
	}
	// The rest is for memory that the runtime does not count: the program's own pages, sockets and pipes.
	debug.SetMemoryLimit(bytes - max(bytes/10, min(bytes/4, 32<<20)))
	return nil
}

// memoryLimit returns the container's limit in bytes, or zero without a limit.
func memoryLimit(root string) (int64, error) {
	for _, name := range []string{"memory.max", "memory/memory.limit_in_bytes"} {
		text, err := os.ReadFile(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return 0, fmt.Errorf("reading the memory limit: %w", err)
		}
		word := strings.TrimSpace(string(text))
		if word == "max" {
			return 0, nil
		}
		limit, err := strconv.ParseInt(word, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("reading the memory limit from %s: %w", name, err)
		}
		const none = 1 << 60 // version 1 reports no limit as the largest number of pages
		if limit >= none {
			return 0, nil
		}
		return limit, nil
	}
	return 0, nil
}
