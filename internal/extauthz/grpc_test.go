package extauthz

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// replies answers each call with a message.
type replies []byte

func (r replies) Do(string, *http.Request, int) (*callout.Answer, error) { panic("asked by HTTP") }

func (r replies) Call(context.Context, string, string, string, http.Header, []byte, int) ([]byte, error) {
	return r, nil
}

// asked returns the answer of a server that answers a message.
func asked(message []byte, allowFailure bool) *Answer {
	e := &mesh.ExtAuthz{GRPC: &mesh.GRPCService{Cluster: "c"}, StatusOnError: 503, AllowFailure: allowFailure}
	return Ask(context.Background(), replies(message), e, &Question{Request: &Request{Path: "/"}})
}

// allowing returns a CheckResponse with an OkHttpResponse.
func allowing(b []byte) []byte { return wire.AppendBytes(nil, 3, b) }

// option returns a HeaderValueOption.
func option(name, value string) []byte { return wire.AppendBytes(nil, 1, pair(name, value)) }

// A server may have allowed a request because of the changes in its answer. If one cannot be carried out, the server counts
// as one without an answer.
func TestAChangeThatIsNotCarriedOutAllowsNothing(t *testing.T) {
	for name, c := range map[string]struct {
		number  int
		content []byte
		fails   bool
	}{
		"a field":                        {2, option("X-Role", "a"), false},
		"the host":                       {2, option("Host", "other"), true},
		"the authority":                  {2, option(":authority", "other"), true},
		"the path":                       {2, option(":path", "/other"), true},
		"no name":                        {2, option("", "a"), true},
		"not a name":                     {2, option("a b", "a"), true},
		"a value with a line break":      {2, option("x-role", "a\r\nx-other: b"), true},
		"the length":                     {2, option("Content-Length", "0"), true},
		"the coding":                     {2, option("transfer-encoding", "chunked"), true},
		"a field of the response":        {6, option("x-role", "a"), false},
		"the status of the response":     {6, option(":status", "500"), true},
		"the length of the response":     {6, option("content-length", "0"), true},
		"a line break in the response":   {6, option("x-role", "a\n"), true},
		"removal of a field":             {5, []byte("X-Role"), false},
		"removal of the host":            {5, []byte("Host"), false},
		"removal of a pseudo-header":     {5, []byte(":path"), false},
		"removal of the length":          {5, []byte("content-length"), true},
		"removal of something not named": {5, []byte("a b"), true},
		"a parameter of the query":       {7, pair("a", "b"), false},
		"removal of a parameter":         {8, []byte("a"), false},
		"a parameter with a space":       {7, pair("a", "b c"), true},
		"a parameter with a fragment":    {7, pair("a", "b#c"), true},
		"a parameter with another":       {7, pair("a", "b&c=d"), true},
		"a parameter with a line break":  {7, pair("a\n", "b"), true},
		"a name with an equals sign":     {7, pair("user=admin", ""), true},
		"a name with an ampersand":       {7, pair("a&user", "admin"), true},
		"a value with an equals sign":    {7, pair("a", "b=c"), false},
	} {
		message := allowing(wire.AppendBytes(nil, c.number, c.content))
		if a := asked(message, false); a.Denied != c.fails || (a.Err != nil) != c.fails || c.fails && a.Reply.Status != 503 {
			t.Errorf("%s: %+v", name, a)
		}
		if a := asked(message, true); a.Denied || (a.Err != nil) != c.fails || c.fails && len(a.Edits)+len(a.ResponseEdits) > 0 {
			t.Errorf("%s, fails open: %+v", name, a)
		}
	}
}

