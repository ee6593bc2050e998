package inject

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// document is one YAML document and where its parts stand. The parser tells where a node begins; where it ends is found
// here, so that changes are made in the text itself and all other bytes stay what they are.
type document struct {
	text      string
	lines     []int // where each line begins
	lineBreak string
	root      *yaml.Node // nil when there is nothing but comments
	tree      any
	removed   map[*yaml.Node]bool // the nodes that a change takes away
}

// parse reads one document.
func parse(text string) (*document, error) {
	d := &document{text: text, lines: []int{0}, lineBreak: "\n", removed: make(map[*yaml.Node]bool)}
	for i := 0; i < len(text); {
		n := breakAt(text[i:])
		if n == 0 {
			i++
			continue
		}
		if len(d.lines) == 1 && n == 2 && text[i] == '\r' {
			d.lineBreak = "\r\n"
		}
		i += n
		d.lines = append(d.lines, i)
	}
	var n yaml.Node
	if err := yaml.Unmarshal([]byte(text), &n); err != nil {
		return nil, err
	}
	if n.Kind == 0 {
		return d, nil
	}
	var err error
	d.root = n.Content[0]
	d.tree, err = plain(d.root)
	return d, err
}

// breakAt is the length of the line break with which s begins. YAML 1.1, which the parser reads, knows five.
func breakAt(s string) int {
	switch {
	case strings.HasPrefix(s, "\r\n"):
		return 2
	case s[0] == '\n' || s[0] == '\r':
		return 1
	case strings.HasPrefix(s, "\u0085"):
		return 2
	case strings.HasPrefix(s, "\u2028"), strings.HasPrefix(s, "\u2029"):
		return 3
	}
	return 0
}

// errStyle is for YAML that means what we think but is written in a way that we do not edit.
var errStyle = errors.New("it is written with anchors, tags or explicit keys where something has to change: " +
	"write it without them, as kubectl create --dry-run=client -o yaml does")

// errLastLine is for a text whose last value is a block scalar without a line break, which it gets when something follows.
var errLastLine = errors.New("its last value would be another one if something followed it: end the text with a line break")

// edit returns the text with the changes done. It has checked that the new text says what the changed tree does, and
// nothing else. The document is of no use afterwards.
func (d *document) edit(changes []change) (result string, err error) {
	defer func() {
		// What is looked at in the text are the parser's positions; were one of them not what it should be, then that is
		// a reason to leave the document alone.
		if failed := recover(); failed != nil {
			result, err = "", fmt.Errorf("%w (%v)", errStyle, failed)
		}
	}()
	var places []place
	for _, c := range changes {
		p, err := d.find(c.path)
		if err != nil {
			return "", err
		}
		if n := p.child(c); c.kind == removeMember || c.kind == removeItem {
			d.removed[n] = true
		}
		places = append(places, p)
	}
	var splices []splice
	for i, c := range changes {
		s, err := d.splice(places[i], c)
		if err != nil {
			return "", err
		}
		s.depth = len(c.path)
		splices = append(splices, s)
	}
	// Where a mapping ends, its own mapping may end too: what goes into the inner one comes first.
	slices.SortStableFunc(splices, func(a, b splice) int {
		return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(a.to, b.to), cmp.Compare(b.depth, a.depth))
	})
	var b strings.Builder
	at := 0
	for _, s := range splices {
		b.WriteString(d.text[at:s.from])
		b.WriteString(s.text)
		at = s.to
	}
	b.WriteString(d.text[at:])
	result = b.String()

	d.root, d.removed, places = nil, nil, nil // a new document takes their room
	fresh, err := parse(result)
	if err != nil {
		return "", fmt.Errorf("%w (%v)", errStyle, err)
	}
	want, err := apply(d.tree, changes)
	if err != nil {
		return "", err
	}
	if !equal(fresh.tree, want) {
		if d.lines[len(d.lines)-1] < len(d.text) {
			return "", errLastLine
		}
		return "", errStyle
	}
	return result, nil
}

// splice puts text in place of the bytes between from and to.
type splice struct {
	from, to int
	text     string
	depth    int
}

// place is a mapping or a list in the text.
type place struct {
	node *yaml.Node
	key  *yaml.Node // whose value the node is, if it is a member's
	flow bool       // it stands in flow style: {a: b} or JSON
}

