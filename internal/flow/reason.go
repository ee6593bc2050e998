package flow

// Reason is why a flow ended. The set is closed: a new way to end gets a new Reason here, and a row in README.
type Reason string

// The ordinary ends.
const (
	Closed          Reason = "closed"           // both sides closed, every byte was delivered
	DownstreamReset Reason = "downstream_reset" // downstream reset the connection, or vanished
	UpstreamReset   Reason = "upstream_reset"   // upstream reset the connection, or vanished
)

// Upstream could not be reached. Downstream is reset.
const (
	UpstreamRefused     Reason = "upstream_refused"     // nothing listens there, or a firewall rejects
	UpstreamTimeout     Reason = "upstream_timeout"     // no answer within --connect-timeout
	UpstreamUnreachable Reason = "upstream_unreachable" // no route, or the dial failed in another way
)

// Refused by name: the agent will not carry the connection. Downstream is reset.
const (
	Loop                  Reason = "loop"                    // the destination is one of our own ports at an own address
	ForeignAddress        Reason = "foreign_address"         // inbound, for an address that is not this workload's
	NoOriginalDestination Reason = "no_original_destination" // not redirected by a rule, or connection tracking forgot it
	IPv6SourceMissing     Reason = "ipv6_source_missing"     // inbound IPv6, and lo lacks ::6 to dial the workload from
	MaxConnections        Reason = "max_connections"         // --max-connections is reached
	NoDescriptors         Reason = "no_descriptors"          // the process may open, or watch, no further socket
)

// Ended by the agent. Both sides are reset.
const (
	IdleTimeout      Reason = "idle_timeout"       // nothing moved for --idle-timeout
	HalfCloseTimeout Reason = "half_close_timeout" // one side closed, and nothing moved for --half-close-timeout
	DrainDeadline    Reason = "drain_deadline"     // shutdown waited for it as long as it may
)

// Explanations gives each reason its sentence, in the order in which documents list them.
var Explanations = []struct {
	Reason Reason
	Text   string
}{
	{Closed, "Both sides closed; every byte was delivered."},
	{DownstreamReset, "Downstream reset the connection or vanished; upstream was reset."},
	{UpstreamReset, "Upstream reset the connection or vanished; downstream was reset."},
	{UpstreamRefused, "Nothing listens at the upstream address, or a firewall rejects; downstream was reset."},
	{UpstreamTimeout, "Upstream did not answer within `--connect-timeout`; downstream was reset."},
	{UpstreamUnreachable, "There is no route to upstream, or the dial failed in another way; downstream was reset."},
	{Loop, "The destination is one of pillion's own ports at one of the workload's own addresses."},
	{ForeignAddress, "An inbound connection is for an address that is not the workload's own."},
	{NoOriginalDestination, "No rule redirected the connection here, or connection tracking forgot it."},
	{IPv6SourceMissing, "An inbound IPv6 connection, but `lo` lacks `::6`; run `pillion init`."},
	{MaxConnections, "`--max-connections` is reached."},
	{NoDescriptors, "The process may open or watch no further connection; raise its `nofile` limit, or `fs.epoll.max_user_watches`."},
	{IdleTimeout, "Nothing moved for `--idle-timeout`; both sides were reset."},
	{HalfCloseTimeout, "One side had closed and nothing moved for `--half-close-timeout`; both sides were reset."},
	{DrainDeadline, "Shutdown waited for `--drain-timeout`; both sides were reset."},
}

// ByPolicy reports whether the agent refused the flow by name, as opposed to what the two sides did.
func (r Reason) ByPolicy() bool {
	switch r {
	case Loop, ForeignAddress, NoOriginalDestination, IPv6SourceMissing, MaxConnections, NoDescriptors:
		return true
	}
	return false
}
