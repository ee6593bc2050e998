// Package yamledit changes YAML and JSON documents in their text: every byte outside an edit stays as it is, and comments,
// order, quotes, indentation and line breaks with it.
//
// A document is parsed into nodes, whose positions give the byte range of each change; new text is written in the style of
// its place. The result is parsed again and must equal the changes applied to the tree, else the edit fails. So a mistake
// here, or a style that is not understood, is an error and never a different document. The editor is ours because yaml.v3
// formats the whole node tree: it loses blank lines, moves comments, and changes quotes and indentation.
package yamledit

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Document is one parsed YAML document and the positions of its parts. The parser reports where a node begins; where it
// ends is found here.
type Document struct {
	text      string
	lines     []int // offset of each line
	lineBreak string
	marks     map[int][]int // offsets of every markEvery-th character of a long line, see offset
	steps     int           // characters scanned to find positions; a test keeps them linear
	root      *yaml.Node    // nil if the document has only comments
	tree      any
	removed   map[*yaml.Node]bool // the nodes that an edit removes
}

// Parse reads one document.
func Parse(text string) (*Document, error) {
	d := &Document{text: text, lines: []int{0}, lineBreak: "\n", removed: make(map[*yaml.Node]bool)}
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
		return nil, d.located(err)
	}
	if n.Kind == 0 {
		return d, nil
	}
	var err error
	d.root = n.Content[0]
	d.tree, err = treeOf(d.root)
	return d, err
}

var (
	parserLine    = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)
	unknownAnchor = regexp.MustCompile(`^unknown anchor '(.*)' referenced$`)
)

// located returns an error of the YAML parser with the line, from 1. The parser omits it for the first line and for an
// unknown anchor, and counts from 0 in errors about the structure.
func (d *Document) located(err error) error {
	parts := parserLine.FindStringSubmatch(err.Error())
	if parts == nil {
		return err
	}
	line, problem := 1, parts[2]
	if number, err := strconv.Atoi(parts[1]); err == nil {
		line = number
		if strings.HasPrefix(problem, "did not find expected") {
			line++
		}
	}
	if anchor := unknownAnchor.FindStringSubmatch(problem); anchor != nil {
		line = d.line(max(0, strings.Index(d.text, "*"+anchor[1]))) + 1
	}
	if last := len(d.lines); line == last && line > 1 && d.lines[last-1] == len(d.text) {
		line-- // the end of the text
	}
	return fmt.Errorf("line %d: %s", min(line, len(d.lines)), problem)
}

// Tree returns the document's content. Do not modify it before Edit.
func (d *Document) Tree() any { return d.tree }

// Source returns the text of the member key of the mapping at path. Decoding it gives the same member.
func (d *Document) Source(path []string, key string) (s Source, err error) {
	defer func() {
		if failed := recover(); failed != nil {
			err = fmt.Errorf("%s: %w (%v)", dotted(path, key), errStyle, failed)
		}
	}()
	p, err := d.find(path)
	if err != nil {
		return Source{}, fmt.Errorf("%s: %w", dotted(path), err)
	}
	at := memberIndex(p.node, key)
	if at < 0 {
		return Source{}, fmt.Errorf("%s: %w", dotted(path, key), errStyle)
	}
	s = d.source(p, p.node.Content[at])
	if _, _, err := s.Decode(); err != nil {
		return Source{}, fmt.Errorf("%s: %w", dotted(path, key), errStyle)
	}
	return s, nil
}

// Item returns the text that CutItem removes with the item of the list at path. Decoding it gives the item.
func (d *Document) Item(path []string, index int) (s Source, err error) {
	defer func() {
		if failed := recover(); failed != nil {
			err = fmt.Errorf("%s[%d]: %w (%v)", dotted(path), index, errStyle, failed)
		}
	}()
	p, err := d.find(path)
	if err != nil {
		return Source{}, fmt.Errorf("%s: %w", dotted(path), err)
	}
	cut, err := d.cut(p, index)
	if err != nil {
		return Source{}, fmt.Errorf("%s[%d]: %w", dotted(path), index, err)
	}
	s = Source{Text: d.text[cut.from:cut.to], Column: -1}
	if !p.flow {
		s.Column = d.column(p.node)
	}
	if _, err := s.DecodeItem(); err != nil {
		return Source{}, fmt.Errorf("%s[%d]: %w", dotted(path), index, errStyle)
	}
	return s, nil
}

// Line returns the line of the node at path, from 1. It is the first line if there is no such node.
func (d *Document) Line(path []string) int {
	if d.root == nil {
		return 1
	}
	p, err := d.find(path)
	if err != nil {
		return 1
	}
	return p.node.Line
}

