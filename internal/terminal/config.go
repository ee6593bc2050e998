package terminal

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/configview"
)

// Config prints objects of a control plane: one line for each, or all of what is known of them if they are few enough to
// have been asked for by name.
func Config(v *configview.View, detailed bool, paint Painter) string {
	if v.Len() == 0 {
		return fmt.Sprintf("no %s\n", v.Kind.Plural())
	}
	p := &page{paint: paint, detailed: detailed}
	switch v.Kind {
	case configview.Clusters:
		p.clusters(v.Clusters)
	case configview.Listeners:
		p.listeners(v.Listeners)
	case configview.Routes:
		p.routes(v.Routes)
	case configview.Endpoints:
		p.endpoints(v.Endpoints)
	case configview.Policies:
		p.policies(v.Policies)
	case configview.Names:
		p.names(v.Names)
	}
	return p.text.String()
}

// shortOrigin returns "kind name.namespace" of istiod's /apis/GROUP/VERSION/namespaces/NAMESPACE/KIND/NAME.
func shortOrigin(path string) string {
	parts := strings.Split(path, "/")
	if len(parts) != 8 || parts[1] != "apis" || parts[4] != "namespaces" {
		return path
	}
	return parts[6] + " " + parts[7] + "." + parts[5]
}

// Findings prints what is not honoured, the most important first.
func Findings(list []configview.Finding, paint Painter) string {
	if len(list) == 0 {
		return "no findings: everything that the control plane configured is honoured\n"
	}
	p := &page{paint: paint}
	t := p.table("CLASS", "TYPE", "RESOURCE", "PATH", "PROBLEM", "ORIGIN")
	for _, f := range list {
		t.row(f.Class, f.Type, f.Resource, f.Path, f.Problem, shortOrigin(f.Origin))
		t.colour(classColours[f.Class])
	}
	t.write()
	return p.text.String()
}

var classColours = map[string]string{"security": red, "traffic": yellow, "cosmetic": Faint}

// page collects text.
type page struct {
	text     strings.Builder
	paint    Painter
	detailed bool
}

// table collects rows. The columns are as wide as their longest cell; those without any value are left out.
type table struct {
	page    *page
	rows    [][]string
	colours []string
}

func (p *page) table(titles ...string) *table {
	return &table{page: p, rows: [][]string{titles}, colours: []string{Bold}}
}

func (t *table) row(cells ...string) {
	for i := range cells {
		cells[i] = printable(cells[i])
	}
	t.rows, t.colours = append(t.rows, cells), append(t.colours, "")
}

// colour sets the colour of the last row.
func (t *table) colour(colour string) { t.colours[len(t.colours)-1] = colour }

func (t *table) write() {
	widths := make([]int, len(t.rows[0]))
	for _, row := range t.rows[1:] {
		for i, cell := range row {
			widths[i] = max(widths[i], columnsOf(cell))
		}
	}
	for i, title := range t.rows[0] {
		if widths[i] > 0 {
			widths[i] = max(widths[i], columnsOf(title))
		}
	}
	for i, row := range t.rows {
		var cells []string
		for column, cell := range row {
			if widths[column] > 0 {
				cells = append(cells, pad(cell, widths[column]))
			}
		}
		line := strings.TrimRight(strings.Join(cells, "  "), " ")
		t.page.text.WriteString(t.page.paint.Paint(t.colours[i], line) + "\n")
	}
}

// fact prints one line of details, unless the value is empty.
func (p *page) fact(name, value string) {
	if value != "" {
		fmt.Fprintf(&p.text, "  %-12s %s\n", name, printable(value))
	}
}

var stateColours = map[configview.State]string{configview.Refused: red, configview.Stale: yellow, configview.Warming: yellow}

// head prints an object's name and state, and what all objects have.
func (p *page) head(o *configview.Object) {
	if p.text.Len() > 0 {
		p.text.WriteByte('\n')
	}
	p.text.WriteString(p.paint.Paint(Bold, printable(o.Name)) + "\n")
	fmt.Fprintf(&p.text, "  %-12s %s\n", "state", p.paint.Paint(stateColours[o.State], string(o.State)))
	p.fact("refused", o.Refusal)
	if !o.Updated.IsZero() {
		p.fact("version", fmt.Sprintf("%s, of %s", o.Version, o.Updated.Local().Format(time.DateTime)))
	}
	p.fact("origin", shortOrigin(o.Origin))
}

