package extauthz

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/wire"
)

const checkMethod = "/envoy.service.auth.v3.Authorization/Check"

// askGRPC asks a server by the method Check.
func askGRPC(ctx context.Context, caller Caller, e *mesh.ExtAuthz, q *Question) (*Answer, error) {
	header := http.Header{}
	for _, f := range e.GRPC.Metadata {
		header.Add(f.Name, f.Value)
	}
	message, err := caller.Call(ctx, e.GRPC.Cluster, e.GRPC.Authority, checkMethod, header, checkRequest(e, q), maxAnswer)
	if err != nil {
		return nil, err
	}
	return parseResponse(message, e)
}

// checkRequest returns an envoy.service.auth.v3.CheckRequest.
func checkRequest(e *mesh.ExtAuthz, q *Question) []byte {
	var source, destination []byte
	source = wire.AppendBytes(source, 1, address(q.Source.Addr().Unmap().String(), q.Source.Port()))
	destination = wire.AppendBytes(destination, 1, address(q.Destination.Addr().Unmap().String(), q.Destination.Port()))
	if e.PeerCert && q.Certificate != "" {
		source = wire.AppendString(source, 5, q.Certificate)
	}
	if q.SourceName != "" {
		source = wire.AppendString(source, 4, text(q.SourceName))
	}
	if q.DestinationName != "" {
		destination = wire.AppendString(destination, 4, text(q.DestinationName))
	}
	attributes := wire.AppendBytes(wire.AppendBytes(nil, 1, source), 2, destination)
	var request []byte
	if !q.At.IsZero() {
		at := wire.AppendVarint(wire.AppendVarint(nil, 1, uint64(q.At.Unix())), 2, uint64(q.At.Nanosecond()))
		request = wire.AppendBytes(request, 1, at)
	}
	if q.Request != nil {
		request = wire.AppendBytes(request, 2, httpAttributes(e, q.Request))
	}
	attributes = wire.AppendBytes(attributes, 4, request)
	for _, c := range q.Context {
		attributes = wire.AppendBytes(attributes, 10, pair(c.Name, text(c.Value)))
	}
	if e.TLSSession && q.ServerName != "" {
		attributes = wire.AppendBytes(attributes, 12, wire.AppendString(nil, 1, text(q.ServerName)))
	}
	return wire.AppendBytes(nil, 1, attributes)
}

// address returns an envoy.config.core.v3.Address.
func address(ip string, port uint16) []byte {
	return wire.AppendBytes(nil, 1, wire.AppendVarint(wire.AppendString(nil, 2, ip), 3, uint64(port)))
}

func pair(key, value string) []byte {
	return wire.AppendString(wire.AppendString(nil, 1, key), 2, value)
}

// text returns a text without bytes that are not UTF-8, which a string of protobuf must not have. They become exclamation
// marks, as with Envoy.
func text(s string) string { return strings.ToValidUTF8(s, "!") }

// httpAttributes returns an AttributeContext.HttpRequest. The values of a repeated field are joined by commas, so that the
// server sees all of them (CVE-2021-32777).
func httpAttributes(e *mesh.ExtAuthz, r *Request) []byte {
	path, query, _ := strings.Cut(r.Path, "?")
	b := wire.AppendString(nil, 1, text(r.ID))
	b = wire.AppendString(b, 2, text(r.Method))
	fields := sentFields(e, r)
	if e.RawHeaders {
		var list []byte
		for _, f := range fields {
			list = wire.AppendBytes(list, 1, wire.AppendBytes(wire.AppendString(nil, 1, text(f.Name)), 3, []byte(f.Value)))
		}
		b = wire.AppendBytes(b, 13, list)
	} else {
		for _, f := range joined(fields) {
			b = wire.AppendBytes(b, 3, pair(text(f.Name), text(f.Value)))
		}
	}
	b = wire.AppendString(b, 4, text(r.Path))
	b = wire.AppendString(b, 5, text(r.Host))
	b = wire.AppendString(b, 6, text(r.Scheme))
	if query != "" && path != "" {
		b = wire.AppendString(b, 7, text(query))
	}
	b = wire.AppendVarint(b, 9, uint64(r.Size))
	b = wire.AppendString(b, 10, r.Protocol)
	switch {
	case len(r.Body) == 0:
	case r.Raw:
		b = wire.AppendBytes(b, 12, r.Body)
	default:
		b = wire.AppendString(b, 11, text(string(r.Body)))
	}
	return b
}

