package terminal

import (
	"fmt"
	"strings"

	"github.com/pillion-proxy/pillion/internal/configview"
)

// Explanation prints the steps of a request. Of the routes that do not match it prints those whose paths do, because they
// came close, unless all is set.
func Explanation(e *configview.Explanation, all bool, paint Painter) string {
	p := &page{paint: paint, detailed: true}
	p.text.WriteString(paint.Paint(Bold, printable(e.Request)) + "\n")
	colour := green
	if !strings.HasPrefix(e.Result, "sent") && !strings.HasPrefix(e.Result, "carried") {
		colour = red
	}
	fmt.Fprintf(&p.text, "  %-12s %s\n", "result", paint.Paint(colour, printable(e.Result)))
	p.fact("destination", e.Destination+", "+e.Direction)
	p.found("listener", e.Listener)
	if c := e.Chain; c != nil {
		p.fact("chain", strings.Join(filled(c.Name, c.Match, prefixed("TLS ", c.TLS), shortOrigin(c.Origin)), ", "))
	}
	for i := range e.Verdicts {
		p.verdict(&e.Verdicts[i])
	}
	p.fact("routes", e.Table)
	p.found("host", e.VirtualHost)
	p.tried(e.Tried, all)
	if r := e.Route; r != nil {
		p.fact("route", strings.Join(filled(r.Name, r.Match, shortOrigin(r.Origin)), ", "))
		p.fact("to", strings.Join(filled(r.To, r.With), "; "))
	}
	p.fact("sent as", e.SentAs)
	p.fact("timeouts", e.Timeouts)
	p.fact("retries", e.Retries)
	for i := range e.Clusters {
		p.target(&e.Clusters[i])
	}
	return p.text.String()
}

// filled returns the texts that are not empty.
func filled(texts ...string) (list []string) {
	for _, text := range texts {
		if text != "" {
			list = append(list, text)
		}
	}
	return list
}

func prefixed(prefix, text string) string {
	if text == "" {
		return ""
	}
	return prefix + text
}

func (p *page) found(name string, f *configview.Found) {
	if f != nil {
		p.fact(name, f.Name+": "+f.Why)
	}
}

func (p *page) verdict(v *configview.Verdict) {
	colour := ""
	if v.Verdict == "denied" {
		colour = red
	}
	fmt.Fprintf(&p.text, "  %-12s %s\n", "policy", p.paint.Paint(colour, printable(v.Name+": "+v.Verdict)))
	for _, reason := range v.Reasons {
		p.fact("", reason)
	}
}

// tried prints the routes that do not match. The others are counted.
func (p *page) tried(list []configview.Tried, all bool) {
	left := 0
	for i := range list {
		t := &list[i]
		if !t.Close && !all {
			left++
			continue
		}
		p.fact("not", strings.Join(filled(t.Name, t.Match, shortOrigin(t.Origin)), ", ")+": "+t.Why)
	}
	switch {
	case left == 1:
		p.fact("not", "1 route for another path; --all lists it")
	case left > 1:
		p.fact("not", fmt.Sprintf("%d routes for other paths; --all lists them", left))
	}
}

func (p *page) target(t *configview.Target) {
	object := t.Cluster
	if t.Share != "" {
		object.Name += " (" + t.Share + ")"
	}
	if t.SNI != "" {
		object.TLS += ", SNI " + t.SNI
	}
	p.cluster(&object)
}
