package mesh

import (
	"slices"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// FilterChain is what is done with the connections that its Match selects (envoy.config.listener.v3.FilterChain).
type FilterChain struct {
	Name   string
	Match  ChainMatch     // meaningless in Listener.Default
	TLS    *DownstreamTLS // nil: it is not terminated
	Origin string         // resource of the configuration that the chain stems from

	HandshakeTimeout time.Duration // of TLS; 0: no limit

	Policies []NetworkFilter // that judge a connection, in this order

	// One of these is set, unless the chain is refused.
	TCP  *TCPProxy
	HTTP *HTTPManager

	ClusterIsSNI bool // the cluster is the one with the name of the ClientHello's server name, instead of TCP's
	HasMetadata  bool // istio.metadata_exchange is configured

	Stats    *Stats       `json:",omitzero"` // of connections; nil: they have no metrics of Istio's
	Recorded atomic.Value `json:"-"`         // what AccessLogs and Metrics stand for; of package serve

	// Refused is set if the chain has something that concerns security and is not supported. Its connections are refused.
	Refused bool
}

// AccessLogs returns the access logs of the chain's connections and requests.
func (c *FilterChain) AccessLogs() []AccessLog {
	switch {
	case c.HTTP != nil:
		return c.HTTP.AccessLogs
	case c.TCP != nil:
		return c.TCP.AccessLogs
	}
	return nil
}

// Metrics returns how Istio's metrics of the chain's connections or requests are changed; nil: it has none.
func (c *FilterChain) Metrics() *Stats {
	if c.HTTP == nil {
		return c.Stats
	}
	for i := range c.HTTP.Filters {
		if f := &c.HTTP.Filters[i]; f.Stats != nil && !f.Disabled {
			return f.Stats
		}
	}
	return nil
}

// NetworkFilter is a filter that judges connections.
type NetworkFilter struct {
	Name, Type string // the type without its URL's prefix

	// One of these is set.
	RBAC     *RBAC
	ExtAuthz *ExtAuthz
}

// Restricts reports whether f can refuse a connection.
func (f NetworkFilter) Restricts() bool {
	switch {
	case f.RBAC != nil:
		return f.RBAC.Restricts()
	case f.ExtAuthz != nil:
		return f.ExtAuthz.Restricts()
	}
	return true
}

var filterChainFields = message{"envoy.config.listener.v3.FilterChain", Security, []field{
	1: {"filter_chain_match", once},
	3: {"filters", decoded},
	4: {"use_proxy_proto", security},
	5: {"metadata", once},
	6: {"transport_socket", once},
	7: {"name", decoded},
	9: {"transport_socket_connect_timeout", once},
}}

// filterChain reads a chain. It returns the number of security findings that concern this chain only. Those in the match
// concern all chains: with another match, a connection could get a chain that is not meant for it.
func (d *decoder) filterChain(m wire.Message, c *FilterChain) (inChain int) {
	before, narrow, inMatch, first := d.refusals, d.narrow, 0, len(d.findings)
	closed := false
	for d.next(&m, &filterChainFields) {
		switch m.Number {
		case 1:
			start := d.refusals
			d.chainMatch(m.Message(), &c.Match)
			inMatch += d.refusals - start
		case 3:
			closed = d.networkFilter(m.Message(), c) || closed
		case 5:
			c.Origin = d.configOrigin(m.Message())
		case 6:
			c.TLS = d.downstreamTransport(m.Message())
		case 7:
			c.Name = m.String()
		case 9:
			c.HandshakeTimeout = d.duration(m.Message())
		}
	}
	if !c.terminated() && !closed {
		d.report(Security, "no filter that forwards connections")
	}
	c.Refused = d.refusals-before > d.narrow-narrow
	d.attribute(first, c.Origin)
	return d.refusals - before - inMatch
}

// terminated reports whether the chain has a filter that forwards connections. It must be the last one.
func (c *FilterChain) terminated() bool { return c.TCP != nil || c.HTTP != nil }

// Types of network filters. Those of Istio's own filters have no package of Envoy's.
const (
	networkPrefix        = "envoy.extensions.filters.network."
	tcpProxyType         = networkPrefix + "tcp_proxy.v3.TcpProxy"
	httpManagerType      = networkPrefix + "http_connection_manager.v3.HttpConnectionManager"
	networkRBACType      = networkPrefix + "rbac.v3.RBAC"
	networkExtAuthzType  = networkPrefix + "ext_authz.v3.ExtAuthz"
	sniClusterType       = networkPrefix + "sni_cluster.v3.SniCluster"
	mongoType            = networkPrefix + "mongo_proxy.v3.MongoProxy"
	mysqlType            = networkPrefix + "mysql_proxy.v3.MySQLProxy"
	postgresType         = networkPrefix + "postgres_proxy.v3alpha.PostgresProxy"
	zookeeperType        = networkPrefix + "zookeeper_proxy.v3.ZooKeeperProxy"
	metadataExchangeType = "envoy.tcp.metadataexchange.config.MetadataExchange"
	statsType            = "stats.PluginConfig"
)

// closedTypes are filters of istiod's that forward connections in ways that are not supported. Their chain is closed, and the
// rest of the listener is used as it stands: the same port may serve any number of other services.
var closedTypes = []string{
	networkPrefix + "sni_dynamic_forward_proxy.v3.FilterConfig", // of services with the resolution DYNAMIC_DNS
	networkPrefix + "redis_proxy.v3.RedisProxy",
}

var networkFilterFields = message{"envoy.config.listener.v3.Filter", Security, []field{
	1: {"name", decoded},
	4: {"typed_config", once},
	5: {"config_discovery", security},
}}

var sniClusterFields = message{sniClusterType, Security, nil}

// networkFilter adds a filter to a chain. closed reports that the filter forwards connections, and is not supported.
func (d *decoder) networkFilter(m wire.Message, c *FilterChain) (closed bool) {
	if c.terminated() {
		d.report(Security, "a filter after the one that forwards connections")
	}
	var f NetworkFilter
	var tcp *TCPProxy
	var http *HTTPManager
	configured := false
	for d.next(&m, &networkFilterFields) {
		switch m.Number {
		case 1:
			f.Name = m.String()
		case 4:
			configured = true
			tcp, http = nil, nil
			url, config := d.extension(m.Message())
			f = NetworkFilter{Name: f.Name, Type: url}
			// Decoded here, so that findings have their path.
			switch value := m.Nested(config); url {
			case tcpProxyType:
				tcp = d.tcpProxy(value)
			case httpManagerType:
				http = d.httpManager(value)
			case networkRBACType:
				f.RBAC = share(d, url, config, func() *RBAC { return d.networkRBAC(value) })
				d.carry(url, f.Restricts())
			case networkExtAuthzType:
				f.ExtAuthz = share(d, url, config, func() *ExtAuthz { return d.networkExtAuthz(value) })
				d.carry(url, f.Restricts())
			case sniClusterType:
				d.fields(value, &sniClusterFields)
			case statsType:
				c.Stats = share(d, url, config, func() *Stats { return d.stats(value, config) })
			}
		}
	}
	switch f.Type {
	case tcpProxyType, httpManagerType:
		c.TCP, c.HTTP = tcp, http
	case networkRBACType, networkExtAuthzType:
		c.Policies = append(c.Policies, f)
	case sniClusterType:
		c.ClusterIsSNI = true
	case metadataExchangeType:
		c.HasMetadata = true
	case statsType, mongoType, mysqlType, postgresType, zookeeperType: // measure only
	default:
		what := "the filter " + f.Name + " of type " + f.Type + " is not supported"
		switch closed = slices.Contains(closedTypes, f.Type); {
		case closed:
			d.report(Unenforced, what)
		case configured:
			d.report(Security, what)
		default:
			d.report(Security, "the filter "+f.Name+" has no configuration")
		}
	}
	return closed
}

// Types of messages that hold the JSON of a message whose type the sender does not have.
const (
	udpaStructType = "udpa.type.v1.TypedStruct"
	xdsStructType  = "xds.type.v3.TypedStruct"
)

// structTypes are the types that may come in such a message: their configurations are not read.
var structTypes = []string{metadataExchangeType, peerMetadataType, statsType}

// extension returns the type and the bytes of the configuration of an extension. For one of structTypes in a TypedStruct,
// the bytes are a google.protobuf.Struct.
func (d *decoder) extension(m wire.Message) (name string, config []byte) {
	url, config := d.any(m)
	name = shortType(url)
	if name == udpaStructType || name == xdsStructType {
		inner, value := d.any(m.Nested(config)) // a TypedStruct has the fields of an Any
		if inner = shortType(inner); slices.Contains(structTypes, inner) {
			return inner, value
		}
	}
	return name, config
}

// configOrigin returns the resource of the configuration that istiod names in metadata.
func (d *decoder) configOrigin(m wire.Message) (origin string) {
	for d.next(&m, &metadataFields) {
		if key, value := d.entry(m.Message()); key == istioMetadata {
			d.strings(value, func(name, text string) {
				if name == "config" {
					origin = text
				}
			})
		}
	}
	return origin
}