// sentFields returns the fields that the server may see, pseudo-header fields first. Names are in lower case.
func sentFields(e *mesh.ExtAuthz, r *Request) []route.Field {
	sent, excluded := compile(e.Headers), compile(e.NotHeaders)
	all := append([]route.Field{
		{Name: ":authority", Value: r.Host}, {Name: ":path", Value: r.Path}, {Name: ":method", Value: r.Method}, {Name: ":scheme", Value: r.Scheme},
	}, r.Fields...)
	if len(r.Body) > 0 {
		partial := "false"
		if r.Partial {
			partial = "true"
		}
		all = append(all, route.Field{Name: strings.ToLower(partialField), Value: partial})
	}
	fields := all[:0:0]
	for _, f := range all {
		f.Name = strings.ToLower(f.Name)
		if (e.Headers == nil || sent.match(f.Name)) && !excluded.match(f.Name) {
			fields = append(fields, f)
		}
	}
	return fields
}

// joined returns fields with the values of repeated ones joined.
func joined(fields []route.Field) (list []route.Field) {
	for _, f := range fields {
		if i := slices.IndexFunc(list, func(e route.Field) bool { return e.Name == f.Name }); i >= 0 {
			list[i].Value += "," + f.Value
			continue
		}
		list = append(list, f)
	}
	return list
}

// parseResponse reads an envoy.service.auth.v3.CheckResponse. The code OK allows.
func parseResponse(b []byte, e *mesh.ExtAuthz) (*Answer, error) {
	var err error
	code := uint64(0)
	a := &Answer{}
	var allowed, refused *wire.Message
	for m := wire.Read(b, &err); m.Next(); {
		switch m.Number {
		case 1:
			for m := m.Message(); m.Next(); {
				if m.Number == 1 {
					code = m.Uint64()
				}
			}
		case 2:
			refused = new(m.Message())
		case 3:
			allowed = new(m.Message())
		case 4:
			a.Metadata = structure(m.Message())
		}
	}
	switch {
	case err != nil:
	case code != 0 && refused != nil:
		a = parseDenied(*refused)
	case code != 0:
		a = denied(http.StatusForbidden, "", nil)
	case allowed != nil:
		err2 := parseAllowed(*allowed, a, e.Validate)
		if err == nil {
			err = err2
		}
	}
	if e.NoMetadata {
		a.Metadata = nil
	}
	if err != nil {
		return nil, fmt.Errorf("the answer of the server: %w", err)
	}
	return a, nil
}

// parseDenied reads a DeniedHttpResponse.
func parseDenied(m wire.Message) *Answer {
	status, body := http.StatusForbidden, ""
	var fields []route.Field
	for m.Next() {
		switch m.Number {
		case 1:
			for m := m.Message(); m.Next(); {
				if code := int(int32(m.Uint64())); m.Number == 1 && code >= 200 && code <= 599 {
					status = code
				}
			}
		case 2:
			f, _, _ := headerOption(m.Message())
			if editable(f.Name, f.Value) && len(fields) < maxEdits {
				fields = append(fields, f)
			}
		case 3:
			body = m.String()
		}
	}
	return denied(status, body, fields)
}

// parseAllowed reads an OkHttpResponse. A change that is not carried out is an error: the server may have allowed the request
// because of it.
func parseAllowed(m wire.Message, a *Answer, validate bool) (err error) {
	for err == nil && m.Next() {
		switch m.Number {
		case 2:
			a.Edits, err = appendOption(a.Edits, m.Message(), validate)
		case 5:
			a.Edits, err = appendRemoval(a.Edits, m.String())
		case 6:
			a.ResponseEdits, err = appendOption(a.ResponseEdits, m.Message(), validate)
		case 3:
			a.Metadata = structure(m.Message()) // it overrides that of the answer
		case 7, 8:
			p := Parameter{Remove: m.Number == 8}
			if p.Remove {
				p.Name = m.String()
			} else {
				p.Name, p.Value = keyValue(m.Message())
			}
			a.Parameters = append(a.Parameters, p)
			if !p.Remove {
				err = p.check()
			}
		}
		if err == nil && len(a.Edits)+len(a.ResponseEdits)+len(a.Parameters) > maxEdits {
			err = fmt.Errorf("it has more than %d header fields and parameters", maxEdits)
		}
	}
	return err
}