// find follows path from the root. It does not follow aliases, as a change there would be one in other places too.
func (d *document) find(path []string) (place, error) {
	p := place{node: d.root, flow: d.root.Style&yaml.FlowStyle != 0}
	for _, key := range path {
		at := -1
		switch p.node.Kind {
		case yaml.MappingNode:
			at = memberIndex(p.node, key)
			if at >= 0 {
				p.key = p.node.Content[at]
				at++
			}
		case yaml.SequenceNode:
			at = index(key)
			p.key = nil
		}
		if at < 0 || at >= len(p.node.Content) {
			return place{}, errStyle
		}
		p.node = p.node.Content[at]
		p.flow = p.flow || p.node.Style&yaml.FlowStyle != 0
	}
	if p.node.Kind != yaml.MappingNode && p.node.Kind != yaml.SequenceNode {
		return place{}, errStyle
	}
	return p, nil
}

// memberIndex is where the key stands in a mapping's Content, or -1.
func memberIndex(n *yaml.Node, key string) int {
	for i := 0; i < len(n.Content); i += 2 {
		if n.Content[i].Kind == yaml.ScalarNode && n.Content[i].Value == key {
			return i
		}
	}
	return -1
}

// child is the key of the member, or the item, that a change is about, or nil when there is none yet.
func (p place) child(c change) *yaml.Node {
	switch c.kind {
	case setMember, removeMember:
		if c.old != "" {
			if i := memberIndex(p.node, c.old); i >= 0 {
				return p.node.Content[i]
			}
		}
		if i := memberIndex(p.node, c.key); i >= 0 {
			return p.node.Content[i]
		}
	case removeItem:
		return p.node.Content[index(c.key)]
	}
	return nil
}

// column is where the mapping's keys or the list's dashes stand in block style.
func (d *document) column(n *yaml.Node) int {
	if n.Kind == yaml.SequenceNode {
		return n.Column - 1
	}
	return n.Content[0].Column - 1
}

// splice makes a change where it belongs.
func (d *document) splice(p place, c change) (splice, error) {
	child := p.child(c)
	switch {
	case c.kind == removeMember || c.kind == removeItem:
		if child == nil {
			return splice{}, errStyle
		}
		if p.flow {
			return d.removeFlow(p, child), nil
		}
		return d.removeBlock(p, child)
	case c.kind == setMember && child != nil:
		w := d.written(p, child)
		from := d.offset(child)
		return splice{from: from, to: from + len(w.Text), text: d.render(p, c, w.Column)}, nil
	case len(p.node.Content) == 0: // whoever makes changes replaces an empty mapping or list
		return splice{}, errStyle
	case p.flow && c.kind == addFront:
		at := d.offset(p.node.Content[0])
		return splice{from: at, to: at, text: d.render(p, c, -1) + ", "}, nil
	case p.flow:
		at := d.end(p.node.Content[len(p.node.Content)-1], true, 0)
		return splice{from: at, to: at, text: ", " + d.render(p, c, -1)}, nil
	case c.kind == addFront:
		// Behind the line of the key, so that comments above the first item stay with it.
		first := d.offset(p.node)
		if p.key == nil || d.text[first] != '-' || !d.leads(first) || p.node.Line <= p.key.Line {
			return splice{}, errStyle
		}
		at := d.lineEnd(d.offset(p.key))
		return splice{from: at, to: at, text: d.newLine(d.column(p.node)) + d.render(p, c, d.column(p.node))}, nil
	default:
		if p.node.Kind == yaml.SequenceNode && d.text[d.offset(p.node)] != '-' {
			return splice{}, errStyle
		}
		at := d.lineEnd(d.end(p.node, false, 0))
		return splice{from: at, to: at, text: d.newLine(d.column(p.node)) + d.render(p, c, d.column(p.node))}, nil
	}
}

// render writes what a change adds, in the style of its place: for flow style column is -1.
func (d *document) render(p place, c change, column int) string {
	var value any = c.values
	if c.kind == setMember {
		if c.was != nil && c.was.Column == column {
			return c.was.Text
		}
		value = object{{c.key, c.values[0]}}
	}
	var b strings.Builder
	if column < 0 {
		flow(&b, value)
		return b.String()[1 : b.Len()-1]
	}
	block(&b, value, column, d.lineBreak)
	return b.String()
}

