package extauthz

import (
	"context"
	"fmt"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// alwaysSent are the fields of a request that a server that is asked by HTTP sees in any case, besides method, path and host.
var alwaysSent = []string{"authorization"}

// alwaysPassed are the fields of a denial that clients see besides those of the configuration.
var alwaysPassed = []string{"www-authenticate", "location"}

// ownFields are the fields of a request that are not those of a request to another server, and the fields of an answer that
// are not those of the request or response in question.
var ownFields = append(slices.Clone(framingFields), "trailer", "expect")

// partialField tells the server that it sees a part of the body.
const partialField = "X-Envoy-Auth-Partial-Body"

// removalField lists fields of the request that the server wants removed.
const removalField = "X-Envoy-Auth-Headers-To-Remove"

// askHTTP asks a server by a request with the method, host and path of the one in question. The status 200 allows it.
func askHTTP(ctx context.Context, caller Caller, e *mesh.ExtAuthz, q *Question) (*Answer, error) {
	if q.Request == nil {
		return nil, fmt.Errorf("connections cannot be asked about by HTTP")
	}
	answer, err := caller.Do(e.HTTP.Service.Cluster, httpRequest(ctx, e, q.Request), maxAnswer)
	switch {
	case err != nil:
		return nil, err
	case answer.Status >= http.StatusInternalServerError: // as for Envoy, no decision
		return nil, fmt.Errorf("the server of cluster %s answered %d", e.HTTP.Service.Cluster, answer.Status)
	case answer.Status == http.StatusOK:
		return allowedByHTTP(e.HTTP, answer)
	}
	passed := compile(e.HTTP.Denied)
	fields := fieldsOf(answer.Header, func(name string) bool {
		return e.HTTP.Denied == nil || slices.Contains(alwaysPassed, name) || passed.match(name)
	})
	return denied(answer.Status, string(answer.Body), fields), nil
}

// httpRequest returns the request to the server.
func httpRequest(ctx context.Context, e *mesh.ExtAuthz, r *Request) *http.Request {
	sent, excluded := compile(e.Headers), compile(e.NotHeaders)
	header := http.Header{"User-Agent": nil} // otherwise net/http adds one
	for _, f := range r.Fields {
		name := strings.ToLower(f.Name)
		if (slices.Contains(alwaysSent, name) || sent.match(name)) && !excluded.match(name) && !slices.Contains(ownFields, name) {
			header.Add(name, f.Value)
		}
	}
	for _, f := range e.HTTP.Add {
		header.Set(f.Name, f.Value)
	}
	own := &http.Request{
		Method: r.Method, URL: target(e.HTTP.PathPrefix + r.Path), Host: r.Host, Header: header,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if len(r.Body) > 0 {
		own.Body, own.ContentLength = callout.Body(r.Body), int64(len(r.Body))
		if r.Partial {
			header.Set(partialField, "true")
		} else {
			header.Set(partialField, "false")
		}
	}
	return own.WithContext(ctx)
}

// target returns a URL that is sent as path. Net/http would take what follows two slashes in Opaque for a host.
func target(path string) *url.URL {
	if !strings.HasPrefix(path, "//") {
		return &url.URL{Opaque: path}
	}
	before, query, _ := strings.Cut(path, "?")
	decoded, err := url.PathUnescape(before)
	if err != nil {
		decoded = before
	}
	return &url.URL{Path: decoded, RawPath: before, RawQuery: query}
}

// allowedByHTTP returns what an answer adds to a request that it allows.
func allowedByHTTP(h *mesh.HTTPAuthz, answer *callout.Answer) (*Answer, error) {
	a := &Answer{}
	set, add, passed := compile(h.Upstream), compile(h.UpstreamAppend), compile(h.Allowed)
	for _, f := range fieldsOf(answer.Header, set.match) {
		a.Edits = appendSet(a.Edits, f)
	}
	for _, f := range fieldsOf(answer.Header, add.match) {
		a.Edits = append(a.Edits, route.AddField(f.Name, f.Value))
	}
	for _, f := range fieldsOf(answer.Header, passed.match) {
		a.ResponseEdits = append(a.ResponseEdits, route.AddField(f.Name, f.Value))
	}
	for _, list := range answer.Header.Values(removalField) {
		for name := range strings.SplitSeq(list, ",") {
			if name = strings.TrimSpace(name); name == "" {
				continue // an empty element of a list (RFC 9110, section 5.6.1)
			}
			var err error
			if a.Edits, err = appendRemoval(a.Edits, name); err != nil {
				return nil, fmt.Errorf("the answer of the server: %w", err)
			}
		}
	}
	if len(a.Edits)+len(a.ResponseEdits) > maxEdits {
		return nil, fmt.Errorf("the answer has more than %d header fields", maxEdits)
	}
	return a, nil
}

// appendSet appends the edit that sets a field. Of a field with several values, the later ones are added to the first.
func appendSet(edits []route.Edit, f route.Field) []route.Edit {
	if slices.ContainsFunc(edits, func(e route.Edit) bool { return !e.Remove && e.Name == f.Name }) {
		return append(edits, route.AddField(f.Name, f.Value))
	}
	return append(edits, route.SetField(f.Name, f.Value))
}

// fieldsOf returns the fields of an answer that are selected by their names in lower case.
func fieldsOf(h http.Header, selected func(name string) bool) (fields []route.Field) {
	names := make([]string, 0, len(h))
	for name := range h {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, canonical := range names {
		name := strings.ToLower(canonical)
		if slices.Contains(ownFields, name) || !selected(name) {
			continue
		}
		for _, value := range h[textproto.CanonicalMIMEHeaderKey(canonical)] {
			if editable(name, value) {
				fields = append(fields, route.Field{Name: name, Value: value})
			}
		}
	}
	return fields
}
