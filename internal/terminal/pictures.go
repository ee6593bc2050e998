package terminal

import (
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/live"
)

// Order is an order of destinations.
type Order string

// The orders. All but ByName put the largest first.
const (
	ByRate   Order = "rate"
	ByTotal  Order = "total"
	ByErrors Order = "errors"
	ByP99    Order = "p99"
	ByBytes  Order = "bytes"
	ByName   Order = "name"
)

// Orders lists the orders. The first letter of each is its key in top.
var Orders = []Order{ByRate, ByTotal, ByErrors, ByP99, ByBytes, ByName}

// OrderOf returns the order with that key, or false.
func OrderOf(key byte) (Order, bool) {
	for _, o := range Orders {
		if o[0] == key {
			return o, true
		}
	}
	return "", false
}

// Sort orders destinations. Equal ones keep their order.
func Sort(list []live.Destination, by Order) {
	sort.SliceStable(list, func(i, j int) bool {
		a, b := &list[i], &list[j]
		switch by {
		case ByTotal:
			return a.Flows > b.Flows
		case ByErrors:
			return a.Errors > b.Errors
		case ByP99:
			return a.P99MS > b.P99MS
		case ByBytes:
			return a.Bytes > b.Bytes
		case ByName:
			return a.Name < b.Name
		}
		return a.FlowsPerSecond > b.FlowsPerSecond
	})
}

// Fit is the room that a table has.
type Fit struct {
	Columns, Rows int   // 0: no limit
	Sorted        Order // the order of the rows, for the heading
	Keys          bool  // show a line with the keys
}

// topColumn is a column of Top. If the terminal is too narrow, columns are dropped, those with the highest drop first; 0
// is never dropped.
type topColumn struct {
	order  Order // the column is emphasised if the rows are sorted by it
	title  string
	width  int
	drop   int
	value  func(*live.Counts) string
	colour func(*live.Counts) string
}

var topColumns = []topColumn{
	{ByRate, "PER S", 7, 0, func(c *live.Counts) string { return showRate(c.FlowsPerSecond) }, nil},
	{ByTotal, "TOTAL", 7, 1, func(c *live.Counts) string { return showCount(c.Flows) }, nil},
	{ByErrors, "SUCCESS", 7, 0, func(c *live.Counts) string { return showSuccess(c.Flows, c.Errors) }, func(c *live.Counts) string {
		if c.Errors > 0 {
			return red
		}
		return ""
	}},
	{"", "P50", 7, 4, func(c *live.Counts) string { return showMS(c.P50MS) }, nil},
	{"", "P95", 7, 5, func(c *live.Counts) string { return showMS(c.P95MS) }, nil},
	{ByP99, "P99", 7, 2, func(c *live.Counts) string { return showMS(c.P99MS) }, nil},
	{ByBytes, "BYTES", 6, 3, func(c *live.Counts) string { return showBytes(float64(c.Bytes)) }, nil},
}

const (
	longestName  = 48 // columns of a destination in an unlimited table
	shortestName = 16 // below it a column is dropped
)

// Top is the table of destinations, under the totals of the agent. It has at most fit.Rows lines of at most
// fit.Columns columns.
func Top(s *live.Snapshot, paint Painter, fit Fit) string {
	limit := fit.Columns
	if limit == 0 {
		limit = 1 << 20
	}
	var lines []string
	add := func(colour, text string) { lines = append(lines, paint.Paint(colour, cut(text, limit))) }
	add("", fmt.Sprintf("pillion %s%s, up %s, %d open", s.Version, podOf(s), showAge(s.UptimeSeconds), s.Open))
	add("", fmt.Sprintf("in %s/s, %s total; out %s/s, %s total; %s errors", showRate(s.Inbound.FlowsPerSecond), showCount(s.Inbound.Flows),
		showRate(s.Outbound.FlowsPerSecond), showCount(s.Outbound.Flows), showCount(s.Inbound.Errors+s.Outbound.Errors)))
	if len(s.Destinations) == 0 {
		add("", "no traffic yet")
	} else {
		lines = append(lines, topTable(s.Destinations, paint, fit, limit)...)
	}
	if fit.Keys {
		lines = append(lines, topKeys(paint, fit, limit))
	}
	if fit.Rows > 0 && len(lines) > fit.Rows {
		lines = lines[:fit.Rows]
	}
	return strings.Join(lines, "\n") + "\n"
}

