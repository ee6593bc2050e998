// Package configview shows people what a control plane has configured: one value for each object, shorter than the resource
// and in words, with its state and what of it is not honoured. The values are compiled from the resources' bytes on request.
// Explain follows a request through the configuration in force.
package configview

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Kind is a kind of object.
type Kind string

// The kinds.
const (
	Clusters  Kind = "cluster"
	Listeners Kind = "listener"
	Routes    Kind = "route"
	Endpoints Kind = "endpoint"
	Policies  Kind = "policy"
	Names     Kind = "name"
)

// Kinds lists the kinds.
var Kinds = []Kind{Clusters, Listeners, Routes, Endpoints, Policies, Names}

// ParseKind returns the kind with a name, in the singular or the plural.
func ParseKind(text string) (Kind, error) {
	for _, k := range Kinds {
		if plural := k.Plural(); text == string(k) || text == plural {
			return k, nil
		}
	}
	return "", fmt.Errorf("%.50q is not a kind of object: use %s", text, strings.Join(kindNames(), ", "))
}

// Plural returns the kind's name for several objects.
func (k Kind) Plural() string {
	if k == Policies {
		return "policies"
	}
	return string(k) + "s"
}

func kindNames() (names []string) {
	for _, k := range Kinds {
		names = append(names, string(k))
	}
	return names
}

// View is the objects of one kind; one of the lists is set.
type View struct {
	Kind      Kind       `json:"kind"`
	Clusters  []Cluster  `json:"clusters,omitempty"`
	Listeners []Listener `json:"listeners,omitempty"`
	Routes    []Table    `json:"routes,omitempty"`
	Endpoints []Endpoint `json:"endpoints,omitempty"`
	Policies  []Policy   `json:"policies,omitempty"`
	Names     []Name     `json:"names,omitempty"`
}

// Len returns the number of objects.
func (v *View) Len() int {
	return len(v.Clusters) + len(v.Listeners) + len(v.Routes) + len(v.Endpoints) + len(v.Policies) + len(v.Names)
}

