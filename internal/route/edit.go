package route

import (
	"bytes"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// appendEdits appends the edits of one header. Fields are removed first, then overwritten, then added, as Envoy does.
func appendEdits(edits []Edit, h *mesh.HeaderEdits) []Edit {
	for _, name := range h.Remove {
		edits = append(edits, Edit{Name: strings.ToLower(name), Remove: true})
	}
	for _, overwrite := range [...]bool{true, false} {
		for i := range h.Add {
			e := &h.Add[i]
			if (e.Action == mesh.OverwriteOrAdd || e.Action == mesh.OverwriteIfPresent) == overwrite {
				edits = append(edits, compileEdit(e.Name, e.Value, e.Action, e.KeepEmpty))
			}
		}
	}
	return edits
}

func compileEdit(name, value string, action mesh.EditAction, keepEmpty bool) Edit {
	e := Edit{Name: strings.ToLower(name), Action: action, KeepEmpty: keepEmpty}
	pieces := parseValue(value)
	if len(pieces) == 1 && pieces[0].kind == constant {
		e.value = pieces[0].text
		return e
	}
	e.pieces = pieces
	return e
}

// piece is a part of the value of an edit.
type piece struct {
	kind        pieceKind
	operator    Operator
	text        string // constant text, or the name of a field
	alternative string // of the field, if that one is missing
	limit       int    // of the field's value in bytes; 0: no limit
}

type pieceKind uint8

const (
	constant pieceKind = iota
	requestField
	responseField
	fromContext
	originalHost   // the authority, unless it is the last value of X-Forwarded-Host
	connectionHash // of a cookie that the hash of requests is made of, unless the request has the cookie; text is its name
)

// operators has the operators of Context by Envoy's names.
var operators = map[string]Operator{
	"DOWNSTREAM_REMOTE_ADDRESS": DownstreamRemoteAddress, "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": DownstreamRemoteHost,
	"DOWNSTREAM_REMOTE_PORT": DownstreamRemotePort, "DOWNSTREAM_DIRECT_REMOTE_ADDRESS": DownstreamDirectRemoteAddress,
	"DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT": DownstreamDirectRemoteHost, "DOWNSTREAM_DIRECT_REMOTE_PORT": DownstreamDirectRemotePort,
	"DOWNSTREAM_LOCAL_ADDRESS": DownstreamLocalAddress, "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT": DownstreamLocalHost,
	"DOWNSTREAM_LOCAL_PORT": DownstreamLocalPort, "DOWNSTREAM_PEER_SUBJECT": DownstreamPeerSubject,
	"DOWNSTREAM_PEER_URI_SAN": DownstreamPeerURISAN, "DOWNSTREAM_LOCAL_URI_SAN": DownstreamLocalURISAN,
	"REQUESTED_SERVER_NAME": RequestedServerName, "PROTOCOL": Protocol, "HOSTNAME": Hostname, "START_TIME": StartTime,
	"ROUTE_NAME": RouteName, "VIRTUAL_CLUSTER_NAME": VirtualClusterName, "UPSTREAM_CLUSTER": UpstreamCluster,
	"UPSTREAM_HOST": UpstreamHost, "UPSTREAM_REMOTE_ADDRESS": UpstreamRemoteAddress, "RESPONSE_FLAGS": ResponseFlags,
	"RESPONSE_CODE_DETAILS": ResponseCodeDetails,
}

// parseValue splits the value of an edit. %% is a percent sign. An operator that is not known, or not closed, has no value;
// it is a finding of the routes.
func parseValue(value string) []piece {
	var pieces []piece
	var text strings.Builder
	for value != "" {
		before, rest, found := strings.Cut(value, "%")
		text.WriteString(before)
		if !found {
			break
		}
		if after, percent := strings.CutPrefix(rest, "%"); percent {
			text.WriteByte('%')
			value = after
			continue
		}
		var p piece
		p, value = parseOperator(rest)
		if text.Len() > 0 {
			pieces = append(pieces, piece{text: text.String()})
			text.Reset()
		}
		if p.kind != constant {
			pieces = append(pieces, p)
		}
	}
	if text.Len() > 0 || len(pieces) == 0 {
		pieces = append(pieces, piece{text: text.String()})
	}
	return pieces
}

// parseOperator returns the piece of the operator that text begins with, behind its first percent sign, and the text after
// the operator.
func parseOperator(text string) (p piece, rest string) {
	end := strings.IndexAny(text, "(%:")
	if end < 0 {
		return piece{}, ""
	}
	name, argument := text[:end], ""
	rest = text[end:]
	if rest[0] == '(' {
		argument, rest, _ = strings.Cut(rest[1:], ")")
	}
	limit, rest, closed := strings.Cut(rest, "%")
	if !closed {
		return piece{}, ""
	}
	p.limit, _ = strconv.Atoi(strings.TrimPrefix(limit, ":"))
	p.text, p.alternative, _ = strings.Cut(argument, "?")
	switch operator, known := operators[name]; {
	case name == "REQ":
		p.kind = requestField
	case name == "RESP":
		p.kind = responseField
	case known:
		p.kind, p.operator = fromContext, operator
	}
	return p, rest
}

// AppendValue appends the value of the edit's field to dst. If it appends nothing and KeepEmpty is not set, the field is not
// added, and fields of its name stay.
func (e *Edit) AppendValue(dst []byte, c Context) []byte {
	if e.pieces == nil {
		return append(dst, e.value...)
	}
	before := len(dst)
	for i := range e.pieces {
		switch p := &e.pieces[i]; p.kind {
		case constant:
			dst = append(dst, p.text...)
		case fromContext:
			dst = sanitize(c.AppendOperator(dst, p.operator), len(dst))
		case originalHost:
			r := c.Request()
			if !endsWith(r.Fields, forwardedHost, r.Authority) {
				dst = append(dst, r.Authority...)
			}
		case connectionHash:
			r := c.Request()
			if _, present := cookie(r.Fields, p.text); present {
				return dst[:before]
			}
			dst = appendConnectionHash(dst, &r)
		default:
			dst = p.appendField(dst, c)
		}
	}
	return dst
}

// sanitize replaces the bytes of b from an index on that would end a field. A certificate's subject can have them.
func sanitize(b []byte, from int) []byte {
	for i := from; i < len(b); i++ {
		if b[i] == '\r' || b[i] == '\n' || b[i] == 0 {
			b[i] = ' '
		}
	}
	return b
}

func (p *piece) appendField(dst []byte, c Context) []byte {
	var value []byte
	if p.kind == requestField {
		r := c.Request()
		if value, _ = r.field(p.text); value == nil && p.alternative != "" {
			value, _ = r.field(p.alternative)
		}
	} else {
		fields := c.ResponseFields()
		if value, _ = lookup(fields, p.text); value == nil && p.alternative != "" {
			value, _ = lookup(fields, p.alternative)
		}
	}
	if p.limit > 0 && len(value) > p.limit {
		value = value[:p.limit]
	}
	return append(dst, value...)
}

// endsWith reports whether value is the last element of the list in a header field.
func endsWith(fields Fields, name string, value []byte) bool {
	if fields == nil {
		return false
	}
	for i := fields.Len() - 1; i >= 0; i-- {
		if field, list := fields.At(i); equalFold(field, name) {
			last := list[bytes.LastIndexByte(list, ',')+1:]
			return bytes.Equal(bytes.TrimSpace(last), value)
		}
	}
	return false
}
