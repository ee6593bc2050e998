package mesh

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Listener is how connections to an address are treated (envoy.config.listener.v3.Listener).
type Listener struct {
	Name           string
	Addresses      []netip.AddrPort // the address and additional ones
	Virtual        bool             // not bound: connections come from the listener with UseOriginalDst
	UseOriginalDst bool             // connections go to the listener of their original destination
	Transparent    bool
	Direction      Direction // a gateway's listeners have Outbound

	Filters           []ListenerFilter
	FiltersTimeout    time.Duration // for the first bytes to arrive; 0: no limit
	ContinueOnTimeout bool          // with what has arrived, instead of closing the connection

	Chains     []*FilterChain
	Default    *FilterChain // of connections that no other chain matches; may be nil
	AccessLogs []AccessLog  // of connections without a chain
	Recorded   atomic.Value `json:"-"` // what AccessLogs stand for; of package serve

	// Refused is set if the chain of a connection cannot be determined with certainty. All connections are refused.
	Refused bool

	index *chainIndex // nil without chains, or if the only one matches all connections
}

// Direction is that of a listener's traffic.
type Direction uint8

// The directions, with Envoy's numbers.
const (
	Unspecified Direction = iota
	Inbound
	Outbound
)

// defaultFiltersTimeout is Envoy's.
const defaultFiltersTimeout = 15 * time.Second

var listenerFields = message{"envoy.config.listener.v3.Listener", Security, []field{
	1:  {"name", decoded},
	2:  {"address", once},
	3:  {"filter_chains", decoded},
	4:  {"use_original_dst", once},
	5:  {"per_connection_buffer_limit_bytes", ignored}, // buffers are smaller
	6:  {"metadata", once},
	7:  {"deprecated_v1", traffic},
	8:  {"drain_type", ignored},
	9:  {"listener_filters", decoded},
	10: {"transparent", once},
	11: {"freebind", traffic},
	12: {"tcp_fast_open_queue_length", ignored},
	13: {"socket_options", traffic},
	15: {"listener_filters_timeout", once},
	16: {"traffic_direction", decoded},
	17: {"continue_on_listener_filters_timeout", decoded},
	18: {"udp_listener_config", traffic},
	19: {"api_listener", traffic},
	20: {"connection_balance_config", ignored},
	21: {"reuse_port", ignored},
	22: {"access_log", decoded},
	24: {"tcp_backlog_size", ignored},
	25: {"default_filter_chain", once},
	26: {"bind_to_port", once},
	27: {"internal_listener", traffic}, // HBONE
	28: {"stat_prefix", ignored},
	29: {"enable_reuse_port", ignored},
	30: {"enable_mptcp", ignored},
	31: {"ignore_global_conn_limit", ignored},
	32: {"filter_chain_matcher", security},
	33: {"additional_addresses", decoded},
	34: {"max_connections_to_accept_per_socket_event", ignored},
	35: {"bypass_overload_manager", ignored},
	36: {"fcds_config", security},
	37: {"tcp_keepalive", traffic},
	38: {"per_connection_buffer_high_watermark_timeout", ignored},
	39: {"stats_matcher", cosmetic},
}}

var additionalAddressFields = message{"envoy.config.listener.v3.AdditionalAddress", Traffic, []field{
	1: {"address", once},
	2: {"socket_options", traffic},
	3: {"tcp_keepalive", traffic},
}}

func (d *decoder) listener(m wire.Message) *Listener {
	l := &Listener{FiltersTimeout: defaultFiltersTimeout}
	inChains := 0 // security findings that refuse a chain only
	var hosts []string
	for d.next(&m, &listenerFields) {
		switch m.Number {
		case 1:
			l.Name = m.String()
		case 2:
			d.listenerAddress(m.Message(), l)
		case 3:
			chain := &FilterChain{}
			inChains += d.filterChain(m.Message(), chain)
			add(d, &l.Chains, &m, chain)
		case 4:
			l.UseOriginalDst = d.boolValue(m.Message())
		case 6:
			hosts = d.serverHosts(m.Message())
		case 9:
			add(d, &l.Filters, &m, d.listenerFilter(m.Message()))
		case 10:
			l.Transparent = d.boolValue(m.Message())
		case 15:
			l.FiltersTimeout = d.duration(m.Message())
		case 16:
			l.Direction = Direction(d.enum(&m, uint64(Outbound)))
		case 17:
			l.ContinueOnTimeout = m.Bool()
		case 22:
			d.accessLogs(&m, &l.AccessLogs)
		case 25:
			l.Default = &FilterChain{}
			inChains += d.filterChain(m.Message(), l.Default)
		case 26:
			l.Virtual = !d.boolValue(m.Message())
		case 33:
			for m := m.Message(); d.next(&m, &additionalAddressFields); {
				d.listenerAddress(m.Message(), l)
			}
		}
	}
	if d.err != nil {
		return l
	}
	l.shareHosts(hosts)
	if err := l.Index(); err != nil {
		d.report(Security, err.Error())
	}
	l.Refused = d.refusals > inChains
	return l
}