// Only the code OK allows. A denial has a status from 200 to 599, 403 if the server has given no such one, and header fields that may
// be changed, of a bounded number.
func TestDenialsOfAServerThatIsAskedByGRPC(t *testing.T) {
	code := func(code uint64) []byte { return wire.AppendBytes(nil, 1, wire.AppendVarint(nil, 1, code)) }
	status := func(n uint64) []byte { return wire.AppendBytes(nil, 1, wire.AppendVarint(nil, 1, n)) }
	refusing := func(parts ...[]byte) []byte { return wire.AppendBytes(nil, 2, slices.Concat(parts...)) }
	field := func(name, value string) []byte { return wire.AppendBytes(nil, 2, option(name, value)) }
	fields := [][]byte{field(":status", "200"), field("x-a", "1\r\nx-b: 2"), field("x-a", "3"), field("Location", "/login")}
	for name, c := range map[string]struct {
		message []byte
		status  int // 0: it is allowed
		fields  int
	}{
		"OK":                              {code(0), 0, 0},
		"nothing":                         {nil, 0, 0},
		"OK, with a denial":               {append(code(0), refusing(status(401))...), 0, 0},
		"not OK":                          {code(7), 403, 0},
		"another code":                    {code(16), 403, 0},
		"an unknown code":                 {code(99), 403, 0},
		"a large code":                    {code(1 << 32), 403, 0},
		"not OK, with changes":            {append(code(5), allowing(nil)...), 403, 0},
		"a status":                        {append(code(7), refusing(status(401))...), 401, 0},
		"a status of success":             {append(code(7), refusing(status(200))...), 200, 0},
		"a status that is too small":      {append(code(7), refusing(status(199))...), 403, 0},
		"a status that is too large":      {append(code(7), refusing(status(600))...), 403, 0},
		"fields":                          {append(code(7), refusing(fields...)...), 403, 2},
		"more fields than are read":       {append(code(7), refusing(slices.Repeat([][]byte{field("x", "y")}, maxEdits+1)...)...), 403, maxEdits},
		"a message that ends too early":   {[]byte{0x0a, 9}, 503, 0},
		"the same, after a code of OK":    {append(code(0), 0x1a, 9), 503, 0},
		"the same, within what it allows": {allowing([]byte{0x12, 9}), 503, 0},
	} {
		a := asked(c.message, false)
		if c.status == 0 {
			if a.Denied || a.Err != nil {
				t.Errorf("%s: %+v", name, a)
			}
			continue
		}
		if !a.Denied || a.Reply.Status != c.status || len(a.Reply.Fields) != c.fields || (a.Err != nil) != (c.status == 503) {
			t.Errorf("%s: %+v, %+v", name, a, a.Reply)
		}
	}
}

// Changes of an answer are bounded, whatever they change.
func TestChangesOfAnAnswerAreBounded(t *testing.T) {
	for name, change := range map[string][]byte{
		"fields": wire.AppendBytes(nil, 2, option("x", "y")), "fields of the response": wire.AppendBytes(nil, 6, option("x", "y")),
		"removals": wire.AppendString(nil, 5, "x"), "parameters": wire.AppendBytes(nil, 7, pair("a", "b")), "removals of parameters": wire.AppendString(nil, 8, "a"),
	} {
		for n, fails := range map[int]bool{maxEdits: false, maxEdits + 1: true} {
			if a := asked(allowing(bytes.Repeat(change, n)), false); a.Denied != fails {
				t.Errorf("%d %s: %+v", n, name, a.Err)
			}
		}
	}
}

// The fields that a server sees are those of the configuration, with all their values.
func TestAServerThatIsAskedByGRPCSeesTheSelectedFields(t *testing.T) {
	r := &Request{Method: "GET", Path: "/p", Host: "a", Scheme: "https", Fields: []route.Field{
		{Name: "X-Role", Value: "a"}, {Name: "x-secret", Value: "b"}, {Name: "x-role", Value: "c"},
	}}
	for want, e := range map[string]*mesh.ExtAuthz{
		":authority=a :path=/p :method=GET :scheme=https x-role=a,c x-secret=b": {},
		":authority=a :path=/p :method=GET :scheme=https x-role=a,c":            {NotHeaders: oneName("x-secret")},
		"x-role=a,c": {Headers: oneName("x-role")},
		":path=/p":   {Headers: append(oneName("x-role"), oneName(":path")...), NotHeaders: oneName("x-role")},
		"":           {Headers: []mesh.StringMatcher{}},
	} {
		var got []string
		for _, f := range joined(sentFields(e, r)) {
			got = append(got, f.Name+"="+f.Value)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%+v: the server sees %q, want %q", e, got, want)
		}
	}
}

