package bench

import (
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// requestsPerSecond is the rate at which latency is measured. It is far below the capacity of every contender, so that the
// figure shows the time of a request and not the growth of queues.
const requestsPerSecond = 2000

// schedule sends requests at a fixed rate, regardless of missing responses. Latency is measured from the time at which the
// request was due, so that a stall counts for all requests that had to wait.
type schedule struct {
	timer     int // a timerfd: epoll_wait counts in milliseconds
	loop      *loop
	idle      []*http1Client // the longest idle first
	due       map[*http1Client]time.Time
	begin     time.Time
	sent      int
	latencies []time.Duration // its capacity is the number of requests
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

// run sends requests and waits for the responses.
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

// readable handles a tick of the timer.
func (s *schedule) readable() error {
	var ticks [8]byte
	if _, err := unix.Read(s.timer, ticks[:]); err != nil && err != unix.EAGAIN {
		return os.NewSyscallError("read", err)
	}
	return s.sendDue()
}

// sendDue sends the requests that are due, as long as there are idle connections.
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

// latencyLoad reports the 50th and the 99th percentile of latency, in nanoseconds.
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
