package accesslog

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// appendStart appends a time as ISO 8601 in UTC, truncated to milliseconds.
func (l *line) appendStart(dst []byte, t time.Time) []byte {
	if second := t.Unix(); second != l.second || len(l.stamp) == 0 {
		l.second = second
		l.stamp = t.UTC().AppendFormat(l.stamp[:0], "2006-01-02T15:04:05.")
	}
	ms := t.Nanosecond() / 1e6
	return append(append(dst, l.stamp...), byte('0'+ms/100), byte('0'+ms/10%10), byte('0'+ms%10), 'Z')
}

// goLayouts maps conversions of strftime to layouts of package time.
var goLayouts = map[byte]string{
	'Y': "2006", 'y': "06", 'm': "01", 'd': "02", 'e': "_2", 'H': "15", 'I': "03", 'p': "PM", 'M': "04", 'S': "05",
	'F': "2006-01-02", 'T': "15:04:05", 'R': "15:04", 'a': "Mon", 'A': "Monday", 'b': "Jan", 'B': "January", 'j': "002",
	'Z': "MST", 'z': "-0700",
}

// checkLayout returns an error unless appendTime can format the layout. A valid layout has no byte that needs an escape.
func checkLayout(layout string) error {
	if layout == "" {
		return fmt.Errorf("the time format is empty; leave the parentheses out for the default")
	}
	for i := 0; i < len(layout); i++ {
		switch {
		case layout[i] < ' ' || layout[i] > '~' || layout[i] == '"' || layout[i] == '\\':
			return fmt.Errorf("the time format %q must be printable ASCII without quotation marks and backslashes", layout)
		case layout[i] != '%':
			continue
		}
		conversion := layout[i+1:]
		if digits := strings.TrimLeft(conversion, "123456789"); len(conversion)-len(digits) == 1 && strings.HasPrefix(digits, "f") {
			i += 2
			continue
		}
		if conversion == "" || !strings.ContainsRune("sf%", rune(conversion[0])) && goLayouts[conversion[0]] == "" {
			return fmt.Errorf("the time format %q has an unknown conversion %%%.1s; known are %%Y %%m %%d %%H %%M %%S %%s %%f %%1f to %%9f %%%% and %%y %%e %%I %%p %%F %%T %%R %%a %%A %%b %%B %%j %%Z %%z", layout, conversion)
		}
		i++
	}
	return nil
}

// appendTime appends t in a layout that checkLayout accepted. t must be in UTC.
func appendTime(dst []byte, t time.Time, layout string) []byte {
	for i := 0; i < len(layout); i++ {
		if layout[i] != '%' {
			dst = append(dst, layout[i])
			continue
		}
		i++
		switch b := layout[i]; b {
		case '%':
			dst = append(dst, '%')
		case 's':
			dst = strconv.AppendInt(dst, t.Unix(), 10)
		case 'f':
			dst = appendFraction(dst, t, 9)
		case '1', '2', '3', '4', '5', '6', '7', '8', '9':
			dst = appendFraction(dst, t, int(b-'0'))
			i++
		default:
			dst = t.AppendFormat(dst, goLayouts[b])
		}
	}
	return dst
}

// appendFraction appends the first digits of the fraction of a second.
func appendFraction(dst []byte, t time.Time, digits int) []byte {
	for rest, unit := t.Nanosecond(), int(1e8); digits > 0; digits, unit = digits-1, unit/10 {
		dst = append(dst, byte('0'+rest/unit%10))
	}
	return dst
}