// findings prints an object's findings below its other details.
func (p *page) findings(list []configview.Finding) {
	for _, f := range list {
		text := f.Class + ": " + f.Problem
		if f.Path != "" {
			text = f.Class + ": " + f.Path + ": " + f.Problem
		}
		if f.Origin != "" {
			text += " (" + shortOrigin(f.Origin) + ")"
		}
		fmt.Fprintf(&p.text, "  %-12s %s\n", "finding", p.paint.Paint(classColours[f.Class], printable(text)))
	}
}

// remark is the last cell of an object's line: its state unless it is active, and the number of its findings.
func remark(o *configview.Object) string {
	var parts []string
	switch o.State {
	case configview.Active:
	case configview.Stale:
		parts = append(parts, "later version refused")
	default:
		parts = append(parts, string(o.State))
	}
	switch n := len(o.Findings); {
	case n == 1:
		parts = append(parts, "1 finding")
	case n > 1:
		parts = append(parts, fmt.Sprintf("%d findings", n))
	}
	return strings.Join(parts, ", ")
}

func (p *page) clusters(list []configview.Cluster) {
	t := p.table("CLUSTER", "DISCOVERY", "HEALTHY", "TLS", "BALANCING", "REMARK")
	for i := range list {
		c := &list[i]
		if p.detailed {
			p.cluster(c)
			continue
		}
		healthy := fmt.Sprintf("%d/%d", c.Healthy, c.Endpoints)
		if c.Endpoints == 0 && c.Discovery != "EDS" { // it has no list of hosts
			healthy = "-"
		}
		t.row(c.Name, c.Discovery, healthy, c.TLS, c.Balancing, remark(&c.Object))
		t.colour(stateColours[c.State])
	}
	if !p.detailed {
		t.write()
	}
}

func (p *page) cluster(c *configview.Cluster) {
	p.head(&c.Object)
	p.fact("discovery", c.Discovery)
	p.fact("balancing", c.Balancing)
	p.fact("TLS", c.TLS)
	p.fact("HTTP", c.HTTP)
	p.fact("connect", c.ConnectTimeout)
	p.fact("limits", c.Limits)
	p.fact("outliers", c.Outliers)
	p.findings(c.Findings)
	p.fact("endpoints", fmt.Sprintf("%d of %d healthy", c.Healthy, c.Endpoints))
	for _, h := range c.Hosts {
		words := []string{h.Address, h.Health, fmt.Sprintf("weight %d", h.Weight)}
		switch {
		case h.Load != "" && h.Load != "100%":
			words = append(words, fmt.Sprintf("priority %d with %s", h.Priority, h.Load))
		case h.Priority > 0:
			words = append(words, fmt.Sprintf("priority %d", h.Priority))
		}
		if h.Panic {
			words = append(words, "in a panic")
		}
		if h.Active > 0 {
			words = append(words, fmt.Sprintf("%d active", h.Active))
		}
		if h.MeshTLS {
			words = append(words, "mesh TLS")
		}
		for _, word := range []string{h.Locality, h.Workload} {
			if word != "" {
				words = append(words, word)
			}
		}
		fmt.Fprintf(&p.text, "    %s\n", p.paint.Paint(healthColour(h), printable(strings.Join(words, ", "))))
	}
}

func healthColour(e configview.Endpoint) string {
	if e.Usable || e.Panic {
		return ""
	}
	return red
}

func (p *page) listeners(list []configview.Listener) {
	t := p.table("LISTENER", "ADDRESS", "DIRECTION", "MATCH", "TLS", "TO", "REMARK")
	for i := range list {
		l := &list[i]
		if p.detailed {
			p.listener(l)
			continue
		}
		name, address, direction := l.Name, strings.Join(l.Addresses, " "), l.Direction
		if len(l.Chains) == 0 {
			t.row(name, address, direction, "", "", "", remark(&l.Object))
			t.colour(stateColours[l.State])
		}
		for j, chain := range l.Chains {
			note := remark(&l.Object)
			if j > 0 {
				name, address, direction, note = "", "", "", ""
			}
			if chain.Refused {
				note = strings.TrimPrefix(note+", closed", ", ")
			}
			t.row(name, address, direction, chain.Match, chain.TLS, chain.To, note)
			if t.colour(stateColours[l.State]); chain.Refused {
				t.colour(red)
			}
		}
	}
	if !p.detailed {
		t.write()
	}
}

