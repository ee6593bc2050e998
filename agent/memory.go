package agent

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// The default of HTTP.MaxHeldBytes: a share of the runtime's memory limit. cmd sets that from the container's. The
// rest is for the program, stacks and buffers in use, and for the garbage collector.
const (
	heldShare     = 4         // 1/heldShare
	leastHeld     = 8 << 20   // of a small limit
	unlimitedHeld = 128 << 20 // without a limit
)

// heldBytes returns the size of the budget for heads and held bodies. limit is the runtime's memory limit in bytes;
// math.MaxInt64 without one.
func (c HTTP) heldBytes(limit int64) int {
	switch {
	case c.MaxHeldBytes > 0:
		return c.MaxHeldBytes
	case limit == math.MaxInt64:
		return unlimitedHeld
	}
	return int(max(limit/heldShare, leastHeld))
}

// freeMemory gives back memory that only past pushes of the control plane needed: free parts of the heap, and pages of the
// program.
func (a *Agent) freeMemory() {
	debug.FreeOSMemory()
	a.unmapProgram()
}

func (a *Agent) unmapProgram() {
	if err := unmapProgram(); err != nil {
		a.log.Debug("cannot unmap pages of the program", "err", err)
	}
}

// unmapProgram unmaps the resident pages of the program file. The start touches nearly all of them, mostly when the runtime
// verifies its own tables, and so does the first push of a control plane; later a third of them is used: 12.8 MB resident
// become 7.8. A page that is needed again is mapped from the page cache, in some microseconds for each 64 KiB. No data can be
// lost: only mappings without write permission whose pages are all unmodified are dropped. Modified pages, by a loader's
// relocations or a debugger, exist only in memory.
func unmapProgram() error {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("finding the program file: %w", err)
	}
	file, err := os.Open("/proc/self/smaps")
	if err != nil {
		return fmt.Errorf("listing the mappings: %w", err)
	}
	defer file.Close()
	var failed error
	var start, end uintptr
	ours, written := false, false
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		line := lines.Text()
		name, value, _ := strings.Cut(line, ":")
		switch {
		case strings.Contains(name, "-"): // a mapping begins
			var access string
			_, err := fmt.Sscanf(line, "%x-%x %s", &start, &end, &access)
			ours = err == nil && access[1] != 'w' && strings.HasSuffix(line, " "+program)
			written = false
		case name == "Anonymous", name == "Swap":
			written = written || strings.TrimSpace(value) != "0 kB"
		case name == "VmFlags" && ours && !written: // it ends
			failed = cmp.Or(failed, unmap(start, end))
		}
	}
	return errors.Join(failed, lines.Err())
}

// unmap unmaps the pages of a mapping. Unless the mapping is read sequentially, the kernel takes that as a use of each page
// (folio_mark_accessed in mm/memory.c) and makes it active. A kubelet's working set is the memory of a cgroup without its
// inactive file pages: it would have 10 MB more of the page cache.
func unmap(start, end uintptr) (err error) {
	for _, advice := range []uintptr{unix.MADV_SEQUENTIAL, unix.MADV_DONTNEED, unix.MADV_NORMAL} {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, start, end-start, advice); errno != 0 && err == nil {
			err = fmt.Errorf("unmapping the program's pages: %w", errno)
		}
	}
	return err
}
