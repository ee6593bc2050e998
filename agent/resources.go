package agent

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"iter"
	"net/netip"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/certview"
	"github.com/pillion-proxy/pillion/internal/configdump"
	"github.com/pillion-proxy/pillion/internal/configview"
	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/metrics"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// shown is what the admin server shows of the control plane.
type shown struct {
	*controlplane.Session
	balancer *balance.Balancer
	count    func(to map[netip.AddrPort]int)       // adds the open connections to each endpoint
	unbound  func() map[string]*configdump.Refusal // listeners that cannot be bound
}

// Resources implements admin.ControlPlane.
func (s shown) Resources() iter.Seq[configdump.Resource] {
	return func(yield func(configdump.Resource) bool) {
		unbound := s.unbound()
		for r := range s.Session.Resources() {
			resource := configdump.Resource{TypeURL: r.TypeURL, Name: r.Name, Version: r.Version, Updated: r.Updated, Warming: r.Warming, Bytes: r.Bytes}
			if r.Refusal != nil {
				resource.Refusal = &configdump.Refusal{Reason: r.Refusal.Reason, At: r.Refusal.At, Bytes: r.Refusal.Bytes}
			}
			if resource.Refusal == nil && r.TypeURL == xds.Listeners.URL() {
				resource.Refusal = unbound[r.Name]
			}
			if !yield(resource) {
				return
			}
		}
	}
}

// Clusters implements admin.ControlPlane.
func (s shown) Clusters() iter.Seq[admin.Cluster] {
	return func(yield func(admin.Cluster) bool) {
		snapshot := s.Snapshot()
		if snapshot == nil {
			return
		}
		connections := make(map[netip.AddrPort]int)
		s.count(connections)
		for name, cluster := range snapshot.Clusters() {
			list := hosts(snapshot.Hosts(cluster))
			if used := s.balancer.Known(name); used != nil {
				list = usedHosts(used, connections)
			}
			b := &cluster.Breakers
			if !yield(admin.Cluster{Name: name, Hosts: list, Limits: admin.Limits{b.Connections, b.Pending, b.Requests, b.Retries}}) {
				return
			}
		}
	}
}

func hosts(assignment *mesh.Assignment) (list []admin.Host) {
	if assignment == nil {
		return nil
	}
	for i := range assignment.Localities {
		l := &assignment.Localities[i]
		for j := range l.Endpoints {
			list = append(list, host(l, &l.Endpoints[j]))
		}
	}
	return list
}

func host(l *mesh.Locality, e *mesh.Endpoint) admin.Host {
	h := admin.Host{
		Address: e.Host, Port: e.Port, Weight: e.Weight, Priority: l.Priority, Health: healths[e.Health],
		Region: l.Region, Zone: l.Zone, SubZone: l.SubZone,
	}
	if e.Address.IsValid() {
		h.Address, h.Port = e.Address.Addr().String(), e.Address.Port()
	}
	return h
}

// usedHosts returns the hosts of a cluster that requests have gone to. Hosts by name are there with their addresses.
func usedHosts(c *balance.Cluster, connections map[netip.AddrPort]int) (list []admin.Host) {
	for _, state := range c.Hosts() {
		h := host(state.Locality, &state.Endpoint)
		h.Ejected = state.Ejected()
		if total := state.Stats.Requests.Load(); total > 0 {
			h.Use = &admin.Use{
				Active: uint64(max(state.Active(), 0)), Total: total, Successes: state.Stats.Successes.Load(),
				Errors: state.Stats.Failures.Load(), ConnectFailures: state.Stats.Refused.Load(),
				Connections: uint64(connections[state.Address]),
			}
		}
		list = append(list, h)
	}
	return list
}

// inUse returns the endpoints of a cluster that requests have gone to.
func (a *Agent) inUse(cluster string) (list []configview.Endpoint, ok bool) {
	c := a.balancer.Known(cluster)
	if c == nil {
		return nil, false
	}
	for _, state := range c.Hosts() {
		e := configview.EndpointOf(cluster, state.Locality, &state.Endpoint)
		if e.Usable, e.Active = state.Healthy, max(state.Active(), 0); state.Ejected() {
			e.Health = configview.Ejected
		}
		e.Load, e.Panic = fmt.Sprintf("%d%%", state.Load), state.Panic
		list = append(list, e)
	}
	return list, true
}

// healths are the names in envoy.config.core.v3.HealthStatus. An endpoint of unknown health counts as healthy.
var healths = [...]string{
	mesh.HealthUnknown: "HEALTHY", mesh.Healthy: "HEALTHY", mesh.Unhealthy: "UNHEALTHY", mesh.Draining: "DRAINING",
	mesh.TimedOut: "TIMEOUT", mesh.Degraded: "DEGRADED",
}

// Identity implements admin.ControlPlane.
func (s shown) Identity() *admin.Identity {
	current := s.Session.Identity()
	if current == nil {
		return nil
	}
	identity := &admin.Identity{Roots: current.Roots.PEM, Since: current.Certificate.Leaf.NotBefore}
	for _, raw := range current.Certificate.Certificate {
		if certificate, err := x509.ParseCertificate(raw); err == nil {
			identity.Chain = append(identity.Chain, certificate)
		}
	}
	return identity
}

// certificates implements certview.Source.
type certificates struct{ *controlplane.Session }

