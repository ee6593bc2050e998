package istiod

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Node describes this proxy to istiod.
type Node struct {
	Type      string // "sidecar" or "router"
	IP        string
	Pod       string
	Namespace string
	Domain    string // of the cluster; empty: cluster.local
	Cluster   string // of the service; for people

	// Metadata has what istiod computes from and shows: strings, bools, float64s, and maps and lists of them.
	Metadata map[string]any
}

// ID returns the node's ID. istiod splits it into its four parts.
func (n *Node) ID() string {
	domain := n.Domain
	if domain == "" {
		domain = "cluster.local"
	}
	return strings.Join([]string{n.Type, n.IP, n.Pod + "." + n.Namespace, n.Namespace + ".svc." + domain}, "~")
}

// Encode returns the node as an envoy.config.core.v3.Node. A value in Metadata that JSON has not is an error.
func (n *Node) Encode() ([]byte, error) {
	b := wire.AppendString(nil, 1, n.ID())
	b = wire.AppendString(b, 2, n.Cluster)
	metadata, err := encodeStruct(n.Metadata)
	if err != nil {
		return nil, fmt.Errorf("node metadata: %w", err)
	}
	b = wire.AppendBytes(b, 3, metadata)
	return wire.AppendString(b, 6, "pillion"), nil
}

// described are the metadata and the labels by which proxies describe their workloads to each other, as Istio's do.
var (
	described       = []string{"NAME", "NAMESPACE", "WORKLOAD_NAME", "OWNER", "CLUSTER_ID"}
	describedLabels = []string{"app", "version", "service.istio.io/canonical-name", "service.istio.io/canonical-revision"}
)

// Description returns the google.protobuf.Struct by which the node describes its workload to other proxies. The arguments are
// used where the metadata and labels lack them; empty: not known.
func (n *Node) Description(workload, canonicalService, canonicalRevision string) ([]byte, error) {
	labels, _ := n.Metadata["LABELS"].(map[string]any)
	description, chosen := choose(n.Metadata, described), choose(labels, describedLabels)
	complete(description, "WORKLOAD_NAME", workload)
	complete(chosen, "service.istio.io/canonical-name", canonicalService)
	complete(chosen, "service.istio.io/canonical-revision", canonicalRevision)
	description["LABELS"] = chosen
	b, err := encodeStruct(description)
	if err != nil {
		return nil, fmt.Errorf("node metadata: %w", err)
	}
	return b, nil
}

func complete(in map[string]any, key, value string) {
	if text, _ := in[key].(string); text == "" && value != "" {
		in[key] = value
	}
}

func choose(from map[string]any, keys []string) map[string]any {
	chosen := map[string]any{}
	for _, key := range keys {
		if value, ok := from[key]; ok {
			chosen[key] = value
		}
	}
	return chosen
}

// encodeStruct returns a google.protobuf.Struct, with its keys in order.
func encodeStruct(fields map[string]any) ([]byte, error) {
	b := []byte{}
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		value, err := encodeValue(fields[key])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		b = wire.AppendBytes(b, 1, wire.AppendBytes(wire.AppendString(nil, 1, key), 2, value))
	}
	return b, nil
}

// encodeValue returns a google.protobuf.Value.
func encodeValue(value any) ([]byte, error) {
	switch value := value.(type) {
	case nil:
		return wire.AppendVarint(nil, 1, 0), nil
	case float64:
		return wire.AppendDouble(nil, 2, value), nil
	case string:
		return wire.AppendString(nil, 3, value), nil
	case bool:
		bit := uint64(0)
		if value {
			bit = 1
		}
		return wire.AppendVarint(nil, 4, bit), nil
	case map[string]any:
		fields, err := encodeStruct(value)
		return wire.AppendBytes(nil, 5, fields), err
	case []any:
		list := []byte{}
		for i, element := range value {
			encoded, err := encodeValue(element)
			if err != nil {
				return nil, fmt.Errorf("element %d: %w", i, err)
			}
			list = wire.AppendBytes(list, 1, encoded)
		}
		return wire.AppendBytes(nil, 6, list), nil
	}
	return nil, fmt.Errorf("a value of type %T", value)
}
