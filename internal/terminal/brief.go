package terminal

import (
	"cmp"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/live"
)

// Brief is one short line about a record of a command's traffic, without its time and addresses. It is cut to a number of
// columns unless that is 0. The end of a failed one is never cut.
func Brief(r *live.Record, paint Painter, columns int) string {
	status := "-"
	if r.Status != 0 {
		status = strconv.Itoa(r.Status)
	}
	host := cmp.Or(r.Authority, r.SNI, r.Destination)
	path := r.Path
	if strings.HasPrefix(path, "http://") || strings.HasPrefix(path, "https://") || path == host { // to a proxy
		host, path = path, ""
	}
	what := r.Method + " " + host + path
	if !r.Request {
		what = r.Protocol + " " + host
		if r.SNI != "" {
			what += " " + r.Destination
		}
	}
	if r.Direction == "inbound" {
		what = "← " + what
	}
	end := showBytes(float64(r.Received+r.Sent)) + " " + showMS(r.DurationMS)
	if r.Failed {
		end = strings.Join(strings.Fields(end+" "+r.Cause()+" "+cmp.Or(r.Failure, r.Error)), " ")
	}
	end = printable(end)
	status = pad(status, 3)
	what = printable(what)
	if columns > 0 {
		least := 12
		if r.Failed { // the line may be longer than the terminal is wide, but names where it went
			least = columnsOf(what) - columnsOf(printable(path)) + 1
		}
		what = cut(what, max(least, columns-columnsOf(status)-columnsOf(end)-2))
	}
	colour := recordColour(r)
	if r.Failed {
		return paint.Paint(colour, status) + " " + what + " " + paint.Paint(colour, end)
	}
	return paint.Paint(colour, status) + " " + what + " " + paint.Paint(Faint, end)
}

// Table returns rows as lines with columns as wide as their longest cell. The first row has the titles.
func Table(rows [][]string, paint Painter) string {
	p := page{paint: paint}
	t := p.table(rows[0]...)
	for _, cells := range rows[1:] {
		t.row(cells...)
	}
	t.write()
	return p.text.String()
}

// Bytes is a number of bytes in three digits and a unit.
func Bytes(n uint64) string { return showBytes(float64(n)) }

// Milliseconds is a time in a fitting unit.
func Milliseconds(ms float64) string { return showMS(ms) }
