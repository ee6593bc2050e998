package edge

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Names of the tables of routes.
const (
	routesName   = "gateway"
	redirectName = "redirect"
)

// Kinds of values in edit.now.
const (
	aListener = 'l'
	aTable    = 'r'
	aCluster  = 'c'
	aSecret   = 's'
)

// edit makes the next snapshot. Values that are made from the same text as before stay, so that connections do.
type edit struct {
	*mesh.Edit
	before, now map[string]string // texts of values, by kind and name
}

// changed reports whether a value is made from another text than before.
func (e *edit) changed(kind rune, name, text string) bool {
	key := string(kind) + name
	e.now[key] = text
	old, has := e.before[key]
	return !has || old != text
}

// removeOthers removes the values that were not made again.
func (e *edit) removeOthers() {
	for key := range e.before {
		if _, kept := e.now[key]; kept {
			continue
		}
		switch name := key[1:]; rune(key[0]) {
		case aListener:
			e.SetListener(name, nil)
		case aTable:
			e.SetRoutes(name, nil)
		case aCluster:
			e.SetCluster(name, nil)
		case aSecret:
			e.SetSecret(name, nil)
		}
	}
}

// add adds all values of c. It reads the certificates.
func (e *edit) add(c *Config) error {
	secrets, err := e.addCertificates(c)
	if err != nil {
		return err
	}
	e.addRoutes(c.Routes)
	for _, address := range c.Listen {
		e.addListener(address, routesName, secrets, c.Proxied)
	}
	if len(c.Redirect) > 0 {
		e.addRedirect(c.Listen[0].Port())
	}
	for _, address := range c.Redirect {
		e.addListener(address, redirectName, nil, c.Proxied)
	}
	return nil
}

func (e *edit) addCertificates(c *Config) (names []string, err error) {
	for i, path := range c.Certificates {
		chain, err := identity.ReadFile(path)
		if err != nil {
			return nil, &Error{"cert", err}
		}
		key, err := identity.ReadFile(c.Keys[i])
		if err != nil {
			return nil, &Error{"key", err}
		}
		if _, err := tls.X509KeyPair(chain, key); err != nil {
			return nil, invalid("cert", "%s with the key %s: %w", path, c.Keys[i], err)
		}
		name := "certificate:" + path
		if names = append(names, name); e.changed(aSecret, name, string(chain)+string(key)) {
			e.SetSecret(name, &mesh.Secret{Name: name, Certificate: &mesh.Certificate{Chain: chain, Key: mesh.NewPrivateKey(key)}})
		}
	}
	return names, nil
}

// addListener adds a listener, of HTTPS if there are certificates.
func (e *edit) addListener(address netip.AddrPort, routes string, certificates []string, proxied bool) {
	name := fmt.Sprintf("0.0.0.0_%d", address.Port())
	if address.Addr().IsValid() {
		name = fmt.Sprintf("%s_%d", address.Addr(), address.Port())
	}
	if !e.changed(aListener, name, fmt.Sprint(routes, proxied, certificates)) {
		return
	}
	l := &mesh.Listener{
		Name: name, Addresses: []netip.AddrPort{address}, Direction: mesh.Outbound, FiltersTimeout: handshakeTimeout,
		Chains: []*mesh.FilterChain{{Name: name, HTTP: manager(routes), HandshakeTimeout: handshakeTimeout}},
	}
	if !address.Addr().IsValid() {
		l.Addresses = []netip.AddrPort{netip.AddrPortFrom(netip.IPv4Unspecified(), address.Port()), netip.AddrPortFrom(netip.IPv6Unspecified(), address.Port())}
	}
	if proxied {
		l.Filters = append(l.Filters, mesh.ListenerFilter{Kind: mesh.ProxyProtocol})
	}
	if len(certificates) > 0 {
		l.Filters = append(l.Filters, mesh.ListenerFilter{Kind: mesh.TLSInspector})
		l.Chains[0].TLS = &mesh.DownstreamTLS{ALPN: []string{"h2", "http/1.1"}, Certificates: certificates}
	}
	e.SetListener(name, l)
}

// handshakeTimeout is that of Istio's gateways.
const handshakeTimeout = 15 * time.Second

