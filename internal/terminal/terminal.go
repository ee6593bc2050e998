// Package terminal renders what a running agent reports as text: a table, lines in columns, one screen.
//
// The functions are pure: values in, text out. Text from traffic is made printable first, because a terminal would obey
// control characters in it.
package terminal

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"
)

// Painter colours text, if it is true.
type Painter bool

// NewPainter paints if out is a terminal and NO_COLOR is not set (no-color.org).
func NewPainter(out io.Writer) Painter {
	return Painter(IsTerminal(out) && os.Getenv("NO_COLOR") == "")
}

// IsTerminal reports whether out is a terminal that understands control sequences.
func IsTerminal(out io.Writer) bool {
	file, ok := out.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return false
	}
	info, err := file.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull) // also a character device
	return err == nil && !os.SameFile(info, null)
}

// The colours, as SGR parameters.
const (
	Red    = "31"
	Green  = "32"
	Yellow = "33"
	Faint  = "2"
	Bold   = "1"
)

// Paint returns text in a colour. An empty colour leaves text as it is.
func (p Painter) Paint(colour, text string) string {
	if !p || text == "" || colour == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// printable replaces what is not printable. Text from traffic must not control the terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, text)
}

// pad fills or cuts text to a width in characters. A negative width aligns right. Cut text ends in "…".
func pad(text string, width int) string {
	runes := []rune(text)
	right := width < 0
	width = max(width, -width)
	if len(runes) > width {
		return string(runes[:width-1]) + "…"
	}
	space := strings.Repeat(" ", width-len(runes))
	if right {
		return space + text
	}
	return text + space
}

func showMS(ms float64) string {
	switch {
	case ms == 0:
		return "-"
	case ms < 1:
		return fmt.Sprintf("%.2fms", ms)
	case ms < 10:
		return fmt.Sprintf("%.1fms", ms)
	case ms < 1000:
		return fmt.Sprintf("%.0fms", ms)
	}
	return fmt.Sprintf("%.1fs", ms/1000)
}

func showBytes(n float64) string {
	unit := 0
	for ; n >= 1000 && unit < 5; unit++ {
		n /= 1024
	}
	if unit == 0 || n >= 100 {
		return fmt.Sprintf("%.0f%c", n, "BKMGTP"[unit])
	}
	return fmt.Sprintf("%.1f%c", n, "BKMGTP"[unit])
}

func showRate(n float64) string {
	if n == 0 || n >= 100 {
		return fmt.Sprintf("%.0f", n)
	}
	return fmt.Sprintf("%.1f", n)
}

// showSuccess is the share of flows without an error.
func showSuccess(flows, errors uint64) string {
	if flows == 0 {
		return "-"
	}
	share := 100 * float64(flows-min(errors, flows)) / float64(flows)
	if errors > 0 {
		share = min(share, 99.9) // 100.0% means no error at all
	}
	return fmt.Sprintf("%.1f%%", share)
}

func showAge(seconds float64) string {
	return (time.Duration(seconds) * time.Second).String()
}
