package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Every command has one exit status for a command line that makes no sense, except the drop-in for istio-iptables.
func TestACommandLineThatMakesNoSenseHasOneExitStatus(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	for _, cmd := range newRoot(nil).Commands() {
		if cmd.Name() == "proxy" { // it names unknown flags in its log, as pilot-agent does
			continue
		}
		want := 2
		if cmd.Name() == istioIPTables {
			want = 255
		}
		got := here(t, ns, cmd.Name(), "--no-such-flag")
		if got.code != want || strings.Count(got.stderr, "\n") != 1 || !strings.HasPrefix(got.stderr, "pillion: error: unknown flag: --no-such-flag") {
			t.Errorf("%s: %+v, want %d", cmd.Name(), got, want)
		}
	}
	for args, want := range map[string]string{
		"stauts":                                         `unknown command "stauts" for "pillion": did you mean "status"?`,
		"rules shwo":                                     `unknown command "shwo" for "pillion rules": did you mean "show"?`,
		"help agnet":                                     `unknown command "agnet" for "pillion": did you mean "agent"?`,
		"help rules shwo":                                `unknown command "shwo" for "pillion rules": did you mean "show"?`,
		"agent --conect-timeout 5s":                      `unknown flag: --conect-timeout: did you mean --connect-timeout?`,
		"agent --connect-timeout soon":                   `invalid argument "soon" for "--connect-timeout" flag: not a time span: use a number with a unit, such as 500ms, 10s or 5m`,
		"agent --max-head-bytes 1":                       `--max-head-bytes: 1 is out of range; use 1024 to 8388608`,
		"top --interval 1ms":                             `--interval 1ms: use 100ms or more`,
		"top --sort size":                                `invalid argument "size" for "--sort" flag: unknown order "size": use one of rate, total, errors, p99, bytes, name`,
		"proxy gateway":                                  `role "gateway" is not supported: only "proxy sidecar" and "proxy router" are; waypoints need Envoy`,
		"rules explain --dst :80":                        `give either the sending user (--uid) or the remote sender (--from)`,
		"wait --url ::::":                                ``,
		"explain GET":                                    `1 arguments: use METHOD URL, such as GET http://reviews:9080/`,
		"explain GET http://a --from x":                  `invalid argument "x" for "--from" flag: "x" is not a direction: use outbound or inbound`,
		"explain GET http://a -H a":                      `--header: "a" is not a header field: use "name: value"`,
		"explain GET http://a --peer a":                  `--peer and --source describe an inbound client: add --from inbound`,
		"explain GET http://a --source ::1":              `--peer and --source describe an inbound client: add --from inbound`,
		"explain GET reviews:9080":                       `"reviews:9080" is not a URL with a host: use one such as http://reviews:9080/path`,
		"explain GET http://a --from inbound --source a": `--source: "a" is not an address, such as 198.51.100.7`,
		"explain GET http://a --destination a":           `--destination: "a" is not an address with a port, such as 198.51.100.7:80`,
		"init -p 15006":                                  `-z 15006: this is the outbound port already; use another port`,
		"check --admin nowhere":                          `invalid argument "nowhere" for "--admin" flag: not an address: use one with a port, such as 127.0.0.1:15000`,
		"request GET":                                    `1 arguments: use METHOD PATH [BODY], such as GET config_dump`,
		"completion powershell":                          `name one shell: bash, zsh, fish`,
		"istio-iptables -p 15001 -p no":                  ``,
	} {
		code := 2
		if strings.HasPrefix(args, istioIPTables) {
			code = 1
		}
		got := here(t, ns, strings.Fields(args)...)
		if got.code != code || want != "" && got.stderr != "pillion: error: "+want+"\n" {
			t.Errorf("%s: %+v\nwant %d %s", args, got, code, want)
		}
	}
}