// written is the member whose key this is, as it stands.
func (d *document) written(p place, key *yaml.Node) written {
	value := p.node.Content[slices.Index(p.node.Content, key)+1]
	column := -1
	if !p.flow {
		column = d.column(p.node)
	}
	return written{d.text[d.offset(key):d.end(value, p.flow, column)], column}
}

// removeBlock takes whole lines away, with the line break before them: so text without one at its end keeps none.
func (d *document) removeBlock(p place, child *yaml.Node) (splice, error) {
	from, last := d.offset(child), child
	if p.node.Kind == yaml.MappingNode {
		last = p.node.Content[slices.Index(p.node.Content, child)+1]
	} else {
		for from > 0 && d.text[from-1] == ' ' {
			from--
		}
		if from--; from < 0 || d.text[from] != '-' {
			return splice{}, errStyle
		}
	}
	to := d.lineEnd(d.end(last, false, d.column(p.node)))
	line := d.line(from)
	if !d.leads(from) || line == 0 {
		return splice{}, errStyle
	}
	return splice{from: d.lineEnd(d.lines[line-1]), to: to}, nil
}

// removeFlow takes away an item and the comma behind it, or before it when it stands behind one that stays.
func (d *document) removeFlow(p place, child *yaml.Node) splice {
	step := 1
	if p.node.Kind == yaml.MappingNode {
		step = 2
	}
	all := p.node.Content
	at := slices.Index(all, child)
	stays := false
	for i := 0; i < at; i += step {
		stays = stays || !d.removed[all[i]]
	}
	if !stays && at+step < len(all) {
		return splice{from: d.offset(child), to: d.offset(all[at+step])}
	}
	return splice{from: d.end(all[at-1], true, 0), to: d.end(all[at+step-1], true, 0)}
}

// offset is where a node begins. The parser counts lines from 1, and characters from 1.
func (d *document) offset(n *yaml.Node) int {
	at := d.lines[n.Line-1]
	for range n.Column - 1 {
		_, size := utf8.DecodeRuneInString(d.text[at:])
		at += size
	}
	return at
}

// line is the index of the line in which a byte stands.
func (d *document) line(at int) int {
	i, found := slices.BinarySearch(d.lines, at)
	if !found {
		i--
	}
	return i
}

// lineEnd is where the line of a byte ends, without its line break.
func (d *document) lineEnd(at int) int {
	for at < len(d.text) && breakAt(d.text[at:]) == 0 {
		at++
	}
	return at
}

func (d *document) newLine(column int) string { return d.lineBreak + strings.Repeat(" ", column) }

// leads reports whether nothing but blanks stands before a byte in its line.
func (d *document) leads(at int) bool {
	return strings.Trim(d.text[d.lines[d.line(at)]:at], " ") == ""
}

// end is where a node ends: behind its last byte. Column is that of the mapping or list that it stands in.
func (d *document) end(n *yaml.Node, flow bool, column int) int {
	at := d.offset(n)
	switch {
	case n.Kind == yaml.AliasNode:
		return at + 1 + len(n.Value)
	case n.Kind != yaml.ScalarNode && n.Style&yaml.FlowStyle == 0:
		return d.end(n.Content[len(n.Content)-1], false, d.column(n))
	case n.Value == "" && n.ShortTag() == "!!null":
		return at
	}
	if n.Anchor != "" || n.Style&yaml.TaggedStyle != 0 {
		at = d.pastProperties(at)
	}
	switch {
	case n.Kind != yaml.ScalarNode:
		return d.flowEnd(at)
	case n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0:
		return d.quotedEnd(at)
	case n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0:
		header := d.text[at:d.lineEnd(at)]
		return d.deeper(d.lineEnd(at), column, true, strings.Contains(header, "+"))
	case flow:
		return d.plainFlowEnd(at)
	}
	return d.plainEnd(at, column)
}

// pastProperties skips anchors and tags.
func (d *document) pastProperties(at int) int {
	for d.text[at] == '&' || d.text[at] == '!' {
		at += strings.IndexAny(d.text[at:], " \t\r\n")
		for strings.IndexByte(" \t\r\n", d.text[at]) >= 0 {
			at++
		}
	}
	return at
}

