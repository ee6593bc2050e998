package httpforward

// ask lets a call wait until a question about it is answered. The question ends by itself, so the wait has no limit of its
// own. Other calls go on, and the body of this one waits within the window of its stream.
func (h *hub) ask(c *call, check Check) {
	c.check, c.asking, c.referred = check, true, true
	c.askedAt = h.now()
	h.asking = append(h.asking, c)
	check.Notify(func() {
		h.answered.Store(true)
		h.w.Wake()
	})
}

// stopAsking gives up the question about a call.
func (c *call) stopAsking() {
	if c.asking {
		c.asking = false
		c.check.Cancel()
	}
}

// resumeAnswered decides about the calls whose questions are answered. A decision may ask again.
func (h *hub) resumeAnswered() {
	if !h.answered.Swap(false) {
		return
	}
	asking := h.asking
	h.asking = nil
	for _, c := range asking {
		switch {
		case !c.asking:
		case !c.check.Answered():
			h.asking = append(h.asking, c)
		default:
			if c.stalled() && !c.arriveEnd.IsZero() {
				c.arriveEnd = c.arriveEnd.Add(h.now().Sub(c.askedAt))
				h.watch(c.arriveEnd)
			}
			c.asking = false
			h.decide(c)
		}
	}
}

// stalled reports whether the rest of the request cannot arrive before the question about it is answered: the client has used
// all its credit. That time does not count for arriveEnd.
func (c *call) stalled() bool { return c.asking && !c.request.ended && c.req.credit <= 0 }
