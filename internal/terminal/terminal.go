// Package terminal renders what a running agent reports as text: a table, lines in columns, one screen.
//
// Rendering is pure: values in, text out. Text from traffic is made printable first, because a terminal would obey control
// characters in it. Screen and Keyboard are the terminal itself: its size, its mode and its keys.
package terminal

import (
	"fmt"
	"io"
	"os"
	"strconv"
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
	return isTerminalFile(file)
}

func isTerminalFile(file *os.File) bool {
	info, err := file.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull) // also a character device
	return err == nil && !os.SameFile(info, null)
}

// The colours, as SGR parameters.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
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
//
//go:noinline // in fifty places
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, text)
}

// columnsOf returns the number of columns that printable text occupies.
func columnsOf(text string) (columns int) {
	for _, r := range text {
		columns += runeColumns(r)
	}
	return columns
}

// runeColumns returns 0 for combining characters and 2 for the wide ones of East Asian scripts and for emoji.
func runeColumns(r rune) int {
	switch {
	case r < 0x300:
		return 1
	case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf):
		return 0
	case 0x1100 <= r && r <= 0x115F, 0x2E80 <= r && r <= 0xA4CF, 0xAC00 <= r && r <= 0xD7A3, 0xF900 <= r && r <= 0xFAFF,
		0xFE30 <= r && r <= 0xFE6F, 0xFF00 <= r && r <= 0xFF60, 0xFFE0 <= r && r <= 0xFFE6, 0x1F300 <= r && r <= 0x1FAFF,
		0x20000 <= r && r <= 0x3FFFD:
		return 2
	}
	return 1
}

// cut shortens text to a number of columns. Shortened text ends in "…".
func cut(text string, columns int) string {
	if columnsOf(text) <= columns {
		return text
	}
	if columns <= 0 {
		return ""
	}
	used := 0
	for i, r := range text {
		if used += runeColumns(r); used > columns-1 {
			return text[:i] + "…"
		}
	}
	return text
}

// pad fills or cuts text to a width in columns. A negative width aligns right.
func pad(text string, width int) string {
	right := width < 0
	width = max(width, -width)
	text = cut(text, width)
	space := strings.Repeat(" ", width-columnsOf(text))
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

// showCount is exact up to a million.
func showCount(n uint64) string {
	switch {
	case n < 1e6:
		return strconv.FormatUint(n, 10)
	case n < 1e9:
		return fmt.Sprintf("%.2fM", float64(n)/1e6)
	}
	return fmt.Sprintf("%.2fG", float64(n)/1e9)
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
