package agent

import (
	"log/slog"
	"math"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestTheBudgetIsAShareOfTheMemoryLimit(t *testing.T) {
	for _, c := range []struct {
		flag  int
		limit int64
		want  int
	}{
		{0, 115 << 20, 115 << 18}, {0, 4 << 30, 1 << 30}, {0, 16 << 20, 8 << 20}, {0, math.MaxInt64, 128 << 20},
		{5 << 20, 115 << 20, 5 << 20}, {500 << 20, math.MaxInt64, 500 << 20},
	} {
		if got := (HTTP{MaxHeldBytes: c.flag}).heldBytes(c.limit); got != c.want {
			t.Errorf("--max-held-bytes %d and a limit of %d: %d, want %d", c.flag, c.limit, got, c.want)
		}
	}
}

// programPages returns how much of the program file is resident, in KiB.
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

func TestPagesThatOnlyAPushNeededAreUnmapped(t *testing.T) {
	before := programPages(t)
	a := &Agent{log: slog.New(slog.DiscardHandler)}
	a.freeMemory()
	if after := programPages(t); after > before*3/4 {
		t.Errorf("%d KiB of the program are resident, %d before", after, before)
	}
}

// A loader relocates pages of a position-independent program before it makes them read-only.
func TestModifiedPagesOfTheProgramAreKept(t *testing.T) {
	program, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	page, err := unix.Mmap(int(program.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(page)
	page[0]++ // the first byte of the ELF header, 0x7f
	if err := unix.Mprotect(page, unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	if err := unmapProgram(); err != nil {
		t.Fatal(err)
	}
	if page[0] != 0x80 {
		t.Errorf("the page begins with %#x, as in the file; 0x80 was written", page[0])
	}
}
