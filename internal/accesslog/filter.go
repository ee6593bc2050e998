package accesslog

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Filter selects the records that are logged. The zero value selects all.
type Filter struct{ groups []group }

// group is a set of terms that must all hold. Terms that were not given are zero.
type group struct {
	errors    bool
	statuses  []statusRange
	slower    time.Duration
	slow      bool // slower was given
	direction string
	sample    float64 // the share that is selected; 0: not given
}

type statusRange struct{ low, high int }

// ParseFilter reads groups of terms:
//
//	errors; status=404|5xx, slower=250ms; sample=1%
//
// Semicolons separate groups, commas separate the terms of a group. A record is logged if at least one group matches. A
// group matches if all of its terms hold:
//
//	errors              it counts as an error: see flow.Record.Failure
//	status=404|5xx|400-499
//	                    the status is one of these; connections have status 0
//	slower=250ms        the duration is at least this long
//	direction=inbound   or outbound
//	sample=1%           chosen at random, one in a hundred
//
// So "errors; sample=1%" logs every error and one in a hundred of the rest. An empty text selects all records.
//
// The same rules apply to lines of open connections. An open connection is not an error, has status 0, and its duration is
// its age.
func ParseFilter(text string) (Filter, error) {
	var f Filter
	if strings.TrimSpace(text) == "" {
		return f, nil
	}
	for part := range strings.SplitSeq(text, ";") {
		var g group
		seen := make(map[string]bool)
		for term := range strings.SplitSeq(part, ",") {
			kind, value, _ := strings.Cut(strings.TrimSpace(term), "=")
			if seen[kind] {
				return Filter{}, fmt.Errorf("access log filter: %q has %s twice; separate alternatives by a semicolon", strings.TrimSpace(part), kind)
			}
			seen[kind] = true
			if err := g.parse(kind, value); err != nil {
				return Filter{}, fmt.Errorf("access log filter: term %q: %w", strings.TrimSpace(term), err)
			}
		}
		f.groups = append(f.groups, g)
	}
	return f, nil
}

func (g *group) parse(kind, value string) (err error) {
	switch kind {
	case "errors":
		if g.errors = true; value != "" {
			return fmt.Errorf("errors takes no value")
		}
	case "status":
		for one := range strings.SplitSeq(value, "|") {
			s, err := parseStatus(one)
			if err != nil {
				return err
			}
			g.statuses = append(g.statuses, s)
		}
	case "slower":
		g.slow = true
		if g.slower, err = time.ParseDuration(value); err != nil || g.slower < 0 {
			return fmt.Errorf("%q is not a duration; write slower=250ms", value)
		}
	case "direction":
		if g.direction = value; value != flow.Inbound.String() && value != flow.Outbound.String() {
			return fmt.Errorf("%q is not a direction; write direction=inbound or direction=outbound", value)
		}
	case "sample":
		number, percent := strings.CutSuffix(value, "%")
		share, err := strconv.ParseFloat(number, 64)
		if g.sample = share / 100; err != nil || !percent || !(share > 0 && share <= 100) {
			return fmt.Errorf("%q is not a share; write sample=10%%, more than 0%% and at most 100%%", value)
		}
	default:
		return fmt.Errorf("unknown term; use errors, status=5xx, slower=250ms, direction=inbound or sample=10%%; a comma means and, a semicolon or")
	}
	return nil
}

// parseStatus reads 404, 5xx or 400-499.
func parseStatus(text string) (statusRange, error) {
	low, high, isRange := strings.Cut(text, "-")
	if class, isClass := strings.CutSuffix(text, "xx"); isClass && !isRange {
		low, high, isRange = class+"00", class+"99", true
	}
	if !isRange {
		high = low
	}
	first, err1 := strconv.ParseUint(low, 10, 10)
	last, err2 := strconv.ParseUint(high, 10, 10)
	if err1 != nil || err2 != nil || first > last || last > 999 {
		return statusRange{}, fmt.Errorf("%q is not a status; write status=404, status=5xx or status=400-499, and | between several", text)
	}
	return statusRange{int(first), int(last)}, nil
}

// match reports whether a record that lasted this long is logged.
func (f *Filter) match(r *flow.Record, lasted time.Duration) bool {
	for i := range f.groups {
		if f.groups[i].match(r, lasted) {
			return true
		}
	}
	return len(f.groups) == 0
}

func (g *group) match(r *flow.Record, lasted time.Duration) bool {
	return (!g.errors || r.Failure() != "") &&
		(g.statuses == nil || g.hasStatus(r.HTTP.Status)) &&
		(!g.slow || lasted >= g.slower) &&
		(g.direction == "" || g.direction == r.Direction.String()) &&
		(g.sample == 0 || rand.Float64() < g.sample)
}

func (g *group) hasStatus(status int) bool {
	for _, s := range g.statuses {
		if s.low <= status && status <= s.high {
			return true
		}
	}
	return false
}