func topTable(list []live.Destination, paint Painter, fit Fit, limit int) (lines []string) {
	rows := len(list)
	if fit.Rows > 0 {
		taken := 3 // the two lines above and the heading
		if fit.Keys {
			taken++
		}
		if rows > fit.Rows-taken {
			rows = max(0, fit.Rows-taken-1) // one for the line that counts the others
		}
	}
	columns, name := fitColumns(list, limit)
	line := func(direction, destination string, cell func(*topColumn) string) string {
		text := pad(direction, 3) + " " + pad(printable(destination), name)
		for i := range columns {
			text += " " + cell(&columns[i])
		}
		return text
	}
	lines = append(lines, paint.Paint(Bold, line("", "DESTINATION", func(c *topColumn) string {
		title := pad(c.title, -c.width)
		if c.order == fit.Sorted && c.order != "" && columnsOf(c.title) < c.width {
			title = pad("↓"+c.title, -c.width)
		}
		return title
	})))
	for _, d := range list[:rows] {
		lines = append(lines, line(shortDirection(d.Direction), d.Name, func(c *topColumn) string {
			colour := ""
			if c.colour != nil {
				colour = c.colour(&d.Counts)
			}
			return paint.Paint(colour, pad(c.value(&d.Counts), -c.width))
		}))
	}
	if rows < len(list) {
		lines = append(lines, cut(fmt.Sprintf("and %d more", len(list)-rows), limit))
	}
	return lines
}

// fitColumns returns the columns that the limit has room for, and the width of the name.
func fitColumns(list []live.Destination, limit int) (columns []topColumn, name int) {
	longest := len("DESTINATION")
	for _, d := range list {
		longest = min(longestName, max(longest, columnsOf(printable(d.Name))))
	}
	columns = slices.Clone(topColumns)
	for {
		name = limit - len("out ")
		worst := 0
		for i := range columns {
			name -= 1 + columns[i].width
			if columns[i].drop > columns[worst].drop {
				worst = i
			}
		}
		if name >= min(longest, shortestName) || columns[worst].drop == 0 {
			return columns, max(0, min(name, longest))
		}
		columns = slices.Delete(columns, worst, worst+1)
	}
}

// topKeys lists the keys, with the order in force emphasised.
func topKeys(paint Painter, fit Fit, limit int) string {
	text, used := "", 0
	add := func(colour, word string) {
		if used+columnsOf(word) <= limit {
			text += paint.Paint(colour, word)
			used += columnsOf(word)
		}
	}
	add(Faint, "q quit; sort by")
	for _, o := range Orders {
		colour := Faint
		if o == fit.Sorted {
			colour = Bold
		}
		add(colour, fmt.Sprintf("  %c %s", o[0], o))
	}
	return text
}

func shortDirection(direction string) string {
	return strings.TrimSuffix(direction, "bound")
}

// podOf is the name of the agent's pod for a heading, if it is known.
func podOf(s *live.Snapshot) string {
	if name := s.PodName(); name != "" {
		return ", pod " + printable(name)
	}
	return ""
}

const topReasons = 5

