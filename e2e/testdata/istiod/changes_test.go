package istiod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	discovery "k8s.io/api/discovery/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

const (
	reviews    = "reviews.default.svc.cluster.local"
	reviewsV1  = "outbound|9080|v1|" + reviews
	reviewsEDS = "outbound|9080||" + reviews
)

const strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: default}\nspec: {mtls: {mode: STRICT}}\n"

func readCase(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("testdata/cases/" + name + ".yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// converged waits until the client has what istiod has, besides what condition asks for.
func (x *proxy) converged(t *testing.T, p *plane, condition func() error) {
	t.Helper()
	await(t, func() error { return errors.Join(condition(), x.synced(p), x.sameAsDump(p)) })
}

// has returns a condition: that the client's resource has, or has not, a text in its bytes.
func (x *proxy) has(t xds.Type, name, text string, want bool) func() error {
	return func() error {
		if got := bytes.Contains(x.get(t, name), []byte(text)); got != want {
			return fmt.Errorf("%v %s has %q: %v, want %v", t, name, text, got, want)
		}
		return nil
	}
}

func TestChangesAtRunTimeArrive(t *testing.T) {
	for kind, test := range map[string]struct {
		text string
		of   xds.Type
		name string
		sign string // a text in the resource by which the change is seen
		gone bool   // the change takes the sign away
	}{
		"VirtualService":      {readCase(t, "01-weighted"), xds.Routes, "9080", reviewsV1, false},
		"DestinationRule":     {readCase(t, "01-weighted"), xds.Clusters, reviewsV1, reviewsV1, false},
		"AuthorizationPolicy": {readCase(t, "06-authz"), xds.Listeners, "virtualInbound", "ns[default]-policy[deny]", false},
		"PeerAuthentication":  {strict, xds.Listeners, "virtualInbound", "raw_buffer", true},
		"ServiceEntry":        {readCase(t, "08-serviceentry"), xds.Endpoints, "outbound|5432||db.example.test", "198.51.100.3", false},
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			p := startPlane(t, "")
			protocols(t, func(t *testing.T, delta bool) {
				x := startProxy(t, p, sidecar(), delta)
				x.converged(t, p, x.has(test.of, test.name, test.sign, test.gone))
				p.apply(test.text)
				x.converged(t, p, x.has(test.of, test.name, test.sign, !test.gone))
				p.remove(test.text)
				x.converged(t, p, x.has(test.of, test.name, test.sign, test.gone))
				x.stop()
			})
		})
	}
}

func TestAChangedWeightArrives(t *testing.T) {
	text := readCase(t, "01-weighted")
	p := startPlane(t, text)
	protocols(t, func(t *testing.T, delta bool) {
		x := startProxy(t, p, sidecar(), delta)
		for _, weight := range []int{10, 50, 10} {
			p.apply(strings.ReplaceAll(strings.ReplaceAll(text, "weight: 10", fmt.Sprintf("weight: %d", weight)), "weight: 90", fmt.Sprintf("weight: %d", 100-weight)))
			x.converged(t, p, func() error { return x.weight(weight) })
		}
		x.stop()
	})
}

// weight returns nil if the second cluster of the reviews' route has a weight.
func (x *proxy) weight(want int) error {
	b := x.get(xds.Routes, "9080")
	if b == nil {
		return errors.New("no routes")
	}
	routes, _, err := mesh.DecodeRoutes(b)
	if err != nil {
		return err
	}
	for _, host := range routes.Hosts {
		for _, route := range host.Routes {
			if route.Forward == nil {
				continue
			}
			for _, cluster := range route.Forward.Clusters {
				if cluster.Name == "outbound|9080|v2|"+reviews && int(cluster.Weight) == want {
					return nil
				}
			}
		}
	}
	return fmt.Errorf("no route with the weight %d", want)
}

