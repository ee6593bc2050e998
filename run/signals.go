package run

import (
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/pillion-proxy/pillion/internal/sandbox"
)

// forwarded are the signals that are sent on to the command.
var forwarded = []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2}

// surviveClosedOutput makes writing to a closed standard error an error: it would otherwise end this process, and with it a
// command that writes nothing there. The command has the signal's default again.
func surviveClosedOutput() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// forwardSignals sends signals on to the command until stop is called. A terminal sends its signals to the command as well,
// which is in the same process group: those are not sent on. A signal that the caller ignores stays ignored. Before the command
// is started, a signal that ends processes ends this one; the others wait for the command.
func (r *run) forwardSignals() (stop func()) {
	terminal := sandbox.OpenTerminal()
	caught := make(chan os.Signal, 16)
	for _, s := range forwarded {
		if !signal.Ignored(s) {
			signal.Notify(caught, s)
		}
	}
	var forwarding sync.WaitGroup
	forwarding.Go(func() {
		for s := range caught {
			if ends := s != syscall.SIGUSR1 && s != syscall.SIGUSR2; ends && !r.running.Load() {
				if s == syscall.SIGQUIT { // Go would print its goroutines
					os.Exit(128 + int(syscall.SIGQUIT))
				}
				signal.Reset(s)
				_ = syscall.Kill(os.Getpid(), s.(syscall.Signal))
				continue
			}
			if (s == syscall.SIGINT || s == syscall.SIGQUIT) && terminal.Foreground() {
				continue
			}
			_ = r.sandbox.Signal(s.(syscall.Signal))
		}
	})
	return func() {
		signal.Stop(caught)
		close(caught)
		forwarding.Wait()
		terminal.Restore()
	}
}
