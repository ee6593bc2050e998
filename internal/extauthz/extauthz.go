// Package extauthz asks servers whether connections and requests are allowed, as Envoy's filters ext_authz do: by HTTP, or by
// the gRPC method envoy.service.auth.v3.Authorization/Check.
//
// A server that cannot be asked, or whose answer is not understood, allows nothing, unless the configuration says so. Header
// fields of the answer are only those that may be changed: an answer cannot change the framing of a message or its host.
package extauthz

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// Caller sends requests to clusters: a *callout.Client.
type Caller interface {
	Do(cluster string, r *http.Request, limit int) (*callout.Answer, error)
	Call(ctx context.Context, cluster, authority, path string, header http.Header, message []byte, limit int) ([]byte, error)
}

// Question is a connection or a request that a server is asked about. It owns its memory.
type Question struct {
	Source, Destination netip.AddrPort // the peer, and the original destination
	Certified           bool           // the client has shown a certificate
	SourceName          string         // the first name in it; may be empty
	DestinationName     string         // the workload's SPIFFE ID; empty: not known
	Certificate         string         // of the client, in PEM with the bytes encoded that URLs do not have; empty: none, or not sent
	ServerName          string         // of the ClientHello; may be empty
	At                  time.Time

	Request *Request          // nil: a connection
	Context []mesh.NamedValue // of the route, for a server that is asked by gRPC
}

// Request is the part of a Question that connections do not have.
type Request struct {
	ID, Method, Scheme, Host string
	Path                     string        // normalized, with its query
	Protocol                 string        // HTTP/1.1 or HTTP/2
	Fields                   []route.Field // in the order of their arrival, with the values of repeated ones
	Body                     []byte        // as much of it as the server may see
	Size                     int64         // of the whole body; -1: not known
	Partial                  bool          // Body is not the whole body
	Raw                      bool          // Body is sent as bytes
}

// Answer is what becomes of a connection or a request.
type Answer struct {
	Denied bool
	Reply  *route.Reply // to a request that is denied
	Err    error        // the server could not be asked; nil: it has answered

	// Of a request that is allowed.
	Edits         []route.Edit   // of its header
	ResponseEdits []route.Edit   // of its response's header
	Metadata      match.Metadata // for later filters; may be nil
	Parameters    []Parameter    // of its query, that are set or removed
}

// Parameter is a change of a parameter of a query.
type Parameter struct {
	Name, Value string
	Remove      bool
}

// Target returns the path of a request with the query that the answer makes of its own. Names are compared in their decoded form,
// in which a server reads them. Parameters that are set follow the others.
func (a *Answer) Target(path string) string {
	last := make(map[string]int, len(a.Parameters)) // the index of the last change of a name, which counts
	for i := range a.Parameters {
		last[decoded(a.Parameters[i].Name)] = i
	}
	target, query, _ := strings.Cut(path, "?")
	b, separator := append(make([]byte, 0, len(path)), target...), byte('?')
	for p := range strings.SplitSeq(query, "&") {
		name, _, _ := strings.Cut(p, "=")
		if _, changed := last[decoded(name)]; p != "" && !changed {
			b, separator = append(append(b, separator), p...), '&'
		}
	}
	for i := range a.Parameters {
		if p := &a.Parameters[i]; !p.Remove && last[decoded(p.Name)] == i {
			b, separator = append(append(b, separator), p.Name+"="+p.Value...), '&'
		}
	}
	return string(b)
}

// Bounds of what is read.
const (
	maxAnswer = 256 << 10 // of the body of an answer
	maxEdits  = 256       // header fields of an answer
)

// defaultTimeout is that of a server without one in its configuration. Envoy does not wait then; the configuration always
// has one.
const defaultTimeout = 200 * time.Millisecond

func decoded(name string) string {
	if plain, err := url.QueryUnescape(name); err == nil {
		return plain
	}
	return name
}

