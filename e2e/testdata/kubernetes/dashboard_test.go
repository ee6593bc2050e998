package kubernetes

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
)

// dashboard has the fields of Grafana's model that are tested.
type dashboard struct {
	UID           string
	SchemaVersion int
	Panels        []struct {
		ID         int
		Type       string
		Title      string
		Datasource struct{ UID string }
		GridPos    struct{ X, Y, W, H int }
		Targets    []struct{ RefID, Expr, LegendFormat string }
	}
	Templating struct {
		List []struct {
			Name, Type, Definition, Regex string
			Query                         any
		}
	}
}

// targetLabels are the labels that Prometheus adds when it scrapes pods.
var targetLabels = []string{"namespace", "pod"}

// names returns the labels of each metric of the agent, and of each series of a histogram.
func names(t *testing.T) map[string][]string {
	t.Helper()
	all := make(map[string][]string)
	for line := range strings.Lines(read(t, "internal/metrics/testdata/names.golden")) {
		words := strings.Fields(line)
		name, kind, labels := words[0], words[1], append(words[2:], targetLabels...)
		if kind != "histogram" {
			all[name] = labels
			continue
		}
		all[name+"_count"], all[name+"_sum"], all[name+"_bucket"] = labels, labels, append(slices.Clone(labels), "le")
	}
	return all
}

