package metrics

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/dns"
)

// The golden file lists each family with its type and labels, without those of Go's runtime. A test of deploy compares the
// dashboard with it.
func TestNames(t *testing.T) {
	const golden = "testdata/names.golden"
	m := everything()
	m.sources.DNS = new(dns.Stats)
	families, err := m.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, family := range families {
		if strings.HasPrefix(family.GetName(), "go_") {
			continue
		}
		var labels []string
		for _, metric := range family.Metric {
			for _, l := range metric.Label {
				if !slices.Contains(labels, l.GetName()) {
					labels = append(labels, l.GetName())
				}
			}
		}
		fmt.Fprintln(&got, strings.TrimSpace(family.GetName()+" "+strings.ToLower(family.GetType().String())+" "+strings.Join(labels, " ")))
	}
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("differs from %s; go test ./internal/metrics -update writes it. Now:\n%s", golden, &got)
	}
}
