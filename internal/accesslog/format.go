package accesslog

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Default is Istio's default format.
const Default = `[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% ` +
	`%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" ` +
	`%BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" ` +
	`"%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% ` +
	`%UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%`

// DefaultJSON has the values of Default under Istio's keys.
const DefaultJSON = `{"start_time":"%START_TIME%","method":"%REQ(:METHOD)%","path":"%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",` +
	`"protocol":"%PROTOCOL%","response_code":"%RESPONSE_CODE%","response_flags":"%RESPONSE_FLAGS%",` +
	`"response_code_details":"%RESPONSE_CODE_DETAILS%","connection_termination_details":"%CONNECTION_TERMINATION_DETAILS%",` +
	`"upstream_transport_failure_reason":"%UPSTREAM_TRANSPORT_FAILURE_REASON%","bytes_received":"%BYTES_RECEIVED%",` +
	`"bytes_sent":"%BYTES_SENT%","duration":"%DURATION%","upstream_service_time":"%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",` +
	`"x_forwarded_for":"%REQ(X-FORWARDED-FOR)%","user_agent":"%REQ(USER-AGENT)%","request_id":"%REQ(X-REQUEST-ID)%",` +
	`"authority":"%REQ(:AUTHORITY)%","upstream_host":"%UPSTREAM_HOST%","upstream_cluster":"%UPSTREAM_CLUSTER_RAW%",` +
	`"upstream_local_address":"%UPSTREAM_LOCAL_ADDRESS%","downstream_local_address":"%DOWNSTREAM_LOCAL_ADDRESS%",` +
	`"downstream_remote_address":"%DOWNSTREAM_REMOTE_ADDRESS%","requested_server_name":"%REQUESTED_SERVER_NAME%",` +
	`"route_name":"%ROUTE_NAME%"}`

// Format is a compiled format. Create it with ParseFormat or ParseJSONFormat; it is immutable.
type Format struct {
	pieces []piece
	fields flow.Fields
	omits  bool                     // operators without a value leave no trace: no "-" in text, no member of an object in JSON
	steady struct{ first, end int } // the pieces of steadyText
}

// piece is a constant text and the operator that follows it.
type piece struct {
	text   string
	does   verb
	number bool // the value is a JSON number
	style  style
	member int // length of the name of the value's member of a JSON object, at the end of text; 0: it is not a member

	from     []source // verbField: the first one present in the record is used
	pathOnly bool     // verbField: without the query of a path
	max      int      // verbField: maximum length of the value in bytes; -1: no limit
	address  address  // verbAddress
	part     part     // verbAddress
	layout   string   // verbStartTime; empty for the default
	own      string   // verbOwn; of verbDryRun, the key in the metadata

	side  flow.Direction              // of the verbs of TLS: those of downstream have values inbound, those of upstream outbound
	of    certificateOf               // verbCertificate, verbValidity
	local bool                        // verbCertificate: of the own certificate, not of the peer's
	name  func(*flow.Workload) string // verbWorkload

	reserve int // bytes of the line reserved for the pieces that follow
}

// verb is the action of an operator.
type verb uint8

const (
	verbNothing verb = iota // the text ends the line
	verbStartTime
	verbField
	verbServiceTime
	verbProtocol
	verbStatus
	verbFlags
	verbDetails
	verbTermination
	verbMissing // a value of Envoy's that pillion never has
	verbTransportFailure
	verbReceived
	verbSent
	verbDuration
	verbAttempts
	verbCluster
	verbAddress
	verbServerName
	verbRoute
	verbGRPCName
	verbGRPCNumber
	verbDirection
	verbReason
	verbTraceID
	verbSpanID
	verbPeerName
	verbOwnName
	verbTLSVersion
	verbTLSCipher
	verbCertificate
	verbValidity
	verbDownstreamFailure
	verbWorkload
	verbDryRun
	verbOwn // a constant of this process
)

// source is the place of a field's value in the record.
type source uint8

const (
	fromMethod source = iota
	fromPath
	fromAuthority
	fromUserAgent
	fromForwardedFor
	fromID
	fromRequest  source = 16                      // plus the index in Record.HTTP.Fields
	fromResponse        = fromRequest + maxFields // plus the index in Record.HTTP.ResponseFields
	maxFields           = 64                      // of requests, and as many of responses
)

