package configdump

import (
	"io"
	"iter"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	adminv3 "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/configdump"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// pushedPlane is a control plane that has configured recorded resources.
type pushedPlane []*anypb.Any

func (p pushedPlane) Resources() iter.Seq[configdump.Resource] {
	return func(yield func(configdump.Resource) bool) {
		for _, r := range p {
			if !yield(configdump.Resource{TypeURL: r.TypeUrl, Name: nameOf(r), Version: "1", Updated: time.Now(), Bytes: func() ([]byte, error) { return r.Value, nil }}) {
				return
			}
		}
	}
}

func (p pushedPlane) Clusters() iter.Seq[admin.Cluster] { return func(func(admin.Cluster) bool) {} }
func (p pushedPlane) Identity() *admin.Identity         { return nil }

// nameOf returns the name of a resource.
func nameOf(packed *anypb.Any) string {
	message, err := packed.UnmarshalNew()
	if err != nil {
		panic(err)
	}
	m := message.ProtoReflect()
	for _, name := range []protoreflect.Name{"name", "cluster_name"} {
		if field := m.Descriptor().Fields().ByName(name); field != nil {
			return m.Get(field).String()
		}
	}
	panic("a resource without a name: " + packed.TypeUrl)
}

func dumpOf(p admin.ControlPlane, target string) io.Reader {
	recorder := httptest.NewRecorder()
	serve(p, target, recorder)
	return recorder.Body
}

func serve(p admin.ControlPlane, target string, w http.ResponseWriter) {
	handler := admin.NewHandler(admin.Config{
		Version: "v1.2.3", Started: time.Now(), Flows: flow.NewTable(), Log: slog.New(slog.DiscardHandler), ControlPlane: p,
		Listeners: func() []admin.Listener { return nil }, Carrying: admin.Carrying{OwnAddresses: func() []netip.Addr { return nil }},
	})
	request := httptest.NewRequest("GET", target, nil)
	request.Host, request.RemoteAddr = "localhost", "127.0.0.1:4711"
	handler.ServeHTTP(w, request)
}

// TestADumpHasTheMessagesThatWereSent dumps each recorded push. Envoy's messages read it strictly, and have what istiod
// sent.
func TestADumpHasTheMessagesThatWereSent(t *testing.T) {
	pushes := map[string]pushedPlane{}
	pushed(t, func(place string, resource *anypb.Any) {
		if clone := proto.CloneOf(resource); !slices.ContainsFunc(pushes[directory(place)], func(other *anypb.Any) bool { return proto.Equal(clone, other) }) {
			pushes[directory(place)] = append(pushes[directory(place)], clone)
		}
	})
	for place, push := range pushes {
		text, err := io.ReadAll(dumpOf(push, "/config_dump?include_eds"))
		if err != nil {
			t.Fatal(err)
		}
		dump := &adminv3.ConfigDump{}
		if err := protojson.Unmarshal(text, dump); err != nil {
			t.Errorf("%s: %v", place, err)
			continue
		}
		got := map[string]bool{}
		for _, shown := range dynamicResources(t, dump) {
			got[string(canonical(t, shown))] = true
		}
		for _, sent := range push {
			if !got[string(canonical(t, sent))] {
				t.Errorf("%s: the dump does not have the %s %q as sent", place, sent.TypeUrl, nameOf(sent))
			}
		}
		if len(got) != len(push) {
			t.Errorf("%s: %d resources are shown, %d were sent", place, len(got), len(push))
		}
	}
	if len(pushes) < 40 {
		t.Errorf("only %d pushes", len(pushes))
	}
}

func directory(place string) string { return place[:strings.LastIndexByte(place, '/')] }

// canonical returns an encoding that equal messages share, also of messages in others.
func canonical(t *testing.T, packed *anypb.Any) []byte {
	t.Helper()
	text, err := protojson.Marshal(packed)
	if err != nil {
		t.Fatal(err)
	}
	again := &anypb.Any{}
	if err := protojson.Unmarshal(text, again); err != nil {
		t.Fatal(err)
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(again)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// dynamicResources returns the resources of the control plane in a dump.
func dynamicResources(t *testing.T, dump *adminv3.ConfigDump) (all []*anypb.Any) {
	t.Helper()
	for _, packed := range dump.Configs {
		message, err := packed.UnmarshalNew()
		if err != nil {
			t.Fatal(err)
		}
		switch section := message.(type) {
		case *adminv3.ClustersConfigDump:
			for _, c := range section.DynamicActiveClusters {
				all = append(all, c.Cluster)
			}
		case *adminv3.ListenersConfigDump:
			for _, l := range section.DynamicListeners {
				all = append(all, l.ActiveState.Listener)
			}
		case *adminv3.RoutesConfigDump:
			for _, r := range section.DynamicRouteConfigs {
				all = append(all, r.RouteConfig)
			}
		case *adminv3.EndpointsConfigDump:
			for _, e := range section.DynamicEndpointConfigs {
				all = append(all, e.EndpointConfig)
			}
		}
	}
	return all
}

// named has the names beforehand.
type named struct {
	pushedPlane
	names []string
}

func (n named) Resources() iter.Seq[configdump.Resource] {
	return func(yield func(configdump.Resource) bool) {
		for i, r := range n.pushedPlane {
			if !yield(configdump.Resource{TypeURL: r.TypeUrl, Name: n.names[i], Bytes: func() ([]byte, error) { return r.Value, nil }}) {
				return
			}
		}
	}
}

// discarding counts what is written.
type discarding struct {
	header  http.Header
	written int64
}

func (d *discarding) Header() http.Header         { return d.header }
func (d *discarding) WriteHeader(int)             {}
func (d *discarding) Write(b []byte) (int, error) { d.written += int64(len(b)); return len(b), nil }

// BenchmarkDump dumps as many bytes as a control plane pushes for a thousand services.
func BenchmarkDump(b *testing.B) {
	var push pushedPlane
	size := 0
	for size < 5<<20 {
		pushed(&testing.T{}, func(_ string, resource *anypb.Any) {
			if size < 5<<20 {
				push, size = append(push, proto.CloneOf(resource)), size+len(resource.Value)
			}
		})
	}
	names := make([]string, len(push))
	for i, r := range push {
		names[i] = nameOf(r)
	}
	b.ReportAllocs()
	for b.Loop() {
		recorder := &discarding{header: http.Header{}}
		serve(named{push, names}, "/config_dump?include_eds", recorder)
		b.SetBytes(recorder.written)
	}
	b.ReportMetric(float64(len(push)), "resources")
}
