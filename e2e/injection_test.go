package e2e

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// injectedArguments returns the arguments of a container in a manifest that `pillionctl inject` has written.
func injectedArguments(t *testing.T, manifest, container string) []string {
	t.Helper()
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	type containers []struct {
		Name string
		Args []string
	}
	var object struct {
		Spec struct {
			Template struct {
				Spec struct {
					InitContainers containers `yaml:"initContainers"`
				}
			}
		}
	}
	if err := yaml.Unmarshal(text, &object); err != nil {
		t.Fatal(err)
	}
	for _, c := range object.Spec.Template.Spec.InitContainers {
		if c.Name == container {
			return c.Args
		}
	}
	t.Fatalf("%s has no init container %s", manifest, container)
	return nil
}

// The pod has an IPv4 and an IPv6 address, the IPv4 one first. With the same arguments istio-iptables leaves IPv6 alone.
func TestAnInjectedPodCapturesBothFamilies(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	arguments := injectedArguments(t, "../deploy/kustomize/overlays/example/injected.yaml", "pillion-init")
	for i, command := range []string{arguments[0], "istio-iptables"} {
		pod, peer := nettest.PodAndPeer(t)
		listeners := map[netip.Addr]string{}
		for _, address := range []netip.Addr{nettest.PeerIP4, nettest.PeerIP6} {
			listeners[address] = peer.Listen(t, "tcp", netip.AddrPortFrom(address, 0).String()).Addr().String()
		}
		if _, stderr, code := execute(t, pod, []string{pathWith(t, nft), initEnvironment}, append([]string{command}, slices.Clone(arguments[1:])...)...); code != 0 {
			t.Fatalf("%s: exit status %d\n%s", command, code, stderr)
		}
		for address, at := range listeners {
			conn, err := pod.Dial("tcp", at, nettest.Patience)
			if err == nil {
				conn.Close()
			}
			captured := errors.Is(err, syscall.ECONNREFUSED) // there is no agent
			if want := i == 0 || address.Is4(); captured != want {
				t.Errorf("%s: the connection to %v is captured: %v (%v), want %v", command, address, captured, err, want)
			}
		}
	}
}