// quotedEnd is where the quoted scalar ends that begins at a quote.
func (d *document) quotedEnd(at int) int {
	quote := d.text[at]
	for at++; ; at++ {
		switch {
		case d.text[at] == '\\' && quote == '"':
			at++
		case d.text[at] == quote && quote == '\'' && strings.HasPrefix(d.text[at+1:], "'"):
			at++
		case d.text[at] == quote:
			return at + 1
		}
	}
}

// flowEnd is where the flow mapping or list ends that begins at a bracket.
func (d *document) flowEnd(at int) int {
	depth := 0
	for {
		switch c := d.text[at]; c {
		case '{', '[':
			depth++
			at++
		case '}', ']':
			at++
			if depth--; depth == 0 {
				return at
			}
		case '"', '\'':
			at = d.quotedEnd(at)
		case '#':
			at = d.lineEnd(at)
		case ' ', '\t', '\r', '\n', ',', ':':
			at++
		default:
			at = max(d.plainFlowEnd(at), at+1)
		}
	}
}

// plainFlowEnd is where a plain scalar in flow style ends.
func (d *document) plainFlowEnd(at int) int {
	end := at
	for ; at < len(d.text); at++ {
		c, next := d.text[at], byte(' ')
		if at+1 < len(d.text) {
			next = d.text[at+1]
		}
		blank := c == ' ' || c == '\t' || c == '\r' || c == '\n'
		switch {
		case strings.IndexByte(",[]{}", c) >= 0,
			c == ':' && strings.IndexByte(" \t\r\n,[]{}", next) >= 0,
			blank && next == '#':
			return end
		case !blank:
			end = at + 1
		}
	}
	return end
}

// plainEnd is where a plain scalar in block style ends: before a comment, or with the lines that go on with it.
func (d *document) plainEnd(at, column int) int {
	line := d.text[at:d.lineEnd(at)]
	if comment := strings.Index(line, " #"); comment >= 0 {
		return at + len(strings.TrimRight(line[:comment], " \t"))
	}
	if comment := strings.Index(line, "\t#"); comment >= 0 {
		return at + len(strings.TrimRight(line[:comment], " \t"))
	}
	return d.deeper(at+len(strings.TrimRight(line, " \t")), column, false, false)
}

// deeper is where those lines end, below that of at, that stand deeper than column. Blank lines at their end are not
// among them, but when all is kept. In a block scalar a # begins no comment.
func (d *document) deeper(at, column int, blockScalar, keep bool) int {
	end := at
	for i := d.line(at) + 1; i < len(d.lines); i++ {
		from := d.lines[i]
		line := d.text[from:d.lineEnd(from)]
		content := strings.TrimLeft(line, " ")
		switch {
		case strings.TrimRight(content, " \t") == "":
			if keep && from < len(d.text) {
				end = from + len(line)
			}
			continue
		case len(line)-len(content) <= column, !blockScalar && content[0] == '#':
			return end
		}
		end = from + len(line)
		if !blockScalar {
			if comment := strings.Index(line, " #"); comment >= 0 && strings.TrimSpace(line[:comment]) != "" {
				return from + len(strings.TrimRight(line[:comment], " \t"))
			}
			end = from + len(strings.TrimRight(line, " \t"))
		}
	}
	return end
}

// split cuts a stream into its documents. Together they are the stream. A line of --- begins a document wherever it
// stands, and ... ends one.
func split(stream []byte) []string {
	var documents []string
	begin := 0
	for at := 0; at < len(stream); {
		var end int
		if i := bytes.IndexByte(stream[at:], '\n'); i >= 0 {
			end = at + i + 1
		} else {
			end = len(stream)
		}
		switch {
		case marker(stream[at:end], "---") && at > begin:
			documents = append(documents, string(stream[begin:at]))
			begin = at
		case marker(stream[at:end], "..."):
			documents = append(documents, string(stream[begin:end]))
			begin = end
		}
		at = end
	}
	if begin < len(stream) {
		documents = append(documents, string(stream[begin:]))
	}
	return documents
}

func marker(line []byte, of string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(of))
	return ok && (len(rest) == 0 || strings.IndexByte(" \t\r\n", rest[0]) >= 0)
}
