package controlplane

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	networking "istio.io/api/networking/v1alpha3"
	proxyconfig "istio.io/api/networking/v1beta1"
	security "istio.io/api/security/v1beta1"
	telemetry "istio.io/api/telemetry/v1alpha1"
)

// documented are the resources of Istio whose fields the document names one by one.
var documented = map[string]proto.Message{
	"AuthorizationPolicy": &security.AuthorizationPolicy{}, "PeerAuthentication": &security.PeerAuthentication{},
	"RequestAuthentication": &security.RequestAuthentication{}, "Telemetry": &telemetry.Telemetry{},
	"VirtualService": &networking.VirtualService{}, "DestinationRule": &networking.DestinationRule{}, "Gateway": &networking.Gateway{},
	"ServiceEntry": &networking.ServiceEntry{}, "WorkloadEntry": &networking.WorkloadEntry{}, "WorkloadGroup": &networking.WorkloadGroup{},
	"Sidecar": &networking.Sidecar{}, "ProxyConfig": &proxyconfig.ProxyConfig{},
}

// The document names what becomes of each field of Istio's API. A field is named in backticks by its name, or with another
// one as "tcp.maxConnections"; "tcp.*" names all fields below a field. A name that no resource has is an error as well.
func TestTheDocumentNamesEachFieldOfTheAPI(t *testing.T) {
	text, err := os.ReadFile("../../../docs/mesh.md")
	if err != nil {
		t.Fatal(err)
	}
	text = text[:strings.Index(string(text), "## Fields that are findings")]
	named := regexp.MustCompile("`([a-z][A-Za-z0-9]*(?:\\.[a-z][A-Za-z0-9]*)*(?:\\.\\*)?)(?:: [A-Z_]+)?`")
	used := map[string]bool{}
	for kind, message := range documented {
		names, groups := map[string]bool{}, map[string]bool{}
		for row := range strings.SplitSeq(string(text), "\n| ") {
			first, _, _ := strings.Cut(row, " |")
			kinds := strings.FieldsFunc(first, func(r rune) bool { return r == ' ' || r == ',' })
			if first != "each" && !slices.Contains(kinds, kind) || strings.HasPrefix(first, "Gateway, HTTPRoute") {
				continue
			}
			for _, found := range named.FindAllStringSubmatch(row, -1) {
				name, group := strings.CutSuffix(found[1], ".*")
				parts := strings.Split(name, ".")
				for _, part := range parts {
					names[part] = true
				}
				if group {
					groups[parts[len(parts)-1]] = true
				}
			}
		}
		descriptor := message.ProtoReflect().Descriptor()
		fields := fieldsOf(descriptor, nil, []protoreflect.FullName{descriptor.FullName()})
		if len(fields) < 5 {
			t.Fatalf("%s has the fields %q", kind, fields)
		}
		for _, path := range fields {
			parts := strings.Split(path, ".")
			own := parts[len(parts)-1]
			grouped := slices.ContainsFunc(parts[:len(parts)-1], func(above string) bool { used[above] = used[above] || groups[above]; return groups[above] })
			if used[own] = true; !grouped && !names[own] {
				t.Errorf("docs/mesh.md does not name %s of %s", path, kind)
			}
		}
	}
	for _, row := range strings.Split(string(text), "\n| ") {
		first, rest, _ := strings.Cut(row, " |")
		kinds := strings.FieldsFunc(first, func(r rune) bool { return r == ' ' || r == ',' })
		if len(kinds) == 0 || documented[kinds[0]] == nil || strings.HasPrefix(first, "Gateway, HTTPRoute") {
			continue
		}
		for _, found := range named.FindAllStringSubmatch(first+rest, -1) {
			for part := range strings.SplitSeq(strings.TrimSuffix(found[1], ".*"), ".") {
				if !used[part] && !slices.Contains(otherNames, part) {
					t.Errorf("docs/mesh.md names %s in a row of %s, which no resource has", found[1], kinds[0])
				}
			}
		}
	}
}

// otherNames are names in rows of resources that are no fields of theirs.
var otherNames = []string{
	"envoyFileAccessLog", "envoyOtelAls", "envoyHttpAls", "envoyTcpAls", "omitEmptyValues", "additionalResponseTrailersToLog",
	"filterStateObjectsToLog", "opentelemetry", "prometheus", "tap", "defaultConfig", "experimental", "envoy", "filters", "istio", "io",
}

// fieldsOf returns the paths of a message's fields, and of those of Istio's messages in it.
func fieldsOf(d protoreflect.MessageDescriptor, at []string, above []protoreflect.FullName) (paths []string) {
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		path := append(slices.Clip(at), f.JSONName())
		paths = append(paths, strings.Join(path, "."))
		if f.IsMap() {
			f = f.MapValue()
		}
		if m := f.Message(); m != nil && strings.HasPrefix(string(m.FullName()), "istio.") && !slices.Contains(above, m.FullName()) {
			paths = append(paths, fieldsOf(m, path, append(slices.Clip(above), m.FullName()))...)
		}
	}
	return paths
}
