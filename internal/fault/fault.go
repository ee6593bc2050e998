// Package fault decides which requests and connections get a fault on purpose, for tests of a program's own resilience. It does
// no I/O: the caller carries a Fault out.
package fault

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/egress"
)

// Rule is which hosts get which fault, and how often.
type Rule struct {
	host    egress.Rule // matched by name; a network by the address in the place of a name
	fault   Fault
	percent float64
}

// Fault is what happens to a request or a connection. The zero Fault does nothing.
type Fault struct {
	Delay time.Duration // before anything is sent on
	Abort int           // status of the reply in place of a request; 0: not aborted
	Rate  uint64        // bytes for each second in each direction; 0: not limited
	Reset bool          // the connection is reset; of HTTP/2, the request's stream
}

// Set is a list of rules. The first rule that matches and is drawn counts. It is never changed.
type Set []Rule

// Parse parses a rule such as "host=api.example,delay=200ms,rate=1MB/s,percent=10". host is a host, *.DOMAIN, an address or a
// network, and defaults to all; percent defaults to 100. At least one of delay, abort, rate and reset is required.
func Parse(text string) (Rule, error) {
	all, err := egress.ParseRule("*")
	if err != nil {
		return Rule{}, err
	}
	r := Rule{host: all, percent: 100}
	for item := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(item), "=")
		if err := r.set(name, value); err != nil {
			return Rule{}, fmt.Errorf("%.100q: %w", item, err)
		}
	}
	if r.fault == (Fault{}) {
		return Rule{}, errors.New("no fault is given: add delay=200ms, abort=503, rate=1MB/s or reset")
	}
	if ends := r.fault.Abort != 0; r.fault.Reset && ends || r.fault.Rate > 0 && (r.fault.Reset || ends) {
		return Rule{}, errors.New("abort, rate and reset exclude each other: use rules of their own, each with percent")
	}
	return r, nil
}

func (r *Rule) set(name, value string) (err error) {
	switch name {
	case "host":
		r.host, err = egress.ParseRule(value)
	case "delay":
		if r.fault.Delay, err = time.ParseDuration(value); err != nil || r.fault.Delay <= 0 {
			return errors.New("not a time span above zero, such as 200ms")
		}
	case "abort":
		if r.fault.Abort, err = strconv.Atoi(value); err != nil || r.fault.Abort < 200 || r.fault.Abort > 599 {
			return errors.New("not a status of HTTP from 200 to 599")
		}
	case "rate":
		if r.fault.Rate = parseRate(value); r.fault.Rate == 0 {
			return errors.New("not a rate such as 1MB/s or 64KiB/s, from 1B/s to 1TB/s")
		}
	case "reset":
		if value != "" {
			return errors.New("reset has no value")
		}
		r.fault.Reset = true
	case "percent":
		if r.percent, err = strconv.ParseFloat(value, 64); err != nil || !(r.percent > 0 && r.percent <= 100) {
			return errors.New("not a percentage above 0 and up to 100")
		}
	default:
		return errors.New("use host, delay, abort, rate, reset or percent")
	}
	return err
}

// units are those of rates, longer ones first.
var units = [...]struct {
	name  string
	bytes float64
}{
	{"KiB/s", 1 << 10}, {"MiB/s", 1 << 20}, {"GiB/s", 1 << 30}, {"KB/s", 1e3}, {"kB/s", 1e3}, {"MB/s", 1e6}, {"GB/s", 1e9}, {"B/s", 1},
}

// parseRate returns a rate in bytes for each second, or 0.
func parseRate(text string) uint64 {
	for _, unit := range units {
		if number, found := strings.CutSuffix(text, unit.name); found {
			n, err := strconv.ParseFloat(number, 64)
			if n *= unit.bytes; err != nil || !(n >= 1 && n <= 1e12) {
				return 0
			}
			return uint64(n)
		}
	}
	return 0
}

// Limits reports whether a fault of the set limits rates.
func (s Set) Limits() bool {
	return slices.ContainsFunc(s, func(r Rule) bool { return r.fault.Rate > 0 })
}

// Draw returns the fault of a request or a connection. It has a host and an address, with or without ports; a rule for either
// is for it.
func (s Set) Draw(host, address string) Fault { return s.draw(host, address, rand.Float64) }

func (s Set) draw(host, address string, random func() float64) Fault {
	for i := range s {
		if (s[i].host.Selects(host) || s[i].host.Selects(address)) && random()*100 < s[i].percent {
			return s[i].fault
		}
	}
	return Fault{}
}
