package mesh

import "iter"

// The methods below yield the names of other resources that a value refers to. A name may occur more than once.

// SecretNames yields the names of the secrets of a cluster's transports.
func (c *Cluster) SecretNames() iter.Seq[string] {
	return func(yield func(string) bool) {
		for i := range c.Transports {
			if t := c.Transports[i].TLS; t != nil && !(each(yield, t.Certificate) && each(yield, t.Roots)) {
				return
			}
		}
	}
}

// SecretNames yields the names of the secrets of a listener's chains.
func (l *Listener) SecretNames() iter.Seq[string] {
	return func(yield func(string) bool) {
		for chain := range l.chains() {
			if t := chain.TLS; t != nil && !(each(yield, t.Certificates...) && each(yield, t.Roots)) {
				return
			}
		}
	}
}

// RouteNames yields the names of the routes that are resources of their own.
func (l *Listener) RouteNames() iter.Seq[string] {
	return func(yield func(string) bool) {
		for chain := range l.chains() {
			if chain.HTTP != nil && !each(yield, chain.HTTP.RouteName) {
				return
			}
		}
	}
}

// ExtensionNames yields the names of filters whose configuration is a resource of its own.
func (l *Listener) ExtensionNames() iter.Seq[string] {
	return func(yield func(string) bool) {
		for chain := range l.chains() {
			if chain.HTTP == nil {
				continue
			}
			for _, f := range chain.HTTP.Filters {
				if f.OnItsOwn && !each(yield, f.Name) {
					return
				}
			}
		}
	}
}

// NeededExtensions yields the names of filters that refuse all requests without such a resource: they have no default, and are
// not optional.
func (l *Listener) NeededExtensions() iter.Seq[string] {
	return func(yield func(string) bool) {
		for chain := range l.chains() {
			if chain.HTTP == nil {
				continue
			}
			for _, f := range chain.HTTP.Filters {
				if f.OnItsOwn && f.Type == "" && !f.Optional && !each(yield, f.Name) {
					return
				}
			}
		}
	}
}

// ClusterNames yields the names of the clusters that a listener forwards to without RouteNames, and of those that its
// policies ask.
func (l *Listener) ClusterNames() iter.Seq[string] {
	return func(yield func(string) bool) {
		for chain := range l.chains() {
			if chain.TCP != nil {
				for i := range chain.TCP.Clusters {
					if !each(yield, chain.TCP.Clusters[i].Name) {
						return
					}
				}
			}
			if !chain.policyClusters(yield) || chain.HTTP != nil && chain.HTTP.Routes != nil && !chain.HTTP.Routes.clusterNames(yield) {
				return
			}
		}
	}
}

func (c *FilterChain) policyClusters(yield func(string) bool) bool {
	for i := range c.Policies {
		if !c.Policies[i].ExtAuthz.clusterNames(yield) {
			return false
		}
	}
	if c.HTTP == nil {
		return true
	}
	for i := range c.HTTP.Filters {
		f := &c.HTTP.Filters[i]
		if !f.ExtAuthz.clusterNames(yield) {
			return false
		}
		if f.JWT == nil {
			continue
		}
		for _, p := range f.JWT.Providers {
			if p.Remote != nil && !each(yield, p.Remote.Service.Cluster) {
				return false
			}
		}
	}
	return true
}

func (e *ExtAuthz) clusterNames(yield func(string) bool) bool {
	if e == nil {
		return true
	}
	return (e.GRPC == nil || each(yield, e.GRPC.Cluster)) && (e.HTTP == nil || each(yield, e.HTTP.Service.Cluster))
}

// ClusterNames yields the names of the clusters that requests are sent or mirrored to.
func (r *Routes) ClusterNames() iter.Seq[string] {
	return func(yield func(string) bool) { r.clusterNames(yield) }
}

func (r *Routes) clusterNames(yield func(string) bool) bool {
	if !mirrored(yield, r.Mirrors) {
		return false
	}
	for i := range r.Hosts {
		host := &r.Hosts[i]
		if !mirrored(yield, host.Mirrors) {
			return false
		}
		for j := range host.Routes {
			if f := host.Routes[j].Forward; f != nil && !f.clusterNames(yield) {
				return false
			}
		}
	}
	return true
}

func (f *Forward) clusterNames(yield func(string) bool) bool {
	for i := range f.Clusters {
		if !each(yield, f.Clusters[i].Name) {
			return false
		}
	}
	return mirrored(yield, f.Mirrors)
}

func mirrored(yield func(string) bool, mirrors []Mirror) bool {
	for i := range mirrors {
		if !each(yield, mirrors[i].Cluster) {
			return false
		}
	}
	return true
}

// each yields the names that are not empty. It returns false if yield did.
func each(yield func(string) bool, names ...string) bool {
	for _, name := range names {
		if name != "" && !yield(name) {
			return false
		}
	}
	return true
}

// chains yields a listener's chains and its default chain.
func (l *Listener) chains() iter.Seq[*FilterChain] {
	return func(yield func(*FilterChain) bool) {
		for _, chain := range l.Chains {
			if !yield(chain) {
				return
			}
		}
		if l.Default != nil {
			yield(l.Default)
		}
	}
}
