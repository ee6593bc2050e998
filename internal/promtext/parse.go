package promtext

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Limits bound the input and memory of Parse. Zero means the default.
type Limits struct {
	Bytes    int // of the whole exposition; default 10 MiB
	Line     int // bytes of a line; default 64 KiB
	Families int // default 10,000
	Samples  int // default 250,000
	Labels   int // of one sample, and of one exemplar; default 64
}

func (l Limits) withDefaults() Limits {
	for _, limit := range []struct {
		value    *int
		standard int
	}{{&l.Bytes, 10 << 20}, {&l.Line, 64 << 10}, {&l.Families, 10_000}, {&l.Samples, 250_000}, {&l.Labels, 64}} {
		if *limit.value == 0 {
			*limit.value = limit.standard
		}
	}
	return l
}

// maxExemplar bounds the characters of an exemplar's labels in OpenMetrics. A longer exemplar is dropped.
const maxExemplar = 128

// maxTimestamp is in milliseconds, in the year 33658. Up to this value, seconds as float64 are exact to the millisecond.
const maxTimestamp = 1e15

// Parse reads an exposition to its end. It returns the families in the order of their metadata, then those without
// metadata, and omits those without samples. The first TYPE, HELP and UNIT line of a family counts; they may follow its
// samples. A family with samples that its type does not allow is split into Unknown ones. Lines may end in CRLF. An
// OpenMetrics exposition without # EOF was truncated and is an error.
//
// An error names the line, unless it comes from the reader.
func Parse(r io.Reader, format Format, limits Limits) ([]Family, error) {
	p := parser{format: format, limits: limits.withDefaults(), families: make(map[string]*family), owners: make(map[string]*family)}
	var read strings.Builder
	n, err := io.Copy(&read, io.LimitReader(r, int64(p.limits.Bytes)+1))
	if err != nil {
		return nil, fmt.Errorf("reading the exposition: %w", err)
	}
	if n > int64(p.limits.Bytes) {
		return nil, fmt.Errorf("the exposition is longer than %d bytes", p.limits.Bytes)
	}
	text := read.String()
	for _, read := range []func(line string) error{p.comment, p.sample} {
		for number, line := range lines(text) {
			if err := read(line); err != nil {
				return nil, fmt.Errorf("line %d: %w", number, err)
			}
		}
	}
	if format == OpenMetrics && !p.ended {
		return nil, errors.New("the exposition does not end in # EOF: it was truncated")
	}
	return p.finished(), nil
}

// parser reads the text twice: first the metadata, because the type decides to which family a sample's name belongs, then
// the samples.
type parser struct {
	format   Format
	limits   Limits
	families map[string]*family // by the name in the metadata
	order    []*family
	owners   map[string]*family // by the name of a sample
	samples  int
	scratch  []Label // collects the labels of one sample
	ended    bool
}

type family struct {
	Family
	typed, helped bool
	misfit        bool // a sample does not fit the type
}

// lines yields the lines with their numbers, without leading blanks and line ends.
func lines(text string) iter.Seq2[int, string] {
	return func(yield func(int, string) bool) {
		number := 0
		for line := range strings.Lines(text) {
			line = strings.TrimRight(strings.TrimSuffix(line, "\n"), "\r")
			if number++; !yield(number, strings.TrimLeft(line, " \t")) {
				return
			}
		}
	}
}

// comment parses the line if it is a comment, and checks the rules for all lines.
func (p *parser) comment(line string) error {
	switch {
	case len(line) > p.limits.Line:
		return fmt.Errorf("longer than %d bytes: %.40q…", p.limits.Line, line)
	case !utf8.ValidString(line):
		return fmt.Errorf("not UTF-8: %.80q", line)
	case p.ended && line != "":
		return fmt.Errorf("%.40q follows # EOF", line)
	case !strings.HasPrefix(line, "#"):
		return nil
	case p.format == OpenMetrics && strings.TrimRight(line, " \t") == "# EOF":
		p.ended = true
		return nil
	}
	keyword, rest := cutBlank(strings.TrimLeft(line[1:], " \t"))
	if keyword != "HELP" && keyword != "TYPE" && (keyword != "UNIT" || p.format == Text) {
		return nil
	}
	name, rest := cutBlank(rest)
	if name == "" {
		return nil // an ordinary comment that begins with the keyword
	}
	if cutName(name, true) != name {
		return fmt.Errorf("%s: %.80q is not a metric name", keyword, name)
	}
	f, err := p.family(name)
	if err != nil {
		return err
	}
	switch keyword {
	case "HELP":
		if !f.helped {
			f.helped, f.Help = true, unescape(rest, p.format == OpenMetrics)
		}
	case "UNIT":
		if f.Unit == "" {
			f.Unit = strings.TrimRight(rest, " \t")
		}
	case "TYPE":
		word := strings.TrimRight(rest, " \t")
		typ, ok := p.typeOf(word)
		if !ok {
			return fmt.Errorf("TYPE of %s: %.40q is not a type of this format", name, word)
		}
		if !f.typed {
			f.typed, f.Type = true, typ
		}
	}
	return nil
}

