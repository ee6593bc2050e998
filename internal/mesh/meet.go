package mesh

// Meet returns the filter chain that a connection meets, after the listener's filters have inspected it. It returns nil if
// no chain accepts the connection.
func (l *Listener) Meet(c *ConnInfo) *FilterChain {
	info := l.inspected(c)
	chain, ok := l.Match(&info)
	if !ok {
		return nil
	}
	return chain
}

// VirtualListener returns the listener of connections that no other listener is for, or nil.
func (s *Snapshot) VirtualListener(inbound bool) *Listener {
	if inbound {
		return s.Listener(virtualInbound)
	}
	return s.Listener(virtualOutbound)
}

// Fault returns the faults of the HTTP filter of requests whose routes have none, or nil.
func (s *Snapshot) Fault(h *HTTPManager) *Fault {
	for i := range h.Filters {
		if f := s.Filter(&h.Filters[i]); f != nil && f.Fault != nil && !f.Disabled {
			return f.Fault
		}
	}
	return nil
}
