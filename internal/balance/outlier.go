package balance

import (
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// outlier is what outlier detection keeps of a host.
type outlier struct {
	consecutive5xx, consecutiveGateway, consecutiveLocal atomic.Uint32
	ejected                                              atomic.Bool

	// With the cluster's mu held.
	since   time.Time // of the ejection
	backoff uint32    // the ejection lasts that many times the shortest time
}

// count counts a result, and reports whether it is the one that ejects the host.
func (o *outlier) count(config *mesh.Outliers, r result) bool {
	local := r == localConnect || r == localTimeout
	if config.SplitLocal {
		if local {
			return failed(&o.consecutiveLocal, config.ConsecutiveLocal)
		}
		reset(&o.consecutiveLocal)
	}
	if r == success {
		reset(&o.consecutive5xx)
		reset(&o.consecutiveGateway)
		return false
	}
	eject := failed(&o.consecutive5xx, config.Consecutive5xx)
	if r == failure {
		reset(&o.consecutiveGateway)
		return eject
	}
	return failed(&o.consecutiveGateway, config.ConsecutiveGateway) || eject
}

// failed counts a failure, and reports whether it reaches the limit; zero is no limit.
func failed(count *atomic.Uint32, limit uint32) bool {
	n := count.Add(1)
	return limit > 0 && n >= limit
}

// reset avoids a write to memory that other processors read.
func reset(count *atomic.Uint32) {
	if count.Load() != 0 {
		count.Store(0)
	}
}

func (o *outlier) clear() {
	reset(&o.consecutive5xx)
	reset(&o.consecutiveGateway)
	reset(&o.consecutiveLocal)
}

// eject ejects a host, unless too many are ejected. As in Envoy, the share of ejected hosts counts all priorities, and one
// host of a few may already be too large a share.
func (c *Cluster) eject(h *Host) {
	c.mu.Lock()
	defer c.mu.Unlock()
	config := c.view.Load().config.Outliers
	if config == nil || c.stopped || h.outlier.ejected.Load() || c.hosts[h.Address] != h {
		return
	}
	ejected := 1
	for _, other := range c.hosts {
		if other.outlier.ejected.Load() {
			ejected++
		}
	}
	if ejected*100 > int(min(config.MaxPercent, 100))*len(c.hosts) {
		c.Stats.EjectionsPrevented.Add(1)
		return
	}
	o := &h.outlier
	o.since = time.Now()
	if time.Duration(o.backoff)*config.Ejection < longest(config) {
		o.backoff++
	}
	o.clear()
	o.ejected.Store(true)
	c.Stats.Ejections.Add(1)
	c.refresh()
	if c.sweep == nil {
		c.sweep = time.AfterFunc(interval(config), c.review)
	}
}

func interval(config *mesh.Outliers) time.Duration { return max(config.Interval, time.Millisecond) }

// longest returns how long a host is ejected at most.
func longest(config *mesh.Outliers) time.Duration { return max(config.MaxEjection, config.Ejection) }

// review returns hosts whose ejection is over. For each interval in which a host is not ejected, its next ejection becomes
// shorter.
func (c *Cluster) review() {
	c.mu.Lock()
	defer c.mu.Unlock()
	config := c.view.Load().config.Outliers
	if c.sweep = nil; config == nil || c.stopped {
		return
	}
	now, changed, again := time.Now(), false, false
	for _, h := range c.hosts {
		o := &h.outlier
		switch {
		case !o.ejected.Load():
			o.backoff = max(o.backoff, 1) - 1
		case now.Sub(o.since) >= min(time.Duration(o.backoff)*config.Ejection, longest(config)):
			o.clear()
			o.ejected.Store(false)
			changed = true
		}
		again = again || o.backoff > 0
	}
	if changed {
		c.refresh()
	}
	if again {
		c.sweep = time.AfterFunc(interval(config), c.review)
	}
}

// readmit ends all ejections, because the cluster is not configured for them any more. It is called with mu held.
func (c *Cluster) readmit() {
	for _, h := range c.hosts {
		h.outlier.clear()
		h.outlier.ejected.Store(false)
		h.outlier.backoff = 0
	}
}
