package arch

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// ARCHITECTURE.md has the arrows of the table, without those of rooms that only tests import. A line may be for several
// rooms; it has the arrows of all of them.
func TestTheDocumentHasTheArrows(t *testing.T) {
	text, err := os.ReadFile("../../ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]string{}
	for _, arrow := range arrows {
		want[arrow.from] = arrow.to
	}
	for _, line := range documentedArrows(t, string(text)) {
		union := map[string]bool{}
		for _, from := range line.from {
			to, known := want[from]
			if !known {
				t.Errorf("ARCHITECTURE.md has arrows from %s, and the table has none", from)
			}
			for _, room := range to {
				union[room] = true
			}
			delete(want, from)
		}
		if table := slices.Sorted(maps.Keys(union)); !slices.Equal(table, line.to) {
			t.Errorf("ARCHITECTURE.md has %v → %v, the table %v", line.from, line.to, table)
		}
	}
	for from := range want {
		if !testRooms.MatchString(from) {
			t.Errorf("ARCHITECTURE.md has no arrows from %s", from)
		}
	}
}

// testRooms matches the rooms that only tests import.
var testRooms = regexp.MustCompile(`test$`)

type documented struct{ from, to []string }

// documentedArrows returns the lines of the block of arrows, with the paths of rooms in order.
func documentedArrows(t *testing.T, text string) (lines []documented) {
	t.Helper()
	_, text, ok := strings.Cut(text, "\n## Arrows\n")
	if !ok {
		t.Fatal("ARCHITECTURE.md has no section about arrows")
	}
	block := strings.Split(text, "```\n")[1]
	block = regexp.MustCompile(`\n +`).ReplaceAllString(strings.TrimSpace(block), " ")
	group := regexp.MustCompile(`([\w/]*)\{([^}]*)\}`)
	for line := range strings.SplitSeq(block, "\n") {
		left, right, _ := strings.Cut(line, "→")
		var d documented
		for name := range strings.SplitSeq(left, ",") {
			d.from = append(d.from, pathOf(strings.TrimSpace(name)))
		}
		for _, g := range group.FindAllStringSubmatch(right, -1) {
			for _, name := range strings.Fields(g[2]) {
				d.to = append(d.to, g[1]+name)
			}
		}
		d.to = append(d.to, strings.Fields(strings.ReplaceAll(group.ReplaceAllString(right, ""), "·", " "))...)
		slices.Sort(d.to)
		lines = append(lines, d)
	}
	return lines
}

// pathOf returns the path of a room that the document calls by the end of it.
func pathOf(name string) string {
	for _, arrow := range arrows {
		if arrow.from == name || arrow.from == "internal/"+name || arrow.from == "iptables/"+name {
			return arrow.from
		}
	}
	return name
}
