package agent

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// An announcement by order and a later signal share one drain delay: the signal waits only for the rest of it.
func TestTheDrainDelayCountsFromTheFirstAnnouncement(t *testing.T) {
	const delay = 5 * time.Second
	for _, c := range []struct{ passed, want time.Duration }{{0, delay}, {2 * time.Second, 3 * time.Second}, {delay, 0}, {time.Hour, 0}} {
		synctest.Test(t, func(t *testing.T) {
			a := &Agent{config: Config{Drain: Drain{Delay: delay}}}
			a.announcing.Do(func() { a.announced = time.Now() })
			time.Sleep(c.passed)
			signalled := time.Now()
			a.announceInTime(t.Context())
			if waited := time.Since(signalled); waited != c.want {
				t.Errorf("%v after the announcement the signal waits %v, want %v", c.passed, waited, c.want)
			}
		})
	}
}

func TestTheDrainTimeoutEndsTheDrainDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &Agent{config: Config{Drain: Drain{Delay: time.Hour}}}
		a.announcing.Do(func() { a.announced = time.Now() })
		deadline, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		signalled := time.Now()
		a.announceInTime(deadline)
		if waited := time.Since(signalled); waited != time.Second {
			t.Errorf("the signal waits %v, want the drain timeout of 1s", waited)
		}
	})
}

// recordingRole records the calls of shutdown, in order.
type recordingRole struct {
	resetting
	name  string
	calls *[]string
}

func (r recordingRole) Announce() { *r.calls = append(*r.calls, r.name+" announced") }
func (r recordingRole) Drain()    { *r.calls = append(*r.calls, r.name+" drained") }

// A further listener is one more entry in the list and drains in its place. Only inbound listeners announce.
func TestShutdownWalksTheListenersInTheirOrder(t *testing.T) {
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	config, log := testConfig()
	a := &Agent{config: config, log: config.Log, poller: poller}
	a.over, a.quitting = context.WithCancel(t.Context())
	defer a.quitting()
	var calls []string
	for _, l := range []*trafficListener{
		{name: "gateway", direction: flow.Inbound}, {name: "inbound", direction: flow.Inbound}, {name: "outbound", direction: flow.Outbound},
	} {
		l.role = recordingRole{name: l.name, calls: &calls}
		l.server = &listener.Server{Name: l.name, Handler: l.role, Limit: new(listener.Limit), Log: a.log}
		l.server.Start()
		a.listeners = append(a.listeners, l)
	}
	if err := a.shutdown(t.Context()); err != nil {
		t.Errorf("shutdown: %v\n%s", err, log)
	}
	want := []string{"gateway announced", "inbound announced", "gateway drained", "inbound drained", "outbound drained"}
	if !slices.Equal(calls, want) {
		t.Errorf("calls %q, want %q", calls, want)
	}
}
