package cel

import (
	"bytes"
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// attribute is a value that Envoy derives from a connection or request.
type attribute struct {
	of     func(*machine, *flow.Record) value // an error: the record lacks it
	header headerOf
	nested bool // a field of a map that the record lacks as a whole: the question whether it is present is an error then
}

type headerOf uint8

const (
	notHeader headerOf = iota
	requestHeader
	responseHeader
)

// attributes are those that are supported, by their paths in Envoy.
var attributes = map[string]*attribute{
	"request.path": {of: func(m *machine, r *flow.Record) value { return present(r.HTTP.Path) }},
	"request.url_path": {of: func(m *machine, r *flow.Record) value {
		path, _, _ := bytes.Cut(r.HTTP.Path, question)
		return present(path)
	}},
	"request.query":     {of: query},
	"request.host":      {of: func(m *machine, r *flow.Record) value { return present(r.HTTP.Authority) }},
	"request.method":    {of: func(m *machine, r *flow.Record) value { return present(r.HTTP.Method) }},
	"request.id":        {of: func(m *machine, r *flow.Record) value { return present(r.HTTP.ID) }},
	"request.useragent": {of: func(m *machine, r *flow.Record) value { return present(r.HTTP.UserAgent) }},
	"request.protocol": {of: func(m *machine, r *flow.Record) value {
		if r.Protocol < flow.HTTP10 {
			return value{}
		}
		return m.literally(r.Protocol.String())
	}},
	"request.duration":      {of: func(m *machine, r *flow.Record) value { return value{kind: kindDuration, number: int64(r.Duration)} }},
	"request.size":          {of: func(m *machine, r *flow.Record) value { return number(int64(r.Received.Load())) }},
	"request.headers":       {header: requestHeader},
	"response.headers":      {header: responseHeader},
	"response.size":         {of: func(m *machine, r *flow.Record) value { return number(int64(r.Sent.Load())) }},
	"response.code":         {of: func(m *machine, r *flow.Record) value { return positive(int64(r.HTTP.Status)) }},
	"response.flags":        {of: func(m *machine, r *flow.Record) value { return number(envoy.FlagBits(r.Flags())) }},
	"response.code_details": {of: func(m *machine, r *flow.Record) value { return m.nonEmpty(r.Details()) }},
	"response.grpc_status": {of: func(m *machine, r *flow.Record) value {
		if status, ok := r.GRPCStatus(); ok {
			return number(int64(status))
		}
		return value{}
	}},
	"response.backend_latency": {of: func(m *machine, r *flow.Record) value {
		if r.HTTP.ServiceTime <= 0 {
			return value{}
		}
		return value{kind: kindDuration, number: int64(r.HTTP.ServiceTime)}
	}},

	"connection.mtls": {of: func(m *machine, r *flow.Record) value { s := downstream(r); return truth(s != nil && s.Mutual) }},
	"connection.tls_version": {of: func(m *machine, r *flow.Record) value {
		return m.ofTLS(downstream(r), func(s *flow.Security) string { return s.Version })
	}},
	"connection.requested_server_name": {of: func(m *machine, r *flow.Record) value { return m.literally(r.ServerName()) }},
	"connection.uri_san_peer_certificate": {of: func(m *machine, r *flow.Record) value {
		return m.ofTLS(downstream(r), func(s *flow.Security) string { return s.Peer })
	}},
	"connection.uri_san_local_certificate": {of: func(m *machine, r *flow.Record) value {
		return m.ofTLS(downstream(r), func(s *flow.Security) string { return s.Own })
	}},
	"connection.termination_details":      {of: func(m *machine, r *flow.Record) value { return m.nonEmpty(r.TerminationDetails()) }},
	"connection.transport_failure_reason": {of: func(m *machine, r *flow.Record) value { return m.nonEmpty(r.DownstreamFailure()) }},

	"source.address":      {of: func(m *machine, r *flow.Record) value { return m.address(r.Downstream) }},
	"source.port":         {of: func(m *machine, r *flow.Record) value { return number(int64(r.Downstream.Port())) }},
	"destination.address": {of: func(m *machine, r *flow.Record) value { return m.address(r.OriginalDestination) }},
	"destination.port":    {of: func(m *machine, r *flow.Record) value { return number(int64(r.OriginalDestination.Port())) }},

	"upstream.address": {of: func(m *machine, r *flow.Record) value {
		return m.address(r.Upstream)
	}},
	"upstream.port": {of: func(m *machine, r *flow.Record) value { return positive(int64(r.Upstream.Port())) }},
	"upstream.local_address": {of: func(m *machine, r *flow.Record) value {
		return m.address(r.UpstreamLocal)
	}},
	"upstream.transport_failure_reason": {of: func(m *machine, r *flow.Record) value { return m.nonEmpty(r.TransportFailure) }},
	"upstream.request_attempt_count":    {of: func(m *machine, r *flow.Record) value { return number(int64(r.Attempts)) }},
	"upstream.tls_version": {of: func(m *machine, r *flow.Record) value {
		return m.ofTLS(upstream(r), func(s *flow.Security) string { return s.Version })
	}},
	"upstream.uri_san_peer_certificate": {of: func(m *machine, r *flow.Record) value {
		return m.ofTLS(upstream(r), func(s *flow.Security) string { return s.Peer })
	}},

	"xds.cluster_name":       {of: func(m *machine, r *flow.Record) value { return m.nonEmpty(r.Cluster) }},
	"xds.route_name":         {of: func(m *machine, r *flow.Record) value { return m.nonEmpty(r.Route) }},
	"xds.listener_direction": {of: func(m *machine, r *flow.Record) value { return number(1 + int64(r.Direction)) }}, // INBOUND, OUTBOUND
}

func init() {
	for side, key := range map[flow.Direction]string{flow.Inbound: "downstream_peer", flow.Outbound: "upstream_peer"} {
		for name, of := range flow.WorkloadNames {
			a := &attribute{nested: true, of: func(m *machine, r *flow.Record) value {
				w := r.Workload.Get()
				if w == nil || r.Direction != side {
					return value{}
				}
				return m.literally(of(w))
			}}
			attributes["filter_state."+key+"."+name] = a
		}
	}
}

var question = []byte("?")

// query returns what follows the question mark; empty without one.
func query(_ *machine, r *flow.Record) value {
	if r.HTTP.Path == nil {
		return value{}
	}
	_, rest, _ := bytes.Cut(r.HTTP.Path, question)
	return value{kind: kindText, text: rest}
}

// downstream returns the security of the connection from downstream; nil: it is not secured, or not by the agent.
func downstream(r *flow.Record) *flow.Security { return r.SecurityOf(flow.Inbound) }

func upstream(r *flow.Record) *flow.Security { return r.SecurityOf(flow.Outbound) }

// ofTLS returns a text that all connections by TLS have, though it may be empty.
func (m *machine) ofTLS(s *flow.Security, of func(*flow.Security) string) value {
	if s == nil {
		return value{}
	}
	return m.literally(of(s))
}

// address returns the text of an address with its port; an invalid one is missing.
func (m *machine) address(a netip.AddrPort) value {
	if !a.IsValid() {
		return value{}
	}
	from := len(m.scratch)
	m.scratch = a.AppendTo(m.scratch)
	return m.made(from)
}

// positive returns a number; zero is missing.
func positive(n int64) value {
	if n == 0 {
		return value{}
	}
	return number(n)
}