// Ask asks the server of e. ctx ends the call early.
func Ask(ctx context.Context, caller Caller, e *mesh.ExtAuthz, q *Question) *Answer {
	timeout := defaultTimeout
	switch {
	case e.GRPC != nil && e.GRPC.Timeout > 0:
		timeout = e.GRPC.Timeout
	case e.HTTP != nil && e.HTTP.Service.Timeout > 0:
		timeout = e.HTTP.Service.Timeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var answer *Answer
	var err error
	if e.GRPC != nil {
		answer, err = askGRPC(ctx, caller, e, q)
	} else {
		answer, err = askHTTP(ctx, caller, e, q)
	}
	if r := q.Request; err == nil && r != nil && !strings.HasPrefix(r.Path, "/") && answer.Target(r.Path) != r.Path {
		err = errNoQuery
	}
	if err != nil {
		return Failed(e, err)
	}
	return answer
}

// errNoQuery is the error of an answer about OPTIONS * or CONNECT that sets parameters.
var errNoQuery = errors.New("the answer of the server: it sets parameters of a request that has no path")

// failureField marks requests that are allowed although their server could not be asked.
const failureField = "x-envoy-auth-failure-mode-allowed"

// Failed returns the answer for a server that cannot be asked.
func Failed(e *mesh.ExtAuthz, err error) *Answer {
	if e.AllowFailure {
		answer := &Answer{Err: err}
		if e.MarkFailure {
			answer.Edits = []route.Edit{route.SetField(failureField, "true")}
		}
		return answer
	}
	return &Answer{Denied: true, Err: err, Reply: &route.Reply{
		Status: e.StatusOnError, Details: detailsError, Flags: FlagUnauthorized, Reason: flow.PolicyDenied, Edited: true,
	}}
}

// Envoy's words.
const (
	FlagUnauthorized = "UAEX"
	detailsDenied    = "ext_authz_denied"
	detailsError     = "ext_authz_error"
)

// DetailsOf returns Envoy's response_code_details of a denial: by a server, or because it could not be asked.
func DetailsOf(failed bool) string {
	if failed {
		return detailsError
	}
	return detailsDenied
}

// denied returns the answer of a server that denies a request.
func denied(status int, body string, fields []route.Field) *Answer {
	return &Answer{Denied: true, Reply: &route.Reply{
		Status: status, Body: body, Fields: fields, Details: detailsDenied, Flags: FlagUnauthorized, Reason: flow.PolicyDenied, Edited: true,
	}}
}

// editable reports whether a field of an answer may be used.
func editable(name, value string) bool { return mesh.Editable(name) && mesh.FieldValue(value) }

// framingFields frame a message or belong to one connection. Edits of them have no effect: see httpforward.
var framingFields = []string{
	"connection", "keep-alive", "proxy-connection", "transfer-encoding", "content-length", "te", "upgrade", "http2-settings", "host",
}

// appendRemoval appends the removal of a field from a request. As with Envoy, the host and pseudo-header fields stay, because
// a request without them would be malformed.
func appendRemoval(edits []route.Edit, name string) ([]route.Edit, error) {
	name = strings.ToLower(name)
	switch {
	case name == "host" || strings.HasPrefix(name, ":"):
		return edits, nil
	case !mesh.Editable(name) || slices.Contains(framingFields, name):
		return nil, fmt.Errorf("it removes the header field %.64q, which is not supported", name)
	}
	return append(edits, route.Edit{Name: name, Remove: true}), nil
}

// texts are compiled matchers.
type texts []match.Text

func compile(matchers []mesh.StringMatcher) texts {
	list := make(texts, len(matchers))
	for i := range matchers {
		list[i] = match.Compile(&matchers[i])
	}
	return list
}

// match reports whether one of the matchers certainly matches the name of a field, in lower case.
func (t texts) match(name string) bool {
	for i := range t {
		if t[i].MatchString(name) == match.Yes {
			return true
		}
	}
	return false
}
