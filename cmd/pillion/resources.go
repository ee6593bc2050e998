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

// limitMemory sets the runtime's soft memory limit below the container's limit, so that the garbage collector works harder
// before the kernel kills the process. root is the mount point of the container's control group, version 1 or 2. If limit,
// the value of GOMEMLIMIT, is set, the runtime has applied it already.
func limitMemory(root, limit string) error {
	if limit != "" {
		return nil
	}
	bytes, err := memoryLimit(root)
	if err != nil || bytes == 0 {
		return err
	}
	// A tenth remains for memory that the runtime does not count: the program's own pages, sockets and pipes.
	debug.SetMemoryLimit(bytes - bytes/10)
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
