package agent

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// orders is the state of what can be ordered over the agent's own ports and by signals. An order may come at any time, from
// any goroutine, and more than once.
type orders struct {
	announcing   sync.Once
	announced    time.Time // set by announcing
	draining     atomic.Bool
	failedByHand atomic.Bool     // by /healthcheck/fail
	stopping     atomic.Bool     // a graceful order to stop listening is in progress
	over         context.Context // ends on quit, or when the agent has ended
	quitting     context.CancelFunc
	obeying      sync.Mutex     // held while an order begins, and while over ends
	running      sync.WaitGroup // orders in progress
}

// announce turns readiness off and makes responses to inbound HTTP/1 requests close their connections. Connections are still
// accepted, so that load balancers notice before one is refused. The delay of a later shutdown counts from the first
// announcement.
func (a *Agent) announce() {
	a.announcing.Do(func() {
		a.announced = time.Now()
		a.draining.Store(true)
		for _, l := range a.listeners {
			if l.direction == flow.Inbound || l.server.Dynamic {
				l.role.Announce()
			}
		}
		a.log.Info("draining", "delay", a.config.Drain.Delay, "timeout", a.config.Drain.Timeout)
	})
}

// drainListeners implements Envoy's /drain_listeners. A graceful order waits for the drain delay, once for all such orders.
func (a *Agent) drainListeners(order admin.DrainOrder) {
	if order.Graceful {
		a.announce()
	}
	if order.Graceful && order.SkipExit || order.Graceful && !a.stopping.CompareAndSwap(false, true) {
		return
	}
	a.obey(func() {
		if order.Graceful {
			select {
			case <-time.After(a.config.Drain.Delay):
			case <-a.over.Done():
				return
			}
		}
		for _, l := range a.listeners {
			if l.direction == flow.Inbound || !order.InboundOnly {
				a.stopListener(l)
			}
		}
	})
}

// obey runs an order in the background, for what takes longer than an answer may. It does nothing after endOrders: handlers
// can run until the ports are closed, and a little longer.
func (a *Agent) obey(order func()) {
	a.obeying.Lock()
	defer a.obeying.Unlock()
	if a.over.Err() == nil {
		a.running.Go(order)
	}
}

// endOrders cancels the orders in progress and waits for them. Later orders do nothing.
func (a *Agent) endOrders() {
	a.obeying.Lock()
	a.quitting()
	a.obeying.Unlock()
	a.running.Wait()
}

// quit ends the agent at once and as a success. Jobs end their sidecar with it.
func (a *Agent) quit() {
	a.log.Info("quit requested")
	a.quitting()
}

// ReopenLogs reopens the access log, for use after its file was moved away.
func (a *Agent) ReopenLogs() {
	if log := a.telling.access; log != nil {
		log.Reopen()
	}
	if logs := a.telling.planned; logs != nil {
		logs.Reopen()
	}
}

// notDraining is the first gate that shutdown closes.
func (a *Agent) notDraining() error {
	if a.draining.Load() {
		return errors.New("shutting down")
	}
	return nil
}

// notFailedByHand is the gate of /healthcheck/fail.
func (a *Agent) notFailedByHand() error {
	if a.failedByHand.Load() {
		return errors.New("failed by POST /healthcheck/fail; POST /healthcheck/ok ends that")
	}
	return nil
}

func (a *Agent) logLevel() slog.Level { return a.config.LogLevel.Level() }
