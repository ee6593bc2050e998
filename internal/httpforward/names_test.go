package httpforward

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// The two engines record the same parts of the same message.
func recordBoth(t *testing.T, path string, fields []http2.Field, note []string, check func(name string, r *flow.Record, size int)) {
	t.Helper()
	settings := &Settings{Note: flow.Fields{Request: note}}
	connection := &flow.Record{}

	text := "GET " + path + " HTTP/1.1\r\n"
	for _, f := range fields {
		text += f.Name + ": " + f.Value + "\r\n"
	}
	x := &exchange{s: &session{Connection: &Connection{Record: connection}}, settings: settings}
	b := []byte(text + "\r\n")
	if done, err := x.requestHead.ParseRequest(b, http1.Limits{Head: 1 << 20, Fields: 1000}); !done || err != nil {
		t.Fatal(done, err)
	}
	x.record.HTTP = &x.http
	x.recordRequest(b)
	check("HTTP/1", &x.record, x.names.size)

	s := &stream{settings: settings, record: flow.Record{Connection: connection}}
	s.record.HTTP = &s.http
	request := http2.Request{Method: "GET", Path: path}
	s.recordRequest(&request, fields)
	check("HTTP/2", &s.record, s.names.size)
}

func TestARecordKeepsWhatCanBeReported(t *testing.T) {
	long := strings.Repeat("x", 3*flow.MaxValue)
	exact := strings.Repeat("y", flow.MaxValue)
	fields := []http2.Field{
		{Name: "host", Value: long}, {Name: "user-agent", Value: exact}, {Name: "x-request-id", Value: "id"}, {Name: "a", Value: long},
		{Name: "b", Value: ""},
	}
	recordBoth(t, "/"+long, fields, []string{"a", "b", "c", "user-agent"}, func(name string, r *flow.Record, size int) {
		h := r.HTTP
		for field, c := range map[string]struct {
			got  []byte
			want string
		}{
			"path":       {h.Path, "/" + long[:flow.MaxValue]}, // one byte more than a sink reports, so that it sees the cut
			"authority":  {h.Authority, long[:flow.MaxValue+1]},
			"user-agent": {h.UserAgent, exact},
			"id":         {h.ID, "id"},
			"a":          {h.Fields[0], long[:flow.MaxValue+1]},
			"again":      {h.Fields[3], exact},
		} {
			if string(c.got) != c.want {
				t.Errorf("%s: of %s %d bytes are kept, want %d", name, field, len(c.got), len(c.want))
			}
		}
		if h.Fields[1] == nil || len(h.Fields[1]) != 0 || h.Fields[2] != nil {
			t.Errorf("%s: an empty field is %v, a missing one %v", name, h.Fields[1], h.Fields[2])
		}
	})
}

// However many values there are: a mark stands for those that do not fit.
func TestARecordIsBoundedAsAWhole(t *testing.T) {
	var fields []http2.Field
	var note []string
	for i := range 40 {
		name := fmt.Sprintf("field-%d", i)
		fields = append(fields, http2.Field{Name: name, Value: strings.Repeat("x", 4<<10)})
		note = append(note, name)
	}
	fields = append(fields, http2.Field{Name: "host", Value: "a"})
	recordBoth(t, "/", fields, note, func(name string, r *flow.Record, size int) {
		if size > 2*flow.MaxValues {
			t.Errorf("%s: %d bytes are held", name, size)
		}
		whole := 0
		for i, value := range r.HTTP.Fields {
			switch {
			case len(value) == 4<<10 && i == whole:
				whole++
			case string(value) != flow.CutMark:
				t.Errorf("%s: value %d is %.20q…, want all of it or the mark", name, i, value)
			}
		}
		if whole != 15 { // 64 KiB, minus some bytes for the rest
			t.Errorf("%s: %d values are kept", name, whole)
		}
	})
}

// Sinks take the last element for the address that the nearest proxy saw.
func TestTheLastElementOfALongForwardedForIsKept(t *testing.T) {
	value := strings.Repeat("203.0.113.7, ", 300) + "203.0.113.8"
	for name, c := range map[string]struct {
		last    string
		want    string
		repeats int
	}{
		"its own field":    {"198.51.100.9", ",198.51.100.9", 60},
		"within a field":   {"203.0.113.1,  198.51.100.9", ",198.51.100.9", 60},
		"no address":       {strings.Repeat("z", 9000), "," + strings.Repeat("z", maxLast), 60},
		"the only field":   {value + value + value + ", 198.51.100.9", ",198.51.100.9", 0},
		"empty":            {"", ",", 60},
		"a list that fits": {"198.51.100.9", "203.0.113.8,198.51.100.9", 1},
	} {
		fields := []http2.Field{{Name: "host", Value: "a"}}
		all := ""
		for range c.repeats {
			fields = append(fields, http2.Field{Name: "x-forwarded-for", Value: value})
			all += value + ","
		}
		fields = append(fields, http2.Field{Name: "x-forwarded-for", Value: c.last})
		all += c.last
		recordBoth(t, "/", fields, nil, func(engine string, r *flow.Record, size int) {
			got := string(r.HTTP.ForwardedFor)
			if !strings.HasSuffix(got, c.want) || len(got) > flow.MaxValue || size > 4*flow.MaxValue {
				t.Errorf("%s, %s: %d bytes are kept of %d, and the end is %.80q, want %.80q", name, engine, len(got), size, got[max(0, len(got)-80):], c.want)
			}
			if len(all) <= flow.MaxValue && got != all {
				t.Errorf("%s, %s: %d of %d bytes are kept", name, engine, len(got), len(all))
			}
			if before, _, found := strings.Cut(got, flow.CutMark); !strings.HasPrefix(all, before) || found != (len(all) > flow.MaxValue) {
				t.Errorf("%s, %s: the beginning is not that of the list", name, engine)
			}
		})
	}
}

func TestNamesAreReadyForTheNextRecord(t *testing.T) {
	var s names
	first := copyValue(&s, "first")
	copyValue(&s, strings.Repeat("x", 5000))
	large := s.size
	s.clear()
	if s.size != 0 || s.used != 0 || large < 5000 {
		t.Errorf("%d bytes are kept of %d, %d in use", s.size, large, s.used)
	}
	small := copyValue(&s, "small")
	s.clear()
	if s.size != namesSize || !bytes.Equal(small, make([]byte, len(small))) {
		t.Errorf("%d bytes are kept, and they hold %q", s.size, small)
	}
	if string(first) != "first" {
		t.Errorf("a chunk that is not kept was cleared: %q", first)
	}
}

func TestSizesOfWhatIsCounted(t *testing.T) {
	if n := reflect.TypeFor[http1.Field]().Size(); n != fieldSize {
		t.Errorf("a field has %d bytes, counted as %d", n, fieldSize)
	}
	if n := reflect.TypeFor[stream]().Size(); n > streamSize || n < streamSize/2 {
		t.Errorf("a stream has %d bytes, counted as %d", n, streamSize)
	}
}
