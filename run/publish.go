package run

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/sandbox"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Port is a port of the command that is published at an address of the caller's network.
type Port struct {
	At     netip.AddrPort // port 0: any free one
	Inside uint16
}

// ParsePort parses [ADDRESS:]PORT[:PORT], as Docker's -p: the last port is inside and defaults to the other one. The address
// defaults to 127.0.0.1.
func ParsePort(text string) (Port, error) {
	address, ports := netip.AddrFrom4([4]byte{127, 0, 0, 1}), text
	if strings.ContainsAny(text, ".[") {
		end := strings.IndexByte(text, ':')
		if text[0] == '[' {
			end = strings.Index(text, "]:") + 1
		}
		if end <= 0 {
			return Port{}, errPort(text)
		}
		parsed, err := netip.ParseAddr(strings.Trim(text[:end], "[]"))
		if err != nil {
			return Port{}, errPort(text)
		}
		address, ports = parsed, text[end+1:]
	}
	first, last, two := strings.Cut(ports, ":")
	outside, err := strconv.ParseUint(first, 10, 16)
	if err != nil || !two && outside == 0 {
		return Port{}, errPort(text)
	}
	p := Port{At: netip.AddrPortFrom(address, uint16(outside)), Inside: uint16(outside)}
	if two {
		if p.Inside, err = capture.ParsePort(last); err != nil {
			return Port{}, errPort(text)
		}
	}
	return p, nil
}

func errPort(text string) error {
	return fmt.Errorf("%s is not a published port: use [ADDRESS:]PORT[:PORT INSIDE], such as 8080, 8080:80 or 0.0.0.0:8080:80", capture.Quoted(text))
}

// publisher serves published ports: connections to them go on to the command's servers.
type publisher struct {
	box    *sandbox.Sandbox
	poller *tcp.Poller // its sockets are inside; those of its listeners are not
	pool   *upstream.Pool
	role   *serve.Role
	log    *slog.Logger
	out    io.Writer

	mu   sync.Mutex
	open map[Port]*listener.Server
	kept map[uint16]bool // ports that are published whether the command listens or not

	stop  context.CancelFunc // of the goroutine that watches ports
	watch sync.WaitGroup
}

func newPublisher(config Config, box *sandbox.Sandbox, t *traffic) (*publisher, error) {
	p := &publisher{box: box, pool: upstream.NewPool(0), log: config.Logger, out: config.Errors, open: make(map[Port]*listener.Server), kept: make(map[uint16]bool), stop: func() {}}
	var err error
	if p.poller, err = tcp.NewPollerOf(box.Socket); err != nil {
		return nil, err
	}
	p.role, err = serve.NewRole(serve.Config{
		Direction: flow.Inbound, Poller: p.poller, Flows: t.table, Settings: settings(), HTTP: t.forwarding(p.pool), Faults: config.Faults,
	})
	if err != nil {
		p.close()
		return nil, err
	}
	for _, port := range config.Publish {
		p.kept[port.Inside] = true
		if err := p.publish(port); err != nil {
			p.close()
			return nil, err
		}
	}
	if config.PublishAll {
		var ctx context.Context
		ctx, p.stop = context.WithCancel(context.Background())
		p.watch.Go(func() { p.follow(ctx) })
	}
	return p, nil
}

// publish opens a port and prints where.
func (p *publisher) publish(port Port) error {
	bound, err := p.poller.Listen(port.At)
	if err != nil {
		return fmt.Errorf("publishing port %d: %w%s", port.Inside, err, remedy(err, port.Inside))
	}
	server := &listener.Server{
		Name: "published", Listeners: []*tcp.Listener{bound}, Handler: published{p.role, p.box, port.Inside}, Limit: listener.NewLimit(0), Log: p.log,
	}
	server.Start()
	p.mu.Lock()
	p.open[port] = server
	p.mu.Unlock()
	fmt.Fprintf(p.out, "pillion: port %d is published at %s\n", port.Inside, bound.Addr())
	return nil
}

