package httpforward

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// line is a field of the reference.
type line struct{ name, value string }

// editedSlowly makes edits on a list of fields, one after the other, as the documentation of Envoy describes them.
func editedSlowly(fields []line, h *mesh.HeaderEdits) []line {
	without := func(name string) []line {
		return slices.DeleteFunc(slices.Clone(fields), func(l line) bool { return strings.EqualFold(l.name, name) })
	}
	for _, name := range h.Remove {
		if editable(strings.ToLower(name)) {
			fields = without(name)
		}
	}
	for _, overwrites := range []bool{true, false} { // see route.Plan
		for _, add := range h.Add {
			if overwrites != (add.Action == mesh.OverwriteOrAdd || add.Action == mesh.OverwriteIfPresent) ||
				!editable(strings.ToLower(add.Name)) || add.Value == "" && !add.KeepEmpty {
				continue
			}
			there := len(without(add.Name)) < len(fields)
			switch {
			case add.Action == mesh.AddIfAbsent && there, add.Action == mesh.OverwriteIfPresent && !there:
				continue
			case overwrites:
				fields = without(add.Name)
			}
			fields = append(slices.Clone(fields), line{strings.ToLower(add.Name), add.Value})
		}
	}
	return fields
}

var editedNames = []string{"x-a", "X-A", "x-b", "X-Bc", "x-bC", "Connection", "content-length", "Host", "accept", "TE"}

func FuzzEditsMatchAReference(f *testing.F) {
	for seed := range uint64(50) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		random := rand.New(rand.NewPCG(seed, 0))
		pick := func(of []string) string { return of[random.IntN(len(of))] }
		var edits mesh.HeaderEdits
		for range random.IntN(4) {
			edits.Remove = append(edits.Remove, pick(editedNames))
		}
		for range random.IntN(6) {
			edits.Add = append(edits.Add, mesh.HeaderEdit{
				Name: pick(editedNames), Value: pick([]string{"", "1", "2", "three"}), Action: mesh.EditAction(random.IntN(4)), KeepEmpty: random.IntN(2) == 0,
			})
		}
		text, fields := "GET / HTTP/1.1\r\nhost: h\r\n", []line{{"host", "h"}}
		for range random.IntN(8) {
			l := line{pick(editedNames), fmt.Sprint(random.IntN(3))}
			if editable(strings.ToLower(l.name)) {
				text += l.name + ": " + l.value + "\r\n"
				fields = append(fields, l)
			}
		}
		text += "\r\n"
		plan := planOf(t, mesh.Forward{}, mesh.Edits{Request: edits})
		var h http1.Head
		if done, err := h.ParseRequest([]byte(text), http1.Limits{}); !done || err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		e := &edited{request: route.Request{Fields: &headFields{&h, []byte(text)}}}
		e.begin(&headFields{&h, []byte(text)})
		e.apply(plan.RequestEdits)
		var got []line
		for i := range h.Fields {
			if name, value := e.fields.At(i); !e.gone[i] {
				got = append(got, line{string(name), string(value)})
			}
		}
		for i := range e.added {
			if a := &e.added[i]; !a.gone {
				got = append(got, line{a.name, string(e.value(a))})
			}
		}
		if want := editedSlowly(fields, &edits); !slices.Equal(got, want) {
			t.Errorf("%q with %+v has %q, want %q", text, edits, got, want)
		}
	})
}

// Pauses are random parts of a growing bound, and have a limit.
func TestPausesBeforeRetries(t *testing.T) {
	p := &mesh.RetryPolicy{BackOff: 25, MaxBackOff: 250}
	for n, limit := range map[int]int64{1: 25, 2: 75, 3: 175, 4: 250, 5: 250, 40: 250, 1000: 250} {
		most := int64(0)
		for range 20_000 {
			pause := int64(backOff(p, n))
			if pause < 0 || pause >= limit {
				t.Fatalf("pause %d is %d, want less than %d", n, pause, limit)
			}
			most = max(most, pause)
		}
		if most != limit-1 {
			t.Errorf("pause %d is at most %d, want %d", n, most, limit-1)
		}
	}
	if pause := backOff(&mesh.RetryPolicy{}, 1); pause != 0 {
		t.Errorf("the pause of a policy without one is %v", pause)
	}
}
