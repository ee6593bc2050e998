package peers

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// reviews is what Istio's proxies send, with more than is read.
var reviews = map[string]any{
	"NAME": "reviews-v1-x", "NAMESPACE": "shop", "WORKLOAD_NAME": "reviews-v1", "CLUSTER_ID": "east",
	"OWNER": "kubernetes://apis/apps/v1/namespaces/shop/deployments/reviews-v1", "APP_CONTAINERS": "reviews", "INSTANCE_IPS": []any{"192.0.2.1"},
	"LABELS": map[string]any{
		"app": "reviews", "version": "v1", "service.istio.io/canonical-name": "reviews", "service.istio.io/canonical-revision": "v1", "other": 7.5,
	},
}

var reviewed = flow.Workload{
	Name: "reviews-v1", Namespace: "shop", Cluster: "east", App: "reviews", Version: "v1", CanonicalService: "reviews", CanonicalRevision: "v1",
}

func encode(t testing.TB, fields map[string]any) []byte {
	t.Helper()
	s, err := structpb.NewStruct(fields)
	if err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestADescriptionIsReadAsIstioWritesIt(t *testing.T) {
	long := strings.Repeat("x", maxName+1)
	for name, c := range map[string]struct {
		fields map[string]any
		want   flow.Workload
	}{
		"all":          {reviews, reviewed},
		"nothing":      {map[string]any{}, flow.Workload{}},
		"no labels":    {map[string]any{"NAMESPACE": "shop"}, flow.Workload{Namespace: "shop"}},
		"other types":  {map[string]any{"NAMESPACE": 7.0, "WORKLOAD_NAME": true, "CLUSTER_ID": map[string]any{"a": "b"}, "LABELS": "none"}, flow.Workload{}},
		"long":         {map[string]any{"NAMESPACE": long, "WORKLOAD_NAME": long[1:]}, flow.Workload{Name: long[1:]}},
		"other labels": {map[string]any{"LABELS": map[string]any{"app": 1.0, "version": "v2"}}, flow.Workload{Version: "v2"}},
	} {
		e := New("", nil)
		padded := base64.StdEncoding.EncodeToString(encode(t, c.fields))
		for _, text := range []string{padded, strings.TrimRight(padded, "=")} {
			if text == "" {
				continue
			}
			if w := Find(e, text); w == nil || *w != c.want {
				t.Errorf("%s: %+v, want %+v", name, w, c.want)
			}
		}
	}
}

func TestADescriptionThatCannotBeReadDescribesNothing(t *testing.T) {
	whole := encode(t, reviews)
	for name, text := range map[string]string{
		"no base64": "%%%", "cut": base64.StdEncoding.EncodeToString(whole[:len(whole)-3]), "no UTF-8": base64.StdEncoding.EncodeToString([]byte("\x0a\x0c\x0a\x09NAMESPACE\x12\x05\x1a\x03\xff\xfe\xfd")),
		"nothing": "", "a group": base64.StdEncoding.EncodeToString([]byte{0x0c}),
	} {
		if w := Find(New("", nil), text); w != nil {
			t.Errorf("%s: %+v", name, w)
		}
	}
}

// A value that is too long is not even decoded.
func TestALongDescriptionIsNotKept(t *testing.T) {
	e := New("", nil)
	if w := Find(e, strings.Repeat("A", maxText+1)); w != nil || len(e.now) > 0 {
		t.Errorf("%+v, %d are kept", w, len(e.now))
	}
}

// What one exchange sends the other one reads.
func TestAProxyReadsWhatAnotherSends(t *testing.T) {
	e := New("sidecar~192.0.2.1~reviews-v1-x.shop~shop.svc.cluster.local", encode(t, reviews))
	if w := Find(New("", nil), e.Metadata); w == nil || *w != reviewed {
		t.Errorf("the field describes %+v", w)
	}
	got := read(t, New("", nil), string(e.Preamble())+"payload", 1<<20)
	if got.workload == nil || *got.workload != reviewed || got.payload != "payload" {
		t.Errorf("the preamble describes %+v", got)
	}
}

// Peers cannot make a proxy keep more than some descriptions, and those in use are kept.
func TestDescriptionsAreBounded(t *testing.T) {
	e := New("", nil)
	used := base64.StdEncoding.EncodeToString(encode(t, reviews))
	first := Find(e, used)
	for i := range 5 * maxKept {
		junk := fmt.Sprintf("junk%d%s", i, strings.Repeat("A", i%maxText))
		Find(e, junk[:min(len(junk), maxText)])
		if again := Find(e, used); again != first {
			t.Fatalf("after %d others, the description in use was forgotten", i)
		}
		bytes := 0
		for _, kept := range []map[string]*flow.Workload{e.now, e.before} {
			for text := range kept {
				bytes += len(text)
			}
		}
		if len(e.now)+len(e.before) > 2*maxKept || bytes > 2*maxBytes {
			t.Fatalf("%d descriptions of %d bytes are kept", len(e.now)+len(e.before), bytes)
		}
	}
}

func TestADescriptionThatWasSeenCostsNoMemory(t *testing.T) {
	e := New("", nil)
	text := []byte(base64.StdEncoding.EncodeToString(encode(t, reviews)))
	Find(e, text)
	if allocs := testing.AllocsPerRun(100, func() { Find(e, text) }); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

// stream is what a connection has after its preamble.
type stream struct {
	workload *flow.Workload
	payload  string
	done     bool
	err      error
}

// read reads text in pieces of a size.
func read(t testing.TB, e *Exchange, text string, size int) (got stream) {
	t.Helper()
	p := e.Reader(func(w *flow.Workload) { got.workload = w })
	for len(text) > 0 {
		piece := []byte(text[:min(size, len(text))])
		text = text[len(piece):]
		if got.done {
			got.payload += string(piece)
			continue
		}
		var rest []byte
		if rest, got.done, got.err = p.Read(piece); got.err != nil {
			return got
		}
		got.payload += string(rest)
	}
	return got
}

func TestThePreambleIsTakenOutHoweverItArrives(t *testing.T) {
	description := encode(t, reviews)
	preamble := string(appendPreamble(nil, "id", description))
	long := string(appendPreamble(nil, strings.Repeat("i", maxText), description))
	for name, c := range map[string]struct {
		text, payload string
		described     bool
	}{
		"with payload":            {preamble + "payload", "payload", true},
		"alone":                   {preamble, "", true},
		"missing":                 {"payload", "payload", false},
		"missing, and short":      {"=#", "", false}, // it may become a preamble
		"like the magic at first": {"=#\x04payload", "=#\x04payload", false},
		"empty":                   {"=#\x04g\x00\x00\x00\x00payload", "payload", false},
		"of another message":      {"=#\x04g\x00\x00\x00\x03abcpayload", "payload", false},
		"too long to keep":        {long + "payload", "payload", false},
		"twice":                   {preamble + preamble, preamble, true},
	} {
		for _, size := range []int{1, 2, 3, 7, 8, 9, 100, 1 << 20} {
			got := read(t, New("", nil), c.text, size)
			if got.err != nil || got.payload != c.payload || (got.workload != nil) != c.described || got.done == (c.payload == "" && !c.described) {
				t.Errorf("%s, in pieces of %d: %+v", name, size, got)
			}
			if got.workload != nil && *got.workload != reviewed {
				t.Errorf("%s, in pieces of %d: %+v", name, size, got.workload)
			}
		}
	}
}

func TestAPreambleOfUnreasonableLengthIsAnError(t *testing.T) {
	for _, length := range []string{"\x00\x01\x00\x01", "\xff\xff\xff\xff"} {
		if got := read(t, New("", nil), "=#\x04g"+length+"payload", 1); got.err == nil || got.payload != "" {
			t.Errorf("%q: %+v", length, got)
		}
	}
}

func FuzzPreamble(f *testing.F) {
	f.Add(appendPreamble(nil, "id", encode(f, reviews)), 3)
	f.Add([]byte("=#\x04g\x00\x00\x00\x01a"), 1)
	f.Fuzz(func(t *testing.T, text []byte, size int) {
		if size < 1 || size > 1<<20 {
			return
		}
		pieces, whole := read(t, New("", nil), string(text), size), read(t, New("", nil), string(text), len(text)+1)
		if pieces.payload != whole.payload || (pieces.err == nil) != (whole.err == nil) || (pieces.workload == nil) != (whole.workload == nil) {
			t.Errorf("in pieces of %d: %+v, at once: %+v", size, pieces, whole)
		}
	})
}