// Status is an agent's state on one screen. Totals are since the start, so that one request is visible after its rate is 0.
func Status(s *live.Snapshot, paint Painter) string {
	var text strings.Builder
	row := func(name, format string, values ...any) {
		fmt.Fprintf(&text, "%-12s %s\n", name, fmt.Sprintf(format, values...))
	}
	row("pillion", "%s%s, up %s", s.Version, podOf(s), showAge(s.UptimeSeconds))
	if s.Ready {
		row("ready", "%s", paint.Paint(green, "yes"))
	} else {
		row("ready", "%s", paint.Paint(red, "no"))
		for _, gate := range s.Gates {
			if !gate.Open {
				row("", "%s: %s", gate.Name, gate.Why)
			}
		}
	}
	if s.ControlPlane != nil {
		planeStatus(row, s.ControlPlane, paint)
	}
	in, out := &s.Inbound, &s.Outbound
	row("connections", "%d open; %d in, %d out in total; new per second: %s in, %s out", s.Open, in.Connections, out.Connections,
		showRate(in.ConnectionsPerSecond), showRate(out.ConnectionsPerSecond))
	row("requests", "%d in, %d out in total; per second: %s in, %s out", in.Requests, out.Requests,
		showRate(in.RequestsPerSecond), showRate(out.RequestsPerSecond))
	row("latency", "in %s p50, %s p99; out %s p50, %s p99", showMS(in.P50MS), showMS(in.P99MS), showMS(out.P50MS), showMS(out.P99MS))
	failed, flows := in.ErrorsPerSecond+out.ErrorsPerSecond, in.FlowsPerSecond+out.FlowsPerSecond
	share, colour := 0.0, ""
	if failed > 0 {
		share, colour = 100*failed/flows, red
	}
	row("errors", "%d of %d that ended; now %s, %s per second", in.Errors+out.Errors, in.Flows+out.Flows,
		paint.Paint(colour, fmt.Sprintf("%.1f%%", share)), showRate(failed))
	for i, reason := range s.Reasons {
		if i == topReasons {
			row("", "and %d other reasons", len(s.Reasons)-topReasons)
			break
		}
		row("", "%6d %s: %s", reason.Count, reason.Reason, reason.Text)
	}
	return text.String()
}

// planeStatus prints the session with the control plane and the workload's identity.
func planeStatus(row func(name, format string, values ...any), c *live.ControlPlane, paint Painter) {
	server := ""
	if c.Server != "" {
		server = " (" + printable(c.Server) + ")"
	}
	switch {
	case c.Connected:
		row("istiod", "%s%s, %s for %s", printable(c.Address), server, paint.Paint(green, "connected"), showAge(c.SinceSeconds))
	case c.SinceSeconds > 0:
		row("istiod", "%s%s, %s for %s: %s", printable(c.Address), server, paint.Paint(red, "not connected"), showAge(c.SinceSeconds), printable(c.Why))
	default:
		row("istiod", "%s, connecting", printable(c.Address))
	}
	var held []string
	for _, t := range c.Types {
		held = append(held, fmt.Sprintf("%d %s", t.Resources, printable(t.Type)))
	}
	if len(held) > 0 {
		row("", "%s; the last push was %s ago", strings.Join(held, ", "), showAge(c.PushAgeSeconds))
	}
	if text := pushVersions(c.Types); text != "" {
		row("", "%s", text)
	}
	for _, t := range c.Types {
		if t.Error != "" {
			row("", "%s: %s", paint.Paint(red, printable(t.Type)+" rejected"), printable(t.Error))
		}
	}
	if all := c.SecurityFindings + c.Unenforced + c.TrafficFindings + c.CosmeticFindings; all > 0 {
		row("findings", "%d security, %d unenforced, %d traffic, %d cosmetic", c.SecurityFindings, c.Unenforced, c.TrafficFindings, c.CosmeticFindings)
	}
	for _, listener := range c.Unbound {
		row("", "%s: %s", paint.Paint(red, "not accepting"), printable(listener))
	}
	identityStatus(row, c.Identity, paint)
}

// pushVersions returns the versions of the last pushes, each with its types.
func pushVersions(types []live.PushType) string {
	var versions []string
	of := map[string][]string{}
	for _, t := range types {
		if t.Version == "" {
			continue
		}
		if of[t.Version] == nil {
			versions = append(versions, t.Version)
		}
		of[t.Version] = append(of[t.Version], t.Type)
	}
	for i, version := range versions {
		versions[i] = "version " + printable(version) + " of " + printable(strings.Join(of[version], ", "))
	}
	return strings.Join(versions, "; ")
}

