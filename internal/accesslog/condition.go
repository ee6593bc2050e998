package accesslog

import (
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// condition is a filter of a control plane.
type condition struct {
	*mesh.LogFilter
	program *cel.Program // of LogExpression
	field   source       // of LogHeader
	text    match.Text   // of LogHeader, if it compares texts
	of      []condition  // of LogAnd and LogOr
}

// verdict is the result of a condition.
type verdict int8

const (
	no      verdict = iota
	unknown         // the condition is not supported
	yes
)

func verdictOf(b bool) verdict {
	if b {
		return yes
	}
	return no
}

// bind returns the condition of a filter. It asks for the header fields that the filter looks at.
func (s *Sinks) bind(f *mesh.LogFilter) *condition {
	c := &condition{LogFilter: f}
	if f.Expression != nil {
		c.program = f.Expression.Bind(s.place)
	}
	if f.Header != nil {
		from, known := always[f.Header.Name]
		if place := 0; !known {
			if place = s.place(cel.Header{Name: f.Header.Name}); place < 0 {
				return &condition{LogFilter: &mesh.LogFilter{}}
			}
			from = fromRequest + source(place)
		}
		c.field, c.text = from, match.Compile(&f.Header.Text)
	}
	for i := range f.Filters {
		c.of = append(c.of, *s.bind(&f.Filters[i]))
	}
	return c
}

// judge returns whether a record that lasted this long is to be written. Conjunction and disjunction are Kleene's.
func (c *condition) judge(r *flow.Record, lasted time.Duration) verdict {
	switch c.Kind {
	case mesh.LogAnd:
		all := yes
		for i := range c.of {
			all = min(all, c.of[i].judge(r, lasted))
		}
		return all
	case mesh.LogOr:
		some := no
		for i := range c.of {
			some = max(some, c.of[i].judge(r, lasted))
		}
		return some
	case mesh.LogFlags:
		return verdictOf(hasFlag(r.Flags(), c.Flags))
	case mesh.LogExpression:
		return verdictOf(c.program.Match(r))
	case mesh.LogStatus:
		return verdictOf(c.compare(int64(r.HTTP.Status)))
	case mesh.LogDuration:
		return verdictOf(c.compare(lasted.Milliseconds()))
	case mesh.LogGRPCStatus:
		status, ok := r.GRPCStatus()
		if !ok {
			status = int(envoy.GRPCUnknown)
		}
		return verdictOf(slices.Contains(c.Statuses, uint32(status)) != c.Exclude)
	case mesh.LogHeader:
		return c.header(c.field.of(r.HTTP))
	case mesh.LogType:
		return verdictOf(slices.Contains(c.Statuses, typeOf(r)) != c.Exclude)
	case mesh.LogTraced:
		return verdictOf(r.HTTP.Trace != nil && r.HTTP.Trace.Sampled)
	case mesh.LogSample:
		return verdictOf(rand.Uint32N(max(c.Sample.Denominator, 1)) < c.Sample.Numerator)
	}
	return unknown
}

// typeOf returns the type of a record.
func typeOf(r *flow.Record) uint32 {
	if r.IsRequest() {
		return mesh.TypeRequestEnd
	}
	return mesh.TypeConnectionEnd
}

// header judges the value of a header field; nil: the request does not have it.
func (c *condition) header(value []byte) verdict {
	h := c.Header
	if value == nil && h.MissingIsEmpty {
		value = []byte{}
	}
	v := match.No
	switch {
	case h.Kind == mesh.HeaderPresence:
		v = match.Of((value != nil) == h.Present)
	case value == nil:
		return no // also of an inverted matcher
	case h.Kind == mesh.HeaderText:
		v = c.text.Match(value)
	default:
		n, err := strconv.ParseInt(string(value), 10, 64)
		v = match.Of(err == nil && h.Start <= n && n < h.End)
	}
	if h.Invert {
		v = -v
	}
	return verdict(v + 1)
}

func (c *condition) compare(n int64) bool {
	switch value := int64(c.Value); c.Compare {
	case mesh.Equal:
		return n == value
	case mesh.AtLeast:
		return n >= value
	case mesh.AtMost:
		return n <= value
	default:
		return n != value
	}
}

// hasFlag reports whether flags, separated by commas, have one of the list; an empty list has all.
func hasFlag(flags string, list []string) bool {
	if len(list) == 0 {
		return flags != ""
	}
	for flags != "" {
		var flag string
		flag, flags, _ = strings.Cut(flags, ",")
		if slices.Contains(list, flag) {
			return true
		}
	}
	return false
}
