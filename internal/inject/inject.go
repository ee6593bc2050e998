// Package inject adds pillion to pods and removes it again.
//
// It reads Kubernetes objects, derives the sidecar from each pod's annotations, and makes a list of changes. The list is
// either applied to a text, every other byte of which is kept, or sent to an API server as a JSON Patch. An annotation of
// the pod records the changes, so that a second injection changes nothing and Uninject can undo the first. An
// error means that no text is returned: a pod without its sidecar would run uncaptured.
package inject

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// Short names for values that are added to a tree.
type (
	object = yamledit.Object
	member = yamledit.Member
)

// Action is what was done to an object with a pod.
type Action string

// The actions.
const (
	Injected   Action = "injected"
	Uninjected Action = "uninjected"
	LeftAlone  Action = "left alone"
	Failed     Action = "failed"
)

// Outcome reports one object that has a pod or a pod template. Objects without one are not reported.
type Outcome struct {
	File      string   `json:"file"`
	Line      int      `json:"line"` // in File, where the object begins
	Kind      string   `json:"kind"`
	Namespace string   `json:"namespace,omitempty"` // as the object has it
	Name      string   `json:"name"`
	Action    Action   `json:"action"`
	Reason    string   `json:"reason,omitempty"` // for LeftAlone and Failed
	Image     string   `json:"image,omitempty"`  // of the injected containers
	Warnings  []string `json:"warnings,omitempty"`

	requested bool // LeftAlone as the pod's author requested
}

// Object returns the kind and name for messages.
func (o Outcome) Object() string {
	if o.Namespace != "" {
		return o.Kind + " " + o.Namespace + "/" + o.Name
	}
	return o.Kind + " " + o.Name
}

// Output takes the changed documents piece by piece. Inject may take back what it has written.
type Output interface {
	io.StringWriter
	Size() int64
	Truncate(size int64) error // to a former Size
}

// Inject writes the documents to out, with a sidecar in each pod that is to have one. report receives the outcome of each
// object, in order; its File is name. If objects cannot be injected, the error names all of them, and the output must not be
// used.
func Inject(text, name string, options Options, report func(Outcome), out Output) error {
	return each(text, name, report, out, func(o *found) ([]yamledit.Change, error) { return o.inject(options) })
}

// Uninject removes the sidecars. It restores a text that Inject has changed byte for byte.
func Uninject(text, name string, report func(Outcome), out Output) error {
	return each(text, name, report, out, (*found).uninject)
}

const byteOrderMark = "\uFEFF"

// editor applies a decision to all objects of a stream.
type editor struct {
	name   string // of the input, for messages
	report func(Outcome)
	decide func(*found) ([]yamledit.Change, error)
	out    Output
	broken error // of out
	failed []error
}

func (e *editor) write(text string) {
	if e.broken == nil && len(e.failed) == 0 {
		_, e.broken = e.out.WriteString(text)
	}
}

// each applies the changes that decide returns for each object.
func each(text, name string, report func(Outcome), out Output, decide func(*found) ([]yamledit.Change, error)) error {
	if !utf8.ValidString(text) {
		return fmt.Errorf("%s is not UTF-8: convert it", name)
	}
	e := &editor{name: name, report: report, decide: decide, out: out}
	if strings.HasPrefix(text, byteOrderMark) {
		e.write(byteOrderMark)
		text = text[len(byteOrderMark):]
	}
	line := 1
	for _, document := range yamledit.Split(text) {
		e.document(document, line)
		line += strings.Count(document, "\n")
	}
	return errors.Join(append(e.failed, e.broken)...)
}

// document edits the document that begins at a line of the input. The items of a List are edited one by one, because the
// nodes of a parsed document take many times the memory of its text.
func (e *editor) document(text string, line int) {
	if trimmed := strings.TrimLeft(text, " \t\r\n"); trimmed == "" || trimmed[0] == '%' {
		e.write(text) // directives belong to the document after them
		return
	}
	if e.list(text, line) {
		return
	}
	edited, err := e.part(text, line, nil)
	if err != nil {
		e.failed = append(e.failed, fmt.Errorf("%s: %w", e.name, err))
	}
	e.write(edited)
}

// list edits a List item by item. It reports false if that is not possible: the document has to be parsed as a whole.
func (e *editor) list(text string, line int) (done bool) {
	parts, rest := yamledit.SplitList(text, "items")
	if yamledit.Text(rest, "kind") != "List" || strings.Contains(yamledit.Text(rest, "apiVersion"), "/") {
		return false
	}
	failed, size, report := len(e.failed), e.out.Size(), e.report
	var outcomes []Outcome
	e.report = func(o Outcome) { outcomes = append(outcomes, o) }
	defer func() {
		e.report = report
		if !done {
			e.failed = e.failed[:failed]
			e.broken = errors.Join(e.broken, e.out.Truncate(size))
			return
		}
		for _, o := range outcomes {
			report(o)
		}
	}()
	for _, part := range parts {
		edited := part.Text
		if part.Item {
			var path []string
			if strings.HasPrefix(strings.TrimLeft(part.Text, " "), "-") {
				path = []string{"0"}
			}
			var err error
			if edited, err = e.part(part.Text, line, path); err != nil {
				return false
			}
		}
		e.write(edited)
		line += strings.Count(part.Text, "\n")
	}
	return true
}

// part edits a text that is parsed as a whole. The object in it is at path.
func (e *editor) part(text string, line int, path []string) (string, error) {
	d, err := yamledit.Parse(text)
	if err != nil {
		return "", fileLines(err, line)
	}
	tree := d.Tree()
	if len(path) > 0 {
		items, _ := tree.([]any)
		if len(items) != 1 {
			return "", errors.New("not a single item")
		}
		tree = items[0]
	}
	var changes []yamledit.Change
	failed := len(e.failed)
	for _, o := range objects(tree, path) {
		o.record, o.recordItem = d.Source, d.Item
		o.outcome.File, o.outcome.Line = e.name, d.Line(o.path)+line-1
		more, err := e.decide(o)
		if err != nil {
			err = fileLines(err, line)
			o.outcome.Action, o.outcome.Reason = Failed, err.Error()
			e.failed = append(e.failed, fmt.Errorf("%s (line %d of %s): %w", o.outcome.Object(), o.outcome.Line, e.name, err))
		}
		e.report(o.outcome)
		changes = append(changes, more...)
	}
	if len(e.failed) > failed || len(changes) == 0 {
		return text, nil
	}
	edited, err := d.Edit(changes)
	return edited, fileLines(err, line)
}

var lineNumber = regexp.MustCompile(`^line (\d+)`)

// fileLines replaces a line number of a document at the beginning of an error by that of the file.
func fileLines(err error, first int) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	at := lineNumber.FindStringSubmatchIndex(text)
	if at == nil {
		return err
	}
	number, _ := strconv.Atoi(text[at[2]:at[3]])
	return fmt.Errorf("line %d%s", number+first-1, text[at[3]:])
}