func identityStatus(row func(name, format string, values ...any), i *live.Identity, paint Painter) {
	switch {
	case i == nil:
		return
	case i.SPIFFE == "":
		row("identity", "%s from the %s: %s", paint.Paint(red, "none yet"), printable(i.Source), printable(i.Why))
		return
	case i.ExpiresSeconds <= 0:
		row("identity", "%s, %s %s ago", printable(i.SPIFFE), paint.Paint(red, "expired"), showAge(-i.ExpiresSeconds))
	default:
		row("identity", "%s, expires in %s, %d received from the %s", printable(i.SPIFFE), showAge(i.ExpiresSeconds), i.Renewals, printable(i.Source))
	}
	if i.Why != "" {
		row("", "%s: %s", paint.Paint(red, "not renewed"), printable(i.Why))
	}
	for _, problem := range i.Problems {
		row("", "%s", paint.Paint(red, printable(problem)))
	}
}

// narrow is the width below which a record has shorter columns.
const narrow = 110

// Record is one line about a record: in columns if aligned, otherwise with single blanks between the words. It is cut to a
// number of columns unless that is 0. The reason of a failure is never cut in favour of the path.
func Record(r *live.Record, paint Painter, aligned bool, columns int) string {
	clock, direction, hostWidth := "15:04:05.000", r.Direction, 28
	slim := aligned && columns > 0 && columns < narrow
	if slim {
		clock, direction, hostWidth = "15:04:05", shortDirection(r.Direction), 20
	}
	column := func(text string, width int) string {
		if aligned {
			return pad(printable(text), width)
		}
		return printable(text)
	}
	colour := recordColour(r)
	status := "-"
	if r.Status != 0 {
		status = strconv.Itoa(r.Status)
	}
	host := r.Authority
	if host == "" {
		host = r.Destination
	}
	type word struct{ colour, text string }
	words := []word{{Faint, r.Time.Local().Format(clock)}, {"", column(direction, len("outbound"))}, {colour, column(status, 3)},
		{"", column(showMS(r.DurationMS), -7)}, {"", column(showBytes(float64(r.Received+r.Sent)), -6)}, {"", column(host, hostWidth)}}
	if slim {
		words[1].text = column(direction, len("out"))
		words = slices.Delete(words, 4, 5) // the bytes
	}
	reason := ""
	if r.Failed {
		reason = strings.TrimSpace(r.Reason + " " + r.Flags)
	}
	what := printable(whatOf(r))
	if columns > 0 {
		room := columns
		for _, w := range words {
			room -= columnsOf(w.text) + 1
		}
		if reason != "" {
			room -= columnsOf(reason) + 1
		}
		what = cut(what, max(0, room))
	}
	words = append(words, word{"", what}, word{colour, reason})
	var line []string
	left := columns
	for _, w := range words {
		if columns > 0 {
			w.text = cut(w.text, left)
			left -= columnsOf(w.text) + 1
		}
		if w.text != "" {
			line = append(line, paint.Paint(w.colour, w.text))
		}
	}
	return strings.Join(line, " ")
}

// Policies returns the explanation of a denial, each line of it indented and after a line break.
func Policies(r *live.Record) string {
	text := ""
	for line := range strings.Lines(r.Policies) {
		text += "\n    " + printable(strings.TrimSuffix(line, "\n"))
	}
	return text
}

func recordColour(r *live.Record) string {
	switch {
	case r.Failed:
		return red
	case r.Status >= 400:
		return yellow
	case r.Status != 0:
		return green
	}
	return ""
}

// whatOf is a request's method and path, or a connection's protocol and server name, and in a mesh the cluster that it was
// sent to, the route that chose it, and the endpoint.
func whatOf(r *live.Record) string {
	what := r.Protocol
	switch {
	case r.Request:
		what = r.Method + " " + r.Path
	case r.SNI != "":
		what += " " + r.SNI
	}
	if strings.HasPrefix(r.Cluster, r.Direction+"|") && r.Direction == "outbound" {
		what += " → " + strings.Join(filled(r.Cluster, prefixed("route ", r.Route), r.Upstream), ", ")
	}
	if r.DryRun != "" {
		what += " (dry run: " + r.DryRun + ")"
	}
	return what
}
