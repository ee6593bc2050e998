package agent

import (
	"crypto/x509"
	"iter"

	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/configdump"
	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// shown is what the admin server shows of the control plane.
type shown struct{ *controlplane.Session }

// Resources implements admin.ControlPlane.
func (s shown) Resources() iter.Seq[configdump.Resource] {
	return func(yield func(configdump.Resource) bool) {
		for r := range s.Session.Resources() {
			resource := configdump.Resource{TypeURL: r.TypeURL, Name: r.Name, Version: r.Version, Updated: r.Updated, Warming: r.Warming, Bytes: r.Bytes}
			if r.Refusal != nil {
				resource.Refusal = &configdump.Refusal{Reason: r.Refusal.Reason, At: r.Refusal.At, Bytes: r.Refusal.Bytes}
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
		for name, cluster := range snapshot.Clusters() {
			if !yield(admin.Cluster{Name: name, Hosts: hosts(snapshot.Hosts(cluster))}) {
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
			e := &l.Endpoints[j]
			host := admin.Host{
				Address: e.Host, Port: e.Port, Weight: e.Weight, Priority: l.Priority, Health: healths[e.Health],
				Region: l.Region, Zone: l.Zone, SubZone: l.SubZone,
			}
			if e.Address.IsValid() {
				host.Address, host.Port = e.Address.Addr().String(), e.Address.Port()
			}
			list = append(list, host)
		}
	}
	return list
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
