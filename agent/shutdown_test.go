package agent

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
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
