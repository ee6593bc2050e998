package controlplane

import (
	"crypto/tls"
	"fmt"
	"strings"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// compiled is what a resource's bytes mean.
type compiled struct {
	value    any // of a type of mesh's; may be nil
	findings []mesh.Finding
	reason   string // why it is not to take the place of a good version; empty if it may
}

// bundle is the roots of trust in a resource.
type bundle struct{ roots []string }

// compile decodes a resource. A resource that is refused has a value as well where its name is enough to close what it
// concerns.
func compile(c *mesh.Compiler, t xds.Type, r *xds.Resource) compiled {
	if r.TypeURL != t.URL() {
		return compiled{value: closed(t, r.Name), reason: fmt.Sprintf("its type is %.200q", r.TypeURL)}
	}
	c.Name(r.Name)
	value, name, findings, err := decode(c, t, r.Value)
	switch l, _ := value.(*mesh.Listener); {
	case err != nil && t == xds.Listeners && name == r.Name:
		// The fields before the malformed one may have the address.
		l.Refused, l.Chains, l.Default = true, nil, nil
		return compiled{value: l, findings: findings, reason: "malformed: " + err.Error()}
	case err != nil:
		return compiled{value: closed(t, r.Name), findings: findings, reason: "malformed: " + err.Error()}
	case name != r.Name:
		return compiled{value: closed(t, r.Name), reason: fmt.Sprintf("the name in it is %.200q", name)}
	}
	reason := refusal(findings)
	if reason != "" && t == xds.Endpoints {
		value = nil // how they are to be reached may be what is not understood
	}
	return compiled{value, findings, reason}
}

// decode returns a value and the name in it.
func decode(c *mesh.Compiler, t xds.Type, b []byte) (value any, name string, findings []mesh.Finding, err error) {
	switch t {
	case xds.Clusters:
		v, findings, err := c.Cluster(b)
		return v, v.Name, findings, err
	case xds.Endpoints:
		a, findings, err := c.Assignment(b)
		return a, a.Name, findings, err
	case xds.Listeners:
		l, findings, err := c.Listener(b)
		return l, l.Name, findings, err
	case xds.Routes:
		r, findings, err := c.Routes(b)
		return r, r.Name, findings, err
	case xds.Secrets:
		s, findings, err := mesh.DecodeSecret(b)
		if err == nil && !s.Refused {
			findings = append(findings, judgeSecret(s)...)
		}
		return s, s.Name, findings, err
	case xds.Extensions:
		f, findings, err := c.Extension(b)
		return f, f.Name, findings, err
	case xds.Names:
		n, findings, err := c.Names(b)
		return n, "", findings, err
	case xds.ProxyConfigs:
		roots, findings, err := mesh.DecodeTrustBundle(b)
		return &bundle{roots}, "", findings, err
	}
	return nil, "", nil, fmt.Errorf("resources of %v are not supported", t)
}

// judgeSecret refuses a secret whose content cannot be used. The finding has no byte of the content.
func judgeSecret(s *mesh.Secret) []mesh.Finding {
	var path string
	var err error
	if s.Certificate != nil {
		path = "tls_certificate"
		_, err = tls.X509KeyPair(s.Certificate.Chain, s.Certificate.Key.PEM())
	} else {
		path = "validation_context.trusted_ca"
		_, err = identity.ParseRoots(s.Roots.CA)
		if err == nil && len(s.Roots.CRL) > 0 {
			path = "validation_context.crl"
			_, err = identity.ParseRevocations(s.Roots.CRL)
		}
	}
	if err == nil {
		return nil
	}
	s.Refused = true
	problem, _, _ := strings.Cut(err.Error(), " after skipping") // what follows is from the text of the key
	return []mesh.Finding{{Class: mesh.Security, Path: path, Problem: problem}}
}

// closed returns a value that refuses everything that uses the resource. It is nil for endpoints: a cluster without them has no
// host; and for a listener: it cannot be found without its address.
func closed(t xds.Type, name string) any {
	switch t {
	case xds.Clusters:
		return &mesh.Cluster{Name: name, Refused: true}
	case xds.Routes:
		return &mesh.Routes{Name: name, Refused: true}
	case xds.Secrets:
		return &mesh.Secret{Name: name, Refused: true}
	case xds.Extensions:
		return &mesh.HTTPFilter{Name: name, Refused: true}
	}
	return nil
}

// refusal returns the findings of security as one text.
func refusal(findings []mesh.Finding) string {
	var first string
	count := 0
	for _, f := range findings {
		if f.Class != mesh.Security {
			continue
		}
		if count == 0 {
			first = f.String()
		}
		count++
	}
	if count > 1 {
		first += fmt.Sprintf(" (and %d more findings of security)", count-1)
	}
	return first
}

// put sets a value in the snapshot, or removes it if value is nil.
func put(edit *mesh.Edit, t xds.Type, name string, value any) {
	switch t {
	case xds.Clusters:
		c, _ := value.(*mesh.Cluster)
		edit.SetCluster(name, c)
	case xds.Endpoints:
		a, _ := value.(*mesh.Assignment)
		edit.SetAssignment(name, a)
	case xds.Listeners:
		l, _ := value.(*mesh.Listener)
		edit.SetListener(name, l)
	case xds.Routes:
		r, _ := value.(*mesh.Routes)
		edit.SetRoutes(name, r)
	case xds.Secrets:
		s, _ := value.(*mesh.Secret)
		edit.SetSecret(name, s)
	case xds.Extensions:
		f, _ := value.(*mesh.HTTPFilter)
		edit.SetExtension(name, f)
	case xds.Names:
		n, _ := value.(*mesh.Names)
		edit.SetNames(n)
	case xds.ProxyConfigs:
		if b, ok := value.(*bundle); ok {
			edit.SetTrustBundle(b.roots)
		} else {
			edit.SetTrustBundle(nil)
		}
	}
}

// local reports whether a secret comes from the agent's identity or from a file, and not from the control plane.
func local(secret string) bool {
	return secret == "default" || secret == "ROOTCA" || strings.HasPrefix(secret, "file-cert:") || strings.HasPrefix(secret, "file-root:")
}
