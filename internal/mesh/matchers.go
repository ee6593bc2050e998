package mesh

import (
	"bytes"
	"regexp/syntax"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// HeaderMatcher matches a field of a request's header (envoy.config.route.v3.HeaderMatcher). The values of a repeated
// field are joined by commas. A missing field does not match, even if Invert is set, unless MissingIsEmpty is set or
// Kind is HeaderPresence.
type HeaderMatcher struct {
	Name           string
	Kind           HeaderMatchKind
	Present        bool          // what HeaderPresence requires
	Text           StringMatcher // of HeaderText
	Start, End     int64         // of HeaderRange: Start ≤ value < End
	Invert         bool
	MissingIsEmpty bool
}

// HeaderMatchKind is how a HeaderMatcher matches.
type HeaderMatchKind uint8

// The kinds. A matcher without a pattern is HeaderPresence with Present set.
const (
	HeaderPresence HeaderMatchKind = iota
	HeaderText
	HeaderRange
)

// Fraction is a share of cases (envoy.type.v3.FractionalPercent).
type Fraction struct {
	Numerator   uint32
	Denominator uint32 // 100, 10,000 or 1,000,000
}

var (
	never  = Fraction{0, 100}
	always = Fraction{100, 100}
)

var headerMatcherFields = message{"envoy.config.route.v3.HeaderMatcher", Security, []field{
	1:  {"name", decoded},
	4:  {"exact_match", choice},
	6:  {"range_match", choice},
	7:  {"present_match", choice},
	8:  {"invert_match", decoded},
	9:  {"prefix_match", choice},
	10: {"suffix_match", choice},
	11: {"safe_regex_match", choice},
	12: {"contains_match", choice},
	13: {"string_match", choice},
	14: {"treat_missing_header_as_empty", decoded},
}}

var rangeFields = message{"envoy.type.v3.Int64Range", Security, []field{1: {"start", decoded}, 2: {"end", decoded}}}

// headerMatcher returns a matcher of a header field.
func (d *decoder) headerMatcher(m wire.Message) HeaderMatcher {
	h := HeaderMatcher{Present: true}
	text := func(s StringMatcher) { h.Kind, h.Present, h.Text = HeaderText, false, s }
	for d.next(&m, &headerMatcherFields) {
		switch m.Number {
		case 1:
			h.Name = m.String()
		case 4:
			text(StringMatcher{Kind: MatchExact, Text: m.String()})
		case 6:
			h.Kind, h.Present, h.Start, h.End = HeaderRange, false, 0, 0
			for m := m.Message(); d.next(&m, &rangeFields); {
				switch m.Number {
				case 1:
					h.Start = int64(m.Uint64())
				case 2:
					h.End = int64(m.Uint64())
				}
			}
		case 7:
			h.Kind, h.Present = HeaderPresence, m.Bool()
		case 8:
			h.Invert = m.Bool()
		case 9:
			text(StringMatcher{Kind: MatchPrefix, Text: m.String()})
		case 10:
			text(StringMatcher{Kind: MatchSuffix, Text: m.String()})
		case 11:
			text(StringMatcher{Kind: MatchRegex, Text: d.regex(m.Message())})
		case 12:
			text(StringMatcher{Kind: MatchContains, Text: m.String()})
		case 13:
			text(d.stringMatcher(m.Message()))
		case 14:
			h.MissingIsEmpty = m.Bool()
		}
	}
	if h.Name == "" {
		d.report(Security, "a header matcher without a name")
	}
	return h
}

var regexFields = message{"envoy.type.matcher.v3.RegexMatcher", Security, []field{1: {"google_re2", ignored}, 2: {"regex", decoded}}}

// Bounds of a regular expression. Envoy's limit of a program's size is the one that istiod configures.
const (
	maxRegexLength = 8 << 10
	maxRegexSize   = 32768
)

// regex returns a regular expression. It has to match the whole of a text. If regexp cannot compile it within the bounds,
// that is reported. RE2 and regexp have the same syntax, except for \C.
func (d *decoder) regex(m wire.Message) (expression string) {
	for d.next(&m, &regexFields) {
		expression = m.String()
	}
	if len(expression) > maxRegexLength {
		d.report(Security, "a regular expression that is too long")
		return ""
	}
	parsed, err := syntax.Parse(expression, syntax.Perl)
	switch {
	case err != nil:
		d.report(Security, "not a regular expression: "+err.Error())
	case programSize(parsed) > maxRegexSize:
		d.report(Security, "a regular expression whose program is too large")
	}
	return expression
}

// programSize estimates the number of instructions that re is compiled to.
func programSize(re *syntax.Regexp) int {
	size := 1
	if re.Op == syntax.OpLiteral {
		size = len(re.Rune)
	}
	for _, sub := range re.Sub {
		size += programSize(sub)
	}
	if re.Op == syntax.OpRepeat {
		size *= max(re.Min, re.Max, 1)
	}
	return min(size, maxRegexSize+1)
}

var fractionFields = message{"envoy.type.v3.FractionalPercent", Security, []field{1: {"numerator", decoded}, 2: {"denominator", decoded}}}

// denominators has the values of the enumeration envoy.type.v3.FractionalPercent.DenominatorType.
var denominators = [...]uint32{100, 10_000, 1_000_000}

func (d *decoder) fraction(m wire.Message) Fraction {
	f := never
	for d.next(&m, &fractionFields) {
		switch m.Number {
		case 1:
			f.Numerator = uint32(m.Uint64())
		case 2:
			f.Denominator = denominators[d.enum(&m, uint64(len(denominators)-1))]
		}
	}
	return f
}

// The default counts: there is no runtime in which the key could be looked up.
var runtimeFractionFields = message{"envoy.config.core.v3.RuntimeFractionalPercent", Security, []field{1: {"default_value", once}, 2: {"runtime_key", ignored}}}

// runtimeFraction returns the default of a RuntimeFractionalPercent. Without one it is 0.
func (d *decoder) runtimeFraction(m wire.Message) Fraction {
	f := never
	for d.next(&m, &runtimeFractionFields) {
		f = d.fraction(m.Message())
	}
	return f
}

// boolValue returns the value of a google.protobuf.BoolValue.
func (d *decoder) boolValue(m wire.Message) (value bool) {
	for d.next(&m, &wrapperFields) {
		value = m.Bool()
	}
	return value
}

var dataSourceFields = message{"envoy.config.core.v3.DataSource", Security, []field{
	1: {"filename", security},
	2: {"inline_bytes", choice},
	3: {"inline_string", choice},
	4: {"environment_variable", security},
	5: {"watched_directory", ignored}, // of a file
}}

// inline returns a copy of the content of a DataSource. Files and variables of the environment are reported: the
// control plane must not choose what is read.
func (d *decoder) inline(m wire.Message) []byte {
	content := []byte{}
	for d.next(&m, &dataSourceFields) {
		if content = bytes.Clone(m.Bytes()); m.Number == 3 {
			_ = m.String() // it must be UTF-8
		}
	}
	return content
}

// inlineText returns the content of a DataSource as text.
func (d *decoder) inlineText(m wire.Message) (content string) {
	for d.next(&m, &dataSourceFields) {
		if m.Number == 3 {
			content = m.String()
		} else {
			content = string(m.Bytes())
		}
	}
	return content
}

// MetadataMatcher matches a value that a filter left about a request (envoy.type.matcher.v3.MetadataMatcher), such as a
// claim of its JSON Web Token. A value that is not there does not match; Invert inverts that as well.
type MetadataMatcher struct {
	Filter string   // that left the value
	Path   []string // of keys in the filter's values
	Value  ValueMatcher
	Invert bool
}

// ValueMatcher matches a value (envoy.type.matcher.v3.ValueMatcher).
type ValueMatcher struct {
	Kind ValueMatchKind
	Text StringMatcher  // of ValueText
	Bool bool           // of ValueBool: the value; of ValuePresence: whether there must be a value
	Any  []ValueMatcher // of ValueList: one that an element must match; of ValueOr: several, of which the value must match one
}

// ValueMatchKind is how a ValueMatcher matches.
type ValueMatchKind uint8

// The kinds. ValueNothing is a matcher without a pattern or of an unknown kind; it is reported.
const (
	ValueNothing ValueMatchKind = iota
	ValueNull
	ValueText
	ValueBool
	ValuePresence
	ValueList
	ValueOr
)

var metadataMatcherFields = message{"envoy.type.matcher.v3.MetadataMatcher", Security, []field{
	1: {"filter", decoded},
	2: {"path", decoded},
	3: {"value", once},
	4: {"invert", decoded},
}}

var pathSegmentFields = message{"envoy.type.matcher.v3.MetadataMatcher.PathSegment", Security, []field{1: {"key", choice}}}

func (d *decoder) metadataMatcher(m wire.Message) MetadataMatcher {
	var matcher MetadataMatcher
	valued := false
	for d.next(&m, &metadataMatcherFields) {
		switch m.Number {
		case 1:
			matcher.Filter = m.String()
		case 2:
			key := ""
			for m := m.Message(); d.next(&m, &pathSegmentFields); {
				key = m.String()
			}
			matcher.Path = append(matcher.Path, key)
		case 3:
			matcher.Value, valued = d.valueMatcher(m.Message()), true
		case 4:
			matcher.Invert = m.Bool()
		}
	}
	if matcher.Filter == "" || len(matcher.Path) == 0 {
		d.report(Security, "a metadata matcher without a filter or a path")
	}
	if !valued {
		d.report(Security, "a metadata matcher without a value")
	}
	return matcher
}

var valueMatcherFields = message{"envoy.type.matcher.v3.ValueMatcher", Security, []field{
	1: {"null_match", choice},
	2: {"double_match", security},
	3: {"string_match", choice},
	4: {"bool_match", choice},
	5: {"present_match", choice},
	6: {"list_match", choice},
	7: {"or_match", choice},
}}

var (
	nullMatchFields   = message{"envoy.type.matcher.v3.ValueMatcher.NullMatch", Security, nil}
	listMatcherFields = message{"envoy.type.matcher.v3.ListMatcher", Security, []field{1: {"one_of", choice}}}
	orMatcherFields   = message{"envoy.type.matcher.v3.OrMatcher", Security, []field{1: {"value_matchers", decoded}}}
)

// valueMatcher returns a matcher of a value.
func (d *decoder) valueMatcher(m wire.Message) (v ValueMatcher) {
	for d.next(&m, &valueMatcherFields) {
		switch m.Number {
		case 1:
			for m := m.Message(); d.next(&m, &nullMatchFields); {
			}
			v = ValueMatcher{Kind: ValueNull}
		case 3:
			v = ValueMatcher{Kind: ValueText, Text: d.stringMatcher(m.Message())}
		case 4:
			v = ValueMatcher{Kind: ValueBool, Bool: m.Bool()}
		case 5:
			v = ValueMatcher{Kind: ValuePresence, Bool: m.Bool()}
		case 6:
			v = ValueMatcher{Kind: ValueList}
			for m := m.Message(); d.next(&m, &listMatcherFields); {
				v.Any = []ValueMatcher{d.valueMatcher(m.Message())}
			}
		case 7:
			v = ValueMatcher{Kind: ValueOr}
			for m := m.Message(); d.next(&m, &orMatcherFields); {
				v.Any = append(v.Any, d.valueMatcher(m.Message()))
			}
		}
	}
	if v.Kind == ValueNothing || (v.Kind == ValueList || v.Kind == ValueOr) && len(v.Any) == 0 {
		d.report(Security, "a matcher without a pattern")
	}
	return v
}
