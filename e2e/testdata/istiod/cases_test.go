package istiod

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"istio.io/istio/security/pkg/pki/util"

	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/xds"
)

var update = flag.Bool("update", false, "write the golden files")

// TestFindingsAreTheReviewedOnes feeds the configuration of each case to istiod and compares what the decoders do not
// honour with a file that was reviewed.
func TestFindingsAreTheReviewedOnes(t *testing.T) {
	files, err := filepath.Glob("testdata/cases/*.yaml")
	if err != nil || len(files) < 15 {
		t.Fatalf("%d cases, error %v", len(files), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			p := startPlane(t, string(text), gatewayCertificate(t))
			var found strings.Builder
			for _, node := range []istiod.Node{sidecar(), gateway()} {
				push(t, p, node).print(&found, node.Type)
			}
			compareGolden(t, strings.TrimSuffix(file, ".yaml")+".findings", found.String())
		})
	}
}

// push returns what both protocols give a node. It fails the test if that is not the same, or not what istiod's own
// configuration dump has.
func push(t *testing.T, p *plane, node istiod.Node) *view {
	t.Helper()
	var views []*view
	protocols(t, func(t *testing.T, delta bool) {
		x := startProxy(t, p, node, delta)
		await(t, func() error { return x.synced(p) })
		if err := x.sameAsDump(p); err != nil {
			t.Error(err)
		}
		x.stop()
		views = append(views, x.view)
	})
	for kind := range xds.Type(xds.Types) {
		if a, b := views[0].names(kind), views[1].names(kind); !slices.Equal(a, b) {
			t.Errorf("%s: %v by delta: %q; by state of the world: %q", node.Type, kind, a, b)
		}
	}
	return views[0]
}

// print writes the number of resources of each type, and the findings. Resources of the same type with the same finding
// share a line.
func (v *view) print(to *strings.Builder, node string) {
	to.WriteString(node + ":")
	for t := range xds.Type(xds.Types) {
		if len(v.held[t]) > 0 {
			fmt.Fprintf(to, " %v %d", t, len(v.held[t]))
		}
	}
	to.WriteByte('\n')
	for t := range xds.Type(xds.Types) {
		resources := map[string][]string{} // by finding
		for name, findings := range v.findings[t] {
			for _, f := range findings {
				text := fmt.Sprintf("%v: %v", f.Class, f)
				resources[text] = append(resources[text], name)
			}
		}
		for _, finding := range slices.Sorted(maps.Keys(resources)) {
			fmt.Fprintf(to, "%s %v %s\n\t%s\n", node, t, finding, strings.Join(sorted(resources[finding]), " "))
		}
	}
}

func compareGolden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s has\n%s\nand istiod's resources give\n%s", file, want, got)
	}
}

// gatewayCertificate is the Secret that the gateways of the cases name, as YAML. It serves for mutual TLS, too.
func gatewayCertificate(t *testing.T) string {
	t.Helper()
	cert, key, err := util.GenCertKeyFromOptions(util.CertOptions{
		Host: "shop.example.test", TTL: certificate, Org: "shop", IsCA: true, IsSelfSigned: true, ECSigAlg: util.EcdsaSigAlg, IsServer: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	text, err := yaml.Marshal(core.Secret{
		TypeMeta: meta.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: meta.ObjectMeta{Name: "shop-cert", Namespace: "default"},
		Type: core.SecretTypeTLS, Data: map[string][]byte{core.TLSCertKey: cert, core.TLSPrivateKeyKey: key, "ca.crt": cert},
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func parseSecret(t *testing.T, text string) *core.Secret {
	t.Helper()
	var secret core.Secret
	if err := yaml.Unmarshal([]byte(text), &secret); err != nil {
		t.Fatal(err)
	}
	return &secret
}

// sameAsDump returns an error if the clusters, listeners and routes that the client holds are not those of
// istiod's configuration dump for the node. istioctl compares the same.
func (x *proxy) sameAsDump(p *plane) error {
	var dump struct{ Configs []json.RawMessage }
	if err := p.debug("/debug/config_dump?types=CDS,LDS,RDS&proxyID="+x.node.Pod+"."+x.node.Namespace, &dump); err != nil {
		return err
	}
	want := map[string]map[string]proto.Message{} // by type URL and name
	for _, text := range dump.Configs {
		var resource anypb.Any
		if err := protojson.Unmarshal(text, &resource); err != nil {
			return err
		}
		message, err := resource.UnmarshalNew()
		if err != nil {
			return err
		}
		if want[resource.TypeUrl] == nil {
			want[resource.TypeUrl] = map[string]proto.Message{}
		}
		want[resource.TypeUrl][message.(interface{ GetName() string }).GetName()] = message
	}
	for _, t := range []xds.Type{xds.Clusters, xds.Listeners, xds.Routes} {
		if err := x.same(t, want[t.URL()]); err != nil {
			return err
		}
	}
	return nil
}

// same returns an error if the resources that are held of a type are not the given ones.
func (x *proxy) same(t xds.Type, want map[string]proto.Message) error {
	if got := x.names(t); !slices.Equal(got, slices.Sorted(maps.Keys(want))) {
		return fmt.Errorf("%v: the client has %q, istiod's dump %q", t, got, slices.Sorted(maps.Keys(want)))
	}
	for name, message := range want {
		got, err := (&anypb.Any{TypeUrl: t.URL(), Value: x.get(t, name)}).UnmarshalNew()
		if err != nil {
			return err
		}
		if !proto.Equal(got, message) {
			return fmt.Errorf("%v %s: the client has %v, istiod's dump %v", t, name, got, message)
		}
	}
	return nil
}
