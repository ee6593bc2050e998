package flow

import (
	"strings"

	"github.com/pillion-proxy/pillion/internal/envoy"
)

// Reason is why a flow ended. The set is closed: a new Reason needs a constant, a row in Explanations and one in
// docs/reasons.md.
type Reason string

// Ordinary ends of a connection.
const (
	Closed          Reason = "closed"           // both sides closed, and every byte was delivered
	DownstreamReset Reason = "downstream_reset" // downstream reset the connection, or vanished
	UpstreamReset   Reason = "upstream_reset"   // upstream reset the connection, or vanished
)

// Upstream could not be reached. Downstream is reset, or its request answered 503.
const (
	UpstreamRefused     Reason = "upstream_refused"     // nothing listens there, or a firewall rejects
	UpstreamTimeout     Reason = "upstream_timeout"     // no answer within the connect timeout
	UpstreamUnreachable Reason = "upstream_unreachable" // no route, or the dial failed in another way
	UpstreamTLS         Reason = "upstream_tls"         // the TLS handshake failed
	NoHealthyUpstream   Reason = "upstream_unhealthy"   // the cluster has no healthy endpoint; nothing was dialled
	UpstreamOverflow    Reason = "upstream_overflow"    // a limit of the cluster is reached; nothing was dialled
)

// Ends of a request.
const (
	Completed          Reason = "completed"           // the response was delivered to its end
	DownstreamLeft     Reason = "downstream_left"     // downstream closed before the response was complete
	UpstreamClosed     Reason = "upstream_closed"     // upstream closed before the head of the response
	ResponseIncomplete Reason = "response_incomplete" // upstream closed in the middle of the response
	BadFraming         Reason = "bad_framing"         // the request is malformed
	BadResponse        Reason = "bad_response"        // the response is malformed
	HeadTooLarge       Reason = "head_too_large"      // the head of the request is over a limit
	HeadTimeout        Reason = "head_timeout"        // downstream did not finish the head of its request
	RequestTimeout     Reason = "request_timeout"     // no response within the request timeout, or a limit of its route
	Overload           Reason = "overload"            // an HTTP/2 peer opens too many streams, or floods the connection
	MemoryBudget       Reason = "memory_budget"       // the memory for heads and held bodies is used up
)

// Refused by the agent. Downstream is reset.
const (
	Loop                  Reason = "loop"                    // the destination is one of our own ports at an own address, or the rules captured a connection of our own
	ForeignAddress        Reason = "foreign_address"         // inbound, for an address that is not this workload's
	NoOriginalDestination Reason = "no_original_destination" // not redirected by a rule, or connection tracking forgot it
	IPv6SourceMissing     Reason = "ipv6_source_missing"     // inbound IPv6, and lo lacks ::6 to dial the workload from
	MaxConnections        Reason = "max_connections"         // the limit of connections is reached
	NoDescriptors         Reason = "no_descriptors"          // the process may open, or watch, no further socket
	NoConfiguration       Reason = "no_configuration"        // the control plane has sent no configuration in time
	FaultInjected         Reason = "fault"                   // a fault on purpose
	Denied                Reason = "denied"                  // the policy for outbound traffic does not allow the destination
	PolicyDenied          Reason = "policy_denied"           // an authorization policy denies it
	MeshRefused           Reason = "mesh_refused"            // the control plane's configuration does not let it pass
	BadProxyHeader        Reason = "bad_proxy_header"        // the connection does not begin with a valid header of the PROXY protocol, which its listener requires
	TLSRequired           Reason = "tls_required"            // the client does not begin with TLS, which the configuration requires
	TLSUnexpected         Reason = "tls_unexpected"          // the client speaks TLS where the configuration has HTTP without it
	TLSFailed             Reason = "tls_failed"              // the TLS handshake failed for another reason than those below
	TLSVersion            Reason = "tls_version"             // no version, cipher suite or key exchange in common
	TLSTimeout            Reason = "tls_timeout"             // the peer did not finish the TLS handshake in time
	TLSNoCertificate      Reason = "tls_no_certificate"      // the client has no certificate
	TLSExpired            Reason = "tls_expired"             // the peer's certificate is expired or not valid yet
	TLSUnknownRoot        Reason = "tls_unknown_root"        // the peer's certificate is issued under another root
	TLSNameRefused        Reason = "tls_name_refused"        // the peer's names are not accepted
	TLSPeerRefused        Reason = "tls_peer_refused"        // the peer's certificate is not accepted for another reason
	TLSNoIdentity         Reason = "tls_no_identity"         // this workload has no certificate, or no roots of trust
)