// remedy says at which other port a port can be published, if an error is about the port.
func remedy(err error, inside uint16) string {
	switch {
	case errors.Is(err, syscall.EACCES):
		return fmt.Sprintf("; choose a port from 1024 upwards, such as --publish %d:%d", 8000+inside%1000, inside)
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Sprintf("; choose another port, or any free one by --publish 0:%d", inside)
	}
	return ""
}

// followInterval is the time between looks at the ports at which the command listens; the kernel has no notification.
const followInterval = 200 * time.Millisecond

// follow publishes each port at which a process of the sandbox listens, while it does.
func (p *publisher) follow(ctx context.Context) {
	ticker := time.NewTicker(followInterval)
	defer ticker.Stop()
	for {
		p.adjust()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// adjust opens ports that are new, and closes those whose listener has gone.
func (p *publisher) adjust() {
	addresses, err := p.box.Listening()
	if err != nil {
		return // the sandbox has ended
	}
	wanted := make(map[uint16]bool)
	for _, text := range addresses {
		if at, err := netip.ParseAddrPort(text); err == nil && !p.box.Owns(at.Port()) && !p.kept[at.Port()] {
			wanted[at.Port()] = true
		}
	}
	p.mu.Lock()
	for port, server := range p.open {
		if !wanted[port.Inside] && !p.kept[port.Inside] {
			delete(p.open, port)
			p.watch.Go(server.Stop)
		}
		delete(wanted, port.Inside)
	}
	p.mu.Unlock()
	for inside := range wanted {
		at := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if p.publish(Port{netip.AddrPortFrom(at, inside), inside}) != nil { // taken, or a low port
			if err := p.publish(Port{netip.AddrPortFrom(at, 0), inside}); err != nil {
				p.log.Warn("cannot publish a port", "port", inside, "error", err)
			}
		}
	}
}

// end lets connections end until ctx is done, and cuts the others.
func (p *publisher) end(ctx context.Context) {
	p.stop()
	p.watch.Wait()
	p.role.Drain()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, server := range p.open {
		server.Stop()
		p.poller.WakeAll()
		_ = server.Wait(ctx)
		server.Abort()
	}
	clear(p.open)
}

func (p *publisher) close() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if p.role != nil {
		p.end(ctx)
	}
	p.pool.Close()
	p.poller.Close()
}

// published is the role of one published port: its walk is that of inbound connections, to an address inside.
type published struct {
	*serve.Role
	box    *sandbox.Sandbox
	inside uint16
}

// ServeConn carries one connection to its end, and closes it.
func (p published) ServeConn(ctx context.Context, down *tcp.Conn) {
	c := p.Open(ctx, down)
	defer c.Close()
	to := upstream.Target{Address: p.target()}
	c.Record.OriginalDestination, c.Record.Cluster = to.Address, flow.Inbound.Passthrough()
	c.List()
	if !c.ReadFirst(true) || !c.Fault() {
		return
	}
	silent := c.Silent()
	if !c.HTTP() && !c.Dial(&to) {
		return
	}
	if c.WatchBoth() && (!silent || c.Fault()) {
		c.Carry(&to)
	}
}

// target returns the address at which the command listens: on loopback if possible.
func (p published) target() netip.AddrPort {
	loopback4, loopback6 := netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
	best := netip.AddrPortFrom(loopback4, p.inside)
	addresses, _ := p.box.Listening()
	for _, text := range addresses {
		at, err := netip.ParseAddrPort(text)
		switch {
		case err != nil || at.Port() != p.inside:
		case at.Addr() == loopback4, at.Addr().IsUnspecified():
			return netip.AddrPortFrom(loopback4, p.inside)
		case at.Addr() == loopback6 || best.Addr() != loopback6:
			best = at
		}
	}
	return best
}