func (p *parser) typeOf(word string) (Type, bool) {
	switch typ := Type(strings.ToLower(word)); typ {
	case "untyped":
		return Unknown, true
	case Info, StateSet, GaugeHistogram:
		return typ, p.format == OpenMetrics
	default:
		return typ, suffixes[typ] != nil
	}
}

// family finds or adds the family of that name.
func (p *parser) family(name string) (*family, error) {
	if f := p.families[name]; f != nil {
		return f, nil
	}
	if len(p.order) == p.limits.Families {
		return nil, fmt.Errorf("%.80q exceeds the limit of %d families", name, p.limits.Families)
	}
	f := &family{Family: Family{Name: name, Type: Unknown}}
	p.families[name] = f
	p.order = append(p.order, f)
	return f, nil
}

// owner finds the family of a sample by its name. A family of exactly that name is preferred.
func (p *parser) owner(name string) (*family, error) {
	if f := p.owners[name]; f != nil {
		return f, nil
	}
	f := p.families[name]
	if at := strings.LastIndexByte(name, '_'); f == nil && at > 0 {
		base := p.families[name[:at]]
		if base != nil && slices.Contains(base.claims(p.format), name) {
			f = base
		}
	}
	if f == nil {
		var err error
		if f, err = p.family(name); err != nil {
			return nil, err
		}
	}
	p.owners[name] = f
	return f, nil
}

// sample parses the line if it is a sample: name{label="value"} value timestamp # {label="value"} value timestamp. Only the
// name and the first value are required.
func (p *parser) sample(line string) error {
	if line == "" || line[0] == '#' {
		return nil
	}
	name := cutName(line, true)
	rest := line[len(name):]
	if name == "" || rest != "" && !strings.ContainsAny(rest[:1], " \t{") {
		return fmt.Errorf("%.80q does not begin with a metric name", line)
	}
	if p.samples++; p.samples > p.limits.Samples {
		return fmt.Errorf("%.80q exceeds the limit of %d samples", name, p.limits.Samples)
	}
	s := Sample{Name: name}
	var err error
	if rest = strings.TrimLeft(rest, " \t"); strings.HasPrefix(rest, "{") {
		if s.Labels, rest, err = p.labels(rest); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if s.Value, rest, err = value(rest); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if rest != "" && rest[0] != '#' {
		var word string
		word, rest = cutBlank(rest)
		if s.Timestamp, s.Timed = p.milliseconds(word); !s.Timed {
			return fmt.Errorf("%s: %.40q is not a timestamp", name, word)
		}
	}
	if p.format == OpenMetrics && strings.HasPrefix(rest, "#") {
		if s.Exemplar, rest, err = p.exemplar(rest); err != nil {
			return fmt.Errorf("%s: exemplar: %w", name, err)
		}
	}
	if rest != "" {
		return fmt.Errorf("%s: unexpected %.40q", name, rest)
	}
	f, err := p.owner(name)
	if err != nil {
		return err
	}
	f.Samples = append(f.Samples, s)
	return nil
}

// labels parses labels in braces.
func (p *parser) labels(text string) (labels []Label, rest string, err error) {
	labels = p.scratch[:0]
	for rest = text[1:]; ; {
		rest = strings.TrimLeft(rest, " \t")
		if strings.HasPrefix(rest, "}") {
			p.scratch = labels
			return slices.Clone(labels), rest[1:], nil
		}
		name := cutName(rest, false)
		if name == "" || name == "__name__" {
			return nil, "", fmt.Errorf("%.40q is not a label name", rest)
		}
		if len(labels) == p.limits.Labels {
			return nil, "", fmt.Errorf("label %.80q exceeds the limit of %d labels", name, p.limits.Labels)
		}
		for _, label := range labels {
			if label.Name == name {
				return nil, "", fmt.Errorf("duplicate label %s", name)
			}
		}
		rest = strings.TrimLeft(rest[len(name):], " \t")
		if rest, err = after(rest, "=", name); err != nil {
			return nil, "", err
		}
		if rest, err = after(strings.TrimLeft(rest, " \t"), `"`, name); err != nil {
			return nil, "", err
		}
		end := closingQuote(rest)
		if end < 0 {
			return nil, "", fmt.Errorf("the value of label %s does not end", name)
		}
		labels = append(labels, Label{name, unescape(rest[:end], true)})
		rest = strings.TrimLeft(rest[end+1:], " \t")
		if !strings.HasPrefix(rest, "}") {
			if rest, err = after(rest, ",", name); err != nil {
				return nil, "", err
			}
		}
	}
}

func after(text, mark, label string) (string, error) {
	rest, ok := strings.CutPrefix(text, mark)
	if !ok {
		return "", fmt.Errorf("label %s: %.40q instead of %s", label, text, mark)
	}
	return rest, nil
}

// closingQuote returns the index of the first quotation mark that is not escaped, or -1.
func closingQuote(text string) int {
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '"':
			return i
		case '\\':
			i++
		}
	}
	return -1
}

