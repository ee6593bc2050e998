package agent

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNameServersAreThoseOfTheFlagOrOfTheFile(t *testing.T) {
	here := filepath.Join(t.TempDir(), "resolv.conf")
	given := []netip.AddrPort{netip.MustParseAddrPort("198.51.100.53:5353")}
	for _, c := range []struct {
		name, text string
		given      []netip.AddrPort
		want       string // of the servers, or of the error
	}{
		{"the file's", "nameserver 192.0.2.53\n", nil, "[192.0.2.53:53]"},
		{"the flag's", "nameserver 192.0.2.53\n", given, "[198.51.100.53:5353]"},
		{"a file without any", "search example\n", nil, here + " names no server; set the servers to ask"},
	} {
		if err := os.WriteFile(here, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		a := &Agent{config: Config{DNS: DNS{Servers: c.given}}}
		servers, err := a.nameServers(here)
		got := fmt.Sprint(servers)
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	a := &Agent{}
	if _, err := a.nameServers(here + ".none"); err == nil || !strings.Contains(err.Error(), here) {
		t.Errorf("without a file: %v", err)
	}
}
