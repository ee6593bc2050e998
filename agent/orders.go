package agent

import (
	"errors"
	"log/slog"
	"time"

	"github.com/pillion-proxy/pillion/internal/admin"
)

// What can be ordered over the agent's own ports, and by signals. All of it may be called from anywhere, at any time.

// announce turns readiness off and makes answers to inbound HTTP/1 requests close their connections, while everything is
// still accepted: load balancers learn of it before a connection is refused. The delay of a later shutdown counts from
// the first announcement.
func (a *Agent) announce() {
	a.announcing.Do(func() {
		a.announced = time.Now()
		a.draining.Store(true)
		a.inboundProxy.Announce()
		a.log.Info("draining", "delay", a.config.DrainDelay, "timeout", a.config.DrainTimeout)
	})
}

// drainListeners does what Envoy's /drain_listeners does.
func (a *Agent) drainListeners(order admin.DrainOrder) {
	if order.Graceful {
		a.announce()
	}
	if order.Graceful && order.SkipExit || order.Graceful && !a.leaving.CompareAndSwap(false, true) {
		return
	}
	a.obey(func() {
		if order.Graceful {
			select {
			case <-time.After(a.config.DrainDelay):
			case <-a.over.Done():
				return
			}
		}
		a.stopInbound()
		if !order.InboundOnly {
			a.outbound.Stop()
		}
	})
}

// obey does what takes longer than an answer may, unless the agent has ended: orders come in until its ports are closed,
// and a little after.
func (a *Agent) obey(order func()) {
	a.obeying.Lock()
	defer a.obeying.Unlock()
	if a.over.Err() == nil {
		a.orders.Go(order)
	}
}

// endOrders ends those that are under way, and waits for them. There are no others after it.
func (a *Agent) endOrders() {
	a.obeying.Lock()
	a.quitting()
	a.obeying.Unlock()
	a.orders.Wait()
}

// quit ends the agent at once, as one that has done its work: jobs end their sidecar so.
func (a *Agent) quit() {
	a.log.Info("told to quit")
	a.quitting()
}

// ReopenLogs opens the access log anew, after its file was moved away.
func (a *Agent) ReopenLogs() {
	if log := a.telling.access; log != nil {
		log.Reopen()
	}
}

// notDraining is the gate that shutdown closes first.
func (a *Agent) notDraining() error {
	if a.draining.Load() {
		return errors.New("shutting down")
	}
	return nil
}

// notFailedByHand is the gate of /healthcheck/fail.
func (a *Agent) notFailedByHand() error {
	if a.failedByHand.Load() {
		return errors.New("failed by order; POST /healthcheck/ok ends that")
	}
	return nil
}

func (a *Agent) logLevel() slog.Level { return a.config.LogLevel.Level() }