func dotted(path []string, keys ...string) string {
	return strings.Join(append(slices.Clone(path), keys...), ".")
}

// breakAt returns the length of the line break at the start of s, or 0. YAML 1.1 has five line breaks.
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

// errStyle reports YAML in a style that cannot be edited in place.
var errStyle = errors.New("the text to change uses anchors, tags or explicit keys: " +
	"rewrite it without them, as kubectl create --dry-run=client -o yaml does")

// errLastLine reports a text that ends in a block scalar without a line break. Text added after it would add a line break
// to the scalar.
var errLastLine = errors.New("adding text would change the last value, a block scalar without a line break: end the text with a line break")

// Edit returns the text with the changes applied. Before it returns, it parses the new text and compares the result with
// the changes applied to the tree. It consumes the document.
func (d *Document) Edit(changes []Change) (result string, err error) {
	defer func() {
		// Offsets come from the parser's positions. If one of them is wrong, leave the document alone.
		if failed := recover(); failed != nil {
			result, err = "", fmt.Errorf("%w (%v)", errStyle, failed)
		}
	}()
	var places []place
	for _, c := range changes {
		p, err := d.find(c.Path)
		if err != nil {
			return "", err
		}
		if n := p.child(c); c.Kind == RemoveMember || c.Kind == RemoveItem || c.Kind == CutItem {
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
		s.depth = len(c.Path)
		splices = append(splices, s)
	}
	// A nested mapping may end where its holder ends: text for the inner one comes first.
	slices.SortStableFunc(splices, func(a, b splice) int {
		return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(a.to, b.to), cmp.Compare(b.depth, a.depth))
	})
	var b strings.Builder
	size := len(d.text)
	for _, s := range splices {
		size += len(s.text) - (s.to - s.from)
	}
	b.Grow(max(0, size))
	at := 0
	for _, s := range splices {
		b.WriteString(d.text[at:s.from])
		b.WriteString(s.text)
		at = s.to
	}
	b.WriteString(d.text[at:])
	result = b.String()

	d.root, d.removed, places = nil, nil, nil // free them before the result is parsed
	fresh, err := Parse(result)
	if err != nil {
		return "", fmt.Errorf("%w (%v)", errStyle, err)
	}
	want, err := Apply(d.tree, changes)
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

// splice replaces the bytes from from to to by text.
type splice struct {
	from, to int
	text     string
	depth    int
}

// place is a mapping or a list in the text.
type place struct {
	node *yaml.Node
	key  *yaml.Node // the key whose value the node is, or nil
	flow bool       // in flow style, {a: b} or JSON
}

// find follows path from the root. It does not follow aliases: a change there would apply in other places too.
func (d *Document) find(path []string) (place, error) {
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

// memberIndex returns the index of key in a mapping's Content, or -1.
func memberIndex(n *yaml.Node, key string) int {
	for i := 0; i < len(n.Content); i += 2 {
		if n.Content[i].Kind == yaml.ScalarNode && n.Content[i].Value == key {
			return i
		}
	}
	return -1
}

// child returns the node of the member's key or of the item that a change affects, or nil if it does not exist yet.
func (p place) child(c Change) *yaml.Node {
	switch c.Kind {
	case SetMember, RemoveMember:
		if c.Old != "" {
			if i := memberIndex(p.node, c.Old); i >= 0 {
				return p.node.Content[i]
			}
		}
		if i := memberIndex(p.node, c.Key); i >= 0 {
			return p.node.Content[i]
		}
	case RemoveItem, CutItem:
		return p.node.Content[index(c.Key)]
	}
	return nil
}

// column returns the column of a block mapping's keys or of a block list's dashes, from 0.
func (d *Document) column(n *yaml.Node) int {
	if n.Kind == yaml.SequenceNode {
		return n.Column - 1
	}
	return n.Content[0].Column - 1
}

// splice returns the replacement of text that makes a change.
func (d *Document) splice(p place, c Change) (splice, error) {
	child := p.child(c)
	switch {
	case c.Kind == CutItem:
		return d.cut(p, index(c.Key))
	case c.Kind == InsertItem:
		return d.insert(p, c)
	case c.Kind == RemoveMember || c.Kind == RemoveItem:
		if child == nil {
			return splice{}, errStyle
		}
		if p.flow {
			return d.removeFlow(p, child), nil
		}
		return d.removeBlock(p, child)
	case c.Kind == SetMember && child != nil:
		s := d.source(p, child)
		from := d.offset(child)
		return splice{from: from, to: from + len(s.Text), text: d.render(p, c, s.Column)}, nil
	case len(p.node.Content) == 0: // callers replace empty mappings and lists as a whole
		return splice{}, errStyle
	case p.flow && c.Kind == AddFront:
		at := d.offset(p.node.Content[0])
		return splice{from: at, to: at, text: d.render(p, c, -1) + ", "}, nil
	case p.flow:
		at := d.end(p.node.Content[len(p.node.Content)-1], true, 0)
		return splice{from: at, to: at, text: ", " + d.render(p, c, -1)}, nil
	case c.Kind == AddFront:
		// After the line of the key, so that comments above the first item stay with it.
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

// render returns the text that a change adds, in the style of its place. In flow style column is -1.
func (d *Document) render(p place, c Change, column int) string {
	var value any = c.Values
	if c.Kind == SetMember {
		if c.Was != nil && c.Was.Column == column {
			return c.Was.Text
		}
		value = Object{{c.Key, c.Values[0]}}
	}
	var b strings.Builder
	if column < 0 {
		flow(&b, value)
		return b.String()[1 : b.Len()-1]
	}
	block(&b, value, column, d.lineBreak)
	return b.String()
}

// source returns the text of the member with this key.
func (d *Document) source(p place, key *yaml.Node) Source {
	value := p.node.Content[slices.Index(p.node.Content, key)+1]
	column := -1
	if !p.flow {
		column = d.column(p.node)
	}
	return Source{d.text[d.offset(key):d.end(value, p.flow, column)], column}
}

// removeBlock removes whole lines with the line break before them, so that a text without a final line break does not
// get one.
func (d *Document) removeBlock(p place, child *yaml.Node) (splice, error) {
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

// removeFlow removes an item with the comma after it, or with the comma before it if an earlier item stays.
func (d *Document) removeFlow(p place, child *yaml.Node) splice {
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

// cut removes an item of a list and the comments above it: in block style from the end of the item before, or of the line
// of the list's key.
func (d *Document) cut(p place, index int) (splice, error) {
	if p.node.Kind != yaml.SequenceNode || index < 0 || index >= len(p.node.Content) || len(p.node.Content) == 1 {
		return splice{}, errStyle
	}
	if p.flow {
		return d.removeFlow(p, p.node.Content[index]), nil
	}
	from, err := d.itemPlace(p, index-1)
	if err != nil {
		return splice{}, err
	}
	to := d.lineEnd(d.end(p.node.Content[index], false, d.column(p.node)))
	return splice{from: from, to: to}, nil
}

// itemPlace returns where the lines of the item after another one begin in block style, with the line break before them.
// after is -1 for the first item.
func (d *Document) itemPlace(p place, after int) (int, error) {
	first := d.offset(p.node)
	if p.key == nil || d.text[first] != '-' || !d.leads(first) || p.node.Line <= p.key.Line {
		return 0, errStyle
	}
	if after < 0 {
		return d.lineEnd(d.offset(p.key)), nil
	}
	return d.lineEnd(d.end(p.node.Content[after], false, d.column(p.node))), nil
}

// insert writes an item after another one, or at the front of a list that is not empty.
func (d *Document) insert(p place, c Change) (splice, error) {
	after := -1
	if c.Old != "" {
		after = index(c.Old)
	}
	if p.node.Kind != yaml.SequenceNode || len(p.node.Content) == 0 || after >= len(p.node.Content) || c.Old != "" && after < 0 {
		return splice{}, errStyle
	}
	if !p.flow {
		at, err := d.itemPlace(p, after)
		column := d.column(p.node)
		text := d.newLine(column) + d.render(p, Change{Kind: AddBack, Values: c.Values}, column)
		if c.Was != nil && c.Was.Column == column {
			text = c.Was.Text
		}
		return splice{from: at, to: at, text: text}, err
	}
	text := d.render(p, Change{Kind: AddBack, Values: c.Values}, -1)
	was := c.Was != nil && c.Was.Column < 0
	if after < 0 {
		at := d.offset(p.node.Content[0])
		if text += ", "; was && strings.HasSuffix(strings.TrimRight(c.Was.Text, " \t\r\n"), ",") {
			text = c.Was.Text
		}
		return splice{from: at, to: at, text: text}, nil
	}
	at := d.end(p.node.Content[after], true, 0)
	if text = ", " + text; was && strings.HasPrefix(strings.TrimLeft(c.Was.Text, " \t\r\n"), ",") {
		text = c.Was.Text
	}
	return splice{from: at, to: at, text: text}, nil
}

// markEvery is the distance in characters between the marks of a long line.
const markEvery = 256

// offset returns where a node begins. The parser counts lines and characters from 1. A document may be one long line of
// JSON, so the line's marks are used in place of decoding it from its start each time.
func (d *Document) offset(n *yaml.Node) int {
	at, characters := d.lines[n.Line-1], n.Column-1
	if characters >= markEvery {
		at = d.marksOf(n.Line - 1)[characters/markEvery]
		characters %= markEvery
	}
	for range characters {
		_, size := utf8.DecodeRuneInString(d.text[at:])
		at += size
	}
	d.steps += characters
	return at
}

// marksOf returns the offsets of the characters 0, markEvery, 2·markEvery, … of a line.
func (d *Document) marksOf(line int) []int {
	if marks, has := d.marks[line]; has {
		return marks
	}
	if d.marks == nil {
		d.marks = make(map[int][]int)
	}
	var marks []int
	from, to := d.lines[line], len(d.text)
	if line+1 < len(d.lines) {
		to = d.lines[line+1]
	}
	count := 0
	for at := range d.text[from:to] {
		if count%markEvery == 0 {
			marks = append(marks, from+at)
		}
		count++
	}
	if count%markEvery == 0 { // a node without text may begin at the line's end
		marks = append(marks, to)
	}
	d.steps += count
	d.marks[line] = marks
	return marks
}

// line returns the index of the line that contains a byte.
func (d *Document) line(at int) int {
	i, found := slices.BinarySearch(d.lines, at)
	if !found {
		i--
	}
	return i
}

// lineEnd returns where the line of a byte ends, without its line break.
func (d *Document) lineEnd(at int) int {
	next := d.line(at) + 1
	if next == len(d.lines) {
		return len(d.text)
	}
	end := d.lines[next]
	if _, size := utf8.DecodeLastRuneInString(d.text[:end]); size > 0 {
		end -= size
	}
	if strings.HasSuffix(d.text[:end+1], "\r\n") {
		end--
	}
	return max(at, end)
}

func (d *Document) newLine(column int) string { return d.lineBreak + strings.Repeat(" ", column) }

// leads reports whether a byte has only spaces before it in its line.
func (d *Document) leads(at int) bool {
	return strings.Trim(d.text[d.lines[d.line(at)]:at], " ") == ""
}

// end returns the offset after a node's last byte. Column is that of the mapping or list that holds the node.
func (d *Document) end(n *yaml.Node, flow bool, column int) int {
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
		end := d.flowEnd(at)
		d.steps += end - at
		return end
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

// pastProperties returns the offset after anchors and tags. It panics if no value follows.
func (d *Document) pastProperties(at int) int {
	for d.text[at] == '&' || d.text[at] == '!' {
		length := strings.IndexAny(d.text[at:], " \t\r\n")
		if length < 0 {
			panic("the text ends in a tag or an anchor")
		}
		at += length
		for strings.IndexByte(" \t\r\n", d.text[at]) >= 0 {
			at++
		}
	}
	return at
}

// quotedEnd returns the end of the quoted scalar whose quote is at at.
func (d *Document) quotedEnd(at int) int {
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

// flowEnd returns the end of the flow mapping or list whose bracket is at at.
func (d *Document) flowEnd(at int) int {
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

// plainFlowEnd returns the end of a plain scalar in flow style.
func (d *Document) plainFlowEnd(at int) int {
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

// plainEnd returns the end of a plain scalar in block style: before a comment, or after its continuation lines.
func (d *Document) plainEnd(at, column int) int {
	line := d.text[at:d.lineEnd(at)]
	if comment := strings.Index(line, " #"); comment >= 0 {
		return at + len(strings.TrimRight(line[:comment], " \t"))
	}
	if comment := strings.Index(line, "\t#"); comment >= 0 {
		return at + len(strings.TrimRight(line[:comment], " \t"))
	}
	return d.deeper(at+len(strings.TrimRight(line, " \t")), column, false, false)
}

// deeper returns the end of the lines after at that are indented deeper than column. Trailing blank lines are excluded
// unless keep is set. In a block scalar a # does not begin a comment.
func (d *Document) deeper(at, column int, blockScalar, keep bool) int {
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

// Split cuts a stream into documents whose concatenation is the stream. A line of --- begins a document and a line of ...
// ends one, also inside a scalar.
func Split(stream string) []string {
	var documents []string
	begin := 0
	for at := 0; at < len(stream); {
		var end int
		if i := strings.IndexByte(stream[at:], '\n'); i >= 0 {
			end = at + i + 1
		} else {
			end = len(stream)
		}
		switch {
		case marker(stream[at:end], "---") && at > begin:
			documents = append(documents, stream[begin:at])
			begin = at
		case marker(stream[at:end], "..."):
			documents = append(documents, stream[begin:end])
			begin = end
		}
		at = end
	}
	if begin < len(stream) {
		documents = append(documents, stream[begin:])
	}
	return documents
}

func marker(line, of string) bool {
	rest, ok := strings.CutPrefix(line, of)
	return ok && (len(rest) == 0 || strings.IndexByte(" \t\r\n", rest[0]) >= 0)
}
