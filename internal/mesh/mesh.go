// Package mesh compiles the resources of a control plane. It interprets bytes and does no I/O.
//
// No field is ignored silently. Each message has a table of its fields beside the function that reads it: a field is
// decoded, known not to concern pillion, or a Finding. So is a field that the table does not have.
package mesh

import (
	"errors"

	"github.com/pillion-proxy/pillion/internal/wire"
)

var errNoName = errors.New("the resource has no name")

// Compiler compiles resources. Its values share texts and parts that are equal, because the resources of a push have most of
// them in common. Values are never changed. The zero value is ready. A Compiler is used by one goroutine.
//
// Each method returns an error for malformed bytes, beside the value of the fields before the error. The values do not
// share the memory of the bytes.
type Compiler struct {
	d     decoder
	bytes int // of resources since Forget
}

// maxShared bounds the resources whose parts are remembered to be shared, in bytes. What is remembered takes about a tenth.
const maxShared = 16 << 20

// Forget frees what is remembered to be shared. Call it when a push is over.
func (c *Compiler) Forget() { *c = Compiler{} }

// begin returns a decoder for a resource of some bytes.
func (c *Compiler) begin(bytes int) *decoder {
	if c.bytes += bytes; c.bytes > maxShared {
		c.Forget()
	}
	if c.d.texts == nil {
		c.d.texts, c.d.shared = wire.Texts{}, map[sharedKey]any{}
	}
	clear(c.d.path)
	c.d = decoder{path: c.d.path, texts: c.d.texts, shared: c.d.shared}
	return &c.d
}

// Name makes name one of the texts to share.
func (c *Compiler) Name(name string) {
	d := c.begin(0)
	if _, ok := d.texts[name]; !ok {
		d.texts[name] = name
	}
}

// Cluster compiles an envoy.config.cluster.v3.Cluster.
func (c *Compiler) Cluster(b []byte) (*Cluster, []Finding, error) {
	d := c.begin(len(b))
	value := d.cluster(d.read(b))
	return value, d.findings, d.named(value.Name)
}

// Assignment compiles an envoy.config.endpoint.v3.ClusterLoadAssignment.
func (c *Compiler) Assignment(b []byte) (*Assignment, []Finding, error) {
	d := c.begin(len(b))
	value := d.assignment(d.read(b))
	return value, d.findings, d.named(value.Name)
}

// Listener compiles an envoy.config.listener.v3.Listener.
func (c *Compiler) Listener(b []byte) (*Listener, []Finding, error) {
	d := c.begin(len(b))
	value := d.listener(d.read(b))
	return value, d.findings, d.named(value.Name)
}

// Routes compiles an envoy.config.route.v3.RouteConfiguration.
func (c *Compiler) Routes(b []byte) (*Routes, []Finding, error) {
	d := c.begin(len(b))
	value := d.routes(d.read(b))
	return value, d.findings, d.named(value.Name)
}

// Extension compiles an envoy.config.core.v3.TypedExtensionConfig: the configuration of the HTTP filters that have its name
// and OnItsOwn.
func (c *Compiler) Extension(b []byte) (*HTTPFilter, []Finding, error) {
	d := c.begin(len(b))
	value := d.extensionConfig(d.read(b))
	return value, d.findings, d.named(value.Name)
}

// Names compiles an istio.networking.nds.v1.NameTable.
func (c *Compiler) Names(b []byte) (*Names, []Finding, error) {
	d := c.begin(len(b))
	value := d.names(d.read(b))
	return value, d.findings, d.err
}

// named returns the error of a resource with a name.
func (d *decoder) named(name string) error {
	if d.err == nil && name == "" {
		return errNoName
	}
	return d.err
}

// The functions below compile one resource, as the methods of a Compiler do.

// DecodeCluster compiles an envoy.config.cluster.v3.Cluster.
func DecodeCluster(b []byte) (*Cluster, []Finding, error) { return new(Compiler).Cluster(b) }

// DecodeAssignment compiles an envoy.config.endpoint.v3.ClusterLoadAssignment.
func DecodeAssignment(b []byte) (*Assignment, []Finding, error) { return new(Compiler).Assignment(b) }

// DecodeListener compiles an envoy.config.listener.v3.Listener.
func DecodeListener(b []byte) (*Listener, []Finding, error) { return new(Compiler).Listener(b) }

// DecodeRoutes compiles an envoy.config.route.v3.RouteConfiguration.
func DecodeRoutes(b []byte) (*Routes, []Finding, error) { return new(Compiler).Routes(b) }

// DecodeExtension compiles an envoy.config.core.v3.TypedExtensionConfig.
func DecodeExtension(b []byte) (*HTTPFilter, []Finding, error) { return new(Compiler).Extension(b) }

// DecodeNames compiles an istio.networking.nds.v1.NameTable.
func DecodeNames(b []byte) (*Names, []Finding, error) { return new(Compiler).Names(b) }

// The resources below have keys or certificates. Nothing of them is remembered to be shared.

// DecodeSecret compiles an envoy.extensions.transport_sockets.tls.v3.Secret. An error means that its bytes are malformed.
func DecodeSecret(b []byte) (*Secret, []Finding, error) {
	var d decoder
	s := d.secret(d.read(b))
	return s, d.findings, d.named(s.Name)
}

// DecodeTrustBundle returns the roots of trust in an istio.mesh.v1alpha1.ProxyConfig, each as PEM. An error means that its
// bytes are malformed.
func DecodeTrustBundle(b []byte) (roots []string, findings []Finding, err error) {
	var d decoder
	roots = d.trustBundle(d.read(b))
	return roots, d.findings, d.err
}
