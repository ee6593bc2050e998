// Package prestart starts the helper of a sandbox, for `pillion run` while the program is still being initialized: two
// processors then initialize the two processes at the same time.
//
// Go initializes a package as soon as those are initialized that it imports. This one imports few, so it comes before most
// others. The helper waits until package sandbox sends it a configuration. It ends without one if the command line is invalid,
// because this process ends then.
package prestart

import (
	"os"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"
)

// Marker is the name under which the helper runs. Its only argument is the descriptor of its control socket.
const Marker = "pillion-sandbox"

// Process is a helper, or the reason why there is none.
type Process struct {
	ID         int
	Control    int  // this process's end of the control socket, a SOCK_SEQPACKET
	Privileged bool // the namespaces are not in a user namespace of their own
	Err        error
}

// early is the helper that was started during initialization.
var early *Process

func init() {
	if runs(os.Args) {
		early = start()
	}
}

// runs reports whether a command line, with the program's name, is that of `pillion run`.
func runs(args []string) bool { return len(args) > 1 && args[1] == "run" && args[0] != Marker }

// Start returns a helper that was started early, once, or starts one. The kernel kills it when the thread ends that started it:
// the main thread, which ends last, or that of the calling goroutine, which stays locked to it.
func Start() *Process {
	if p := early; p != nil {
		early = nil
		return p
	}
	runtime.LockOSThread()
	return start()
}

// The bits of capabilities(7).
const netAdmin, netRaw, killing, setPCAP, sysAdmin = 12, 13, 5, 8, 21

// start starts this program again, in new namespaces. The helper's end of the socket pair is inherited under its own number,
// also by any other process that is started meanwhile, so that no descriptor is replaced that the command inherits from the
// caller.
//
// Package os is not used for it: it starts a process of its own first, to find out whether the kernel has descriptors of
// processes.
func start() *Process {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET, 0)
	if err != nil {
		return &Process{Err: os.NewSyscallError("socketpair", err)}
	}
	defer syscall.Close(pair[1])
	syscall.CloseOnExec(pair[0])
	const needed = 1<<sysAdmin | 1<<netAdmin | 1<<setPCAP
	p := &Process{Control: pair[0], Privileged: capabilities()&needed == needed}
	attributes := &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	if !p.Privileged {
		attributes.Cloneflags |= syscall.CLONE_NEWUSER
		attributes.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		attributes.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
		attributes.AmbientCaps = []uintptr{sysAdmin, netAdmin, netRaw, setPCAP, killing}
	}
	const program = "/proc/self/exe"
	p.ID, err = syscall.ForkExec(program, []string{Marker, strconv.Itoa(pair[1])},
		&syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: attributes})
	if err != nil {
		syscall.Close(p.Control)
		p.Err = &os.PathError{Op: "fork/exec", Path: program, Err: err}
	}
	return p
}

// capabilities returns the effective capabilities of the calling thread as bits, and none if they cannot be read.
func capabilities() uint64 {
	header := struct {
		version uint32
		thread  int32
	}{version: 0x20080522}
	var sets [2]struct{ effective, permitted, inheritable uint32 }
	_, _, errno := syscall.RawSyscall(syscall.SYS_CAPGET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&sets)), 0)
	if errno != 0 {
		return 0
	}
	return uint64(sets[1].effective)<<32 | uint64(sets[0].effective)
}