func (p *page) listener(l *configview.Listener) {
	p.head(&l.Object)
	p.fact("address", strings.Join(l.Addresses, " "))
	p.fact("direction", l.Direction)
	if !l.Bound {
		p.fact("socket", "none: connections come by their original destination")
	}
	p.findings(l.Findings)
	for _, chain := range l.Chains {
		title := "  chain " + printable(chain.Match)
		if chain.Refused {
			title = p.paint.Paint(red, title+": its connections are closed")
		}
		p.text.WriteString(title + "\n")
		for _, fact := range [][2]string{{"name", chain.Name}, {"TLS", chain.TLS}, {"filters", strings.Join(chain.Filters, ", ")}, {"to", chain.To}, {"origin", shortOrigin(chain.Origin)}} {
			if fact[1] != "" {
				fmt.Fprintf(&p.text, "    %-10s %s\n", fact[0], printable(fact[1]))
			}
		}
	}
}

func (p *page) routes(list []configview.Table) {
	t := p.table("TABLE", "DOMAINS", "MATCH", "TO", "WITH", "ORIGIN", "REMARK")
	for i := range list {
		table := &list[i]
		if p.detailed {
			p.head(&table.Object)
			p.fact("listener", table.Listener)
			p.findings(table.Findings)
			p.hosts(table.Hosts)
			continue
		}
		p.routeRows(t, table)
	}
	if !p.detailed {
		t.write()
	}
}

func (p *page) routeRows(t *table, table *configview.Table) {
	name, note := table.Name, remark(&table.Object)
	row := func(cells ...string) {
		t.row(append(append([]string{name}, cells...), note)...)
		t.colour(stateColours[table.State])
		name, note = "", ""
	}
	if len(table.Hosts) == 0 {
		row("", "", "answer 404", "", "")
	}
	for _, host := range table.Hosts {
		domains := shortDomains(host.Domains)
		if len(host.Routes) == 0 {
			row(domains, "", "answer 404", "", "")
		}
		for _, r := range host.Routes {
			if r.Refused {
				note = strings.TrimPrefix(note+", refused", ", ")
			}
			row(domains, r.Match, r.To, r.With, shortOrigin(r.Origin))
			if domains = ""; r.Refused {
				t.colour(red)
			}
		}
	}
}

// shortDomains is the first domain and the number of the others. istiod puts the full name first.
func shortDomains(domains []string) string {
	if len(domains) < 2 {
		return strings.Join(domains, "")
	}
	return fmt.Sprintf("%s +%d", domains[0], len(domains)-1)
}

func (p *page) hosts(list []configview.Host) {
	for _, host := range list {
		p.text.WriteString("  host " + printable(host.Name) + "\n")
		fmt.Fprintf(&p.text, "    %-10s %s\n", "domains", printable(strings.Join(host.Domains, " ")))
		if host.TLS {
			fmt.Fprintf(&p.text, "    %-10s required\n", "TLS")
		}
		for _, r := range host.Routes {
			line := r.Match + " → " + r.To
			if r.With != "" {
				line += "; " + r.With
			}
			if r.Origin != "" {
				line += " (" + shortOrigin(r.Origin) + ")"
			}
			colour := ""
			if r.Refused {
				line, colour = line+": refused", red
			}
			fmt.Fprintf(&p.text, "    %s\n", p.paint.Paint(colour, printable(line)))
		}
	}
}

func (p *page) endpoints(list []configview.Endpoint) {
	t := p.table("ENDPOINT", "HEALTH", "WEIGHT", "PRIORITY", "MESH TLS", "LOCALITY", "WORKLOAD", "CLUSTER")
	prioritized := slices.ContainsFunc(list, func(e configview.Endpoint) bool { return e.Priority > 0 })
	for _, e := range list {
		priority, tls := "", ""
		if prioritized {
			priority = fmt.Sprint(e.Priority)
		}
		if e.MeshTLS {
			tls = "yes"
		}
		t.row(e.Address, e.Health, fmt.Sprint(e.Weight), priority, tls, e.Locality, e.Workload, e.Cluster)
		t.colour(healthColour(e))
	}
	t.write()
}

func (p *page) policies(list []configview.Policy) {
	t := p.table("LISTENER", "CHAIN", "POLICY", "PER", "RULES", "REMARK")
	for _, policy := range list {
		note := ""
		if policy.Refused {
			note = "closed"
		}
		t.row(policy.Listener, policy.Chain, policy.Name, policy.Per, policy.Rules, note)
		if policy.Refused {
			t.colour(red)
		}
	}
	t.write()
}

func (p *page) names(list []configview.Name) {
	t := p.table("HOST", "ADDRESSES", "REGISTRY", "NAMESPACE", "SHORT NAME")
	for _, n := range list {
		t.row(n.Host, strings.Join(n.Addresses, " "), n.Registry, n.Namespace, n.ShortName)
	}
	t.write()
}