// always are the request fields that every record has.
var always = map[string]source{
	":method": fromMethod, ":path": fromPath, ":authority": fromAuthority, "host": fromAuthority,
	"user-agent": fromUserAgent, "x-forwarded-for": fromForwardedFor, "x-request-id": fromID,
}

// address is one of a record's addresses, and part the part of it that is printed.
type (
	address uint8
	part    uint8
)

const (
	upstreamRemote address = iota
	upstreamLocal
	downstreamLocal
	downstreamRemote // from x-forwarded-for if the request has one
	downstreamDirect
)

const (
	whole part = iota
	withoutPort
	onlyPort
)

// argument is the kind of argument that an operator takes in parentheses.
type argument uint8

const (
	takesNone argument = iota
	takesRequestField
	takesResponseField
	takesLayout // optional
	takesState  // of a filter of Envoy's
)

// operator is a row of the table of known operators.
type operator struct {
	name  string
	takes argument
	piece
}

// operators are all that are known. The table is made when a format is read.
var operators = sync.OnceValue(func() []operator {
	all := []operator{
		{"START_TIME", takesLayout, piece{does: verbStartTime}},
		{"REQ", takesRequestField, piece{does: verbField}},
		{"REQ_WITHOUT_QUERY", takesRequestField, piece{does: verbField, pathOnly: true}},
		{"RESP", takesResponseField, piece{does: verbField}},
		{"PROTOCOL", takesNone, piece{does: verbProtocol}},
		{"RESPONSE_CODE", takesNone, piece{does: verbStatus, number: true}},
		{"RESPONSE_FLAGS", takesNone, piece{does: verbFlags}},
		{"RESPONSE_CODE_DETAILS", takesNone, piece{does: verbDetails}},
		{"CONNECTION_TERMINATION_DETAILS", takesNone, piece{does: verbTermination}},
		{"UPSTREAM_TRANSPORT_FAILURE_REASON", takesNone, piece{does: verbTransportFailure}},
		{"DOWNSTREAM_TRANSPORT_FAILURE_REASON", takesNone, piece{does: verbDownstreamFailure}},
		{"FILTER_STATE", takesState, piece{does: verbWorkload}},
		{"DYNAMIC_METADATA", takesState, piece{does: verbDryRun}},
		{"BYTES_RECEIVED", takesNone, piece{does: verbReceived, number: true}},
		{"BYTES_SENT", takesNone, piece{does: verbSent, number: true}},
		{"DURATION", takesNone, piece{does: verbDuration, number: true}},
		{"UPSTREAM_HOST", takesNone, piece{does: verbAddress, address: upstreamRemote}},
		{"UPSTREAM_REQUEST_ATTEMPT_COUNT", takesNone, piece{does: verbAttempts, number: true}},
		{"UPSTREAM_CLUSTER", takesNone, piece{does: verbCluster}},
		{"UPSTREAM_CLUSTER_RAW", takesNone, piece{does: verbCluster}},
		{"REQUESTED_SERVER_NAME", takesNone, piece{does: verbServerName}},
		{"ROUTE_NAME", takesNone, piece{does: verbRoute}},
		{"GRPC_STATUS", takesNone, piece{does: verbGRPCName}},
		{"GRPC_STATUS_NUMBER", takesNone, piece{does: verbGRPCNumber, number: true}},
		{"HOSTNAME", takesNone, piece{does: verbOwn}},
		{"TRAFFIC_DIRECTION", takesNone, piece{does: verbDirection}},
		{"PILLION_REASON", takesNone, piece{does: verbReason}},
		{"TRACE_ID", takesNone, piece{does: verbTraceID}},
		{"SPAN_ID", takesNone, piece{does: verbSpanID}},
	}
	for side, name := range [...]string{flow.Inbound: "DOWNSTREAM", flow.Outbound: "UPSTREAM"} {
		side := flow.Direction(side)
		all = append(all,
			operator{name + "_PEER_URI_SAN", takesNone, piece{does: verbPeerName, side: side}},
			operator{name + "_LOCAL_URI_SAN", takesNone, piece{does: verbOwnName, side: side}},
			operator{name + "_TLS_VERSION", takesNone, piece{does: verbTLSVersion, side: side}},
			operator{name + "_TLS_CIPHER", takesNone, piece{does: verbTLSCipher, side: side}})
		all = append(all, operator{name + "_TLS_SESSION_ID", takesNone, piece{does: verbMissing}}) // sessions are not resumed
		all = append(all, certificateOperators(name, side)...)
	}
	for _, a := range []struct {
		name string
		address
	}{
		{"UPSTREAM_REMOTE", upstreamRemote}, {"UPSTREAM_LOCAL", upstreamLocal}, {"DOWNSTREAM_LOCAL", downstreamLocal},
		{"DOWNSTREAM_REMOTE", downstreamRemote}, {"DOWNSTREAM_DIRECT_REMOTE", downstreamDirect},
	} {
		all = append(all,
			operator{a.name + "_ADDRESS", takesNone, piece{does: verbAddress, address: a.address}},
			operator{a.name + "_ADDRESS_WITHOUT_PORT", takesNone, piece{does: verbAddress, address: a.address, part: withoutPort}},
			operator{a.name + "_PORT", takesNone, piece{does: verbAddress, address: a.address, part: onlyPort, number: true}})
	}
	return all
})