// ObjectNames returns names by which the objects can be asked for, in order, each once.
func (v *View) ObjectNames() (names []string) {
	for i := range v.Clusters {
		names = append(names, v.Clusters[i].Name)
	}
	for i := range v.Listeners {
		names = append(names, v.Listeners[i].Name)
	}
	for i := range v.Routes {
		names = append(names, v.Routes[i].Name)
	}
	for i := range v.Endpoints {
		names = append(names, v.Endpoints[i].Cluster)
	}
	for i := range v.Policies {
		names = append(names, v.Policies[i].Listener)
	}
	for i := range v.Names {
		names = append(names, v.Names[i].Host)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Object is what all resources have.
type Object struct {
	Name     string    `json:"name"`
	State    State     `json:"state"`
	Version  string    `json:"version,omitempty"`
	Updated  time.Time `json:"updated,omitzero"` // when the version in force was received
	Origin   string    `json:"origin,omitempty"` // resource of Kubernetes that it stems from
	Refusal  string    `json:"refusal,omitempty"`
	Findings []Finding `json:"findings,omitempty"`
}

// State is that of a resource.
type State string

// The states.
const (
	Active  State = "active"
	Warming State = "warming" // not in use before what it needs has come
	Stale   State = "stale"   // a later version was refused, and the last good one is in use
	Refused State = "refused" // each version was refused, and what it concerns is closed
)

// Finding is a part of a resource that is not honoured.
type Finding struct {
	Class    string `json:"class"` // security, traffic or cosmetic
	Type     string `json:"type"`  // such as CDS
	Resource string `json:"resource"`
	Path     string `json:"path,omitempty"` // of the field in the resource
	Problem  string `json:"problem"`
	Origin   string `json:"origin,omitempty"` // resource of Kubernetes that it stems from
}

// ErrNotFound is returned for a name that no object has.
var ErrNotFound = errors.New("not found")

// Show returns the objects of a kind, in the order of their names. A name selects those with that name, and those whose
// host it is; see matches.
func Show(resources controlplane.Resources, kind Kind, name string) (*View, error) {
	c := collect(resources)
	v := &View{Kind: kind}
	switch kind {
	case Clusters:
		v.Clusters = c.clusters(name)
	case Listeners:
		v.Listeners = c.listeners(name)
	case Routes:
		v.Routes = c.tables(name)
	case Endpoints:
		v.Endpoints = c.endpoints(name)
	case Policies:
		v.Policies = c.policies(name)
	case Names:
		v.Names = c.names(name)
	}
	if name != "" && v.Len() == 0 {
		return nil, fmt.Errorf("%w: no %s is named %.200q", ErrNotFound, kind, name)
	}
	return v, nil
}

// FindingsOf returns the findings of all resources, the most important first.
func FindingsOf(resources controlplane.Resources) []Finding {
	all := []Finding{}
	for r := range resources {
		all = append(all, findings(&r)...)
	}
	sort.SliceStable(all, func(i, j int) bool { return importance(all[i].Class) < importance(all[j].Class) })
	return all
}

func importance(class string) int {
	return slices.Index([]string{mesh.Security.String(), mesh.Traffic.String(), mesh.Cosmetic.String()}, class)
}

// findings returns the findings of a resource: of the refused version if there is one.
func findings(r *controlplane.Resource) (all []Finding) {
	list := r.Findings
	if r.Refusal != nil {
		list = r.Refusal.Findings
		if len(list) == 0 { // its bytes are malformed
			all = append(all, Finding{Class: mesh.Security.String(), Type: r.Type.String(), Resource: r.Name, Problem: r.Refusal.Reason})
		}
	}
	for _, f := range list {
		all = append(all, Finding{Class: f.Class.String(), Type: r.Type.String(), Resource: r.Name, Path: f.Path, Problem: f.Problem, Origin: f.Origin})
	}
	return all
}

// matches reports whether a name that a person gave selects an object: it is the object's name or one of its parts between
// bars, so that the host of a service selects the service's clusters.
func matches(object, name string) bool {
	return name == "" || object == name || slices.Contains(strings.Split(object, "|"), name)
}

// collection is the resources by type.
type collection [xds.Types][]controlplane.Resource

func collect(resources controlplane.Resources) *collection {
	var c collection
	for r := range resources {
		c[r.Type] = append(c[r.Type], r)
	}
	return &c
}

// read returns the bytes of a resource to show: those in force, or the refused ones.
func read(r *controlplane.Resource) []byte {
	bytes := r.Bytes
	if bytes == nil && r.Refusal != nil {
		bytes = r.Refusal.Bytes
	}
	if bytes == nil {
		return nil
	}
	b, err := bytes()
	if err != nil {
		return nil
	}
	return b
}

// decoded yields the resources of a type with their values. The value is nil if the bytes are malformed.
func decoded[T any](list []controlplane.Resource, decode func([]byte) (*T, []mesh.Finding, error)) iter.Seq2[Object, *T] {
	return func(yield func(Object, *T) bool) {
		for i := range list {
			value, _, err := decode(read(&list[i]))
			if err != nil {
				value = nil
			}
			if !yield(objectOf(&list[i]), value) {
				return
			}
		}
	}
}

func objectOf(r *controlplane.Resource) Object {
	o := Object{Name: r.Name, State: Active, Version: r.Version, Updated: r.Updated, Findings: findings(r)}
	switch {
	case r.Bytes == nil:
		o.State, o.Version, o.Updated = Refused, "", time.Time{}
	case r.Warming:
		o.State = Warming
	case r.Refusal != nil:
		o.State = Stale
	}
	if r.Refusal != nil {
		o.Refusal = r.Refusal.Reason
	}
	return o
}