// manager returns what istiod configures for the clients of a gateway: nothing that they send is trusted. Responses keep
// their server field, because there is no mesh that would have a name.
func manager(routes string) *mesh.HTTPManager {
	h := mesh.DefaultManager()
	h.RouteName = routes
	h.UseRemoteAddress = true
	h.ClientCert = mesh.ReplaceClientCert
	h.ClientCertDetails = mesh.ClientCertDetails{Subject: true, Cert: true, DNS: true, URI: true}
	h.NormalizePath = true
	h.ServerHeader = mesh.PassServer
	h.Upgrades = []mesh.Upgrade{{Protocol: "websocket"}}
	h.MaxHeaderKiB, h.MaxHeaders = 0, 0 // those of the flags
	return h
}

// addRoutes adds the table of routes, and a cluster for each route.
func (e *edit) addRoutes(routes []Route) {
	// Longer prefixes come first: the first route of a host that matches is used.
	routes = slices.Clone(routes)
	sort.Slice(routes, func(i, j int) bool {
		a, b := &routes[i], &routes[j]
		return cmp.Or(strings.Compare(a.Host, b.Host), cmp.Compare(len(b.Prefix), len(a.Prefix)), strings.Compare(a.Prefix, b.Prefix)) < 0
	})
	text := ""
	for i := range routes {
		e.addCluster(&routes[i])
		text += routes[i].name() + "\n"
	}
	if !e.changed(aTable, routesName, text) {
		return
	}
	table := &mesh.Routes{Name: routesName, IgnorePort: true}
	for i := range routes {
		r := &routes[i]
		last := len(table.Hosts) - 1
		if last < 0 || table.Hosts[last].Name != r.Host {
			last++
			table.Hosts = append(table.Hosts, mesh.VirtualHost{Name: r.Host, Domains: []mesh.Domain{mesh.DomainOf(r.Host)}, Retry: retry()})
		}
		host := &table.Hosts[last]
		host.Routes = append(host.Routes, mesh.Route{
			Name: r.name(), Match: matchOf(r.Prefix),
			Forward: &mesh.Forward{NotFoundCode: 503, Clusters: []mesh.WeightedCluster{{Name: r.name(), Weight: 1}}},
		})
	}
	e.SetRoutes(routesName, table)
}

func matchOf(prefix string) mesh.RouteMatch {
	if prefix == "/" {
		return mesh.RouteMatch{Kind: mesh.PathPrefix, Path: prefix}
	}
	return mesh.RouteMatch{Kind: mesh.PathSeparatedPrefix, Path: prefix}
}

// retry returns Istio's default policy.
func retry() *mesh.RetryPolicy {
	r := mesh.DefaultRetry()
	r.On = mesh.RetryConnectFailure | mesh.RetryRefusedStream | mesh.RetryUnavailable | mesh.RetryCancelled
	r.Retries, r.OtherHosts, r.HostChoices = 2, true, 5
	return r
}

func (e *edit) addCluster(r *Route) {
	if !e.changed(aCluster, r.name(), r.text) {
		return
	}
	c := &mesh.Cluster{
		Name: r.name(), Hosts: &mesh.Assignment{Name: r.name(), Localities: []mesh.Locality{{Endpoints: r.To}}},
		Balancing: mesh.Balancing{Policy: mesh.LeastRequest, Choices: 2},
		Breakers:  mesh.Breakers{Connections: math.MaxUint32, Pending: math.MaxUint32, Requests: math.MaxUint32, Retries: math.MaxUint32},
		Service:   mesh.Service{Host: r.Host, Name: r.Host},
	}
	if slices.ContainsFunc(r.To, func(e mesh.Endpoint) bool { return e.Host != "" }) {
		c.Discovery, c.DNS = mesh.StrictDNS, mesh.DNS{Refresh: time.Minute, RespectTTL: true, Family: mesh.DNSAll}
	}
	e.SetCluster(r.name(), c)
}

// addRedirect adds the table of a listener whose requests are redirected to a port of HTTPS.
func (e *edit) addRedirect(port uint16) {
	if !e.changed(aTable, redirectName, fmt.Sprint(port)) {
		return
	}
	to := &mesh.Redirect{Scheme: "https", Code: 301}
	if to.Port = uint32(port); port == 443 {
		to.Port = 0
	}
	e.SetRoutes(redirectName, &mesh.Routes{Name: redirectName, Hosts: []mesh.VirtualHost{{
		Name: redirectName, Domains: []mesh.Domain{{Kind: mesh.DomainAny}},
		Routes: []mesh.Route{{Name: redirectName, Match: mesh.RouteMatch{Kind: mesh.PathPrefix, Path: "/"}, Redirect: to}},
	}}})
}
