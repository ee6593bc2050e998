package inject

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// meshes are other sidecars that capture a pod's traffic: the names of their containers, and the label or annotation by
// which their injectors select pods.
var meshes = []struct {
	name       string
	containers []string
	key        string
	values     []string // nil: any value
}{
	{"Istio", []string{"istio-proxy", "istio-init", "istio-validation"}, "istio.io/rev", nil},
	{"Istio's ambient mode", nil, "istio.io/dataplane-mode", []string{"ambient"}},
	{"Linkerd", []string{"linkerd-proxy", "linkerd-init"}, "linkerd.io/inject", []string{"enabled", "ingress"}},
	{"Kuma", []string{"kuma-sidecar", "kuma-init"}, "kuma.io/sidecar-injection", []string{"enabled", "true"}},
	{"Consul", []string{"consul-dataplane", "consul-connect-inject-init"}, "consul.hashicorp.com/connect-inject", []string{"true"}},
	{"AWS App Mesh", nil, "appmesh.k8s.aws/sidecarInjectorWebhook", []string{"enabled"}},
}

// otherSidecar returns why a pod that has a sidecar already is left alone, or "". An override of our own is not a sidecar.
func (p *pod) otherSidecar(options Options) (string, error) {
	names := map[string]string{SidecarName: "", options.sidecarName(): "", initName: ""}
	for _, mesh := range meshes {
		for _, name := range mesh.containers {
			names[name] = mesh.name
		}
	}
	for _, list := range []string{"containers", "initContainers"} {
		containers, err := p.containers(list)
		if err != nil {
			return "", err
		}
		for _, c := range containers {
			name := yamledit.Text(c, "name")
			mesh, taken := names[name]
			switch {
			case !taken || name == options.sidecarName() && c["image"] == autoImage:
			case mesh == "":
				return fmt.Sprintf("it already has a container %q", name), nil
			default:
				return fmt.Sprintf("it already has a container %q, of %s", name, mesh), nil
			}
		}
	}
	return "", nil
}

// requestedMeshes returns the other meshes whose injectors select the pod, each with its key.
func (p *pod) requestedMeshes() (found []string, istio bool, err error) {
	for _, mesh := range meshes {
		for _, from := range []string{"labels", "annotations"} {
			m, err := p.mapping("metadata", from)
			if err != nil {
				return nil, false, err
			}
			value, has := m[mesh.key]
			if has && (mesh.values == nil || slices.Contains(mesh.values, fmt.Sprint(value))) {
				found = append(found, fmt.Sprintf("%s (%s %s)", mesh.name, strings.TrimSuffix(from, "s"), mesh.key))
				istio = istio || mesh.key == "istio.io/rev"
			}
		}
	}
	return found, istio, nil
}

// warnOfConflicts warns of other meshes and of ports that the workload and the sidecar both use.
func (p *pod) warnOfConflicts(s *settings) error {
	requested, _, err := p.requestedMeshes()
	if err != nil {
		return err
	}
	for _, mesh := range requested {
		p.warn("%s selects the pod too: two sidecars would capture the same connections; remove one of them", mesh)
	}
	spec := capture.Default()
	taken := slices.DeleteFunc(spec.OwnPorts(), func(port uint16) bool {
		return port == capture.StatusPort || port == capture.DNSPort && !s.dnsCapture
	})
	taken = append(taken, s.statusPort)
	for _, list := range []string{"containers", "initContainers"} {
		containers, err := p.workload(list)
		if err != nil {
			return err
		}
		for _, c := range containers {
			if list == "initContainers" && yamledit.Text(c, "restartPolicy") != "Always" {
				continue // it ends before the workload starts
			}
			declared, _ := c["ports"].([]any)
			for _, d := range declared {
				port, err := portOf(c, yamledit.Get(d, "containerPort"))
				if err == nil && slices.Contains(taken, uint16(port)) {
					p.warn("container %s declares port %d, a port of the sidecar: one of them cannot listen; use another port", yamledit.Text(c, "name"), port)
				}
			}
		}
	}
	return nil
}

// tlsMode is the label by which clients in an Istio mesh select mutual TLS for a pod. The sidecar does not terminate it.
const tlsMode = "security.istio.io/tlsMode"

const tlsDisabled = "disabled"

// disableMeshTLS sets the label if it, or an injector of Istio, would announce mutual TLS.
func (p *pod) disableMeshTLS() error {
	at := []string{"metadata", "labels"}
	labels, err := p.mapping(at...)
	if err != nil {
		return err
	}
	_, istio, err := p.requestedMeshes()
	if err != nil {
		return err
	}
	value, has := labels[tlsMode]
	switch {
	case has && value != tlsDisabled:
		return p.replace(at, at, tlsMode, member{tlsMode, tlsDisabled})
	case !has && istio && len(labels) > 0:
		return p.add(at, object{{tlsMode, tlsDisabled}})
	}
	return nil
}

// undoMeshTLS restores the label, unless it was changed since.
func (p *pod) undoMeshTLS() error {
	at := []string{"metadata", "labels"}
	labels, err := p.mapping(at...)
	if err != nil || labels[tlsMode] != tlsDisabled {
		return err
	}
	if r, was := p.wasAt(append(at, tlsMode)...); was {
		return p.restore(at, tlsMode, r)
	}
	if slices.Contains(p.status.Added, yamledit.Pointer(append(at, tlsMode)...)) {
		p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, at), Kind: yamledit.RemoveMember, Key: tlsMode})
	}
	return nil
}
