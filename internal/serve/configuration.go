package serve

import (
	"errors"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// AwaitConfiguration holds a connection until the control plane has sent the first configuration. It does not read: the
// bytes that downstream sends stay in the kernel. Without a control plane it does nothing.
func (c *Conn) AwaitConfiguration() bool {
	if c.role.mesh == nil {
		return true
	}
	if c.Mesh = c.role.mesh.Snapshot(); c.Mesh != nil {
		return true
	}
	return c.hold(c.Record.Opened.Add(c.role.wait))
}

// hold waits for the first snapshot until deadline. Its publisher wakes all waits.
func (c *Conn) hold(deadline time.Time) bool {
	for {
		if c.Mesh = c.role.mesh.Snapshot(); c.Mesh != nil {
			return true
		}
		if c.role.engine.Draining() {
			c.Refuse(flow.Drained, nil)
			return false
		}
		err := c.w.Wait(deadline, c.Down, nil)
		if err == nil {
			err = c.Down.Failed()
		}
		switch {
		case errors.Is(err, tcp.ErrDeadline):
			c.Refuse(flow.NoConfiguration, nil)
			return false
		case err != nil:
			c.Refuse(sniff.Reason(err), err)
			return false
		}
	}
}

// Admit refuses a connection that the control plane's configuration does not let pass to its original destination. Call it
// after ReadFirst. Without a control plane it does nothing.
func (c *Conn) Admit() bool { return c.Mesh == nil || c.judge() }

func (c *Conn) judge() bool {
	info := mesh.ConnInfo{
		Destination: c.Record.OriginalDestination, Source: c.Record.Downstream, DirectSource: c.Record.Downstream.Addr(),
	}
	switch c.protocol {
	case sniff.TLS:
		info.TLS, info.ServerName, info.Protocols = true, c.sniffer.Hello.ServerName, c.sniffer.Hello.ALPN
	case sniff.HTTP1:
		info.Protocols = http1Protocols
	case sniff.HTTP2:
		info.Protocols = http2Protocols
	}
	direction := mesh.Outbound
	if c.role.direction == flow.Inbound {
		direction = mesh.Inbound
	}
	if refusal := c.Mesh.Verdict(direction, &info); refusal != "" {
		return c.abandon(flow.MeshRefused, errors.New(refusal))
	}
	return true
}

// What Envoy's HTTP inspector calls the versions of HTTP.
var (
	http1Protocols = []string{"http/1.1", "http/1.0"}
	http2Protocols = []string{"h2c"}
)
