package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pillion-proxy/pillion/internal/listener"
)

// ErrForced says that shutdown cut connections that were still open.
var ErrForced = errors.New("cut connections that were still open")

// shutdown is the order in which things stop. Inbound drains before outbound: the workload may have to call out to
// finish what it was asked. The agent's own ports are served to the end, readiness longest, so that the drain can be
// watched.
func (a *Agent) shutdown(force context.Context) error {
	deadline, cancel := context.WithTimeout(force, a.config.DrainTimeout)
	defer cancel()
	stopTelling := a.tellProgress()
	defer stopTelling()

	for _, step := range []func(context.Context){
		a.announceInTime,
		a.drainInbound,
		a.drainOutbound,
	} {
		step(deadline)
	}
	cut := a.cutRest()
	if err := a.telling.close(); err != nil {
		a.log.Error("the end of the access log is lost", "error", err)
	}
	for _, s := range a.servers {
		s.http.Close()
	}

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

// announceInTime announces the end and goes on serving for the rest of the delay.
func (a *Agent) announceInTime(deadline context.Context) {
	a.announce()
	select {
	case <-time.After(a.config.DrainDelay - time.Since(a.announced)):
	case <-deadline.Done():
	}
}

func (a *Agent) drainInbound(deadline context.Context) {
	a.inbound.Stop()
	a.inboundProxy.Drain()
	a.poller.WakeAll()
	_ = a.inbound.Wait(deadline) // what is left then is cut by cutRest
}

func (a *Agent) drainOutbound(deadline context.Context) {
	a.outbound.Stop()
	a.outboundProxy.Drain()
	a.poller.WakeAll()
	_ = a.outbound.Wait(deadline)
}

// cutRest ends the connections that are left and returns how many there were.
func (a *Agent) cutRest() int {
	cut := 0
	for _, server := range []*listener.Server{a.inbound, a.outbound} {
		cut += server.Active()
		server.Abort()
	}
	return cut
}

// tellProgress logs once a second how many connections are left, until the function that it returns is called.
func (a *Agent) tellProgress() (stop func()) {
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
			a.log.Info("draining", "inbound_left", a.inbound.Active(), "outbound_left", a.outbound.Active(),
				"elapsed", time.Since(started).Round(time.Second))
		}
	}
}
