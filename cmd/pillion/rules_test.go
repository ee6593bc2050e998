package main

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares with the file of that name, or writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s changed; if that is meant, run the test with -update\ngot:\n%s\nwant:\n%s", file, got, want)
	}
}

// counted is what differs from run to run.
var counted = regexp.MustCompile(`("packets"|"bytes"): \d+`)

// The JSON output is an interface for programs and must not change.
func TestRulesAreReportedInTextAndJSON(t *testing.T) {
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	pod.MustRun(t, "iptables-nft", "-t", "nat", "-A", "OUTPUT", "-m", "ttl", "--ttl-eq", "7", "-j", "ACCEPT")
	if got := here(t, pod, "init", "-i", "*", "-b", "8080"); got.code != 0 {
		t.Fatalf("got %+v", got)
	}
	pod.MustRun(t, "iptables-nft", "-t", "nat", "-I", "PILLION_OUTPUT", "-d", "203.0.113.9/32", "-j", "RETURN")
	if got := here(t, pod, "rules", "show"); got.code != 0 || !strings.Contains(got.stdout,
		"\nipv4 nft nat OUTPUT\n    -m ttl --ttl-eq 7 -j ACCEPT  (0 packets, 0 bytes)\n      # not ours\n    -p tcp -j PILLION_OUTPUT  (0 packets, 0 bytes)\n") {
		t.Errorf("got %+v", got)
	}
	if got := here(t, pod, "rules", "show", "-i", "203.0.113.0/24"); got.code != 0 || !strings.Contains(got.stdout,
		"\n    -d 203.0.113.0/24 -j PILLION_REDIRECT\n      # outbound/network/203.0.113.0/24: this network is captured\n") {
		t.Errorf("got %+v", got)
	}
	for _, test := range []struct {
		name string
		args string
		code int
	}{
		{"show.json", "rules show --output json", 0},
		{"check", "rules check -i * -b 8080", 1},
		{"check.json", "rules check -i * -b 8080 --output json", 1},
		{"explain", "rules explain --uid 1000 --dst 198.51.100.7:443", 0},
		{"explain.json", "rules explain --uid 1000 --dst 203.0.113.9:443 --output json", 0},
		{"explain.inbound", "rules explain --from 203.0.113.9 --dst :8080", 0},
		{"explain.planned", "rules explain --from 2001:db8::9 --dst :8081 -b 8080", 0},
		{"explain.dns", "rules explain --uid 1000 --gid 5 --proto udp --dst 203.0.113.7:53 --mark 0x7 --redirect-dns --capture-all-dns", 0},
		{"explain.like", "rules explain --from 203.0.113.9 --dst :8080 --state invalid --like istio-iptables", 0},
	} {
		got := here(t, pod, strings.Split(test.args, " ")...)
		if got.code != test.code || got.stderr != "" {
			t.Errorf("%s: got %+v", test.args, got)
		}
		told := counted.ReplaceAllString(got.stdout, `$1: 0`)
		if test.name == "show.json" { // the rules have goldens of their own
			told = strings.Join(strings.SplitAfter(told, "\n")[:36], "")
		}
		golden(t, "rules/"+test.name, told)
	}
}

func TestACheckServesAsAProbe(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	before := state(t, ns)
	check := func(what string, code int, stdout string, args ...string) {
		t.Helper()
		got := here(t, ns, append([]string{"rules", "check"}, args...)...)
		if got.code != code || !strings.HasPrefix(got.stdout, stdout) || got.stderr != "" {
			t.Errorf("%s: got %+v", what, got)
		}
	}
	check("nothing there", 1, "no rules of pillion are installed: nothing is captured\n", "-i", "*")
	if after := state(t, ns); after != before {
		t.Errorf("looking changed something: before:\n%s\nafter:\n%s", before, after)
	}
	if got := pillion(t, ns, nil, nil, append([]string{"istio-iptables"}, injectorArguments...)...); got.code != 0 {
		t.Fatalf("got %+v", got)
	}
	check("by the same arguments, but with init's defaults", 1, "missing: ", injectorArguments...)
	check("by the same arguments", 0, "the rules match\n", append([]string{"--like", "istio-iptables"}, injectorArguments...)...)

	without := []string{"setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"}
	for command, code := range map[string]int{"check": 2, "show": 1, "explain --uid 1 --dst 127.0.0.1:80": 1} {
		got := pillion(t, ns, nil, without, append([]string{"rules"}, strings.Split(command, " ")...)...)
		if got.code != code || !strings.HasPrefix(got.stderr, "pillion: error: capability CAP_NET_ADMIN is missing") {
			t.Errorf("%s without rights: got %+v", command, got)
		}
	}
	elsewhere := nettest.New(t, "elsewhere")
	arguments := append([]string{"rules", "check", "--like", "istio-iptables"}, injectorArguments...)
	if got := pillion(t, elsewhere, []string{"NETWORK_NAMESPACE=" + ns.Path()}, nil, arguments...); got.code != 0 {
		t.Errorf("looking into another namespace: got %+v", got)
	}
	if got := pillion(t, elsewhere, []string{"NETWORK_NAMESPACE=" + ns.Path()}, nil, "rules", "show"); !strings.Contains(got.stdout, "PILLION_") {
		t.Errorf("looking into another namespace: got %+v", got)
	}
	if got := pillion(t, ns, nil, without, "rules", "explain", "--uid", "1", "--dst", "127.0.0.1:80", "-i", "*"); got.code != 0 {
		t.Errorf("what is planned needs no rights: got %+v", got)
	}
}

