// Package mesh compiles the resources of a control plane. It interprets bytes and does no I/O.
//
// No field is ignored silently. Each message has a table of its fields beside the function that reads it: a field is
// decoded, known not to concern pillion, or a Finding. So is a field that the table does not have.
package mesh

import "errors"

var errNoName = errors.New("the resource has no name")

// DecodeCluster compiles an envoy.config.cluster.v3.Cluster. An error means that its bytes are malformed.
func DecodeCluster(b []byte) (*Cluster, []Finding, error) {
	var d decoder
	c := d.cluster(d.read(b))
	if d.err == nil && c.Name == "" {
		d.err = errNoName
	}
	return c, d.findings, d.err
}

// DecodeAssignment compiles an envoy.config.endpoint.v3.ClusterLoadAssignment. An error means that its bytes are
// malformed.
func DecodeAssignment(b []byte) (*Assignment, []Finding, error) {
	var d decoder
	a := d.assignment(d.read(b))
	if d.err == nil && a.Name == "" {
		d.err = errNoName
	}
	return a, d.findings, d.err
}

// DecodeRoutes compiles an envoy.config.route.v3.RouteConfiguration. An error means that its bytes are malformed.
func DecodeRoutes(b []byte) (*Routes, []Finding, error) {
	var d decoder
	r := d.routes(d.read(b))
	if d.err == nil && r.Name == "" {
		d.err = errNoName
	}
	return r, d.findings, d.err
}

// DecodeSecret compiles an envoy.extensions.transport_sockets.tls.v3.Secret. An error means that its bytes are malformed.
func DecodeSecret(b []byte) (*Secret, []Finding, error) {
	var d decoder
	s := d.secret(d.read(b))
	if d.err == nil && s.Name == "" {
		d.err = errNoName
	}
	return s, d.findings, d.err
}

// DecodeNames compiles an istio.networking.nds.v1.NameTable. An error means that its bytes are malformed.
func DecodeNames(b []byte) (*Names, []Finding, error) {
	var d decoder
	n := d.names(d.read(b))
	return n, d.findings, d.err
}

// DecodeTrustBundle returns the roots of trust in an istio.mesh.v1alpha1.ProxyConfig, each as PEM. An error means that its
// bytes are malformed.
func DecodeTrustBundle(b []byte) (roots []string, findings []Finding, err error) {
	var d decoder
	roots = d.trustBundle(d.read(b))
	return roots, d.findings, d.err
}