// ParseFormat compiles a text with Envoy's operators, such as %RESPONSE_CODE%. An empty text means Default. A newline at the
// end, also one written as \n, is removed, since each line ends in a newline anyway. An error names the operator, the
// column where it begins, and the nearest known operator.
func ParseFormat(text string) (*Format, error) {
	if text == "" {
		text = Default
	}
	text = strings.TrimSuffix(strings.TrimSuffix(text, "\n"), `\n`)
	if i := strings.IndexFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f || r == utf8.RuneError }); i >= 0 {
		return nil, fmt.Errorf("access log format: control character or invalid UTF-8 at column %d: a record is one line of UTF-8", column(text, i))
	}
	var c compiler
	if err := c.template(text, bare); err != nil {
		return nil, fmt.Errorf("access log format: %w", err)
	}
	return c.finish()
}

// ParseJSONFormat compiles a JSON object whose strings have Envoy's operators. An empty text means DefaultJSON. A string
// that consists of one operator becomes a number if the operator's value is one, and null if the record has no value.
func ParseJSONFormat(text string) (*Format, error) {
	if text == "" {
		text = DefaultJSON
	}
	var c compiler
	if err := c.object(text); err != nil {
		return nil, err
	}
	return c.finish()
}

// object compiles a JSON object.
func (c *compiler) object(text string) error {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	if !strings.HasPrefix(strings.TrimSpace(text), "{") {
		return errors.New(`access log format: JSON lines need an object, such as {"status":"%RESPONSE_CODE%"}`)
	}
	if err := c.json(d, ""); err != nil {
		return fmt.Errorf("access log format: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("access log format: text after the JSON object")
	}
	return nil
}

// Fields returns the message fields that the engines must record for this format, in this order.
func (f *Format) Fields() flow.Fields { return f.fields }

// compiler collects the pieces of a format.
type compiler struct {
	Format
	text   []byte // constant text since the last piece
	member int    // of the text's end: bytes of the name of a member that was just begun; 0: not there

	lenient  bool // an operator that is not understood has no value, and is one of problems
	problems []error
}

// template compiles a text. s is jsonString or plain, or bare for lines of text, where quotation marks switch it to quoted and back.
func (c *compiler) template(text string, s style) error {
	for i := 0; i < len(text); {
		literal := text[i:]
		if next := strings.IndexByte(literal, '%'); next >= 0 {
			literal = literal[:next]
		}
		i += len(literal)
		if s == jsonString {
			c.text = appendText(c.text, literal, s, maxLine)
		} else {
			c.text = append(c.text, literal...)
			if s != plain && strings.Count(literal, `"`)%2 == 1 {
				s ^= bare ^ quoted
			}
		}
		switch {
		case i == len(text):
		case strings.HasPrefix(text[i:], "%%"):
			c.text = append(c.text, '%')
			i += 2
		default:
			end, err := c.operator(text, i, s)
			if err != nil {
				return err
			}
			i = end
		}
	}
	return nil
}

// json compiles one JSON value. Keys keep their order.
func (c *compiler) json(d *json.Decoder, key string) error {
	token, err := d.Token()
	if err != nil {
		return fmt.Errorf("reading JSON: %w", err)
	}
	switch token := token.(type) {
	case string:
		if loneOperator(token) {
			_, err = c.operator(token, 0, jsonValue)
		} else {
			c.member = 0
			c.text = append(c.text, '"')
			err = c.template(token, jsonString)
			c.text = append(c.text, '"')
		}
		if err != nil {
			return fmt.Errorf("value of %q: %w", key, err)
		}
		return nil
	case json.Delim:
		return c.jsonGroup(d, token, key)
	}
	constant, err := json.Marshal(token)
	c.text = append(c.text, constant...)
	return err
}

// jsonGroup compiles an object or an array after its opening delimiter.
func (c *compiler) jsonGroup(d *json.Decoder, open json.Delim, key string) error {
	c.member = 0
	c.text = append(c.text, byte(open))
	for first := true; d.More(); first = false {
		if !first {
			c.text = append(c.text, ',')
		}
		if open == '{' {
			token, err := d.Token()
			if err != nil {
				return fmt.Errorf("reading JSON: %w", err)
			}
			key = token.(string) // the decoder guarantees a string here
			before := len(c.text)
			c.text = append(appendText(append(c.text, '"'), key, jsonString, maxLine), `":`...)
			c.member = len(c.text) - before
		}
		if err := c.json(d, key); err != nil {
			return err
		}
		c.member = 0
	}
	end, err := d.Token()
	if err != nil {
		return fmt.Errorf("reading JSON: %w", err)
	}
	c.text = append(c.text, byte(end.(json.Delim)))
	return nil
}

// loneOperator reports whether text is a single operator. An unknown one counts too; compiling it fails.
func loneOperator(text string) bool {
	if len(text) < 3 || text[0] != '%' || text[1] == '%' {
		return false
	}
	_, _, _, end, err := split(text, 0)
	return err == nil && end == len(text)
}

// split parses the operator at text[start]: %name(argument):max%. max is -1 if it is missing.
func split(text string, start int) (name string, arg *string, max, end int, err error) {
	end, max = start+1, -1
	for end < len(text) && (text[end] >= 'A' && text[end] <= 'Z' || text[end] == '_' || text[end] >= '0' && text[end] <= '9') {
		end++
	}
	name = text[start+1 : end]
	if strings.HasPrefix(text[end:], "(") {
		inner, _, closed := strings.Cut(text[end+1:], ")")
		if !closed {
			return name, nil, 0, 0, fmt.Errorf("operator %%%s( at column %d has no closing parenthesis", name, column(text, start))
		}
		arg = &inner
		end += len(inner) + 2
	}
	if strings.HasPrefix(text[end:], ":") {
		digits, _, _ := strings.Cut(text[end+1:], "%")
		if max, err = strconv.Atoi(digits); err != nil || max < 1 {
			return name, nil, 0, 0, fmt.Errorf("operator %%%s at column %d: %q is not a length; write a number after the colon", name, column(text, start), digits)
		}
		end += 1 + len(digits)
	}
	if !strings.HasPrefix(text[end:], "%") {
		return name, nil, 0, 0, fmt.Errorf("operator %%%s at column %d has no %% at its end; write %%%% for a percent sign", name, column(text, start))
	}
	return name, arg, max, end + 1, nil
}

// operator compiles the operator at text[start] and returns the index after it.
func (c *compiler) operator(text string, start int, s style) (int, error) {
	end, err := c.understood(text, start, s)
	if err == nil || !c.lenient {
		return end, err
	}
	c.problems = append(c.problems, err)
	if _, _, _, end, err = split(text, start); err != nil {
		c.text = append(c.text, '%')
		return start + 1, nil
	}
	c.add(piece{does: verbMissing}, s, -1)
	return end, nil
}

// add ends the constant text by an operator.
func (c *compiler) add(p piece, s style, max int) {
	p.text, p.style, p.max, p.member = string(c.text), s, max, c.member
	c.text, c.member = c.text[:0], 0
	c.pieces = append(c.pieces, p)
}

// understood is operator for one that is understood.
func (c *compiler) understood(text string, start int, s style) (int, error) {
	name, arg, max, end, err := split(text, start)
	if err != nil {
		return 0, err
	}
	i := slices.IndexFunc(operators(), func(o operator) bool { return o.name == name })
	if i < 0 {
		return 0, fmt.Errorf("unknown operator %%%s%% at column %d; the nearest known one is %%%s%%", name, column(text, start), nearest(name))
	}
	p := operators()[i].piece
	switch takes := operators()[i].takes; {
	case max >= 0 && takes != takesRequestField && takes != takesResponseField && takes != takesState:
		err = errors.New("takes no length")
	case takes == takesNone && arg != nil:
		err = errors.New("takes no argument")
	case takes == takesState:
		err = p.filterState(arg)
	case takes == takesLayout && arg != nil:
		p.layout = *arg
		err = checkLayout(*arg)
	case takes == takesRequestField || takes == takesResponseField:
		if arg == nil {
			arg = new(string)
		}
		err = c.field(&p, *arg, takes == takesResponseField)
	}
	if err != nil {
		return 0, fmt.Errorf("operator %%%s%% at column %d: %w", name, column(text, start), err)
	}
	switch p.does {
	case verbCertificate, verbValidity, verbPeerName, verbOwnName:
		c.fields.Certificates = true
	case verbOwn:
		if p.own, err = os.Hostname(); err != nil {
			return 0, fmt.Errorf("operator %%HOSTNAME%%: %w", err)
		}
	}
	c.add(p, s, max)
	return end, nil
}

// field compiles the argument of %REQ% and %RESP%: a field name, optionally followed by a question mark and the name of an
// alternative that is used when the first field is missing.
func (c *compiler) field(p *piece, arg string, response bool) error {
	names := strings.Split(strings.ToLower(arg), "?")
	if len(names) > 2 {
		return fmt.Errorf("%q names more than one alternative", arg)
	}
	for _, name := range names {
		if name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`"(),/;<=>?@[\]{}`, r) }) {
			return fmt.Errorf("%q is not a field name; write, for example, %%REQ(X-TENANT)%%", name)
		}
		place, have := always[name]
		switch {
		case response && (name == ":status" || name == "x-envoy-upstream-service-time"):
			if len(names) > 1 {
				return fmt.Errorf("%s has no alternative", name)
			}
			p.does, p.number = verbServiceTime, true
			if name == ":status" {
				p.does = verbStatus
			}
			return nil
		case !response && have:
			p.from = append(p.from, place)
			continue
		case strings.Contains(name, ":"):
			return fmt.Errorf("there is no field %q; requests have :method, :path and :authority, responses :status", name)
		}
		list, base := &c.fields.Request, fromRequest
		if response {
			list, base = &c.fields.Response, fromResponse
		}
		i := slices.Index(*list, name)
		if i < 0 {
			if i = len(*list); i == maxFields {
				return fmt.Errorf("more than %d different fields", maxFields)
			}
			*list = append(*list, name)
		}
		p.from = append(p.from, base+source(i))
	}
	return nil
}