func value(text string) (value, rest string, err error) {
	value, rest = cutBlank(strings.TrimLeft(text, " \t"))
	if _, ok := parseNumber(value); !ok {
		return "", "", fmt.Errorf("%.40q is not a value", value)
	}
	return value, rest, nil
}

// milliseconds parses a timestamp: in milliseconds in the text format, in seconds in OpenMetrics.
func (p *parser) milliseconds(text string) (int64, bool) {
	if p.format == Text {
		n, err := strconv.ParseInt(text, 10, 64)
		return n, err == nil && n <= maxTimestamp && n >= -maxTimestamp
	}
	seconds, ok := parseNumber(text)
	rounded := math.Round(seconds * 1000)
	return int64(rounded), ok && math.Abs(rounded) <= maxTimestamp
}

func (p *parser) exemplar(text string) (*Exemplar, string, error) {
	rest := strings.TrimLeft(text[1:], " \t")
	if !strings.HasPrefix(rest, "{") {
		return nil, "", fmt.Errorf("%.40q instead of its labels", rest)
	}
	var e Exemplar
	var err error
	if e.Labels, rest, err = p.labels(rest); err != nil {
		return nil, "", err
	}
	if e.Value, rest, err = value(rest); err != nil {
		return nil, "", err
	}
	e.Timestamp, rest = cutBlank(rest)
	if e.Timestamp != "" {
		if seconds, ok := parseNumber(e.Timestamp); !ok || math.IsNaN(seconds) || math.IsInf(seconds, 0) {
			return nil, "", fmt.Errorf("%.40q is not a timestamp", e.Timestamp)
		}
	}
	length := 0
	for _, label := range e.Labels {
		length += utf8.RuneCountInString(label.Name) + utf8.RuneCountInString(label.Value)
	}
	if length > maxExemplar {
		return nil, rest, nil
	}
	return &e, rest, nil
}

// finished returns the families with their names in the text format.
func (p *parser) finished() []Family {
	var all []Family
	for _, f := range p.order {
		if p.format == OpenMetrics && f.Type == Counter {
			f.Name += "_total"
		}
		if p.format == OpenMetrics && f.Type == Info {
			f.Name += "_info"
		}
		for i := range f.Samples {
			f.misfit = f.misfit || !f.fits(&f.Samples[i], p.format)
		}
		switch {
		case f.misfit:
			all = append(all, split(f.Family, Unknown)...)
		case len(f.Samples) > 0:
			all = append(all, f.Family)
		}
	}
	return all
}

// cutName returns the longest prefix of text that is the name of a metric, or else of a label. Only metrics may have colons.
func cutName(text string, metric bool) string {
	for i := 0; i < len(text); i++ {
		c := text[i]
		letter := c|0x20 >= 'a' && c|0x20 <= 'z' || c == '_' || c == ':' && metric
		if !letter && (i == 0 || c < '0' || c > '9') {
			return text[:i]
		}
	}
	return text
}

// cutBlank splits text at its first blanks.
func cutBlank(text string) (word, rest string) {
	i := strings.IndexAny(text, " \t")
	if i < 0 {
		return text, ""
	}
	return text[:i], strings.TrimLeft(text[i:], " \t")
}

// unescape resolves escapes: \\, \n and, if quotes is set, \". In HELP of the text format, \" is not an escape. Any other
// backslash is kept, as in Prometheus.
func unescape(text string, quotes bool) string {
	switch {
	case strings.IndexByte(text, '\\') < 0:
		return text
	case quotes:
		return valueUnescaper.Replace(text)
	}
	return helpUnescaper.Replace(text)
}

var (
	helpUnescaper  = strings.NewReplacer(`\\`, `\`, `\n`, "\n")
	valueUnescaper = strings.NewReplacer(`\\`, `\`, `\n`, "\n", `\"`, `"`)
)
