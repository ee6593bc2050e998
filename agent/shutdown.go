package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/tcp"
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
		a.drainResolver,
	} {
		step(deadline)
	}
	cut := a.cutRest()
	a.openDoor()
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
	a.stopInbound()
	a.inboundProxy.Drain()
	a.poller.WakeAll()
	_ = a.inbound.Wait(deadline) // what is left then is cut by cutRest
}

// stopInbound closes the inbound listeners.
func (a *Agent) stopInbound() {
	a.inbound.Stop()
	if a.config.Mode == capture.TPROXY {
		a.closing.Do(a.closeDoor)
	}
}

// closeDoor resets whoever comes from now on. With REDIRECT the kernel refuses them by itself, and they turn elsewhere at
// once. TPROXY drops what has no listener, and they would wait until the pod is gone.
func (a *Agent) closeDoor() {
	door := &listener.Server{Name: "inbound, closed", Handler: closedDoor{}, Limit: new(listener.Limit), Log: a.log}
	var err error
	door.Listeners, err = listen(a, "--inbound-port", allAddresses, a.config.InboundPort, a.listenInbound)
	if err != nil {
		a.log.Warn("new inbound connections will hang, and not be reset", "error", err)
	}
	door.Start()
	a.door = door
}

// openDoor leaves the rest to the kernel.
func (a *Agent) openDoor() {
	if a.door != nil {
		a.door.Stop()
		a.door.Abort()
	}
}

// closedDoor resets each connection.
type closedDoor struct{}

func (closedDoor) ServeConn(_ context.Context, down *tcp.Conn) { down.Reset() }
func (closedDoor) Refuse(down *tcp.Conn)                       { down.Reset() }

func (a *Agent) drainOutbound(deadline context.Context) {
	a.outbound.Stop()
	a.outboundProxy.Drain()
	a.poller.WakeAll()
	_ = a.outbound.Wait(deadline)
}

// drainResolver lets queries finish. Connections need names, so they come first.
func (a *Agent) drainResolver(deadline context.Context) {
	if a.resolver != nil {
		_ = a.resolver.Shutdown(deadline) // what is left then is answered SERVFAIL
	}
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
