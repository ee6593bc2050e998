package extauthz

import (
	"context"
	"net/http"
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
	return Ask(context.Background(), replies(message), e, &Question{Request: &Request{}})
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
		"a parameter of the query":       {7, pair("a", "b"), true},
		"removal of a parameter":         {8, []byte("a"), true},
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

func removed(edits []route.Edit) (names []string) {
	for _, e := range edits {
		if e.Remove {
			names = append(names, e.Name)
		}
	}
	return names
}