// Ended by the agent. Both sides are reset, except for Drained.
const (
	Drained          Reason = "drained"            // neither side had sent anything when the agent drained; both sides are closed in order
	IdleTimeout      Reason = "idle_timeout"       // nothing moved for the idle timeout
	MaxDuration      Reason = "max_duration"       // the connection lasted as long as its configuration permits
	HalfCloseTimeout Reason = "half_close_timeout" // one side closed, and nothing moved for the half-close timeout
	DrainDeadline    Reason = "drain_deadline"     // still open at the end of the drain timeout
)

// Explanation is the row of a reason: its description and its names in Istio's vocabulary.
type Explanation struct {
	Reason       Reason
	Flags        string // Envoy's response flags for a connection; empty: no flags, or connections never end for this reason
	RequestFlags string // the same for a request
	Details      string // Envoy's response_code_details for a request
	Text         string // settings stand in braces, by the names of the agent's configuration: see Render
}

// Render returns Text with each setting as name spells it for the reader, such as --connect-timeout for ConnectTimeout.
// A nil name leaves the names as they are.
func (e *Explanation) Render(name func(setting string) string) string {
	var b strings.Builder
	for rest := e.Text; ; {
		before, after, found := strings.Cut(rest, "{")
		b.WriteString(before)
		if !found {
			return b.String()
		}
		setting, behind, _ := strings.Cut(after, "}")
		if name != nil {
			setting = name(setting)
		}
		b.WriteString(setting)
		rest = behind
	}
}

