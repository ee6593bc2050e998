package accesslog

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// planned writes records to logs of a control plane, and returns the lines of a file.
func planned(t *testing.T, path string, logs []mesh.AccessLog, records ...*flow.Record) (lines []string, log *logBuffer) {
	t.Helper()
	log = &logBuffer{}
	s := &Sinks{Noted: flow.NewNoted(flow.Fields{Request: []string{"x-first"}}), Log: log.logger()}
	sinks := s.Of(logs)
	for _, r := range records {
		for _, sink := range sinks {
			sink.Closed(r)
		}
	}
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	text := read(t, path)
	if text == "" {
		return nil, log
	}
	return strings.Split(strings.TrimSuffix(text, "\n"), "\n"), log
}

func expression(t *testing.T, text string) *mesh.LogFilter {
	t.Helper()
	e, err := cel.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return &mesh.LogFilter{Kind: mesh.LogExpression, Expression: e}
}

func TestFiltersOfAControlPlane(t *testing.T) {
	failed := story(request(flow.Inbound, flow.Completed), func(r *flow.Record) {
		r.HTTP.Status, r.HTTP.Flags, r.Duration = 503, "UF,URX", time.Second
	})
	call := story(request(flow.Inbound, flow.Completed), func(r *flow.Record) {
		r.HTTP.GRPCStatus = []byte("5")
		r.HTTP.Trace = &flow.Trace{Sampled: true}
	})
	opaque := connection(flow.Outbound, flow.Opaque, flow.Closed)
	records := []*flow.Record{request(flow.Inbound, flow.Completed), failed, call, opaque}
	both := func(kind mesh.LogFilterKind, of ...mesh.LogFilter) mesh.LogFilter {
		return mesh.LogFilter{Kind: kind, Filters: of}
	}
	unsupported, flags := mesh.LogFilter{}, mesh.LogFilter{Kind: mesh.LogFlags, Flags: []string{"NR", "URX"}}
	status := func(compare mesh.Comparison, value uint32) mesh.LogFilter {
		return mesh.LogFilter{Kind: mesh.LogStatus, Compare: compare, Value: value}
	}
	header := func(h mesh.HeaderMatcher) mesh.LogFilter {
		return mesh.LogFilter{Kind: mesh.LogHeader, Header: &h}
	}
	failed.HTTP.Fields = [][]byte{nil, []byte("42")} // x-number, behind x-first
	for name, c := range map[string]struct {
		filter mesh.LogFilter
		want   string // whether each record is written
	}{
		"unsupported":          {unsupported, "1111"},
		"flags":                {flags, "0100"},
		"any flag":             {mesh.LogFilter{Kind: mesh.LogFlags}, "0100"},
		"flags and more":       {both(mesh.LogAnd, unsupported, flags), "0100"},
		"flags or more":        {both(mesh.LogOr, flags, unsupported), "1111"},
		"flags or gRPC":        {both(mesh.LogOr, flags, mesh.LogFilter{Kind: mesh.LogGRPCStatus, Statuses: []uint32{5}}), "0110"},
		"not these of gRPC":    {mesh.LogFilter{Kind: mesh.LogGRPCStatus, Statuses: []uint32{5, 2}, Exclude: true}, "0100"},
		"status at least":      {status(mesh.AtLeast, 400), "0100"},
		"status at most":       {status(mesh.AtMost, 200), "1011"}, // 0 without a response
		"status equal":         {status(mesh.Equal, 200), "1010"},
		"status unequal":       {status(mesh.Unequal, 200), "0101"},
		"duration":             {mesh.LogFilter{Kind: mesh.LogDuration, Compare: mesh.AtLeast, Value: 1000}, "0100"},
		"traced":               {mesh.LogFilter{Kind: mesh.LogTraced}, "0010"},
		"type request":         {mesh.LogFilter{Kind: mesh.LogType, Statuses: []uint32{mesh.TypeRequestEnd}}, "1110"},
		"type connection":      {mesh.LogFilter{Kind: mesh.LogType, Statuses: []uint32{1, mesh.TypeConnectionEnd}}, "0001"},
		"no type request":      {mesh.LogFilter{Kind: mesh.LogType, Statuses: []uint32{mesh.TypeRequestEnd}, Exclude: true}, "0001"},
		"header present":       {header(mesh.HeaderMatcher{Name: "x-number", Present: true}), "0100"},
		"header absent":        {header(mesh.HeaderMatcher{Name: "x-number", Present: true, Invert: true}), "1011"},
		"header range":         {header(mesh.HeaderMatcher{Name: "x-number", Kind: mesh.HeaderRange, Start: 42, End: 43}), "0100"},
		"header out of range":  {header(mesh.HeaderMatcher{Name: "x-number", Kind: mesh.HeaderRange, Start: 1, End: 42}), "0000"},
		"header text":          {header(mesh.HeaderMatcher{Name: "x-number", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Kind: mesh.MatchRegex, Text: "4."}}), "0100"},
		"header inverted":      {header(mesh.HeaderMatcher{Name: "x-number", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "1"}, Invert: true}), "0100"}, // missing does not match
		"header or empty":      {header(mesh.HeaderMatcher{Name: "x-number", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "1"}, Invert: true, MissingIsEmpty: true}), "1111"},
		"header method":        {header(mesh.HeaderMatcher{Name: ":method", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "GET"}}), "1110"},
		"header, no pattern":   {header(mesh.HeaderMatcher{Name: ":method", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Kind: mesh.MatchRegex, Text: "("}}), "1110"},
		"all of a sample":      {mesh.LogFilter{Kind: mesh.LogSample, Sample: mesh.Fraction{Numerator: 100, Denominator: 100}}, "1111"},
		"nothing of a sample":  {mesh.LogFilter{Kind: mesh.LogSample, Sample: mesh.Fraction{Denominator: 100}}, "0000"},
		"expression":           {*expression(t, "response.code >= 400"), "0100"},
		"expression, negative": {*expression(t, "!has(response.code) || response.code >= 400"), "0101"},
	} {
		path := filepath.Join(t.TempDir(), "log")
		got := ""
		for _, r := range records {
			lines, _ := planned(t, path, []mesh.AccessLog{{Path: path, Text: "line\n", Filter: &c.filter}}, r)
			got += map[bool]string{true: "1", false: "0"}[len(lines) > strings.Count(got, "1")]
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// member is a member of a google.protobuf.Struct.
func member(name string, number int, value []byte) []byte {
	return wire.AppendBytes(nil, 1, wire.AppendBytes(wire.AppendString(nil, 1, name), 2, wire.AppendBytes(nil, number, value)))
}

func TestFormatsOfAControlPlane(t *testing.T) {
	with := story(request(flow.Inbound, flow.Completed), func(r *flow.Record) {
		r.HTTP.Fields = [][]byte{[]byte("first"), []byte("second")}
	})
	without := request(flow.Inbound, flow.Completed)
	text := func(name, value string) []byte { return member(name, 3, []byte(value)) }
	flat := append(text("z", "%REQ(X-SECOND)%"), text("code", "%RESPONSE_CODE%")...)
	numbers := wire.AppendBytes(nil, 1, wire.AppendBytes(wire.AppendString(nil, 1, "n"), 2, wire.AppendDouble(nil, 2, 1.5)))
	flag := wire.AppendBytes(nil, 1, wire.AppendBytes(wire.AppendString(nil, 1, "flag"), 2, wire.AppendVarint(nil, 4, 1)))
	list := member("list", 6, append(wire.AppendBytes(nil, 1, wire.AppendString(nil, 3, "%PROTOCOL%")), wire.AppendBytes(nil, 1, wire.AppendVarint(nil, 1, 0))...))
	nested := append(append(append(member("inner", 5, flat), numbers...), flag...), list...)
	missing := append(append(append(append(text("a", "%REQ(X-NONE)%"), text("b", "%RESPONSE_CODE%")...), text("c", "%GRPC_STATUS%")...), text("d", "<%REQ(X-NONE)%>")...), member("e", 5, text("a", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"))...)
	for name, c := range map[string]struct {
		log     mesh.AccessLog
		want    string
		warning string
	}{
		"text":                 {mesh.AccessLog{Text: "%RESPONSE_CODE% %REQ(X-SECOND)% 100%%\n"}, "200 second 100%", ""},
		"a field of another":   {mesh.AccessLog{Text: "%REQ(X-FIRST)%"}, "first", ""},
		"an unknown operator":  {mesh.AccessLog{Text: "%METADATA(CLUSTER:istio)% %RESPONSE_CODE% %CEL(a)%"}, "- 200 -", "unknown operator %METADATA%"},
		"a malformed operator": {mesh.AccessLog{Text: "%RESPONSE_CODE% %oops"}, "200 %oops", "column 17"},
		"lines":                {mesh.AccessLog{Text: "a\nb\t%RESPONSE_CODE%\n"}, "a b 200", ""},
		"without a query":      {mesh.AccessLog{Text: "%REQ_WITHOUT_QUERY(X-NONE?:PATH):3% %REQ_WITHOUT_QUERY(:PATH)%"}, "/a /a", ""},
		"empty":                {mesh.AccessLog{Text: "%REQ(X-NONE)%-%RESPONSE_CODE%", OmitEmpty: true}, "-200", ""},
		"JSON":                 {mesh.AccessLog{JSON: flat}, `{"code":200,"z":"second"}`, ""},
		"nested JSON":          {mesh.AccessLog{JSON: nested}, `{"flag":true,"inner":{"code":200,"z":"second"},"list":["HTTP/1.1",null],"n":1.5}`, ""},
		"JSON without values":  {mesh.AccessLog{JSON: missing}, `{"a":null,"b":200,"c":null,"d":"<->","e":{"a":null}}`, ""},
		"JSON, empty":          {mesh.AccessLog{JSON: missing, OmitEmpty: true}, `{"b":200,"d":"<>","e":{}}`, ""},
		"JSON, unknown":        {mesh.AccessLog{JSON: text("a", "%OOPS%")}, `{"a":null}`, "unknown operator %OOPS%"},
		"JSON of nothing":      {mesh.AccessLog{JSON: []byte{}}, `{}`, ""},
		"broken JSON":          {mesh.AccessLog{JSON: []byte{0x0a}}, "", "error="},
		"Envoy's format":       {mesh.AccessLog{}, "", ""},
	} {
		c.log.Path = filepath.Join(t.TempDir(), "log")
		r := with
		if strings.Contains(c.log.Text+string(c.log.JSON), "X-NONE") {
			r = without
		}
		lines, log := planned(t, c.log.Path, []mesh.AccessLog{c.log}, r)
		if len(lines) != 1 || c.want != "" && lines[0] != c.want {
			t.Errorf("%s: %q, want %q", name, lines, c.want)
		}
		if c.log.JSON != nil && c.want != "" && !json.Valid([]byte(lines[0])) {
			t.Errorf("%s: %s is not JSON", name, lines[0])
		}
		if warned := log.count("access log format not honoured") > 0; warned != (c.warning != "") || log.count(c.warning) == 0 && warned {
			t.Errorf("%s: the agent logs %s", name, log.buf.String())
		}
	}
}

func TestLogsOfAControlPlaneShareFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	logs := []mesh.AccessLog{{Path: path, Text: "one"}, {Path: path, Text: "two", Filter: expression(t, "response.code == 200")}}
	if lines, _ := planned(t, path, logs, request(flow.Inbound, flow.Completed), connection(flow.Inbound, flow.Opaque, flow.Closed)); strings.Join(lines, " ") != "one two one" {
		t.Errorf("lines %q", lines)
	}
}

// taken counts the sinks that are not refused.
func taken(sinks []flow.Sink) (n int) {
	for _, s := range sinks {
		if _, ok := s.(*Log); ok {
			n++
		}
	}
	return n
}

func TestFilesOfAControlPlaneAreBounded(t *testing.T) {
	var log logBuffer
	directory := t.TempDir()
	s := &Sinks{Noted: flow.NewNoted(flow.Fields{}), Log: log.logger()}
	written := 0
	for i := range maxFiles + 2 {
		path := filepath.Join(directory, string(rune('a'+i)))
		if i == 0 {
			path = directory // cannot be written
		}
		written += taken(s.Of([]mesh.AccessLog{{Path: path, Text: "x"}}))
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if written != maxFiles || log.count("too many access logs") != 2 || log.count("access log not written") != 1 {
		t.Errorf("%d files, and the log %s", written, log.buf.String())
	}
}

// A file that cannot be opened at first gets the lines that were queued when it can: when the files are opened again, or
// after a while.
func TestAFileOfAControlPlaneIsOpenedLater(t *testing.T) {
	for _, reopens := range []bool{true, false} {
		var log logBuffer
		directory := filepath.Join(t.TempDir(), "later")
		path := filepath.Join(directory, "log")
		s := &Sinks{Noted: flow.NewNoted(flow.Fields{}), Log: log.logger()}
		for _, sink := range s.Of([]mesh.AccessLog{{Path: path, Text: "line"}}) {
			sink.Closed(request(flow.Inbound, flow.Completed))
		}
		nettest.Eventually(t, "a message with the remedy", func() bool { return log.count("permit the agent to write there") > 0 })
		s.Reopen() // fails
		if err := os.Mkdir(directory, 0o755); err != nil {
			t.Fatal(err)
		}
		if reopens {
			s.Reopen()
		}
		nettest.Eventually(t, "the line that was queued", func() bool {
			text, err := os.ReadFile(path)
			return err == nil && string(text) == "line\n"
		})
		if err := s.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if written, dropped := s.Counts(); written != 1 || dropped != 0 {
			t.Errorf("%d lines written and %d dropped", written, dropped)
		}
	}
}

func TestFieldsOfAControlPlaneAreBounded(t *testing.T) {
	var log logBuffer
	path := filepath.Join(t.TempDir(), "log")
	s := &Sinks{Noted: flow.NewNoted(flow.Fields{}), Log: log.logger()}
	for i := range 70 {
		name := strings.Repeat("x", i+1)
		s.Of([]mesh.AccessLog{{Path: path, Text: "%REQ(" + name + ")% %RESP(" + name + ")%"}})
	}
	if n := s.Noted.Load(); len(n.Request) != flow.MaxNoted || len(n.Response) != flow.MaxNoted || log.count("too many different header fields") == 0 {
		t.Errorf("%d and %d fields are recorded", len(n.Request), len(n.Response))
	}

	// A format keeps everything else; x is recorded.
	other := filepath.Join(t.TempDir(), "log")
	for _, sink := range s.Of([]mesh.AccessLog{{Path: other, Text: "%REQ(X-LATE?X)% %RESPONSE_CODE% %RESP(X-LATER)% %REQ(X)%"}}) {
		sink.Closed(story(request(flow.Inbound, flow.Completed), func(r *flow.Record) { r.HTTP.Fields = [][]byte{[]byte("first")} }))
	}
	if log.count("the field x-late is not recorded") != 1 || log.count("the field x-later is not recorded") != 1 {
		t.Errorf("the agent logs %s", log.buf.String())
	}
	defer func() {
		if got := read(t, other); got != "- 200 - first\n" {
			t.Errorf("line %q", got)
		}
	}()
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
}