// A nested answer cannot take the stack of the process: messages end at the depth of 100, as with protobuf.
func TestAnAnswerThatIsNestedTooDeepAllowsNothing(t *testing.T) {
	for depth, fails := range map[int]bool{20: false, 60: true, 2000: true} {
		for name, wrap := range map[string]func(value []byte) []byte{
			"lists": func(value []byte) []byte { return wire.AppendBytes(nil, 6, wire.AppendBytes(nil, 1, value)) },
			"structs": func(value []byte) []byte {
				return wire.AppendBytes(nil, 5, wire.AppendBytes(nil, 1, wire.AppendBytes(nil, 2, value)))
			},
		} {
			value := wire.AppendVarint(nil, 4, 1)
			for range depth {
				value = wrap(value)
			}
			metadata := wire.AppendBytes(nil, 1, wire.AppendBytes(wire.AppendString(nil, 1, "k"), 2, value))
			if a := asked(wire.AppendBytes(nil, 4, metadata), false); a.Denied != fails {
				t.Errorf("%s, %d deep: %+v", name, depth, a)
			}
		}
	}
}

// A server that is asked by HTTP names the fields that it wants removed. A removal that is not carried out allows nothing.
func TestRemovalsOfAServerThatIsAskedByHTTP(t *testing.T) {
	for list, want := range map[string]string{
		"X-A, host, ,:path,x-b": "x-a x-b", "": "", "x-a, content-length": "error", "a b": "error",
	} {
		got := "error"
		a, err := allowedByHTTP(&mesh.HTTPAuthz{}, &callout.Answer{Status: 200, Header: http.Header{removalField: {list}}})
		if err == nil {
			got = strings.Join(removed(a.Edits), " ")
		}
		if got != want {
			t.Errorf("%q: %q, %v", list, got, err)
		}
	}
}

// A server sets and removes parameters of the query, also where clients encode their names.
func TestParametersOfTheQueryAreChanged(t *testing.T) {
	set := func(name, value string) []byte { return wire.AppendBytes(nil, 7, pair(name, value)) }
	remove := func(name string) []byte { return wire.AppendString(nil, 8, name) }
	for name, c := range map[string]struct {
		path    string
		changes [][]byte
		want    string
	}{
		"a new one":               {"/p", [][]byte{set("a", "1")}, "/p?a=1"},
		"another value":           {"/p?a=0&b=2&a=3", [][]byte{set("a", "1")}, "/p?b=2&a=1"},
		"an encoded name":         {"/p?%61=0&b=2", [][]byte{set("a", "1")}, "/p?b=2&a=1"},
		"a removal":               {"/p?a=0&b=%20", [][]byte{remove("a")}, "/p?b=%20"},
		"a removal of all":        {"/p?a=0&%61&a", [][]byte{remove("a")}, "/p"},
		"a removal, encoded":      {"/p?a%20b=0&c", [][]byte{remove("a b")}, "/p?c"},
		"a removal after a value": {"/p?a=0", [][]byte{set("a", "1"), remove("a")}, "/p"},
		"the last of two values":  {"/p?x", [][]byte{set("a", "1"), set("a", "2")}, "/p?x&a=2"},
		"two spellings of a name": {"/p?user=x", [][]byte{set("%75ser", "1"), set("user", "2")}, "/p?user=2"},
		"one of them is removed":  {"/p?user=x", [][]byte{set("%75ser", "1"), remove("user")}, "/p"},
		"no query":                {"/p", [][]byte{remove("a")}, "/p"},
		"a broken escape":         {"/p?%zz=1&a", [][]byte{remove("a")}, "/p?%zz=1"},
	} {
		a := asked(allowing(slices.Concat(c.changes...)), false)
		if got := a.Target(c.path); a.Denied || got != c.want {
			t.Errorf("%s: %q, %v; want %q", name, got, a.Err, c.want)
		}
	}
}

// The target of OPTIONS * and CONNECT has no query: an answer that sets a parameter of it cannot be carried out.
func TestParametersOfARequestWithoutAPath(t *testing.T) {
	set, remove := wire.AppendBytes(nil, 7, pair("a", "b")), wire.AppendString(nil, 8, "a")
	for _, path := range []string{"*", ""} {
		for _, fails := range []bool{true, false} {
			for _, allowFailure := range []bool{false, true} {
				change := remove
				if fails {
					change = set
				}
				e := &mesh.ExtAuthz{GRPC: &mesh.GRPCService{}, StatusOnError: 503, AllowFailure: allowFailure}
				a := Ask(context.Background(), replies(allowing(change)), e, &Question{Request: &Request{Path: path}})
				if (a.Err != nil) != fails || a.Denied != (fails && !allowFailure) {
					t.Errorf("path %q, set %v, allowed on failure %v: %+v", path, fails, allowFailure, a)
				}
			}
		}
	}
}