// Explanations has each reason, in the order of the documents. Flags and details that an engine sets in the record take
// precedence, because they may be more precise.
var Explanations = []Explanation{
	{Closed, "", "", envoy.DetailsViaUpstream,
		"Both sides closed; every byte was delivered."},
	{DownstreamReset, envoy.FlagDownstreamRemoteReset, envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft,
		"Downstream reset the connection or vanished; upstream was reset."},
	{UpstreamReset, envoy.FlagUpstreamConnectionTermination, envoy.FlagUpstreamRemoteReset, envoy.ResetBeforeResponse(envoy.ResetByRemote),
		"Upstream reset the connection or vanished; downstream was reset."},
	{UpstreamRefused, envoy.FlagsConnectFailed, envoy.FlagUpstreamConnectionFailure, envoy.ResetBeforeResponse(envoy.ResetByRemoteConnectFailure),
		"Nothing listens at the upstream address, or a firewall rejects."},
	{UpstreamTimeout, envoy.FlagsConnectFailed, envoy.FlagUpstreamConnectionFailure, envoy.ResetBeforeResponse(envoy.ResetByConnectTimeout),
		"Upstream did not answer within `{ConnectTimeout}`."},
	{UpstreamUnreachable, envoy.FlagsConnectFailed, envoy.FlagUpstreamConnectionFailure, envoy.ResetBeforeResponse(envoy.ResetByRemoteConnectFailure),
		"There is no route to upstream, or the dial failed in another way."},
	{UpstreamTLS, envoy.FlagsConnectFailed, envoy.FlagUpstreamConnectionFailure, envoy.ResetBeforeResponse(envoy.ResetByRemoteConnectFailure),
		"The TLS handshake with upstream failed: its certificate is not accepted, it rejected ours, or it does not speak TLS; the log has the cause."},
	{NoHealthyUpstream, envoy.FlagNoHealthyUpstream, envoy.FlagNoHealthyUpstream, envoy.DetailsNoHealthyUpstream,
		"The cluster that the control plane chose has no healthy endpoint; a request was answered 503."},
	{UpstreamOverflow, envoy.FlagUpstreamOverflow, envoy.FlagUpstreamOverflow, envoy.ResetBeforeResponse(envoy.ResetByOverflow),
		"A limit of the cluster's connection pool or circuit breaker is reached; a request was answered 503 with `x-envoy-overloaded`."},
	{Completed, "", "", envoy.DetailsViaUpstream,
		"The response to a request was delivered to its end."},
	{DownstreamLeft, "", envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft,
		"Downstream closed or cancelled before the response was complete; so was the request upstream."},
	{UpstreamClosed, "", envoy.FlagUpstreamConnectionTermination, envoy.ResetBeforeResponse(envoy.ResetByTermination),
		"Upstream closed before the head of the response; downstream was answered 503."},
	{ResponseIncomplete, "", envoy.FlagUpstreamConnectionTermination, envoy.ResetAfterResponse(envoy.ResetByTermination),
		"Upstream closed in the middle of the response; downstream was cut off as well."},
	{BadFraming, "", envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP1CodecError,
		"The request is malformed; it was answered 400, or its HTTP/2 stream reset, and not forwarded."},
	{BadResponse, "", envoy.FlagUpstreamProtocolError, envoy.ResetBeforeResponse(envoy.ResetByProtocolError),
		"The response is malformed; downstream was answered 502."},
	{HeadTooLarge, "", envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP1HeadTooLarge,
		"The head of the request is over `{MaxHeadBytes}` or `{MaxHeadFields}`; it was answered 431."},
	{HeadTimeout, "", "", envoy.DetailsHeadTimeout,
		"The head of the request was not complete within `{RequestHeadTimeout}`, or the request within its gateway's `request_timeout`; it was answered 408, or the HTTP/2 connection ended."},
	{RequestTimeout, "", envoy.FlagUpstreamRequestTimeout, envoy.DetailsResponseTimeout,
		"There was no response within `{RequestTimeout}`, or a limit of the route has passed; downstream was answered 504, or a response that had begun was cut off."},
	{Overload, "", envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP2Violation,
		"An HTTP/2 peer opened too many streams, or flooded the connection with frames without effect; it was refused or disconnected."},
	{MemoryBudget, envoy.FlagOverloadManager, envoy.FlagOverloadManager, envoy.DetailsOverload,
		"`{MaxHeldBytes}` was used up and this connection held the most, or an HTTP/2 connection held too much by itself; the request was answered 503, or its stream or connection was reset."},
	{Loop, envoy.FlagNoHealthyUpstream, envoy.FlagNoHealthyUpstream, envoy.DetailsNoHealthyUpstream,
		"The destination is one of pillion's own ports at one of the workload's own addresses, or the rules capture pillion's own connections."},
	{ForeignAddress, envoy.FlagNoRouteFound, "", "",
		"An inbound connection is for an address that is not the workload's own."},
	{NoOriginalDestination, envoy.FlagNoRouteFound, "", "",
		"No rule redirected the connection here, or connection tracking forgot it."},
	{IPv6SourceMissing, envoy.FlagNoRouteFound, "", "",
		"An inbound IPv6 connection, but `lo` lacks `::6`; run `pillion init`."},
	{MaxConnections, envoy.FlagOverloadManager, "", "",
		"`{MaxConnections}` is reached."},
	{NoDescriptors, envoy.FlagOverloadManager, envoy.FlagOverloadManager, envoy.DetailsOverload,
		"The process may open or watch no further connection; raise its `nofile` limit, `fs.epoll.max_user_watches`, or its memory."},
	{NoConfiguration, envoy.FlagNoRouteFound, "", "",
		"The control plane sent no configuration within `{ConfigurationWait}`."},
	{FaultInjected, envoy.FlagFaultInjected, "", "",
		"A fault that was configured on purpose reset the connection."},
	{Denied, envoy.FlagNoHealthyUpstream, "", envoy.DetailsDirectResponse,
		"The policy for outbound traffic does not allow the destination; a request was answered 403, a connection reset."},
	{MeshRefused, envoy.FlagNoRouteFound, "", "",
		"The control plane's configuration closes the connection, or has policies or routes for it that are not supported yet; the log has the cause."},
	{PolicyDenied, "", "", "",
		"An authorization policy denies the connection or the request, which is answered 403, or a token is missing or not accepted (401); the details and the log say which."},
	{BadProxyHeader, envoy.FlagDownstreamProtocolError, "", "",
		"The connection did not begin with a valid header of the PROXY protocol, or not in time, and its listener requires one."},
	{TLSRequired, envoy.FlagNoRouteFound, "", "",
		"The client did not begin with TLS, and the port requires mutual TLS (PeerAuthentication STRICT)."},
	{TLSUnexpected, envoy.FlagDownstreamProtocolError, "", "",
		"The client speaks TLS, and the configuration has HTTP without TLS for the port (PeerAuthentication DISABLE, or ALPN of no proxy to a port declared as HTTP)."},
	{TLSFailed, "", "", "",
		"The TLS handshake failed: the peer violates TLS, or rejected pillion's certificate; the log has the cause."},
	{TLSVersion, "", "", "",
		"The peer and pillion have no version of TLS, cipher suite or key exchange in common."},
	{TLSTimeout, "", "", "",
		"The peer did not finish the TLS handshake within the time that the control plane configures (15 s)."},
	{TLSNoCertificate, "", "", "",
		"The client presented no certificate, and mutual TLS requires one."},
	{TLSExpired, "", "", "",
		"The peer's certificate, or one of its chain, is expired or not valid yet; the log has its validity."},
	{TLSUnknownRoot, "", "", "",
		"The peer's certificate is not issued under a root of trust of this workload; the log has its issuer."},
	{TLSNameRefused, "", "", "",
		"The peer's certificate has none of the names that the configuration accepts; the log has both."},
	{TLSPeerRefused, "", "", "",
		"The peer's certificate is revoked, malformed, for another use, has none of the configured hashes, or not exactly one SPIFFE ID; the log has the cause."},
	{TLSNoIdentity, "", "", "",
		"TLS is required, and this workload, or the server of a gateway, has no certificate or no roots of trust yet; the log names the secret."},
	{IdleTimeout, envoy.FlagStreamIdleTimeout, envoy.FlagStreamIdleTimeout, envoy.DetailsIdleTimeout,
		"Nothing moved for `{IdleTimeout}`, or the limit of a route or gateway; both sides were reset, or a request was answered 408 or 504."},
	{HalfCloseTimeout, envoy.FlagStreamIdleTimeout, envoy.FlagStreamIdleTimeout, envoy.DetailsIdleTimeout,
		"One side had closed and nothing moved for `{HalfCloseTimeout}`; both sides were reset."},
	{MaxDuration, envoy.FlagDurationTimeout, "", "",
		"The connection lasted as long as the control plane permits; both sides were reset."},
	{Drained, "", "", "",
		"Neither side had sent anything when the agent drained; both were closed in order."},
	{DrainDeadline, envoy.FlagLocalReset, envoy.FlagLocalReset, envoy.ResetAfterResponse(envoy.ResetByLocal),
		"Shutdown waited for `{DrainTimeout}`; both sides were reset."},
}

var explanations = func() map[Reason]*Explanation {
	m := make(map[Reason]*Explanation, len(Explanations))
	for i := range Explanations {
		m[Explanations[i].Reason] = &Explanations[i]
	}
	return m
}()

// ByPolicy reports whether the agent refused the flow, as opposed to an end that the two sides caused.
func (r Reason) ByPolicy() bool {
	switch r {
	case Loop, ForeignAddress, NoOriginalDestination, IPv6SourceMissing, MaxConnections, NoDescriptors, MemoryBudget, NoConfiguration, Denied, MeshRefused, PolicyDenied, TLSRequired, TLSUnexpected:
		return true
	}
	return false
}

// OfHandshake reports whether a TLS handshake with downstream failed.
func (r Reason) OfHandshake() bool {
	switch r {
	case TLSFailed, TLSVersion, TLSTimeout, TLSNoCertificate, TLSExpired, TLSUnknownRoot, TLSNameRefused, TLSPeerRefused, TLSNoIdentity:
		return true
	}
	return false
}
