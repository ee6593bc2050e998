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
	var got strings.Builder
	for _, family := range m.Gather() {
		if strings.HasPrefix(family.Name, "go_") {
			continue
		}
		var labels []string
		for _, metric := range family.Metrics {
			for _, l := range metric.Labels {
				if !slices.Contains(labels, l.Name) {
					labels = append(labels, l.Name)
				}
			}
		}
		fmt.Fprintln(&got, strings.TrimSpace(family.Name+" "+string(family.Type)+" "+strings.Join(labels, " ")))
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