func TestABadQuestionEndsWithOneLine(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	for args, want := range map[string]string{
		"explain --dst 198.51.100.7:443":                                    "give either the sending user (--uid) or the remote sender (--from)",
		"explain --uid 0 --from 203.0.113.9 --dst :80":                      "give either the sending user (--uid) or the remote sender (--from)",
		"explain --uid 0":                                                   "give the destination: --dst 198.51.100.7:443",
		"explain --uid root --dst :80":                                      `invalid argument "root" for "--uid" flag: "root" is not a user or group: use a number such as 1000`,
		"explain --uid 0 --dst 198.51.100.7":                                `invalid argument "198.51.100.7" for "--dst" flag: "198.51.100.7" is not a destination: write address and port, such as 198.51.100.7:443 or [2001:db8::7]:443, or a port alone, such as :8080`,
		"explain --uid 0 --dst :0":                                          `invalid argument ":0" for "--dst" flag: "0" is not a port: use a number from 1 to 65535`,
		"explain --uid 0 --dst :80 --planned":                               "the destination has no address: write one such as 198.51.100.7:443; it is optional only with a sender",
		"explain --from 203.0.113 --dst :80":                                `invalid argument "203.0.113" for "--from" flag: "203.0.113" is not an address: write one such as 203.0.113.9 or 2001:db8::9`,
		"explain --from 203.0.113.9 --dst :80 --planned":                    "looking for the route to 203.0.113.9: network is unreachable; to explain without a route, give the interface and the addresses",
		"explain --uid 0 --src 203.0.113.9 --dst [::1]:80 -i * --iface lo0": "203.0.113.9 and ::1 are of different families",
		"explain --uid 0 --dst :80 --proto sctp":                            `invalid argument "sctp" for "--proto" flag: "sctp" is not a protocol: use tcp or udp`,
		"explain --uid 0 --dst :80 --state gone":                            `invalid argument "gone" for "--state" flag: "gone" is not a state: use new, established or invalid`,
		"show --like kuma":                                                  `invalid argument "kuma" for "--like" flag: use one of init, istio-iptables`,
	} {
		code := 2
		if strings.Contains(want, "network is unreachable") { // a failure, not a mistake
			code = 1
		}
		got := here(t, ns, append([]string{"rules"}, strings.Split(args, " ")...)...)
		if got != (outcome{code, "", "pillion: error: " + want + "\n"}) {
			t.Errorf("%s:\ngot  %+v\nwant %s", args, got, want)
		}
	}
}

func TestATerminalGetsHeadingsAndRemarksSetOff(t *testing.T) {
	const text = "ipv4 nat OUTPUT\n    -j RETURN\n      # not ours\n"
	if got := decorate(text, true); got != "\x1b[1mipv4 nat OUTPUT\x1b[0m\n    -j RETURN\n\x1b[2m      # not ours\x1b[0m\n" {
		t.Errorf("got %q", got)
	}
}

// An error names the missing part and the remedy. The programs are real ones that lack it.
func TestAMissingPartOfIptablesIsNamedWithTheRemedy(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	shim := func(name, script string) string {
		dir := publicDir(t)
		nettest.WriteProgram(t, filepath.Join(dir, name), "#!/bin/sh\n"+script+"\n")
		return "PATH=" + dir + ":" + os.Getenv("PATH")
	}
	readOnlyRun := []string{"unshare", "-m", "sh", "-c", `mount -t tmpfs -o ro none /run && exec "$0" "$@"`}
	for _, test := range []struct {
		name        string
		environment []string
		wrapper     []string
		want        string
	}{
		{"no place for the lock", nil, readOnlyRun, "cannot create the lock file of iptables: mount an emptyDir at /run, or set XTABLES_LOCKFILE to another path"},
		{"an extension that is not installed", []string{shim("iptables-legacy-restore", `exec iptables-legacy -m nosuchmatch -A OUTPUT`)}, nil, "this iptables lacks an extension: install its whole package"},
		{"a module that is not there", []string{shim("iptables-legacy-restore", `echo "iptables-restore: line $(grep -n owner | head -1 | cut -d: -f1) failed" >&2; echo "Extension owner revision 0 not supported, missing kernel module?" >&2; exit 4`)},
			nil, "the kernel lacks support for this rule: load the modules xt_owner, xt_comment on the node"},
		{"a lock that another program holds", []string{shim("iptables-legacy-restore", `echo "Another app is currently holding the xtables lock. Stopped waiting after 5s." >&2; exit 4`)},
			nil, "another program has held the xtables lock for 5 seconds: try again; the former state is restored"},
	} {
		got := pillion(t, ns, test.environment, test.wrapper, "init", "-i", "*", "--force-iptables-binary", "legacy")
		if got.code != 1 || !strings.Contains(got.stderr, test.want) || strings.Count(got.stderr, "\n") != 1 {
			t.Errorf("%s: got %+v", test.name, got)
		}
	}
}
