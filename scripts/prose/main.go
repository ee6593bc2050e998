// Command prose counts the lines of comments and documents that use a phrase which CONTRIBUTING asks to avoid.
//
//	go run ./scripts/prose -v
//	go run ./scripts/prose -comments 2 -documents 2
//
// It reads the files that git tracks or would add. Quoted text and code spans are not judged.
package main

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
)

func main() {
	verbose := flag.Bool("v", false, "print file:line: marker for each finding")
	comments := flag.Float64("comments", 100, "fail when more than this percentage of comment lines has a marker")
	documents := flag.Float64("documents", 100, "fail when more than this percentage of document lines has a marker")
	flag.Parse()

	names, err := tracked(flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "prose:", err)
		os.Exit(2)
	}
	report := newReport()
	for _, name := range names {
		source, err := os.ReadFile(name)
		if os.IsNotExist(err) {
			continue // deleted in the work tree
		}
		if err == nil {
			err = report.add(name, source)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "prose:", err)
			os.Exit(2)
		}
	}
	if *verbose {
		for _, f := range report.findings {
			fmt.Printf("%s:%d: %s\n", f.file, f.line, f.marker)
		}
	}
	report.print(os.Stdout, *verbose)
	if report.comments.share() > *comments || report.documents.share() > *documents {
		fmt.Fprintf(os.Stderr, "prose: above the limit of %g %% of comments or %g %% of documents; "+
			"`go run ./scripts/prose -v` lists the lines\n", *comments, *documents)
		os.Exit(1)
	}
}

// tracked returns the Go files and the Markdown files below the given paths, or below the working directory.
func tracked(paths []string) ([]string, error) {
	args := append([]string{"ls-files", "-z", "-co", "--exclude-standard", "--"}, paths...)
	out, err := exec.Command("git", args...).Output()
	if err != nil {
		return nil, fmt.Errorf("git ls-files: %w", err)
	}
	var names []string
	for name := range strings.SplitSeq(string(out), "\x00") {
		if strings.HasSuffix(name, ".go") || strings.HasSuffix(name, ".md") {
			names = append(names, name)
		}
	}
	return names, nil
}

type finding struct {
	file   string
	line   int
	marker string
}

// tally counts lines, and those of them that have a marker.
type tally struct{ lines, marked int }

func (c tally) share() float64 {
	if c.lines == 0 {
		return 0
	}
	return 100 * float64(c.marked) / float64(c.lines)
}

func (c tally) String() string {
	return fmt.Sprintf("%5d of %5d lines, %5.1f %%", c.marked, c.lines, c.share())
}

type report struct {
	findings            []finding
	packages            map[string]tally // comments by directory
	comments, documents tally
}

func newReport() *report { return &report{packages: make(map[string]tally)} }

func (r *report) add(name string, source []byte) error {
	if strings.HasSuffix(name, ".md") {
		marked, lines := r.judge(name, documentParagraphs(source))
		r.documents.lines += lines
		r.documents.marked += marked
		return nil
	}
	paragraphs, err := commentParagraphs(name, source)
	if err != nil {
		return err
	}
	marked, lines := r.judge(name, paragraphs)
	r.comments.lines += lines
	r.comments.marked += marked
	of := r.packages[path.Dir(name)]
	r.packages[path.Dir(name)] = tally{of.lines + lines, of.marked + marked}
	return nil
}

func (r *report) judge(name string, paragraphs []paragraph) (marked, lines int) {
	for _, p := range paragraphs {
		lines += len(p)
		found := p.markers()
		marked += len(found)
		for _, line := range slices.Sorted(maps.Keys(found)) {
			r.findings = append(r.findings, finding{name, line, strings.Join(found[line], ", ")})
		}
	}
	return marked, lines
}

func (r *report) print(w io.Writer, byPackage bool) {
	if byPackage {
		names := slices.SortedFunc(maps.Keys(r.packages), func(a, b string) int {
			return cmp.Or(cmp.Compare(r.packages[b].marked, r.packages[a].marked), strings.Compare(a, b))
		})
		for _, name := range names {
			fmt.Fprintf(w, "%-40s %v\n", name, r.packages[name])
		}
	}
	fmt.Fprintf(w, "comments:  %v with a marker\ndocuments: %v with a marker\n", r.comments, r.documents)
}

// A paragraph is lines of prose that belong together, so that a phrase may be wrapped.
type paragraph []line

type line struct {
	number int
	text   string
}

// commentParagraphs returns one paragraph for each comment group of a Go file. Directives and blank lines do not count.
func commentParagraphs(name string, source []byte) ([]paragraph, error) {
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, name, source, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var all []paragraph
	for _, group := range file.Comments {
		var p paragraph
		for _, comment := range group.List {
			p = append(p, commentLines(comment, files.Position(comment.Pos()).Line)...)
		}
		all = append(all, p)
	}
	return all, nil
}

var directive = regexp.MustCompile(`^//(go:|line |export |nolint)`)

func commentLines(comment *ast.Comment, first int) (lines []line) {
	if directive.MatchString(comment.Text) {
		return nil
	}
	text := strings.TrimPrefix(comment.Text, "//")
	text = strings.TrimSuffix(strings.TrimPrefix(text, "/*"), "*/")
	for i, l := range strings.Split(text, "\n") {
		if strings.TrimSpace(l) != "" {
			lines = append(lines, line{first + i, l})
		}
	}
	return lines
}

