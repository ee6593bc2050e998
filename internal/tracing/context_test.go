package tracing

import (
	"encoding/hex"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// list is header fields, "name: value".
type list []string

func (l list) Len() int { return len(l) }

func (l list) At(i int) (name, value []byte) {
	n, v, _ := strings.Cut(l[i], ": ")
	return []byte(n), []byte(v)
}

const (
	traceID = "4bf92f3577b34da6a3ce929d0e0e4736"
	callerS = "00f067aa0ba902b7"
)

func TestAContextThatArrivesGoesOn(t *testing.T) {
	sampled, not := "00-"+traceID+"-"+callerS+"-01", "00-"+traceID+"-"+callerS+"-00"
	for _, c := range []struct {
		name      string
		fields    list
		continues bool // the trace
		sampled   bool
		forms     Forms
	}{
		{"W3C", list{"Traceparent: " + sampled}, true, true, W3C},
		{"W3C, not sampled", list{"traceparent: " + not}, true, false, W3C},
		{"W3C of a later version", list{"traceparent: cc" + sampled[2:] + "-more"}, true, true, W3C},
		{"W3C with another flag", list{"traceparent: " + not[:54] + "2"}, true, false, W3C},
		{"B3", list{"B3: " + traceID + "-" + callerS + "-1"}, true, true, W3C | B3},
		{"B3 with a parent", list{"b3: " + traceID + "-" + callerS + "-0-05e3ac9a4f6e3b90"}, true, false, W3C | B3},
		{"B3 for debugging", list{"b3: " + traceID + "-" + callerS + "-d"}, true, true, W3C | B3},
		{"B3 without a decision", list{"b3: " + traceID + "-" + callerS}, true, true, W3C | B3},
		{"a decision of B3 alone", list{"b3: 0"}, false, false, W3C | B3},
		{"fields of B3", list{"X-B3-TraceId: " + traceID, "X-B3-SpanId: " + callerS, "X-B3-Sampled: 0"}, true, false, W3C | B3Multi},
		{"fields of B3 for debugging", list{"x-b3-traceid: " + traceID, "x-b3-spanid: " + callerS, "x-b3-flags: 1"}, true, true, W3C | B3Multi},
		{"W3C before B3", list{"b3: 11111111111111111111111111111111-1111111111111111-1", "traceparent: " + not}, true, false, W3C | B3},
		{"none", list{"host: a"}, false, true, W3C},
		{"malformed W3C", list{"traceparent: " + sampled[:54]}, false, true, W3C},
		{"W3C in upper case", list{"traceparent: " + strings.ToUpper(sampled)}, false, true, W3C},
		{"version ff", list{"traceparent: ff" + sampled[2:]}, false, true, W3C},
		{"version 00 with more", list{"traceparent: " + sampled + "-more"}, false, true, W3C},
		{"two of W3C", list{"traceparent: " + not, "traceparent: " + not}, false, true, W3C},
		{"zero trace", list{"traceparent: 00-" + strings.Repeat("0", 32) + "-" + callerS + "-01"}, false, true, W3C},
		{"zero span", list{"traceparent: 00-" + traceID + "-" + strings.Repeat("0", 16) + "-01"}, false, true, W3C},
		{"malformed B3", list{"b3: " + traceID}, false, true, W3C | B3},
	} {
		p := &Policy{Sampler: Sampler{Threshold: all}, Forms: W3C}
		got := p.Begin(&Request{Fields: c.fields})
		if continues := hex.EncodeToString(got.ID[:]) == traceID && hex.EncodeToString(got.Parent[:]) == callerS; continues != c.continues {
			t.Errorf("%s: trace %x after %x", c.name, got.ID, got.Parent)
		}
		if !c.continues && (got.Parent != [8]byte{} || got.ID == [16]byte{}) {
			t.Errorf("%s: a new trace has ID %x and parent %x", c.name, got.ID, got.Parent)
		}
		if got.Sampled != c.sampled || Forms(got.Forms) != c.forms || got.Span == [8]byte{} {
			t.Errorf("%s: sampled %v, forms %b, span %x", c.name, got.Sampled, got.Forms, got.Span)
		}
		Release(got)
	}
}

func TestAShortTraceIDOfB3IsExtended(t *testing.T) {
	p := &Policy{Forms: B3}
	got := p.Begin(&Request{Fields: list{"b3: a3ce929d0e0e4736-" + callerS + "-1"}})
	if id := hex.EncodeToString(got.ID[:]); id != "0000000000000000a3ce929d0e0e4736" {
		t.Errorf("trace %s", id)
	}
}

// written returns the fields that a request gets.
func written(tr *flow.Trace) (fields []string) {
	for f, more := Next(tr, -1); more; f, more = Next(tr, int(f)) {
		fields = append(fields, f.Name()+": "+string(f.AppendValue(nil, tr)))
	}
	return fields
}

func TestAContextIsWrittenInItsForms(t *testing.T) {
	tr := &flow.Trace{Forms: uint8(W3C | B3 | B3Multi), Sampled: true}
	hex.Decode(tr.ID[:], []byte(traceID))
	hex.Decode(tr.Span[:], []byte("0102030405060708"))
	hex.Decode(tr.Parent[:], []byte(callerS))
	check := func(want ...string) {
		t.Helper()
		if got := strings.Join(written(tr), "\n"); got != strings.Join(want, "\n") {
			t.Errorf("written\n%s\nwant\n%s", got, strings.Join(want, "\n"))
		}
	}
	check("traceparent: 00-"+traceID+"-0102030405060708-01", "b3: "+traceID+"-0102030405060708-1-"+callerS,
		"x-b3-traceid: "+traceID, "x-b3-spanid: 0102030405060708", "x-b3-parentspanid: "+callerS, "x-b3-sampled: 1")
	tr.Parent, tr.Sampled = [8]byte{}, false
	check("traceparent: 00-"+traceID+"-0102030405060708-00", "b3: "+traceID+"-0102030405060708-0",
		"x-b3-traceid: "+traceID, "x-b3-spanid: 0102030405060708", "x-b3-sampled: 0")
	tr.Sampled, tr.Debug, tr.Forms = true, true, uint8(B3|B3Multi)
	check("b3: "+traceID+"-0102030405060708-d", "x-b3-traceid: "+traceID, "x-b3-spanid: 0102030405060708", "x-b3-flags: 1")
	tr.Forms = 0
	check()
}

func TestFieldsOfTheFormsAreReplacedAndOthersKept(t *testing.T) {
	names := []string{"traceparent", "Tracestate", "B3", "x-b3-TraceId", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags",
		"baggage", "x-request-id", "x-b4-flags", "traceparens", "", "bb"}
	for _, c := range []struct {
		trace flow.Trace
		want  string
	}{
		{flow.Trace{Forms: uint8(W3C)}, "traceparent"},
		{flow.Trace{Forms: uint8(W3C), Restarted: true}, "traceparent Tracestate"},
		{flow.Trace{Forms: uint8(B3)}, "B3"},
		{flow.Trace{Forms: uint8(B3Multi)}, "x-b3-TraceId x-b3-spanid x-b3-parentspanid x-b3-sampled x-b3-flags"},
		{flow.Trace{Restarted: true}, ""},
	} {
		var replaced []string
		for _, name := range names {
			if Replaces(&c.trace, name) {
				replaced = append(replaced, name)
			}
		}
		if got := strings.Join(replaced, " "); got != c.want {
			t.Errorf("forms %b: %q are replaced, want %q", c.trace.Forms, got, c.want)
		}
	}
}

func TestALocalPolicyLeavesTheContextAsItIs(t *testing.T) {
	p := &Policy{Sampler: Sampler{Threshold: all}, Forms: W3C, Local: true}
	got := p.Begin(&Request{Fields: list{"traceparent: 00-" + traceID + "-" + callerS + "-01"}})
	if len(written(got)) > 0 || Replaces(got, "traceparent") || !got.Sampled {
		t.Errorf("%+v", got)
	}
}

// Request IDs decide as in Envoy: 15th of their characters has the reason, and their beginning is the number that is drawn.
func TestTheRequestIDDecidesAsInEnvoy(t *testing.T) {
	uuid := func(drawn, reason string) string { return "0000" + drawn + "-98e2-" + reason + "000-8000-000000000000" }
	for _, c := range []struct {
		name    string
		rule    RequestIDs
		id      string
		fields  list
		sampled bool
		after   string
	}{
		{"drawn", RequestIDs{10000, 100, 10000, false, false}, uuid("0063", "4"), nil, true, uuid("0063", "9")},
		{"not drawn", RequestIDs{10000, 100, 10000, false, false}, uuid("0064", "4"), nil, false, uuid("0064", "4")},
		{"sampled before", RequestIDs{10000, 0, 10000, false, false}, uuid("0064", "9"), nil, true, uuid("0064", "9")},
		{"forced by a service before", RequestIDs{0, 0, 10000, false, false}, uuid("0064", "a"), nil, true, uuid("0064", "a")},
		{"forced by the client", RequestIDs{10000, 0, 10000, false, false}, uuid("0064", "4"), list{"x-client-trace-id: 1"}, true, uuid("0064", "b")},
		{"the client may not force", RequestIDs{0, 0, 10000, false, false}, uuid("0064", "4"), list{"x-client-trace-id: 1"}, false, uuid("0064", "4")},
		{"forced", RequestIDs{0, 0, 10000, false, false}, uuid("0064", "4"), list{"X-Envoy-Force-Trace: true"}, true, uuid("0064", "a")},
		{"overall limit", RequestIDs{10000, 10000, 100, false, false}, uuid("0064", "9"), nil, false, uuid("0064", "4")},
		{"no UUID", RequestIDs{10000, 10000, 10000, false, false}, "me", list{"x-envoy-force-trace: 1"}, false, "me"},
		{"no number", RequestIDs{10000, 10000, 10000, false, false}, "g" + uuid("0064", "4")[1:], nil, false, "g" + uuid("0064", "4")[1:]},
		{"no ID", RequestIDs{10000, 10000, 10000, false, false}, "", nil, false, ""},
		{"the parent decides", RequestIDs{10000, 10000, 10000, false, false}, uuid("0064", "4"), list{"traceparent: 00-" + traceID + "-" + callerS + "-00"}, false, uuid("0064", "9")},
		{"drawn, the ID is kept", RequestIDs{10000, 100, 10000, false, true}, uuid("0063", "4"), nil, true, uuid("0063", "4")},
		{"ID without effect", RequestIDs{0, 10000, 10000, true, false}, uuid("0064", "4"), nil, true, uuid("0064", "4")},
	} {
		p := &Policy{RequestIDs: &c.rule, Forms: W3C}
		id := []byte(c.id)
		got := p.Begin(&Request{Fields: c.fields, ID: id})
		if got.Sampled != c.sampled || string(id) != c.after {
			t.Errorf("%s: sampled %v, ID %s, want %v, %s", c.name, got.Sampled, id, c.sampled, c.after)
		}
	}
}

func TestARatioSamplesThatPartOfTheTraces(t *testing.T) {
	for _, part := range []float64{0, 0.01, 0.5, 1} {
		p, n := &Policy{Sampler: Sampler{Threshold: Ratio(part)}}, 0
		const requests = 20_000
		for range requests {
			tr := p.Begin(&Request{Fields: list{}})
			if tr.Sampled {
				n++
			}
			Release(tr)
		}
		// 6 standard deviations of a fair draw are below 0.03 for each part.
		if got := float64(n) / requests; got < part-0.03 || got > part+0.03 || (part == 0) != (n == 0) || (part == 1) != (n == requests) {
			t.Errorf("a ratio of %v samples %v", part, got)
		}
	}
}

func TestASamplerMayIgnoreTheParent(t *testing.T) {
	fields := list{"traceparent: 00-" + traceID + "-" + callerS + "-01"}
	p := &Policy{Sampler: Sampler{IgnoresParent: true}}
	if p.Begin(&Request{Fields: fields}).Sampled {
		t.Error("always_off samples the trace of a parent that does")
	}
	p.Sampler.IgnoresParent = false
	if !p.Begin(&Request{Fields: fields}).Sampled {
		t.Error("the parent does not count")
	}
}

func FuzzAContextIsReadWithoutPanic(f *testing.F) {
	f.Add("00-"+traceID+"-"+callerS+"-01", traceID+"-"+callerS+"-1", traceID, callerS)
	f.Fuzz(func(t *testing.T, parent, single, id, span string) {
		p := &Policy{Forms: W3C | B3 | B3Multi, Sampler: Sampler{Threshold: all}}
		tr := p.Begin(&Request{ID: []byte(id), Fields: list{"traceparent: " + parent, "b3: " + single, "x-b3-traceid: " + id, "x-b3-spanid: " + span, "tracestate: " + id}})
		for _, field := range written(tr) {
			if strings.ContainsAny(field, "\r\n") || !strings.Contains(field, ": ") {
				t.Errorf("%q", field)
			}
		}
		if tr.ID == [16]byte{} || tr.Span == [8]byte{} {
			t.Errorf("%+v", tr)
		}
	})
}