// Names of changes are decoded once, not for each parameter of the query: clients choose how many these are.
func TestALongQueryCostsNoMoreForEachChange(t *testing.T) {
	a := &Answer{}
	for i := range maxEdits {
		a.Parameters = append(a.Parameters, Parameter{Name: fmt.Sprintf("%%61%d", i), Value: "v"})
	}
	path := "/p?" + strings.Repeat("x&", 1000)
	if n := testing.AllocsPerRun(1, func() { a.Target(path) }); n > 10*maxEdits {
		t.Errorf("%.0f allocations", n)
	}
}

// Actions of header fields are those of Envoy: append takes precedence, and an unknown action replaces, unless answers are
// validated.
func TestActionsOfHeaderFields(t *testing.T) {
	appended := func(yes uint64) []byte { return wire.AppendBytes(nil, 2, wire.AppendVarint(nil, 1, yes)) }
	action := func(n uint64) []byte { return wire.AppendVarint(nil, 3, n) }
	for name, c := range map[string]struct {
		option  []byte
		want    mesh.EditAction
		invalid bool
	}{
		"none":                        {nil, mesh.OverwriteOrAdd, false},
		"append":                      {appended(1), mesh.AppendOrAdd, false},
		"not append":                  {appended(0), mesh.OverwriteOrAdd, false},
		"add if absent":               {action(1), mesh.AddIfAbsent, false},
		"overwrite or add":            {action(2), mesh.OverwriteOrAdd, false},
		"overwrite if present":        {action(3), mesh.OverwriteIfPresent, false},
		"not append, and an action":   {append(appended(0), action(1)...), mesh.OverwriteOrAdd, false},
		"an action, and append":       {append(action(1), appended(1)...), mesh.AppendOrAdd, false},
		"unknown":                     {action(9), mesh.OverwriteOrAdd, true},
		"unknown, and append":         {append(action(9), appended(1)...), mesh.AppendOrAdd, false},
		"the default, as it is known": {action(0), mesh.OverwriteOrAdd, false},
	} {
		message := allowing(wire.AppendBytes(nil, 2, append(option("x-a", "v"), c.option...)))
		for _, validate := range []bool{false, true} {
			e := mesh.ExtAuthz{GRPC: &mesh.GRPCService{}, StatusOnError: 503, Validate: validate}
			a := Ask(context.Background(), replies(message), &e, &Question{Request: &Request{}})
			if fails := validate && c.invalid; a.Denied != fails || !fails && (len(a.Edits) != 1 || a.Edits[0].Action != c.want) {
				t.Errorf("%s, validated %v: %+v", name, validate, a)
			}
		}
	}
}

// Metadata of the answer's content overrides that of the answer, and may be ignored.
func TestMetadataOfAnswers(t *testing.T) {
	metadata := func(value string) []byte {
		return wire.AppendBytes(nil, 1, wire.AppendBytes(wire.AppendString(nil, 1, "k"), 2, wire.AppendString(nil, 3, value)))
	}
	outer := wire.AppendBytes(nil, 4, metadata("outer"))
	for want, message := range map[string][]byte{
		"outer": append(allowing(nil), outer...), "inner": append(allowing(wire.AppendBytes(nil, 3, metadata("inner"))), outer...),
	} {
		for _, ignored := range []bool{false, true} {
			e := mesh.ExtAuthz{GRPC: &mesh.GRPCService{}, NoMetadata: ignored}
			a := Ask(context.Background(), replies(message), &e, &Question{Request: &Request{}})
			if got, _ := a.Metadata["k"].(string); a.Denied || (got == want) == ignored {
				t.Errorf("%s, ignored %v: %v", want, ignored, a.Metadata)
			}
		}
	}
}

func removed(edits []route.Edit) (names []string) {
	for _, e := range edits {
		if e.Remove {
			names = append(names, e.Name)
		}
	}
	return names
}