// documentParagraphs returns the paragraphs and table rows of a Markdown file, without its code blocks.
func documentParagraphs(source []byte) []paragraph {
	var all []paragraph
	var open paragraph
	end := func() {
		if len(open) > 0 {
			all = append(all, open)
		}
		open = nil
	}
	fenced := false
	for i, raw := range bytes.Split(source, []byte("\n")) {
		text := strings.TrimSpace(string(raw))
		if strings.HasPrefix(text, "```") {
			fenced = !fenced
			end()
			continue
		}
		if fenced || text == "" {
			end()
			continue
		}
		if begins.MatchString(text) {
			end()
		}
		open = append(open, line{i + 1, text})
	}
	end()
	return all
}

// begins matches the first line of a heading, a table row or a list item.
var begins = regexp.MustCompile(`^(#|\||[-*] |\d+\. )`)

// markers returns the markers of a paragraph by the number of the line in which each begins.
func (p paragraph) markers() map[int][]string {
	var joined strings.Builder
	starts := make([]int, len(p))
	for i, l := range p {
		starts[i] = joined.Len()
		joined.WriteString(strings.TrimSpace(l.text) + " ")
	}
	text := quoted.ReplaceAllStringFunc(joined.String(), func(q string) string { return strings.Repeat("_", len(q)) })
	found := make(map[int][]string)
	for _, m := range all {
		for _, at := range m.pattern.FindAllStringSubmatchIndex(text, -1) {
			at = at[len(at)-2:] // the group, if there is one
			if m.unless != nil && m.unless(sentence(text, at[0]), text[at[0]:], text[:at[0]]) {
				continue
			}
			i, exact := slices.BinarySearch(starts, at[0])
			if !exact {
				i--
			}
			name := m.name + " (" + strings.TrimSpace(text[at[0]:at[1]]) + ")"
			found[p[i].number] = append(found[p[i].number], name)
		}
	}
	return found
}

// quoted is a code span, or text between quotation marks that is not longer than a phrase.
var quoted = regexp.MustCompile("`[^`]*`" + `|"[^"]{1,120}"|“[^”]{1,120}”`)

// sentence returns the sentence of text in which the byte at stands.
func sentence(text string, at int) string {
	begin := strings.LastIndexAny(text[:at], ".:;?!") + 1
	if end := strings.IndexAny(text[at:], ".;?!"); end >= 0 {
		return text[begin : at+end+1]
	}
	return text[begin:]
}

// marker is a phrase to avoid. unless, if set, reports whether this use is plain English: it gets the sentence, the text
// from the match on and the text before it.
type marker struct {
	name    string
	pattern *regexp.Regexp
	unless  func(sentence, rest, before string) bool
}

var (
	source  = regexp.MustCompile(`(?i)(\b(RFC|RFCs|standard|specification|documentation|README|ARCHITECTURE|CONTRIBUTING|comment)\b[^.;,]*|§[\d.]+,? |\(\d\) )$`)
	thereIs = regexp.MustCompile(`(?i)\bthere $`)
	plainNo = regexp.MustCompile(`(?i)^\w+ no (longer|more|less|later|earlier|greater|larger|smaller|such|way)\b`)
	compare = regexp.MustCompile(`(?i)^so (long|many) (\w+ ){0,4}(that|as)\b`)
	notBut  = regexp.MustCompile(`(?i)\bnot\b[^.;]* but (for|with)\b`)
)

var all = []marker{
	{name: "negation by pronoun", pattern: regexp.MustCompile(`(?i)\b(?:nobody|none)\b`)},
	{name: "negation by pronoun", pattern: regexp.MustCompile(`(?i)\bnothing (?:is|was|are|has|had|can|may|will|of|comes|goes|else)\b`)},
	{name: "is no", pattern: regexp.MustCompile(`(?i)\b(?:is|are|was|were) no\b`),
		unless: func(_, rest, before string) bool { return thereIs.MatchString(before) || plainNo.MatchString(rest) }},
	{name: "personification", pattern: regexp.MustCompile(`(?i)\b(?:says|said|told|tells|hears|knows|wishes)\b`),
		unless: func(_, _, before string) bool { return source.MatchString(before) }},
	{name: "trailing which", pattern: regexp.MustCompile(`, which\b`)},
	{name: "clause as subject", pattern: regexp.MustCompile(`(?:^|[.:;!?)] |[|*] |\d\. |- )(What|Who|Whoever|Whatever) `),
		unless: func(_, rest, _ string) bool { return isQuestion(rest) }},
	{name: "clause as subject", pattern: regexp.MustCompile(`\b(?:whoever|[Ww]homever)\b`)},
	{name: "but for", pattern: regexp.MustCompile(`(?i)\bbut (?:for|with)\b`),
		unless: func(sentence, _, _ string) bool { return notBut.MatchString(sentence) }},
	{name: "archaic", pattern: regexp.MustCompile(`(?i)\b(?:for ever|anew|under way|strangers?|heed(?:s|ed|ing)?)\b`)},
	{name: "archaic", pattern: regexp.MustCompile(`(?i)\bso (?:long|many)\b`),
		unless: func(_, rest, _ string) bool { return compare.MatchString(rest) }},
}

// isQuestion reports whether the sentence that rest begins with ends in a question mark.
func isQuestion(rest string) bool {
	end := strings.IndexAny(rest, ".;?!")
	return end >= 0 && rest[end] == '?'
}