// finish completes the format and computes how much of a line each piece must leave to the pieces after it, so that the
// limit of a line shortens values and never the format's own text.
func (c *compiler) finish() (*Format, error) {
	c.pieces = append(c.pieces, piece{text: string(c.text)})
	reserve := 1 // the newline
	for i := len(c.pieces) - 1; i >= 0; i-- {
		p := &c.pieces[i]
		p.reserve = reserve
		reserve += len(p.text) + maxShort + 10*len(p.layout)
	}
	if reserve > maxLine/2 {
		return nil, fmt.Errorf("access log format: a line may need %d bytes without the values of fields, but the limit is %d; use fewer operators or less text", reserve, maxLine/2)
	}
	if !c.omits { // what is left out depends on the values before
		c.findSteady()
	}
	return &c.Format, nil
}

// findSteady finds the longest run of pieces whose values depend only on what steadyOf compares.
func (f *Format) findSteady() {
	first := 0
	for i := range f.pieces {
		switch f.pieces[i].does {
		case verbNothing, verbMissing, verbCluster, verbAddress, verbServerName, verbRoute, verbDirection:
			if i+1-first > f.steady.end-f.steady.first {
				f.steady.first, f.steady.end = first, i+1
			}
		default:
			first = i + 1
		}
	}
}

// column returns the column of text[i] in characters, counted from 1.
func column(text string, i int) int { return utf8.RuneCountInString(text[:i]) + 1 }

// nearest returns the known operator with the smallest edit distance to name.
func nearest(name string) string {
	name = name[:min(len(name), 64)]
	best, least := "", 1<<30
	for _, o := range operators() {
		if d := distance(name, o.name); d < least {
			best, least = o.name, d
		}
	}
	return best
}

// distance returns the Levenshtein distance of a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
