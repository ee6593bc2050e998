package tcp

// MaxUnsent is the bound of what a Layer's Read may leave unsent.
const MaxUnsent = maxUnsent

// Unsent returns the number of encoded bytes that the socket has not taken.
func Unsent(c *Conn) int {
	if c.layer == nil || c.layer.unsent == nil {
		return 0
	}
	return c.layer.unsent.Len()
}

// Size returns the number of connections in a set.
func Size(s *Set) int { return s.size() }