func keyValue(m wire.Message) (key, value string) {
	for m.Next() {
		switch m.Number {
		case 1:
			key = m.String()
		case 2:
			value = m.String()
		}
	}
	return key, value
}

// check rejects a parameter that would break the target of a request, or that a server would read with another name.
func (p *Parameter) check() error {
	if strings.Contains(p.Name, "=") {
		return fmt.Errorf("the name of its parameter %.64q has an equals sign, which is not supported", p.Name)
	}
	for _, c := range []byte(p.Name + p.Value) {
		if c <= ' ' || c > '~' || c == '#' || c == '&' {
			return fmt.Errorf("its parameter %.64q has characters that a query does not have", p.Name)
		}
	}
	return nil
}

// appendOption appends the edit of a HeaderValueOption.
func appendOption(edits []route.Edit, m wire.Message, validate bool) ([]route.Edit, error) {
	f, action, known := headerOption(m)
	switch {
	case !known && validate:
		return nil, fmt.Errorf("the append action of its header field %.64q is not known", f.Name)
	case !mesh.Editable(f.Name) || slices.Contains(framingFields, f.Name):
		return nil, fmt.Errorf("it sets the header field %.64q, which is not supported", f.Name)
	case !mesh.FieldValue(f.Value):
		return nil, fmt.Errorf("the value of its header field %.64q has a line break or NUL", f.Name)
	}
	e := route.SetField(f.Name, f.Value)
	e.Action = action
	return append(edits, e), nil
}

// headerOption reads an envoy.config.core.v3.HeaderValueOption. Without append and append_action, the field is replaced: that
// is the default of this API. As with Envoy, append takes precedence, and a field whose action is not known is replaced.
func headerOption(m wire.Message) (f route.Field, action mesh.EditAction, known bool) {
	action, known = mesh.OverwriteOrAdd, true
	decided := false
	for m.Next() {
		switch m.Number {
		case 1:
			for m := m.Message(); m.Next(); {
				switch m.Number {
				case 1:
					f.Name = strings.ToLower(m.String())
				case 2:
					f.Value = m.String()
				case 3:
					f.Value = string(m.Bytes())
				}
			}
		case 2:
			action, decided, known = mesh.OverwriteOrAdd, true, true
			for m := m.Message(); m.Next(); {
				if m.Number == 1 && m.Bool() {
					action = mesh.AppendOrAdd
				}
			}
		case 3:
			a := m.Uint64()
			switch {
			case decided || a == 0:
			case a <= uint64(mesh.OverwriteIfPresent):
				action = mesh.EditAction(a)
			default:
				known = false
			}
		}
	}
	return f, action, known
}

// structure reads a google.protobuf.Struct.
func structure(m wire.Message) match.Metadata {
	d := match.Metadata{}
	for m.Next() {
		if m.Number != 1 {
			continue
		}
		key := ""
		var value any
		for m := m.Message(); m.Next(); {
			switch m.Number {
			case 1:
				key = m.String()
			case 2:
				value = dynamic(m.Message())
			}
		}
		d[key] = value
	}
	return d
}

// dynamic reads a google.protobuf.Value.
func dynamic(m wire.Message) (value any) {
	for m.Next() {
		switch m.Number {
		case 1:
			value = nil
		case 2:
			value = m.Double()
		case 3:
			value = m.String()
		case 4:
			value = m.Bool()
		case 5:
			value = map[string]any(structure(m.Message()))
		case 6:
			list := []any{}
			for m := m.Message(); m.Next(); {
				if m.Number == 1 {
					list = append(list, dynamic(m.Message()))
				}
			}
			value = list
		}
	}
	return value
}
