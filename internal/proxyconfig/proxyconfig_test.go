package proxyconfig

import (
	"maps"
	"reflect"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func text(t string) Value { return Value{Text: t} }

var unreadable = Value{Unreadable: true}

func TestValuesOfJSONAndYAML(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want Config
	}{
		"empty":        {"", Config{}},
		"empty object": {" {}\n", Config{}},
		"as the injector writes it": {`{"discoveryAddress":"istiod:15012","concurrency":2,"drainDuration":"10s","tracing":{"zipkin":{"address":"z:9411"}},"l":[1],"n":null}`,
			Config{"discoveryAddress": text("istiod:15012"), "concurrency": text("2"), "drainDuration": text("10s"), "tracing.zipkin.address": text("z:9411"), "l": unreadable}},
		"as people write it": {"---\n# ours\nconcurrency: 2   # two\ndrainDuration: \"10s\"\nterminationDrainDuration: '7s'\r\nimage:\n  imageType: distroless\nproxyMetadata:\n  # none\n\n  A: x:y\n  \"B\": yes\nlast: true\n",
			Config{"concurrency": text("2"), "drainDuration": text("10s"), "terminationDrainDuration": text("7s"), "image.imageType": text("distroless"), "proxyMetadata.A": text("x:y"), "proxyMetadata.B": text("yes"), "last": text("true")}},
		"lists are skipped, at both indents": {"a:\n- x: 1\n  y: 2\nb:\n  - z\n  - w\nc: 1\n",
			Config{"a": unreadable, "b": unreadable, "c": text("1")}},
		"multi-line text": {"a: |\n  concurrency: 9\n\n  x\nb: >-\n  y\nconcurrency: 1\n",
			Config{"a": unreadable, "b": unreadable, "concurrency": text("1")}},
		"flow style":       {"a: {x: 1}\nb: {\"x\": 1}\nc: [1,\n  2]\nd: 1\n", Config{"a": unreadable, "b.x": text("1"), "c": unreadable, "d": text("1")}},
		"anchors and tags": {"a: &x 1\nb: *x\nc: !!int \"1\"\n", Config{"a": unreadable, "b": unreadable, "c": unreadable}},
		"deep and back":    {"a:\n  b:\n    c: 1\n  d: 2\ne:\n\nf: 3\n", Config{"a.b.c": text("1"), "a.d": text("2"), "f": text("3")}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse(c.in)
			if err != nil || !maps.Equal(got, c.want) {
				t.Errorf("got %v and %v\nwant %v", got, err, c.want)
			}
		})
	}
}

func TestMalformedTextIsRefusedWithItsLine(t *testing.T) {
	for in, complaint := range map[string]string{
		`{"concurrency": 2`:          "not a JSON object",
		`{} {}`:                      "not a JSON object",
		"{concurrency: 2}":           "not a JSON object",
		"concurrency: 2\nwhat?":      "line 2",
		"a: 1\n  b: 2":               "line 2",
		"a:\n    b: 1\n  c: 2":       "line 3",
		"- a":                        "line 1",
		strings.Repeat(" ", 2<<20+1): "bytes",
	} {
		if got, err := Parse(in); err == nil || !strings.Contains(err.Error(), complaint) {
			t.Errorf("%.40q: got %v and %v, want an error with %q", in, got, err, complaint)
		}
	}
}

func TestUnderReturnsRelativePaths(t *testing.T) {
	got := Config{"defaultConfig.concurrency": text("2"), "defaultConfigs": text("3")}.Under("defaultConfig")
	if !maps.Equal(got, Config{"concurrency": text("2")}) {
		t.Errorf("got %v", got)
	}
}

// Each value equals that of a full YAML parser. Unreadable values are allowed, different ones are not.
func FuzzValuesEqualThoseOfYAML(f *testing.F) {
	for _, seed := range []string{
		"a: 1\nb:\n  c: 'x' # y\n", `{"a":{"b":[1]},"c":"\u00e4"}`, "a: |\n  b: 1\nc: {d: 1}\n", "a:\n- b: 1\nc: \"\\x41\"\n", "a: b\n  c\n", "a:\n  b\n", "a: #x\nb: 1",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		got, err := Parse(in)
		if err != nil {
			return
		}
		var node yaml.Node
		if yaml.Unmarshal([]byte(in), &node) != nil || node.Decode(&map[string]any{}) != nil { // Decode rejects duplicate keys
			return
		}
		for path, value := range got {
			if want, known := lookUp(&node, path); known && !value.Unreadable && value.Text != want {
				t.Errorf("%q is %q, and %q in YAML", path, value.Text, want)
			}
		}
	})
}

// lookUp finds a string scalar by its path.
func lookUp(node *yaml.Node, path string) (string, bool) {
	for node.Kind == yaml.DocumentNode && len(node.Content) > 0 {
		node = node.Content[0]
	}
	if path == "" || node.Kind == yaml.ScalarNode {
		return node.Value, node.Kind == yaml.ScalarNode && node.Tag != "!!float" && node.Tag != "!!int" && node.Tag != "!!bool"
	}
	key, rest, _ := strings.Cut(path, ".")
	for i := 0; node.Kind == yaml.MappingNode && i+1 < len(node.Content); i += 2 {
		if node.Content[i].Value == key {
			return lookUp(node.Content[i+1], rest)
		}
	}
	return "", false
}

func TestObjectsHaveTheFormOfJSON(t *testing.T) {
	want := map[string]any{"concurrency": "2", "holdApplicationUntilProxyStarts": true, "proxyMetadata": map[string]any{"ISTIO_META_DNS_CAPTURE": "true"}}
	got, err := Object("concurrency: 2\nholdApplicationUntilProxyStarts: true\nproxyMetadata:\n  ISTIO_META_DNS_CAPTURE: \"true\"\n")
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("YAML: %v, %v", got, err)
	}
	want["concurrency"], want["extraStatTags"] = 2.0, []any{"a"}
	got, err = Object(`{"concurrency":2,"holdApplicationUntilProxyStarts":true,"proxyMetadata":{"ISTIO_META_DNS_CAPTURE":"true"},"extraStatTags":["a"]}`)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("JSON: %v, %v", got, err)
	}
	if _, err := Object("{"); err == nil {
		t.Error("a malformed text is an object")
	}
}

func TestMergedObjectsKeepWhatTheOtherLacks(t *testing.T) {
	into := map[string]any{"a": "1", "tracing": map[string]any{"sampling": "1", "zipkin": "z"}, "b": map[string]any{"c": "1"}}
	Merge(into, map[string]any{"a": "2", "tracing": map[string]any{"sampling": "2"}, "b": "3", "d": true})
	want := map[string]any{"a": "2", "tracing": map[string]any{"sampling": "2", "zipkin": "z"}, "b": "3", "d": true}
	if !reflect.DeepEqual(into, want) {
		t.Errorf("%v", into)
	}
}
