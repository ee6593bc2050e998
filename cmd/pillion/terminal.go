package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"
)

// painter colours text on a terminal, and leaves it as it is elsewhere.
type painter bool

// newPainter paints when out is a terminal and nobody has said that they want no colour (no-color.org).
func newPainter(out io.Writer) painter {
	return painter(isTerminal(out) && os.Getenv("NO_COLOR") == "")
}

func isTerminal(out io.Writer) bool {
	file, ok := out.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return false
	}
	info, err := file.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull) // the other character device that output goes to
	return err == nil && !os.SameFile(info, null)
}

// The colours, as a terminal names them.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
	faint  = "2"
	bold   = "1"
)

func (p painter) paint(colour, text string) string {
	if !p || text == "" || colour == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// printable is text from traffic with nothing in it that a terminal would obey.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, text)
}

// pad gives text a width, on the left when width is negative; cut text ends in "…".
func pad(text string, width int) string {
	runes := []rune(text)
	left := width < 0
	width = max(width, -width)
	if len(runes) > width {
		return string(runes[:width-1]) + "…"
	}
	space := strings.Repeat(" ", width-len(runes))
	if left {
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

// showSuccess is the share of flows that were no error.
func showSuccess(flows, errors uint64) string {
	if flows == 0 {
		return "-"
	}
	share := 100 * float64(flows-min(errors, flows)) / float64(flows)
	if errors > 0 {
		share = min(share, 99.9) // 100 is for none
	}
	return fmt.Sprintf("%.1f%%", share)
}

func showAge(seconds float64) string {
	return (time.Duration(seconds) * time.Second).String()
}