// Certificates implements certview.Source.
func (c certificates) Certificates() certview.Status {
	s := c.Status().Identity
	return certview.Status{Source: s.Source, Renewal: s.Renewal, Renewals: s.Renewals, Failures: s.Failures, LastError: s.LastError}
}

// controlPlaneCounts are the numbers of the session, for the metrics.
func (a *Agent) controlPlaneCounts() metrics.ControlPlane {
	s := a.plane.session.Status()
	counts := metrics.ControlPlane{
		Connected: s.Stream.Connected, Streams: s.Stream.Streams, Failed: s.Stream.Failed, Lost: s.Stream.Lost,
		LastPush: s.LastPush, Initialized: s.Initialized, Initializing: s.Initializing,
		Expiry: s.Identity.NotAfter, Renewals: s.Identity.Renewals, Failures: s.Identity.Failures,
		Calls: s.Calls.All, FailedCalls: s.Calls.Failed,
	}
	if a.authorizer != nil {
		counts.Authz.Allowed, counts.Authz.Denied, counts.Authz.Unanswered = a.authorizer.Asked()
		counts.Authz.Fetched, counts.Authz.Unfetched = a.authorizer.KeyFetches()
	}
	for t := range xds.Type(xds.Types) {
		of := &s.Stream.Types[t]
		counts.Types = append(counts.Types, metrics.PushType{
			Name: t.String(), Resources: of.Held, Accepted: of.Updates - of.Rejected, Rejected: of.Rejected,
			Bytes: s.Counts[t].Bytes, Decoding: s.Counts[t].Decoded,
		})
	}
	for class := mesh.Cosmetic; class <= mesh.Security; class++ {
		sum := 0
		for t := range s.Findings {
			sum += s.Findings[t][class]
		}
		counts.Findings = append(counts.Findings, metrics.Findings{Class: class.String(), Count: sum})
	}
	return counts
}

// livePlane returns the function that describes the session to people, or nil without a control plane.
func (a *Agent) livePlane() func() *live.ControlPlane {
	if a.plane.session == nil {
		return nil
	}
	return a.describeSession
}

func (a *Agent) describeSession() *live.ControlPlane {
	s, now := a.plane.session.Status(), time.Now()
	c := &live.ControlPlane{
		Address: s.Address, Server: serverName(s.Stream.Server), Connected: s.Stream.Connected, Configured: s.Initialized,
		Types: []live.PushType{}, Identity: describeIdentity(&s.Identity, now),
	}
	if !s.Stream.Since.IsZero() {
		c.SinceSeconds = now.Sub(s.Stream.Since).Seconds()
	}
	if !s.Stream.Connected && s.Stream.LastError != nil {
		c.Why = s.Stream.LastError.Error()
	}
	if !s.LastPush.IsZero() {
		c.PushAgeSeconds = now.Sub(s.LastPush).Seconds()
	}
	if a.accepting != nil {
		for _, f := range a.accepting.Failures() {
			c.Unbound = append(c.Unbound, f.Listener+": "+f.Err.Error())
		}
	}
	for t := range xds.Type(xds.Types) {
		c.SecurityFindings += s.Findings[t][mesh.Security]
		c.Unenforced += s.Findings[t][mesh.Unenforced]
		c.TrafficFindings += s.Findings[t][mesh.Traffic]
		c.CosmeticFindings += s.Findings[t][mesh.Cosmetic]
		if of := &s.Stream.Types[t]; of.Updates > 0 {
			c.Types = append(c.Types, live.PushType{
				Type: t.String(), Resources: of.Held, Pushes: of.Updates, Rejected: of.Rejected, AgeSeconds: now.Sub(of.Last).Seconds(),
				Version: of.Version, Error: of.LastError,
			})
		}
	}
	return c
}

func describeIdentity(s *controlplane.IdentityStatus, now time.Time) *live.Identity {
	if s.Source == "" {
		return nil
	}
	i := &live.Identity{Source: s.Source, SPIFFE: s.SPIFFE, Expires: s.NotAfter, Renewals: s.Renewals, Failures: s.Failures}
	if !s.NotAfter.IsZero() {
		i.ExpiresSeconds = s.NotAfter.Sub(now).Seconds()
	}
	if s.LastError != nil {
		i.Why = s.LastError.Error()
	}
	if s.RevocationError != nil {
		i.Problems = append(i.Problems, "revocation lists: "+s.RevocationError.Error())
	}
	if s.OutputError != nil {
		i.Problems = append(i.Problems, "not written to the output directory: "+s.OutputError.Error())
	}
	return i
}

// serverName returns name and version of an istiod from what it sends, or the text as it is.
func serverName(identifier string) string {
	var istiod struct {
		ID   string
		Info struct{ Version string }
	}
	if json.Unmarshal([]byte(identifier), &istiod) != nil || istiod.ID == "" {
		return identifier
	}
	return strings.TrimSpace(istiod.ID + " " + istiod.Info.Version)
}

// serviceOf returns the service of a cluster, as metrics name it.
func (a *Agent) serviceOf(cluster string) (host, name, namespace string) {
	if a.mesh() == nil || a.mesh().Snapshot() == nil {
		return "", "", ""
	}
	c := a.mesh().Snapshot().Cluster(cluster)
	if c == nil {
		return "", "", ""
	}
	return c.Service.Host, c.Service.Name, c.Service.Namespace
}
