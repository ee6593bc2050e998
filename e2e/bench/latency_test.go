package bench

import (
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// requestsPerSecond is the pace at which latency is measured: far from what any proxy here can carry, so that it tells
// what a request costs in time, and not how queues grow.
const requestsPerSecond = 2000

// schedule sends requests at a fixed pace, no matter how many answers are missing. An answer's latency counts from the
// moment at which its request was due, so that a proxy which holds everything up pays for all that had to wait.
type schedule struct {
	timer     int // a timerfd: epoll_wait counts in milliseconds
	loop      *loop
	idle      []*http1Client // the one that has rested longest first
	due       map[*http1Client]time.Time
	begin     time.Time
	sent      int
	latencies []time.Duration // capacity: how many there will be
}

func newSchedule(connections int) (*schedule, error) {
	s := &schedule{due: make(map[*http1Client]time.Time)}
	var err error
	if s.loop, s.idle, err = dialHTTP1(connections, s.answered); err != nil {
		return nil, err
	}
	if s.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("timerfd_create", err)
	}
	return s, s.loop.add(s.timer, s)
}

// run sends so many requests and waits for the answers.
func (s *schedule) run(requests int64) error {
	const interval = int64(time.Second / requestsPerSecond)
	s.sent, s.latencies = 0, make([]time.Duration, 0, requests)
	s.begin = time.Now()
	ticks := unix.ItimerSpec{Interval: unix.NsecToTimespec(interval), Value: unix.NsecToTimespec(interval)}
	if err := unix.TimerfdSettime(s.timer, 0, &ticks, nil); err != nil {
		return os.NewSyscallError("timerfd_settime", err)
	}
	return s.loop.run(patience, func() bool { return len(s.latencies) == cap(s.latencies) })
}

// readable is a tick.
func (s *schedule) readable() error {
	var ticks [8]byte
	if _, err := unix.Read(s.timer, ticks[:]); err != nil && err != unix.EAGAIN {
		return os.NewSyscallError("read", err)
	}
	return s.sendDue()
}

// sendDue sends what is due, as far as there are connections without a request.
func (s *schedule) sendDue() error {
	for now := time.Now(); len(s.idle) > 0 && s.sent < cap(s.latencies); s.sent++ {
		due := s.begin.Add(time.Duration(s.sent) * time.Second / requestsPerSecond)
		if due.After(now) {
			return nil
		}
		c := s.idle[0]
		s.idle = s.idle[:copy(s.idle, s.idle[1:])]
		s.due[c] = due
		if err := c.send(); err != nil {
			return err
		}
	}
	return nil
}

func (s *schedule) answered(c *http1Client) error {
	s.latencies = append(s.latencies, time.Since(s.due[c]))
	s.idle = append(s.idle, c)
	return s.sendDue()
}

// latencyLoad reports the latencies of half and of 99 in 100 requests, in nanoseconds.
func latencyLoad(connections int, requests int64) load {
	var s *schedule
	return load{
		warm: func() (err error) {
			if s, err = newSchedule(connections); err != nil {
				return err
			}
			return s.run(min(requests, requestsPerSecond/2))
		},
		run: func() error { return s.run(requests) },
		report: func() string {
			slices.Sort(s.latencies)
			n := len(s.latencies)
			return fmt.Sprintf("%d %d", s.latencies[n/2], s.latencies[n*99/100])
		},
	}
}
