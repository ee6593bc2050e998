// Command envoyjson judges JSON by Envoy's own protobuf messages, as istioctl reads it. Standard input is JSON objects
// {"name": …, "type": …, "body": …}; the program ends with a code other than 0 when a body is not its type: a field
// that is unknown, of another kind, or missing though Envoy requires it, also inside of Any.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"

	_ "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_src/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
)

func main() {
	log.SetFlags(0)
	bad := false
	for decoder := json.NewDecoder(os.Stdin); ; {
		var given struct{ Name, Type, Body string }
		if err := decoder.Decode(&given); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			log.Fatal(err)
		}
		if err := judge(given.Type, given.Body); err != nil {
			log.Printf("%s is no %s: %v", given.Name, given.Type, err)
			bad = true
		}
	}
	if bad {
		os.Exit(1)
	}
}

func judge(name, body string) error {
	kind, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(name))
	if err != nil {
		return err
	}
	message := kind.New().Interface()
	if err := protojson.Unmarshal([]byte(body), message); err != nil {
		return err
	}
	return validate(message)
}

// validate applies Envoy's rules to a message and to those inside of it, also in Any, where they do not reach by
// themselves.
func validate(message proto.Message) error {
	if ruled, ok := message.(interface{ ValidateAll() error }); ok {
		if err := ruled.ValidateAll(); err != nil {
			return err
		}
	}
	if packed, ok := message.(*anypb.Any); ok {
		inner, err := packed.UnmarshalNew()
		if err != nil {
			return err
		}
		return validate(inner)
	}
	var failed error
	message.ProtoReflect().Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		check := func(v protoreflect.Value) {
			if err := validate(v.Message().Interface()); err != nil && failed == nil {
				failed = fmt.Errorf("%s: %w", field.Name(), err)
			}
		}
		switch {
		case field.IsMap():
			if field.MapValue().Message() != nil {
				value.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { check(v); return failed == nil })
			}
		case field.Message() == nil:
		case field.IsList():
			for i := range value.List().Len() {
				check(value.List().Get(i))
			}
		default:
			check(value)
		}
		return failed == nil
	})
	return failed
}
