package httpforward

import "github.com/pillion-proxy/pillion/internal/tcp"

// ServeHTTP2 is a stand-in.
func (e *Engine) ServeHTTP2(w *tcp.Waiter, c Connection) {}
