// Package decode reads objects as the API server with strict field validation would: with Kubernetes' own types and
// decoder, and the types of Prometheus' operator. Unknown and repeated fields and wrong types are errors.
package decode

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	admissionregistration "k8s.io/api/admissionregistration/v1"
	apps "k8s.io/api/apps/v1"
	autoscaling "k8s.io/api/autoscaling/v2"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
	rbac "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// Stream reads YAML or JSON documents. Objects of unknown kinds are omitted. The error names each document that cannot
// be decoded by its number.
func Stream(r io.Reader) (objects []runtime.Object, err error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		core.AddToScheme, apps.AddToScheme, batch.AddToScheme, policy.AddToScheme, admissionregistration.AddToScheme, monitoring.AddToScheme,
		networking.AddToScheme, rbac.AddToScheme, autoscaling.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	decoder := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme, scheme, json.SerializerOptions{Yaml: true, Strict: true})
	documents := yaml.NewYAMLReader(bufio.NewReader(r))
	var failed []error
	for n := 1; ; n++ {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return objects, errors.Join(failed...)
		}
		if err == nil {
			err = decode(decoder, document, &objects)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("document %d: %w", n, err))
		}
	}
}

// decode reads one object, or each item of a list.
func decode(decoder runtime.Decoder, document []byte, objects *[]runtime.Object) error {
	if json, err := yaml.ToJSON(document); err == nil && string(json) == "null" {
		return nil // only comments
	}
	object, _, err := decoder.Decode(document, nil, nil)
	if runtime.IsNotRegisteredError(err) {
		return nil // a kind of others
	}
	if err != nil {
		return err
	}
	list, ok := object.(*core.List)
	if !ok {
		*objects = append(*objects, object)
		return nil
	}
	for i, item := range list.Items {
		if err := decode(decoder, item.Raw, objects); err != nil {
			return fmt.Errorf("item %d: %w", i, err)
		}
	}
	return nil
}
