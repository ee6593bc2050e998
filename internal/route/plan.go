package route

import (
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Plan is what a route requires of the engine that carries its requests. It is compiled once, shared and never changed.
type Plan struct {
	// RewritesPath and RewritesHost report whether AppendPath and AppendHost change anything.
	RewritesPath, RewritesHost bool

	// RequestEdits and ResponseEdits are changes of headers, in the order in which they are made. They have the fields that
	// come with rewrites, cross-origin requests and cookies: X-Envoy-Original-Path, X-Forwarded-Host,
	// Access-Control-Allow-Origin and Set-Cookie.
	RequestEdits, ResponseEdits []Edit

	Timeout     time.Duration  // from the end of the request to the end of the response; 0: no limit
	GRPCTimeout *time.Duration // bounds grpc-timeout, if that replaces Timeout; 0: no bound; nil: it does not. See Timeouts
	Idle        *time.Duration // of the stream; 0: no limit; nil: the listener's
	MaxStream   *time.Duration // of the whole stream; 0: no limit; nil: the listener's
	GRPCStream  *time.Duration // bounds grpc-timeout, if that replaces MaxStream; 0: no bound; nil: it does not

	Retry            *mesh.RetryPolicy // nil: no retries except the engine's safe resend
	CountAttempts    bool              // in x-envoy-attempt-count of requests
	CountInResponses bool              // in x-envoy-attempt-count of responses, replies included

	Mirrors   []mesh.Mirror // each is drawn on its own, by Request.Drawn
	Operation string        // name of the span; may be empty

	path pathRewrite
	host string // empty: not rewritten
}

// Edit is a change of one header field. An edit with Remove removes all fields of the name.
type Edit struct {
	Name      string // in lower case
	Remove    bool
	Action    mesh.EditAction
	KeepEmpty bool // the field is added also if its value is empty

	value  string // of an edit without operators
	pieces []piece
}

// Context has what the values of edits are made of. An engine implements it without allocation.
type Context interface {
	// Request returns the request as it was received.
	Request() Request

	// ResponseFields returns the header fields of the response, or nil.
	ResponseFields() Fields

	// AppendOperator appends the value of an operator to dst. It returns dst unchanged if there is no value. Operators that
	// Request and ResponseFields give the values of are not passed.
	AppendOperator(dst []byte, o Operator) []byte
}

// Operator is an operator in the value of an edit, with Envoy's name.
type Operator uint8

// The operators that Context gives the values of. Those of addresses are followed by their forms, as Envoy's.
const (
	NoOperator              Operator = iota
	DownstreamRemoteAddress          // with its port, as "198.51.100.7:41234"; the client's, by X-Forwarded-For if that is trusted
	DownstreamRemoteHost             // DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT
	DownstreamRemotePort
	DownstreamDirectRemoteAddress // of the connection
	DownstreamDirectRemoteHost
	DownstreamDirectRemotePort
	DownstreamLocalAddress
	DownstreamLocalHost
	DownstreamLocalPort
	DownstreamPeerSubject
	DownstreamPeerURISAN
	DownstreamLocalURISAN
	RequestedServerName
	Protocol
	Hostname  // of the pod
	StartTime // as 2006-01-02T15:04:05.000Z
	RouteName
	VirtualClusterName
	UpstreamCluster
	UpstreamHost // with its port
	UpstreamRemoteAddress
	ResponseFlags
	ResponseCodeDetails
)

// Reply is a response that is made here.
type Reply struct {
	Status  int
	Body    string
	Fields  []Field // besides those of any reply; names are in lower case
	GRPC    *uint32 // grpc-status of the reply to a gRPC request; nil: by Status
	Flags   string  // Envoy's response flags
	Details string  // Envoy's response_code_details
	Reason  flow.Reason
	Edited  bool // Plan.ResponseEdits are made
	Reset   bool // there is no reply: the connection of HTTP/1 or the stream of HTTP/2 is reset; only Reason applies
}

// Field is a header field of a reply.
type Field struct{ Name, Value string }

// Outcome is what becomes of a request.
type Outcome struct {
	Delay time.Duration // before anything else is done
	Reply *Reply        // nil: the request is sent to the Choice's cluster
	Plan  *Plan         // nil: the request and its response pass as they are, without limits

	ResponseRate uint64 // limit of the response's body in bytes for each second; 0: not limited
}
