package controlplane

import (
	"reflect"
	"testing"

	"github.com/pillion-proxy/pillion/internal/controlplane/pushtest"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Sharing does not change values: each equals the one that is compiled alone.
func TestValuesOfAPushAreThoseOfItsResources(t *testing.T) {
	for name, push := range map[string][]xds.Update{"sidecar": pushtest.Sidecar(), "watch": pushtest.Watch(), "1,000 services": pushtest.Thousand()} {
		var shared mesh.Compiler
		compared := 0
		for _, u := range push {
			for _, r := range u.Resources {
				got, want := compile(&shared, u.Type, &r), compile(&mesh.Compiler{}, u.Type, &r)
				if !reflect.DeepEqual(got, want) {
					t.Fatalf("%s: %v %s: compiled\n%+v\nalone\n%+v", name, u.Type, r.Name, got, want)
				}
				compared++
			}
		}
		if compared < 50 {
			t.Errorf("%s: %d resources were compared", name, compared)
		}
	}
}
