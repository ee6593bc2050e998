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

// limitMemory makes the collector work harder before the container's limit ends the process. root is where the kernel
// shows the container's own control group, of either version. The runtime heeds GOMEMLIMIT, whose value is limit, itself.
func limitMemory(root, limit string) error {
	if limit != "" {
		return nil
	}
	bytes, err := memoryLimit(root)
	if err != nil || bytes == 0 {
		return err
	}
	// A tenth is left for what the runtime does not count: the program's own pages, sockets and pipes.
	debug.SetMemoryLimit(bytes - bytes/10)
	return nil
}

// memoryLimit is zero when there is none.
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
		const none = 1 << 60 // version 1 says the largest number of pages for it
		if limit >= none {
			return 0, nil
		}
		return limit, nil
	}
	return 0, nil
}
