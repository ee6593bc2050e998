package httpforward

import (
	"math/rand/v2"
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

// detention is how long a connection stays open after it was evicted, on average.
const detention = time.Second

// Detain keeps an evicted connection open for half a second to one and a half, unless downstream closes it before. Peers that
// replace a connection once it ends would otherwise make the agent read and evict their bytes as fast as the network carries them;
// with one time for all, they would come back together. Input is discarded, and the connection holds no other memory. The caller
// has sent what there is to send, and closes the connection afterwards.
func (e *Engine) Detain(w *tcp.Waiter, down *tcp.Conn) {
	if !e.config.Budget.Detain() {
		return
	}
	defer e.config.Budget.Release()
	for deadline := time.Now().Add(e.config.detention/2 + rand.N(e.config.detention)); time.Now().Before(deadline); {
		switch _, err := down.Discard(); {
		case err == nil && !w.Stopped():
			w.Yield(down) // there may be more
		case err != tcp.ErrAgain || w.Wait(deadline, down, nil) != nil:
			return
		}
	}
}
