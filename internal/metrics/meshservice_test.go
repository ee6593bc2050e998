package metrics

import (
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

// A request to a cluster of a control plane counts for the cluster's service, whatever the client calls it; one that the
// routes send elsewhere counts there.
func TestRequestsCountForTheServiceOfTheirCluster(t *testing.T) {
	m := New(podinfo.Pod{Namespace: "shop"}, Options{Service: func(cluster string) (host, name, namespace string) {
		if strings.HasSuffix(cluster, "|gone.example") {
			return "", "", ""
		}
		host = cluster[strings.LastIndexByte(cluster, '|')+1:]
		return host, "name-of-" + host, "their-namespace"
	}})
	connection := &flow.Record{Direction: flow.Outbound, HTTP: new(flow.Request)}
	for _, cluster := range []string{"outbound|80|v1|reviews.example", "outbound|80|v2|reviews.example", "outbound|80||ratings.example", "outbound|80||gone.example", "PassthroughCluster"} {
		m.Closed(&flow.Record{
			Direction: flow.Outbound, Protocol: flow.HTTP11, Reason: flow.Completed, Cluster: cluster, Connection: connection,
			HTTP: &flow.Request{Status: 200, Authority: []byte("called.example")},
		})
	}
	counts := map[string]uint64{}
	for _, set := range m.directions[flow.Outbound].inTurn {
		labels := map[string]string{}
		for _, l := range set.labels {
			labels[l.Name] = l.Value
		}
		counts[labels["destination_service"]+" "+labels["destination_service_name"]+" "+labels["destination_service_namespace"]] += set.duration.expose(1).Count
	}
	want := map[string]uint64{
		"reviews.example name-of-reviews.example their-namespace": 2,
		"ratings.example name-of-ratings.example their-namespace": 1,
		"called.example PassthroughCluster unknown":               2,
	}
	for labels, n := range want {
		if counts[labels] != n {
			t.Errorf("%q counts %d, want %d: %v", labels, counts[labels], n, counts)
		}
	}
}
