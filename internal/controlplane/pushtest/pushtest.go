// Package pushtest has recorded pushes of istiod. Only tests import it.
package pushtest

import (
	"bytes"
	"compress/gzip"
	_ "embed"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/pillion-proxy/pillion/internal/wire"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// The recorded streams: DeltaDiscoveryResponses of istiod, each after its length.
var (
	//go:embed sidecar.gz
	sidecar []byte
	//go:embed watch.gz
	watch []byte
	//go:embed gateway.gz
	gateway []byte
)

// Sidecar returns the first push to a sidecar.
func Sidecar() []xds.Update { return unpack(sidecar) }

// Gateway returns the first push to a gateway with servers of plain HTTP, TLS of several modes, and TCP. Its secrets are missing.
func Gateway() []xds.Update { return unpack(gateway) }

// Watch returns a sidecar's stream while routes and services change.
func Watch() []xds.Update { return unpack(watch) }

func unpack(packed []byte) (updates []xds.Update) {
	unpacker, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		panic(err)
	}
	plain, err := io.ReadAll(unpacker)
	if err != nil {
		panic(err)
	}
	for len(plain) > 0 {
		size, n := binary.Uvarint(plain)
		updates = append(updates, response(plain[n:n+int(size)]))
		plain = plain[n+int(size):]
	}
	return updates
}

// response decodes a DeltaDiscoveryResponse.
func response(b []byte) (u xds.Update) {
	var err error
	m := wire.Read(b, &err)
	for m.Next() {
		switch m.Number {
		case 2:
			var r xds.Resource
			for m := m.Message(); m.Next(); {
				switch m.Number {
				case 2:
					for m := m.Message(); m.Next(); {
						switch m.Number {
						case 1:
							r.TypeURL = m.String()
						case 2:
							r.Value = m.Bytes()
						}
					}
				case 3:
					r.Name = m.String()
				}
			}
			u.Resources = append(u.Resources, r)
		case 4:
			url := m.String()
			for u.Type = 0; u.Type.URL() != url; u.Type++ {
			}
		case 6:
			u.Removed = append(u.Removed, m.String())
		}
	}
	if err != nil {
		panic(err)
	}
	return u
}

// Thousand returns a push with 1,000 services of two ports each: the recorded one, in which clusters, endpoints and a
// listener of the service reviews and a virtual host of httpbin are cloned. The names of the clones have its length, so that
// the lengths in the messages stay right.
func Thousand() []xds.Update {
	updates := Sidecar()
	for i := range updates {
		u := &updates[i]
		for _, r := range u.Resources {
			switch {
			case u.Type == xds.Routes && r.Name == "8000":
				r.Value = cloneHosts(r.Value)
				u.Resources = replace(u.Resources, r)
			case u.Type == xds.Listeners && r.Name == "10.96.0.10_9443",
				u.Type < xds.Listeners && (r.Name == "outbound|9080||reviews.default.svc.cluster.local" || r.Name == "outbound|9443||reviews.default.svc.cluster.local"):
				if u.Type == xds.Endpoints {
					r.Value = moreEndpoints(r.Value)
				}
				for n := range 1000 {
					u.Resources = append(u.Resources, xds.Resource{Name: string(clone([]byte(r.Name), n)), TypeURL: r.TypeURL, Value: clone(r.Value, n)})
				}
			}
		}
	}
	return updates
}

func clone(b []byte, n int) []byte {
	name := fmt.Appendf(nil, "svc%04d", n)
	b = bytes.ReplaceAll(bytes.ReplaceAll(b, []byte("reviews"), name), []byte("httpbin"), name)
	address := fmt.Appendf(nil, "10.1%d.%d.1%d", n/100, n/10%10, n%10)
	return bytes.ReplaceAll(bytes.ReplaceAll(b, []byte("10.96.0.10"), address), []byte("10.96.1.10"), address)
}

// cloneHosts clones the virtual host of httpbin.
func cloneHosts(b []byte) []byte {
	var err error
	clones := bytes.Clone(b)
	m := wire.Read(b, &err)
	for m.Next() {
		if host := m.Bytes; m.Number == 2 && bytes.Contains(host(), []byte("httpbin.default.svc.cluster.local:8000")) {
			for n := range 1000 {
				clones = wire.AppendBytes(clones, 2, clone(m.Bytes(), n))
			}
		}
	}
	if err != nil {
		panic(err)
	}
	return clones
}

// moreEndpoints repeats the endpoints of an assignment in a second locality.
func moreEndpoints(b []byte) []byte {
	var err error
	more := bytes.Clone(b)
	m := wire.Read(b, &err)
	for m.Next() {
		if m.Number == 2 {
			more = wire.AppendBytes(more, 2, m.Bytes())
		}
	}
	if err != nil {
		panic(err)
	}
	return more
}

func replace(resources []xds.Resource, r xds.Resource) []xds.Resource {
	for i := range resources {
		if resources[i].Name == r.Name {
			resources[i] = r
		}
	}
	return resources
}
