package nettest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Cgroup is a memory cgroup of version 1 or 2. The methods of a nil Cgroup return 0.
type Cgroup struct {
	dir                                    string
	current, most, statistics, inactiveKey string
}

// NewCgroup makes a cgroup with a limit in bytes, and removes it when the test ends. It returns nil where that is not
// possible.
func NewCgroup(t testing.TB, limit int) *Cgroup {
	name := fmt.Sprintf("pillion-test-%d-%d", os.Getpid(), time.Now().UnixNano())
	for _, c := range []struct {
		parent, limitFile string
		files             Cgroup
	}{
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", Cgroup{"", "memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.stat", "total_inactive_file"}},
		{"/sys/fs/cgroup", "memory.max", Cgroup{"", "memory.current", "memory.peak", "memory.stat", "inactive_file"}},
	} {
		dir := filepath.Join(c.parent, name)
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() { os.Remove(dir) })
		if os.WriteFile(filepath.Join(dir, c.limitFile), []byte(strconv.Itoa(limit)), 0) == nil {
			c.files.dir = dir
			return &c.files
		}
	}
	t.Log("no memory cgroup can be made here")
	return nil
}

// Procs is the file into which a process writes its ID to enter the cgroup.
func (c *Cgroup) Procs() string { return filepath.Join(c.dir, "cgroup.procs") }

// Peak is the most memory that the cgroup has used, the kernel's included; 0 if the kernel has no such file.
func (c *Cgroup) Peak() int {
	if c == nil {
		return 0
	}
	return c.read(c.most)
}

// Reset restarts Peak, where the kernel can.
func (c *Cgroup) Reset() {
	if c != nil {
		_ = os.WriteFile(filepath.Join(c.dir, c.most), []byte("0"), 0)
	}
}

// WorkingSet is the memory that a kubelet counts: that of the cgroup, the kernel's included, without the pages of files that
// have not been used for some time.
func (c *Cgroup) WorkingSet() int {
	if c == nil {
		return 0
	}
	text, _ := os.ReadFile(filepath.Join(c.dir, c.statistics))
	inactive := 0
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, c.inactiveKey+" "); ok {
			inactive, _ = strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return c.read(c.current) - inactive
}

func (c *Cgroup) read(name string) int {
	text, _ := os.ReadFile(filepath.Join(c.dir, name))
	n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return n
}