func TestChangedEndpointsArrive(t *testing.T) {
	p := startPlane(t, "")
	store := p.KubeClient().Kube().DiscoveryV1().EndpointSlices("default")
	protocols(t, func(t *testing.T, delta bool) {
		x := startProxy(t, p, sidecar(), delta)
		x.converged(t, p, x.has(xds.Endpoints, reviewsEDS, "203.0.113.77", false))
		slice, err := store.Get(t.Context(), "reviews-1", meta.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		before := slice.DeepCopy()
		slice.Endpoints = append(slice.Endpoints, discovery.Endpoint{Addresses: []string{"203.0.113.77"}})
		update := func(slice *discovery.EndpointSlice) {
			if _, err := store.Update(t.Context(), slice, meta.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		clusters := x.count(xds.Clusters)
		update(slice)
		x.converged(t, p, x.has(xds.Endpoints, reviewsEDS, "203.0.113.77", true))
		if again := x.count(xds.Clusters); again != clusters {
			t.Errorf("a change of endpoints pushed clusters: %d responses, before %d", again, clusters)
		}
		update(before)
		x.converged(t, p, x.has(xds.Endpoints, reviewsEDS, "203.0.113.77", false))
		x.stop()
	})
}

func TestWhatWasRemovedMeanwhileIsGoneAfterAReconnect(t *testing.T) {
	text := readCase(t, "08-serviceentry")
	p := startPlane(t, text)
	protocols(t, func(t *testing.T, delta bool) {
		const cluster, listener = "outbound|5432||db.example.test", "198.51.100.210_5432"
		present := func(x *proxy, want bool) func() error {
			return func() error {
				if got := slices.Contains(x.names(xds.Clusters), cluster) && slices.Contains(x.names(xds.Listeners), listener); got != want {
					return fmt.Errorf("%s and %s are there: %v, want %v", cluster, listener, got, want)
				}
				return nil
			}
		}
		x := startProxy(t, p, sidecar(), delta)
		x.converged(t, p, present(x, true))
		p.stop()
		p.remove(text)
		if err := present(x, true)(); err != nil {
			t.Errorf("without a control plane: %v", err)
		}
		p.start()
		x.converged(t, p, present(x, false))
		x.stop()
		p.apply(text)
	})
}

func TestARejectionIsShownUntilAnUpdateIsAccepted(t *testing.T) {
	p := startPlane(t, "")
	policy := readCase(t, "06-authz")
	protocols(t, func(t *testing.T, delta bool) {
		x := startProxy(t, p, sidecar(), delta)
		x.converged(t, p, func() error { return nil })
		x.rejecting(func(kind xds.Type, name string) string {
			if kind == xds.Listeners && name == "virtualInbound" {
				return "a filter that is not supported"
			}
			return ""
		})
		p.apply(policy)
		await(t, func() error {
			status, err := p.status(sidecarPod + ".default")
			if err != nil {
				return err
			}
			if got := status.Resources[xds.Listeners.URL()].LastError; got != "virtualInbound: a filter that is not supported" {
				return fmt.Errorf("istiod shows the error %q", got)
			}
			for kind, of := range status.Resources {
				if of.LastError != "" && kind != xds.Listeners.URL() {
					return fmt.Errorf("%s: %s", kind, of.LastError)
				}
			}
			return nil
		})
		x.rejecting(func(xds.Type, string) string { return "" })
		p.remove(policy)
		x.converged(t, p, func() error { return nil })
		x.stop()
	})
}

// churn applies changes until ctx ends or n are done. It returns the names of the hosts that are there at the end.
func (p *plane) churn(ctx context.Context, n int) []string {
	var hosts []string
	for i := 0; i < n && ctx.Err() == nil; i++ {
		name := fmt.Sprintf("host-%d", i)
		p.apply(serviceEntry(name))
		if i%3 == 0 {
			p.remove(serviceEntry(name))
		} else {
			hosts = append(hosts, name+".example.test")
		}
	}
	return hosts
}

func serviceEntry(name string) string {
	return "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: " + name + ", namespace: default}\nspec:\n" +
		"  hosts: [" + name + ".example.test]\n  resolution: STATIC\n  ports: [{number: 80, name: http, protocol: HTTP}]\n  endpoints: [{address: 198.51.100.1}]\n"
}

func TestRestartsUnderChangesEndInTheSameResources(t *testing.T) {
	p := startPlane(t, "")
	protocols(t, func(t *testing.T, delta bool) {
		x := startProxy(t, p, sidecar(), delta)
		x.converged(t, p, func() error { return nil })
		var hosts []string
		for range 5 {
			hosts = p.churn(t.Context(), 100)
			p.stop() // with pushes in progress
			for _, host := range hosts[:len(hosts)/2] {
				p.remove(serviceEntry(strings.TrimSuffix(host, ".example.test")))
			}
			hosts = hosts[len(hosts)/2:]
			p.start()
		}
		x.converged(t, p, func() error { return x.hosts(hosts) })
		x.stop()
		for _, host := range hosts {
			p.remove(serviceEntry(strings.TrimSuffix(host, ".example.test")))
		}
	})
}

// hosts returns nil if the clusters of hosts named "host-N" are exactly the given ones.
func (x *proxy) hosts(want []string) error {
	var got []string
	for _, name := range x.names(xds.Clusters) {
		if host, ok := strings.CutPrefix(name, "outbound|80||host-"); ok {
			got = append(got, "host-"+host)
		}
	}
	if want := slices.Sorted(slices.Values(want)); !slices.Equal(got, want) {
		return fmt.Errorf("the client has %d hosts %q, want %d: %q", len(got), got, len(want), want)
	}
	return nil
}
