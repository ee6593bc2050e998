package agent

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

// programPages is how much of the program file is resident, in KiB.
func programPages(t *testing.T) (total int) {
	t.Helper()
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	ours := false
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		switch {
		case strings.Contains(fields[0], "-"):
			ours = fields[len(fields)-1] == program && fields[1][1] != 'w'
		case ours && fields[0] == "Rss:":
			n, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			total += n
		}
	}
	return total
}

func TestWhatOnlyTheStartNeededIsNotResident(t *testing.T) {
	before := programPages(t)
	if err := unmapStart(); err != nil {
		t.Fatal(err)
	}
	if after := programPages(t); after > before*3/4 {
		t.Errorf("%d KiB of the program are resident, %d before", after, before)
	}
}
