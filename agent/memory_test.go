package agent

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

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

func TestPagesThatOnlyTheStartNeededAreUnmapped(t *testing.T) {
	before := programPages(t)
	if err := unmapStart(); err != nil {
		t.Fatal(err)
	}
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
	if err := unmapStart(); err != nil {
		t.Fatal(err)
	}
	if page[0] != 0x80 {
		t.Errorf("the page begins with %#x, as in the file; 0x80 was written", page[0])
	}
}
