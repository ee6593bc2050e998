package httpforward

// ask lets a call wait until a question about it is answered. The question ends by itself, so the wait has no limit of its
// own. Other calls go on, and the body of this one waits within the window of its stream.
func (h *hub) ask(c *call, check Check) {
	c.check, c.asking, c.referred = check, true, true
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
			c.asking = false
			h.decide(c)
		}
	}
}
