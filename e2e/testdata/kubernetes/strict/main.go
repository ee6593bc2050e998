// Command strict reads YAML or JSON documents from standard input as the API server with strict field validation would:
// with Kubernetes' own types and decoder. Unknown and repeated fields and wrong types are errors, which go to standard
// error with the number of the document.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	admissionregistration "k8s.io/api/admissionregistration/v1"
	apps "k8s.io/api/apps/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	policy "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
)

func main() {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		core.AddToScheme, apps.AddToScheme, batch.AddToScheme, policy.AddToScheme, admissionregistration.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			panic(err)
		}
	}
	decoder := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme, scheme, json.SerializerOptions{Yaml: true, Strict: true})
	documents := yaml.NewYAMLReader(bufio.NewReader(os.Stdin))
	code := 0
	for n := 1; ; n++ {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			os.Exit(code)
		}
		if err == nil {
			err = decode(decoder, document)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "document %d: %v\n", n, err)
			code = 1
		}
	}
}

// decode reads one object, and each item of a list.
func decode(decoder runtime.Decoder, document []byte) error {
	if json, err := yaml.ToJSON(document); err == nil && string(json) == "null" {
		return nil // comments alone
	}
	object, _, err := decoder.Decode(document, nil, nil)
	if runtime.IsNotRegisteredError(err) {
		return nil // somebody else's kind
	}
	if list, ok := object.(*core.List); ok && err == nil {
		for i, item := range list.Items {
			if err := decode(decoder, item.Raw); err != nil {
				return fmt.Errorf("item %d: %w", i, err)
			}
		}
	}
	return err
}