func (d *decoder) listenerAddress(m wire.Message, l *Listener) {
	address, host, _, ok := d.address(m)
	if host != "" {
		d.report(Traffic, "not an IP address")
	} else if ok {
		l.Addresses = append(l.Addresses, address)
	}
}

// ListenerFilter looks at a connection before its chain is chosen.
type ListenerFilter struct {
	Kind     ListenerFilterKind
	Disabled *PortPredicate // ports whose connections bypass the filter; nil: no ports

	AllowWithout bool   // of ProxyProtocol: connections without the header are accepted
	Mark         uint32 // of OriginalSource: of upstream sockets
}

// Applies reports whether the filter looks at connections to port.
func (f *ListenerFilter) Applies(port uint16) bool {
	return f.Disabled == nil || !f.Disabled.Match(port)
}

// ListenerFilterKind is what a ListenerFilter does.
type ListenerFilterKind uint8

// The kinds.
const (
	UnknownListenerFilter ListenerFilterKind = iota // reported
	OriginalDst                                     // takes the destination from the kernel
	OriginalSource                                  // uses the client's address towards the upstream
	TLSInspector                                    // reads the ClientHello
	HTTPInspector                                   // detects HTTP
	ProxyProtocol                                   // takes the addresses from a PROXY header
)

const listenerFilterPrefix = typePrefix + "envoy.extensions.filters.listener."

// Type URLs of listener filters.
const (
	originalDstType   = listenerFilterPrefix + "original_dst.v3.OriginalDst"
	originalSrcType   = listenerFilterPrefix + "original_src.v3.OriginalSrc"
	tlsInspectorType  = listenerFilterPrefix + "tls_inspector.v3.TlsInspector"
	httpInspectorType = listenerFilterPrefix + "http_inspector.v3.HttpInspector"
	proxyProtocolType = listenerFilterPrefix + "proxy_protocol.v3.ProxyProtocol"
)

var listenerFilterFields = message{"envoy.config.listener.v3.ListenerFilter", Security, []field{
	1: {"name", ignored}, // the type counts
	3: {"typed_config", once},
	4: {"filter_disabled", once},
	5: {"config_discovery", security},
}}

var (
	originalDstFields   = message{"envoy.extensions.filters.listener.original_dst.v3.OriginalDst", Security, nil}
	httpInspectorFields = message{"envoy.extensions.filters.listener.http_inspector.v3.HttpInspector", Security, nil}

	originalSrcFields = message{"envoy.extensions.filters.listener.original_src.v3.OriginalSrc", Security, []field{
		1: {"bind_port", traffic},
		2: {"mark", decoded},
	}}

	tlsInspectorFields = message{"envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector", Security, []field{
		1: {"enable_ja3_fingerprinting", cosmetic},
		2: {"initial_read_buffer_size", ignored},
		3: {"enable_ja4_fingerprinting", cosmetic},
		4: {"close_connection_on_client_hello_parsing_errors", traffic},
		5: {"max_client_hello_size", ignored},
	}}

	proxyProtocolFields = message{"envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol", Security, []field{
		1: {"rules", traffic},
		2: {"allow_requests_without_proxy_protocol", decoded},
		3: {"pass_through_tlvs", traffic},
		4: {"disallowed_versions", security},
		5: {"stat_prefix", ignored},
		6: {"tlv_location", ignored},
	}}
)