func ours(t *testing.T) (d dashboard) {
	t.Helper()
	if err := json.Unmarshal([]byte(read(t, "deploy/grafana/pillion.json")), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestTheDashboardQueriesExistingMetrics(t *testing.T) {
	d := ours(t)
	if d.UID != "pillion" || d.SchemaVersion < 38 { // Grafana 10's
		t.Errorf("uid %q, schema %d", d.UID, d.SchemaVersion)
	}
	known, asked := names(t), make(map[string]bool)
	variables := []string{"__rate_interval"}
	for _, v := range d.Templating.List {
		query, isQuery := strings.CutPrefix(v.Definition, "label_values(")
		if isQuery {
			i := strings.LastIndex(query, ", ")
			metric, label := query[:i], strings.TrimSuffix(query[i+2:], ")")
			if full := v.Query.(map[string]any)["query"]; full != v.Definition {
				t.Errorf("variable %s queries %v, and its definition is %v", v.Name, full, v.Definition)
			}
			ask(t, "variable "+v.Name, metric, label, variables, known, asked)
		} else if v.Type != "datasource" {
			t.Errorf("variable %s is a %s", v.Name, v.Type)
		}
		if _, err := regexp.Compile(strings.Trim(v.Regex, "/")); err != nil {
			t.Errorf("variable %s: %v", v.Name, err)
		}
		variables = append(variables, v.Name)
	}
	for _, want := range []string{"datasource", "namespace", "workload", "pod"} {
		if !slices.Contains(variables, want) {
			t.Errorf("there is no variable %s", want)
		}
	}
	ids, places := make(map[int]bool), make(map[[2]int]string)
	for _, p := range d.Panels {
		if p.ID == 0 || ids[p.ID] {
			t.Errorf("%s: id %d is used twice", p.Title, p.ID)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if at := places[[2]int{x, y}]; at != "" || x > 23 {
					t.Fatalf("%s overlaps %q", p.Title, at)
				}
				places[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Datasource.UID != "${datasource}" || len(p.Targets) == 0 || p.Title == "" {
			t.Errorf("panel %d (%s) has no data source or no query", p.ID, p.Title)
		}
		refs := make(map[string]bool)
		for _, target := range p.Targets {
			if refs[target.RefID] {
				t.Errorf("%s: %s is used twice", p.Title, target.RefID)
			}
			refs[target.RefID] = true
			of := ask(t, p.Title, target.Expr, "", variables, known, asked)
			for _, m := range regexp.MustCompile(`{{(\w+)}}`).FindAllStringSubmatch(target.LegendFormat, -1) {
				if !slices.Contains(of, m[1]) {
					t.Errorf("%s: the legend has %s, the series only %v", p.Title, m[1], of)
				}
			}
		}
	}
	for name := range known {
		family := regexp.MustCompile(`_(count|sum|bucket)$`).ReplaceAllString(name, "")
		if strings.HasPrefix(name, "pillion_") && !asked[name] || strings.HasPrefix(name, "istio_") && !slices.ContainsFunc([]string{name, family + "_sum", family + "_bucket"}, func(n string) bool { return asked[n] }) {
			if !slices.Contains(notShown, name) {
				t.Errorf("no panel shows %s", name)
			}
		}
	}
}

// notShown are metrics for the diagnosis of one agent.
var notShown = []string{
	"pillion_dns_cache_bytes", "pillion_dns_cache_entries", "pillion_dns_connections", "pillion_dns_dropped_packets_total",
	"pillion_dns_early_queries_total", "pillion_dns_mesh_answers_total", "pillion_dns_mesh_hosts",
	"pillion_dns_joined_queries_total", "pillion_dns_malformed_queries_total", "pillion_dns_queries_open", "pillion_dns_upstream_strays_total",
}

// ask checks an expression and returns the labels by which its result is grouped. grouped is a label that it must have.
func ask(t *testing.T, what, text, grouped string, variables []string, known map[string][]string, asked map[string]bool) (by []string) {
	t.Helper()
	text = regexp.MustCompile(`\$(\w+)`).ReplaceAllStringFunc(text, func(variable string) string {
		if !slices.Contains(variables, variable[1:]) {
			t.Errorf("%s: there is no variable %s", what, variable)
		}
		if variable == "$__rate_interval" {
			return "5m"
		}
		return "(a|b)"
	})
	expression, err := parser.NewParser(parser.Options{}).ParseExpr(text)
	if err != nil {
		t.Errorf("%s: %s: %v", what, text, err)
		return nil
	}
	parser.Inspect(expression, func(node parser.Node, path []parser.Node) error {
		switch node := node.(type) {
		case *parser.VectorSelector:
			has, ok := known[node.Name]
			if !ok {
				t.Errorf("%s: the agent has no %s", what, node.Name)
			}
			asked[node.Name] = true
			for _, m := range node.LabelMatchers {
				if m.Name != "__name__" && !slices.Contains(has, m.Name) {
					t.Errorf("%s: %s has no label %s", what, node.Name, m.Name)
				}
			}
			for _, above := range path {
				if a, ok := above.(*parser.AggregateExpr); ok {
					for _, label := range a.Grouping {
						if !slices.Contains(has, label) {
							t.Errorf("%s: %s has no label %s", what, node.Name, label)
						}
					}
				}
			}
			if grouped != "" && !slices.Contains(has, grouped) {
				t.Errorf("%s: %s has no label %s", what, node.Name, grouped)
			}
			if rated := slices.ContainsFunc(path, func(n parser.Node) bool { _, ok := n.(*parser.MatrixSelector); return ok }); rated !=
				regexp.MustCompile(`_(total|sum|count|bucket)$|^envoy_.*_(fail|retry)$|^istio_agent_.*_(failures|terminations|requests)$`).MatchString(node.Name) {
				t.Errorf("%s: the rate of a gauge, or a counter itself: %s", what, node.Name)
			}
		case *parser.AggregateExpr:
			by = append(by, node.Grouping...)
		}
		return nil
	})
	return by
}

// Prometheus has the names of pods, and users select workloads: each is derived from the other.
func TestPodsAreFoundByTheirWorkload(t *testing.T) {
	definitions, regexes := map[string]string{}, map[string]string{}
	for _, v := range ours(t).Templating.List {
		definitions[v.Name], regexes[v.Name] = v.Definition, strings.Trim(v.Regex, "/")
	}
	workloadOf := regexp.MustCompile(regexes["workload"])
	_, podsOf, _ := strings.Cut(definitions["pod"], `pod=~"`)
	podsOf, _, _ = strings.Cut(podsOf, `"`)
	of := map[string]string{
		"web-6d4b75cb6d-hswz6": "web", "web-admin-6d4b75cb6d-hswz6": "web-admin", "web-7df8c6-x7k2p": "web", "db-0": "db", "db-12": "db",
		"node-agent-x7k2p": "node-agent", "one": "one", "alone-here": "alone-here",
	}
	for pod, want := range of {
		m := workloadOf.FindStringSubmatch(pod)
		if m == nil || m[1] != want {
			t.Fatalf("the workload of %s is %v, want %s", pod, m, want)
		}
		for other, workload := range of {
			found := regexp.MustCompile("^(?:" + strings.Replace(podsOf, "$workload", want, 1) + ")$").MatchString(other)
			if found != (workload == want) {
				t.Errorf("%s is a pod of %s: %v", other, want, found)
			}
		}
	}
}
