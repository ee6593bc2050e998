// Package fault decides which requests and connections get a fault on purpose, for tests of a program's own resilience. It does
// no I/O: the caller carries a Fault out.
package fault

import (
	"errors"
	"fmt"
	"math/rand/v2"
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
	Reset bool          // the connection is reset; of HTTP/2, the request's stream
}

// Set is a list of rules. The first rule that matches and is drawn counts. It is never changed.
type Set []Rule

// Parse parses a rule such as "host=api.example,delay=200ms,abort=503,percent=10". host is a host, *.DOMAIN, an address or a
// network, and defaults to all; percent defaults to 100. At least one of delay, abort and reset is required.
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
		return Rule{}, errors.New("no fault is given: add delay=200ms, abort=503 or reset")
	}
	if r.fault.Reset && r.fault.Abort != 0 {
		return Rule{}, errors.New("abort and reset exclude each other")
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
		return errors.New("use host, delay, abort, reset or percent")
	}
	return err
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
