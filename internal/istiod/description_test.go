package istiod

import (
	"encoding/json"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// A description has what Istio's proxies send of a workload, and nothing else of the node: labels may be secrets.
func TestANodeDescribesItsWorkload(t *testing.T) {
	all := map[string]any{
		"NAME": "reviews-1", "NAMESPACE": "shop", "WORKLOAD_NAME": "reviews", "CLUSTER_ID": "east", "OWNER": "kubernetes://apis/apps/v1/namespaces/shop/deployments/reviews",
		"PROXY_CONFIG": map[string]any{"a": "b"}, "INSTANCE_IPS": "192.0.2.1",
		"LABELS": map[string]any{"app": "reviews", "version": "v1", "service.istio.io/canonical-name": "reviews", "service.istio.io/canonical-revision": "v1", "other": "x"},
	}
	const whole = `{"CLUSTER_ID":"east","LABELS":{"app":"reviews","service.istio.io/canonical-name":"reviews","service.istio.io/canonical-revision":"v1","version":"v1"},` +
		`"NAME":"reviews-1","NAMESPACE":"shop","OWNER":"kubernetes://apis/apps/v1/namespaces/shop/deployments/reviews","WORKLOAD_NAME":"reviews"}`
	for name, c := range map[string]struct {
		metadata map[string]any
		defaults [3]string
		want     string
	}{
		"all":      {all, [3]string{"other", "other", "other"}, whole},
		"defaults": {map[string]any{"NAMESPACE": "shop"}, [3]string{"a", "b", "c"}, `{"LABELS":{"service.istio.io/canonical-name":"b","service.istio.io/canonical-revision":"c"},"NAMESPACE":"shop","WORKLOAD_NAME":"a"}`},
		"nothing":  {nil, [3]string{}, `{"LABELS":{}}`},
	} {
		node := Node{Metadata: c.metadata}
		b, err := node.Description(c.defaults[0], c.defaults[1], c.defaults[2])
		if err != nil {
			t.Fatal(err)
		}
		var got structpb.Struct
		if err := proto.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if text, _ := json.Marshal(got.AsMap()); string(text) != c.want {
			t.Errorf("%s: %s, want %s", name, text, c.want)
		}
	}
}
