package mesh

import (
	"strings"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Edits are changes of headers. Fields are removed before others are added.
type Edits struct {
	Request, Response HeaderEdits
}

// HeaderEdits are changes of one header.
type HeaderEdits struct {
	Add    []HeaderEdit
	Remove []string
}

// HeaderEdit adds a field to a header (envoy.config.core.v3.HeaderValueOption).
type HeaderEdit struct {
	Name      string
	Value     string // may have operators, such as %PROTOCOL%
	Action    EditAction
	KeepEmpty bool // the field is added also if its value is empty
}

// EditAction is how a field is added.
type EditAction uint8

// The actions, with Envoy's numbers.
const (
	AppendOrAdd EditAction = iota
	AddIfAbsent
	OverwriteOrAdd
	OverwriteIfPresent
)

var headerOptionFields = message{"envoy.config.core.v3.HeaderValueOption", Traffic, []field{
	1: {"header", once},
	2: {"append", once},
	3: {"append_action", decoded},
	4: {"keep_empty_value", decoded},
}}

var headerValueFields = message{"envoy.config.core.v3.HeaderValue", Traffic, []field{1: {"key", decoded}, 2: {"value", decoded}, 3: {"raw_value", decoded}}}

// addHeader reads a field that is added to a header.
func (d *decoder) addHeader(m wire.Message, edits *HeaderEdits) {
	var e HeaderEdit
	var older *bool // append, the predecessor of append_action
	for d.next(&m, &headerOptionFields) {
		switch m.Number {
		case 1:
			d.headerValue(m.Message(), &e)
		case 2:
			older = new(d.boolValue(m.Message()))
		case 3:
			e.Action = EditAction(d.enum(&m, uint64(OverwriteIfPresent)))
		case 4:
			e.KeepEmpty = m.Bool()
		}
	}
	if older != nil {
		if e.Action != AppendOrAdd {
			d.report(Traffic, "append and append_action are both set; append is used")
		}
		e.Action = AppendOrAdd
		if !*older {
			e.Action = OverwriteOrAdd
		}
	}
	if !Editable(e.Name) {
		d.report(Security, "not the name of a header field that can be edited")
		return
	}
	if !FieldValue(e.Value) {
		d.report(Security, notFieldValue)
		return
	}
	d.operators(e.Value)
	edits.Add = append(edits.Add, e)
}

const notFieldValue = "not the value of a header field"

// FieldValue reports whether text has no bytes that would end a header field.
func FieldValue(text string) bool { return !strings.ContainsAny(text, "\r\n\x00") }

// headerText returns the value of a header field. Bytes that would end it are reported.
func (d *decoder) headerText(m *wire.Message) string {
	text := m.String()
	if !FieldValue(text) {
		d.report(Security, notFieldValue)
		return ""
	}
	return text
}

func (d *decoder) headerValue(m wire.Message, e *HeaderEdit) {
	var value string
	var raw []byte
	for d.next(&m, &headerValueFields) {
		switch m.Number {
		case 1:
			e.Name = m.String()
		case 2:
			value = m.String()
		case 3:
			raw = m.Bytes()
		}
	}
	e.Value = value + string(raw)
	if value != "" && len(raw) > 0 {
		d.report(Security, "two values of a header field")
	}
}

// removeHeader reads the name of a field that is removed from a header.
func (d *decoder) removeHeader(m *wire.Message, edits *HeaderEdits) {
	name := m.String()
	if !Editable(name) {
		d.report(Security, "not the name of a header field that can be removed")
		return
	}
	edits.Remove = append(edits.Remove, name)
}

// Editable reports whether name is a token of RFC 9110 and not Host. A route has other fields that rewrite the host.
// Pseudo-header fields are not tokens. Envoy rejects such edits as well.
func Editable(name string) bool {
	for _, c := range []byte(name) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return name != "" && !strings.EqualFold(name, "host")
}

// formatted has the operators that can stand in the value of a field that is added. They have Envoy's names.
var formatted = map[string]bool{
	"DOWNSTREAM_REMOTE_ADDRESS": true, "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": true, "DOWNSTREAM_REMOTE_PORT": true,
	"DOWNSTREAM_DIRECT_REMOTE_ADDRESS": true, "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT": true, "DOWNSTREAM_DIRECT_REMOTE_PORT": true,
	"DOWNSTREAM_LOCAL_ADDRESS": true, "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT": true, "DOWNSTREAM_LOCAL_PORT": true,
	"DOWNSTREAM_PEER_SUBJECT": true, "DOWNSTREAM_PEER_URI_SAN": true, "DOWNSTREAM_LOCAL_URI_SAN": true, "REQUESTED_SERVER_NAME": true,
	"PROTOCOL": true, "REQ": true, "RESP": true, "HOSTNAME": true, "START_TIME": true, "ROUTE_NAME": true, "VIRTUAL_CLUSTER_NAME": true,
	"UPSTREAM_CLUSTER": true, "UPSTREAM_HOST": true, "UPSTREAM_REMOTE_ADDRESS": true, "RESPONSE_FLAGS": true, "RESPONSE_CODE_DETAILS": true,
}

// operators reports the operators in value that cannot be formatted. They have no value then, as operators whose value Envoy
// does not have.
func (d *decoder) operators(value string) {
	for {
		_, rest, found := strings.Cut(value, "%")
		if !found {
			return
		}
		if value, found = strings.CutPrefix(rest, "%"); found {
			continue
		}
		end := strings.IndexAny(rest, "(%:")
		if end <= 0 {
			d.report(Traffic, "a % without an operator")
			return
		}
		name := rest[:end]
		if value = rest[end:]; value[0] == '(' { // arguments, in which a % is text
			_, value, found = strings.Cut(value, ")")
			if !found {
				d.report(Traffic, "the operator "+name+" is not closed")
				return
			}
		}
		if _, value, found = strings.Cut(value, "%"); !found {
			d.report(Traffic, "the operator "+name+" is not closed")
			return
		}
		if !formatted[name] {
			d.report(Traffic, "the operator "+name+" is not supported; it has no value")
		}
	}
}
