package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// ErrForced reports that shutdown cut connections that were still open.
var ErrForced = errors.New("cut connections that were still open")

// shutdown stops the parts in order. Listeners drain one after the other, in the order of their list. The agent's own ports
// are served to the end, readiness longest, so that the drain can be observed. When force ends, the remaining connections
// are cut at once.
func (a *Agent) shutdown(force context.Context) error {
	deadline, cancel := context.WithTimeout(force, a.config.Drain.Timeout)
	defer cancel()
	stopProgress := a.logProgress()
	a.announceInTime(deadline)
	for _, l := range a.listeners {
		a.drain(deadline, l)
	}
	a.drainResolver(deadline)
	a.stopControlPlane()                           // after the connections: they follow its configuration to the end
	cut := a.cutRest() + a.poller.Settle(deadline) // those that settle later are reset when the poller closes
	a.closeRoles()
	a.closeDoors()
	if err := a.telling.close(); err != nil {
		a.log.Error("flushing the access log failed", "error", err)
	}
	for _, s := range a.servers {
		s.http.Close()
	}
	stopProgress() // its last line precedes the result

	if cut > 0 {
		cause := "the drain timeout passed"
		if force.Err() != nil {
			cause = "a second signal came"
		}
		return fmt.Errorf("%w: %d, because %s", ErrForced, cut, cause)
	}
	a.log.Info("drained")
	return nil
}

// announceInTime announces the end and serves on for the rest of the delay.
func (a *Agent) announceInTime(deadline context.Context) {
	a.announce()
	select {
	case <-time.After(a.config.Drain.Delay - time.Since(a.announced)):
	case <-deadline.Done():
	}
}

// drain stops l and waits for its connections. Those that carry no request end at once: Drain marks them, and WakeAll wakes
// their goroutines to see the mark.
func (a *Agent) drain(deadline context.Context, l *trafficListener) {
	a.stopListener(l)
	l.role.Drain()
	a.poller.WakeAll()
	_ = l.server.Wait(deadline) // cutRest cuts the connections that are left
}

// drainResolver waits for queries in progress. It comes after the listeners, because connections need names until the end.
func (a *Agent) drainResolver(deadline context.Context) {
	if a.resolver != nil {
		_ = a.resolver.Shutdown(deadline) // queries that are left are answered SERVFAIL
	}
}

// cutRest cuts the remaining connections and returns their number.
func (a *Agent) cutRest() int {
	cut := 0
	for _, l := range a.listeners {
		cut += l.server.Active()
		l.server.Abort()
	}
	return cut
}

// logProgress logs once a second how many connections are left, until stop is called.
func (a *Agent) logProgress() (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go a.progressLoop(done, ended)
	return func() {
		close(done)
		<-ended
	}
}

func (a *Agent) progressLoop(done <-chan struct{}, ended chan<- struct{}) {
	defer close(ended)
	started := time.Now()
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-done:
			return
		case <-ticker.C:
			var left []slog.Attr
			for _, l := range a.listeners {
				left = append(left, slog.Int(l.name+"_left", l.server.Active()))
			}
			left = append(left, slog.Duration("elapsed", time.Since(started).Round(time.Second)))
			a.log.LogAttrs(context.Background(), slog.LevelInfo, "draining", left...)
		}
	}
}
