package httpforward

import (
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// lingerTime is how long to read and discard input after a response that ends the connection. Closing with unread input
// would reset the connection, and could destroy the response before it is read (RFC 9112 §9.6).
const lingerTime = time.Second

// readOut shuts down our half, and discards input until downstream closes or the deadline passes.
func readOut(w *tcp.Waiter, down *tcp.Conn, deadline time.Time) {
	if down.CloseWrite() != nil {
		return
	}
	for {
		waste := tcp.TakeBuffer()
		_, err := waste.Fill(down)
		waste.Release()
		if err == tcp.ErrAgain {
			err = w.Wait(deadline, down, nil)
		} else if err == nil && time.Now().After(deadline) {
			return
		}
		if err != nil {
			return
		}
	}
}
