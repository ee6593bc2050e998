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
	for left := turn; ; {
		waste := tcp.TakeBuffer()
		n, err := waste.Fill(down)
		waste.Release()
		left -= n
		if err == tcp.ErrAgain {
			err = w.Wait(deadline, down, nil)
		} else if err == nil && time.Now().After(deadline) {
			return
		}
		if err != nil {
			return
		}
		if left <= 0 {
			w.Yield(down)
			left = turn
		}
	}
}

// awaitEnd is readOut for a peer whose input is a flood: it reads nothing, so that the peer's window closes, and the flood
// costs no more than the connection. Most systems still deliver what was written before.
func awaitEnd(w *tcp.Waiter, down *tcp.Conn, deadline time.Time) {
	if down.CloseWrite() != nil {
		return
	}
	for !down.Ended() && w.Wait(deadline, down, nil) == nil {
	}
}