// The demo ends with commands to try next. They exist and do what the line promises; make's are only looked up, as others
// test them.
func TestWhatTheDemoProposesWorks(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	script := read(t, "../../scripts/demo")
	_, block, found := strings.Cut(script, `heading "Try next"`)
	block, _, ended := strings.Cut(block, "\tEND\n")
	if !found || !ended {
		t.Fatal("the demo proposes nothing")
	}
	proposed := 0
	for line := range strings.Lines(block) {
		command, _, _ := strings.Cut(strings.TrimSpace(line), "   ")
		words := strings.Fields(command)
		switch {
		case len(words) > 1 && words[0] == "make":
			proposed++
			make := exec.Command("make", "--dry-run", words[1])
			make.Dir = "../.."
			if out, err := make.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", command, err, out)
			}
			if _, arguments, _ := strings.Cut(command, words[1]); strings.TrimSpace(arguments) != "" && !strings.Contains(read(t, "../../README.md"), command) {
				t.Errorf("README does not show %q", command)
			}
		case len(words) > 1 && words[0] == "bin/pillion":
			proposed++
			before := state(t, ns)
			for i := range words {
				words[i] = strings.Trim(words[i], "'")
			}
			if got := pillion(t, ns, nil, nil, words[1:]...); got.code != 0 || got.stdout == "" || got.stderr != "" {
				t.Errorf("%s: %+v", command, got)
			}
			if after := state(t, ns); after != before {
				t.Errorf("%s changed something: before:\n%s\nafter:\n%s", command, before, after)
			}
		}
	}
	if proposed < 5 {
		t.Errorf("only %d commands are found in\n%s", proposed, block)
	}
}

// Completion works in a real shell, with the functions that bash-completion would provide.
func TestBashCompletesCommands(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	script := pillion(t, ns, nil, nil, "completion", "bash")
	if script.code != 0 {
		t.Fatal(script)
	}
	directory := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(directory, "pillion")); err != nil {
		t.Fatal(err)
	}
	complete := exec.Command("bash", "-c", script.stdout+`
_get_comp_words_by_ref() { words=(pillion stat) cword=1 cur=stat prev=pillion; }
__ltrim_colon_completions() { :; }
_filedir() { :; }
COMP_WORDS=(pillion stat) COMP_CWORD=1 COMP_LINE="pillion stat" COMP_POINT=12 COMP_TYPE=9
__start_pillion
printf '%s\n' "${COMPREPLY[@]}"`)
	complete.Env = append(os.Environ(), "PATH="+directory+":"+os.Getenv("PATH"), asPillion+"=1", "GORACE=atexit_sleep_ms=0")
	var complaints bytes.Buffer
	complete.Stderr = &complaints
	if out, err := complete.Output(); err != nil || !regexp.MustCompile(`^status *\n$`).Match(out) {
		t.Errorf("%v: %q %s", err, out, &complaints)
	}
}

// The help of completion promises the values of each flag that accepts one of some words.
func TestCompletionKnowsTheValuesOfFlags(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	for args, want := range map[string]string{
		"init --backend":               "auto iptables iptables-nft iptables-legacy nftables",
		"init --force-iptables-binary": "legacy nft",
		"istio-iptables -m":            "REDIRECT TPROXY",
		"init --log_output_level":      "debug info warn error none",
		"init --output":                "text json",
		"agent --log-level":            "debug info warn error",
		"agent --interception-mode":    "REDIRECT TPROXY",
		"agent --access-log-encoding":  "text json",
		"agent --x-forwarded-for":      "set-if-absent append off",
		"agent --profiling":            "true false",
		"rules explain --proto":        "tcp udp",
		"rules explain --like":         "init istio-iptables",
		"explain --from":               "outbound inbound",
		"explain":                      "GET HEAD POST PUT PATCH DELETE OPTIONS",
		"top --sort":                   "rate total errors p99 bytes name",
		"version --output":             "json yaml",
	} {
		got := here(t, ns, append(append([]string{"__complete"}, strings.Fields(args)...), "")...)
		words, _, _ := strings.Cut(got.stdout, ":")
		if words = strings.Join(strings.Fields(words), " "); words != want {
			t.Errorf("%s: %q, want %q", args, words, want)
		}
	}
}

// A command line that begins with the name of a command builds only that one. Any other builds all of them.
func TestOnlyTheCommandOfTheCommandLineIsBuilt(t *testing.T) {
	for _, c := range commands {
		if built := newRoot([]string{c.name, "--help"}).Commands(); len(built) != 1 || built[0].Name() != c.name {
			t.Errorf("%s: got %d commands", c.name, len(built))
		}
	}
	for _, args := range [][]string{nil, {"--help"}, {"help", "init"}, {"stauts"}, {"__complete", "init", ""}} {
		if built := newRoot(args).Commands(); len(built) != len(commands) {
			t.Errorf("%q: got %d commands, want %d", args, len(built), len(commands))
		}
	}
}
