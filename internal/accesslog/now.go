package accesslog

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// writeNow writes as much of chunk as the sink takes without waiting, which may be nothing. It reports false if the sink never
// takes a write that must not wait: regular files of most file systems do not, pipes and /dev/null do.
//
// Such a write need not be announced to Go's scheduler. A write through package os is, and wakes the runtime's monitor thread,
// which then polls every 20 µs for a millisecond or more.
func writeNow(file *os.File, chunk []byte) (n int, able bool) {
	raw, err := file.SyscallConn()
	if err != nil {
		return 0, false
	}
	var errno syscall.Errno
	err = raw.Control(func(fd uintptr) {
		var wrote uintptr
		piece := unix.Iovec{Base: unsafe.SliceData(chunk), Len: uint64(len(chunk))}
		const here = ^uintptr(0) // at the file's own position
		wrote, _, errno = syscall.RawSyscall6(unix.SYS_PWRITEV2, fd, uintptr(unsafe.Pointer(&piece)), 1, here, here, unix.RWF_NOWAIT)
		if errno == 0 {
			n = int(wrote)
		}
	})
	return n, err == nil && (errno == 0 || errno == syscall.EAGAIN || errno == syscall.EINTR)
}