func (d *decoder) listenerFilter(m wire.Message) ListenerFilter {
	var f ListenerFilter
	configured := false
	for d.next(&m, &listenerFilterFields) {
		switch m.Number {
		case 3:
			configured = true
			d.listenerFilterConfig(m.Message(), &f)
		case 4:
			predicate := d.predicate(m.Message())
			f.Disabled = &predicate
		}
	}
	if !configured {
		d.report(Security, "a listener filter without a configuration")
	}
	return f
}

func (d *decoder) listenerFilterConfig(m wire.Message, f *ListenerFilter) {
	url, value := d.any(m)
	m = m.Nested(value)
	switch url {
	case originalDstType:
		f.Kind = OriginalDst
		for d.next(&m, &originalDstFields) {
		}
	case originalSrcType:
		f.Kind = OriginalSource
		for d.next(&m, &originalSrcFields) {
			f.Mark = uint32(m.Uint64())
		}
	case tlsInspectorType:
		f.Kind = TLSInspector
		for d.next(&m, &tlsInspectorFields) {
		}
	case httpInspectorType:
		f.Kind = HTTPInspector
		for d.next(&m, &httpInspectorFields) {
		}
	case proxyProtocolType:
		f.Kind = ProxyProtocol
		for d.next(&m, &proxyProtocolFields) {
			f.AllowWithout = m.Bool()
		}
	default:
		d.report(Security, "listener filters of type "+shortType(url)+" are not supported")
	}
}

// PortPredicate matches destination ports (envoy.config.listener.v3.ListenerFilterChainMatchPredicate).
type PortPredicate struct {
	Kind       PredicateKind
	Start, End int32           // of PortRange: Start ≤ port < End
	Of         []PortPredicate // of PortOr and PortAnd, and the one of PortNot
}

// PredicateKind is how a PortPredicate matches.
type PredicateKind uint8

// The kinds. PortNever is a predicate that is not understood; it is reported.
const (
	PortNever PredicateKind = iota
	PortAny
	PortRange
	PortOr
	PortAnd
	PortNot
)

// Match reports whether p matches port.
func (p *PortPredicate) Match(port uint16) bool {
	switch p.Kind {
	case PortAny:
		return true
	case PortRange:
		return p.Start <= int32(port) && int32(port) < p.End
	case PortOr:
		for i := range p.Of {
			if p.Of[i].Match(port) {
				return true
			}
		}
		return false
	case PortAnd:
		for i := range p.Of {
			if !p.Of[i].Match(port) {
				return false
			}
		}
		return true
	case PortNot:
		return !p.Of[0].Match(port)
	}
	return false
}

var predicateFields = message{"envoy.config.listener.v3.ListenerFilterChainMatchPredicate", Security, []field{
	1: {"or_match", once},
	2: {"and_match", once},
	3: {"not_match", once},
	4: {"any_match", decoded},
	5: {"destination_port_range", once},
}}

var (
	matchSetFields  = message{"envoy.config.listener.v3.ListenerFilterChainMatchPredicate.MatchSet", Security, []field{1: {"rules", decoded}}}
	portRangeFields = message{"envoy.type.v3.Int32Range", Security, []field{1: {"start", decoded}, 2: {"end", decoded}}}
)

// predicate returns a predicate. In the oneof of its rules the last counts.
func (d *decoder) predicate(m wire.Message) (p PortPredicate) {
	for d.next(&m, &predicateFields) {
		switch m.Number {
		case 1:
			p = PortPredicate{Kind: PortOr, Of: d.predicates(m.Message())}
		case 2:
			p = PortPredicate{Kind: PortAnd, Of: d.predicates(m.Message())}
		case 3:
			p = PortPredicate{Kind: PortNot, Of: []PortPredicate{d.predicate(m.Message())}}
		case 4:
			p = PortPredicate{}
			if m.Bool() {
				p.Kind = PortAny
			}
		case 5:
			p = PortPredicate{Kind: PortRange}
			for m := m.Message(); d.next(&m, &portRangeFields); {
				switch m.Number {
				case 1:
					p.Start = int32(m.Uint64())
				case 2:
					p.End = int32(m.Uint64())
				}
			}
		}
	}
	if p.Kind == PortNever {
		d.report(Security, "a predicate without a rule")
	}
	return p
}

func (d *decoder) predicates(m wire.Message) (of []PortPredicate) {
	for d.next(&m, &matchSetFields) {
		of = append(of, d.predicate(m.Message()))
	}
	return of
}
