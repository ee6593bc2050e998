// Package checklist is the result of checks, for people and programs: one line for each, with a remedy if it failed.
package checklist

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

// State is the result of a check.
type State string

// The states.
const (
	OK      State = "ok"
	Warning State = "warning" // it works, but not well, or not for long
	Failed  State = "failed"
	Skipped State = "skipped" // could not be checked, or does not apply
)

// Check is one result.
type Check struct {
	Name   string `json:"name"`
	State  State  `json:"state"`
	Text   string `json:"text"`             // what was found
	Remedy string `json:"remedy,omitempty"` // what to do about it
}

// List is the results in their order.
type List []Check

// Add appends a result.
func (l *List) Add(name string, state State, text string) { l.AddWithRemedy(name, state, text, "") }

// AddWithRemedy appends a result with its remedy.
func (l *List) AddWithRemedy(name string, state State, text, remedy string) {
	*l = append(*l, Check{name, state, text, remedy})
}

// Failed reports whether a check failed.
func (l List) Failed() bool { return l.count(Failed) > 0 }

func (l List) count(state State) (n int) {
	for _, c := range l {
		if c.State == state {
			n++
		}
	}
	return n
}

var (
	signs = map[State]string{OK: "✓", Warning: "!", Failed: "✗", Skipped: "–"}
	words = map[State]string{OK: "ok  ", Warning: "warn", Failed: "FAIL", Skipped: "skip"}
)

// Text has a line for each check, and one for the sum. plain uses ASCII words instead of signs.
func (l List) Text(plain bool) string {
	width := 0
	for _, c := range l {
		width = max(width, len(c.Name))
	}
	marks := signs
	if plain {
		marks = words
	}
	var text strings.Builder
	for _, c := range l {
		remedy := ""
		if c.Remedy != "" {
			remedy = ": " + c.Remedy
		}
		fmt.Fprintf(&text, "%s %-*s  %s%s\n", marks[c.State], width, c.Name, oneLine(c.Text), oneLine(remedy))
	}
	fmt.Fprintf(&text, "%d ok, %d failed, %d warnings, %d skipped\n", l.count(OK), l.count(Failed), l.count(Warning), l.count(Skipped))
	return text.String()
}

// oneLine makes text that a server sent printable, and one line.
func oneLine(text string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if r < ' ' || 0x7f <= r && r < 0xa0 {
			return '\uFFFD'
		}
		return r
	}, text)
}

// Write writes the list to out, as JSON or as text. Text has signs if out is a terminal and the locale is UTF-8.
func (l List) Write(out io.Writer, asJSON bool) error {
	if asJSON {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(struct {
			Failed bool `json:"failed"`
			Checks List `json:"checks"`
		}{l.Failed(), l})
	}
	_, err := io.WriteString(out, l.Text(!showsSigns(out)))
	return err
}

func showsSigns(out io.Writer) bool {
	file, ok := out.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && utf8Locale(os.Getenv)
}

// utf8Locale follows setlocale(3): the first variable that is set decides.
func utf8Locale(getenv func(string) string) bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if value := strings.ToUpper(getenv(name)); value != "" {
			return strings.Contains(value, "UTF-8") || strings.Contains(value, "UTF8")
		}
	}
	return false
}
