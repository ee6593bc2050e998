package httpforward

import (
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// lingerTime is how long the rest of what downstream sends is read and thrown away after an answer that ends the
// connection. Closed at once, the connection would be reset, and the answer destroyed before it is read (RFC 9112 §9.6).
const lingerTime = time.Second

// readOut says that nothing more comes, and reads until downstream closes as well, or until the deadline.
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
