package run

import (
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/pillion-proxy/pillion/internal/live"
)

// page is the server of the live page.
type page struct {
	server *http.Server
	done   chan struct{}
}

// servePage serves the live page and prints its address.
func servePage(config Config, t *traffic, r *records) (*page, error) {
	listener, err := net.Listen("tcp", config.UI)
	if err != nil {
		return nil, fmt.Errorf("serving the live page: %w", err)
	}
	p := &page{done: make(chan struct{}), server: &http.Server{
		Handler: r.view.Handler(liveSources(t)), ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10,
	}}
	p.server.RegisterOnShutdown(r.view.Close)
	go func() {
		defer close(p.done)
		_ = p.server.Serve(listener) // ends with http.ErrServerClosed
	}()
	fmt.Fprintf(config.Errors, "pillion: live page at http://%s/\n", listener.Addr())
	return p, nil
}

func (p *page) close() {
	p.server.Close()
	<-p.done
}

func liveSources(t *traffic) live.Sources { return live.Sources{Table: t.table} }
