package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// asPillion makes this test's program behave as pillion itself.
const asPillion = "PILLION_TEST_AS_PILLION"

func TestMain(m *testing.M) {
	if os.Getenv(asPillion) != "" {
		os.Exit(run(os.Args[1:]))
	}
	os.Exit(nettest.Main(m))
}

// injectorArguments are what an Istio injector passes.
var injectorArguments = []string{
	"-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "", "-b", "*", "-d", "15090,15021,15020",
	"--log_output_level=default:info",
}

// outcome is how a run of pillion ended.
type outcome struct {
	code           int
	stdout, stderr string
}

// pillion runs the program in the namespace. wrapper, if any, is a program that runs it.
func pillion(t *testing.T, ns *nettest.Namespace, environment []string, wrapper []string, args ...string) outcome {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	words := append(append(wrapper, self), args...)
	cmd := ns.Command(0, 0, words[0], words[1:]...)
	// By default the race detector sleeps for a second at the end of each program.
	cmd.Env = append(append(os.Environ(), asPillion+"=1", "GORACE=atexit_sleep_ms=0"), environment...)
	return finish(t, ns, cmd)
}

func finish(t *testing.T, ns *nettest.Namespace, cmd *exec.Cmd) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_, err := ns.Run(cmd)
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// here runs pillion in this process, for speed. Use it for runs that end before they change anything.
func here(t *testing.T, ns *nettest.Namespace, args ...string) outcome {
	t.Helper()
	files := make([]*os.File, 2)
	for i, std := range []**os.File{&os.Stdout, &os.Stderr} {
		file, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		files[i] = file
		defer func(saved *os.File) { *std = saved }(*std)
		*std = file
	}
	var got outcome
	ns.Do(t, func() error {
		got.code = run(args)
		return nil
	})
	for i, text := range []*string{&got.stdout, &got.stderr} {
		content, err := os.ReadFile(files[i].Name())
		if err != nil {
			t.Fatal(err)
		}
		*text = string(content)
	}
	return got
}

// state is what init could change. Looking changes nothing.
func state(t *testing.T, ns *nettest.Namespace) string {
	t.Helper()
	return ns.MustRun(t, "sh", "-c", "nft list ruleset 2>/dev/null; ip rule; cat /proc/net/ip_tables_names /proc/net/ip6_tables_names; ip -o addr show dev lo")
}

func TestBadInputEndsWithOneLineAndTouchesNothing(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	before := state(t, ns)
	long := strings.Repeat("x", 1000)
	cut := `"` + long[:64] + `"…`
	const (
		notAPort  = " is not a port: use a number from 1 to 65535"
		notPorts  = notAPort + ", or a range such as 8000:9000"
		notANet   = " is not a network: write an address and a mask such as 10.0.0.0/8 or 2001:db8::/32"
		starAlone = ": * stands alone, and only where everything can be chosen; list values instead"
	)
	for _, test := range []struct {
		args        string // one blank between words
		environment string
		code        int
		want        string
	}{
		{args: "init -p 0", code: 2, want: `invalid argument "0" for "-p, --envoy-port" flag: "0"` + notAPort},
		{args: "init -p ", code: 2, want: `invalid argument "" for "-p, --envoy-port" flag: ""` + notAPort},
		{args: "init --envoy-port=no-service", code: 2, want: `invalid argument "no-service" for "-p, --envoy-port" flag: "no-service"` + notAPort},
		{args: "init -z 70000", code: 2, want: `invalid argument "70000" for "-z, --inbound-capture-port" flag: "70000"` + notAPort},
		{args: "init -e -1", code: 2, want: `invalid argument "-1" for "-e, --inbound-tunnel-port" flag: "-1"` + notAPort},
		{args: "init -p 15006", code: 2, want: `-z 15006: this is the outbound port already; use another port`},
		{args: "init -z 15021", code: 2, want: `-z 15021: this is the readiness port already; use another port`},
		{args: "init -u nobody-of-that-name", code: 2, want: `invalid argument "nobody-of-that-name" for "-u, --proxy-uid" flag: "nobody-of-that-name" is neither a number nor a known name: use a number such as 1337, or a range such as 1337-1340`},
		{args: "init -g 4294967295", code: 2, want: `invalid argument "4294967295" for "-g, --proxy-gid" flag: "4294967295" is not a user or group: use a number from 0 to 4294967294`},
		{args: "init -m tproxy", code: 2, want: `invalid argument "tproxy" for "-m, --istio-inbound-interception-mode" flag: "tproxy" is not a mode: use REDIRECT or TPROXY`},
		{args: "init -b 80x", code: 2, want: `invalid argument "80x" for "-b, --istio-inbound-ports" flag: "80x"` + notPorts},
		{args: "init -b *,8080", code: 2, want: `invalid argument "*,8080" for "-b, --istio-inbound-ports" flag: "*,8080"` + starAlone},
		{args: "init -d 8000-90000", code: 2, want: `invalid argument "8000-90000" for "-d, --istio-local-exclude-ports" flag: "8000-90000"` + notPorts},
		{args: "init -q 0", code: 2, want: `invalid argument "0" for "-q, --istio-outbound-ports" flag: "0"` + notPorts},
		{args: "init -o *", code: 2, want: `invalid argument "*" for "-o, --istio-local-outbound-ports-exclude" flag: "*"` + starAlone},
		{args: "init -i 10.0.0.0", code: 2, want: `invalid argument "10.0.0.0" for "-i, --istio-service-cidr" flag: "10.0.0.0"` + notANet},
		{args: "init -x *", code: 2, want: `invalid argument "*" for "-x, --istio-service-exclude-cidr" flag: "*"` + starAlone},
		{args: "init -c eth0!", code: 2, want: `invalid argument "eth0!" for "-c, --istio-exclude-interfaces" flag: "eth0!" is not an interface: use a name of at most 15 letters, digits, "_", ".", "@" and "-"; a "+" at its end is a wildcard`},
		{args: "init --dry-run=maybe", code: 2, want: `invalid argument "maybe" for "-n, --dry-run" flag: "maybe" is not a boolean: use true or false`},
		{args: "init --output yaml", code: 2, want: `invalid argument "yaml" for "--output" flag: unknown output format "yaml": use text or json`},
		{args: "init --log_output_level=loud", code: 2, want: `invalid argument "loud" for "--log_output_level" flag: "loud" is not a log level: use debug, info, warn, error, fatal or none`},
		{args: "init", environment: "ISTIO_INBOUND_PORTS=80x", code: 2, want: `environment variable ISTIO_INBOUND_PORTS="80x" (for --istio-inbound-ports): "80x"` + notPorts},
		{args: "init", environment: "DRY_RUN=maybe", code: 2, want: `environment variable DRY_RUN="maybe" (for --dry-run): "maybe" is not a boolean: use true or false`},
		{args: "init -k eth/0", code: 2, want: `invalid argument "eth/0" for "-k, --kube-virt-interfaces" flag: "eth/0" is not an interface: use a name of at most 15 letters, digits, "_", ".", "@" and "-"; a "+" at its end is a wildcard`},
		{args: "init --force-iptables-binary=nftables", code: 2, want: `invalid argument "nftables" for "--force-iptables-binary" flag: unknown flavour of iptables "nftables": use legacy or nft`},
		{args: "init --backend=nft", code: 2, want: `invalid argument "nft" for "--backend" flag: unknown back end "nft": use auto, iptables, iptables-nft, iptables-legacy or nftables`},
		{args: "init --backend=iptables --native-nftables", code: 2, want: `--backend iptables contradicts --native-nftables, which means nftables: use one of them`},
		{args: "init --backend=nftables --force-iptables-binary=legacy", code: 2, want: `--backend nftables contradicts --force-iptables-binary, which means iptables-legacy: use one of them`},
		{args: "init --network-namespace=/nowhere", code: 1, want: `--network-namespace "/nowhere": no such file or directory: use the path of a network namespace, such as /proc/4711/ns/net or /run/netns/pod`},
		{args: "check --network-namespace=/nowhere", code: 1, want: `--network-namespace "/nowhere": no such file or directory: use the path of a network namespace, such as /proc/4711/ns/net or /run/netns/pod`},
		{args: "init --network-namespace=/proc/version", code: 1, want: `--network-namespace "/proc/version": invalid argument: use the path of a network namespace, such as /proc/4711/ns/net or /run/netns/pod`},
		{args: "cleanup", environment: "NETWORK_NAMESPACE=/proc/version", code: 1, want: `NETWORK_NAMESPACE "/proc/version": invalid argument: use the path of a network namespace, such as /proc/4711/ns/net or /run/netns/pod`},
		{args: "init -m TPROXY -t 0x53a", code: 2, want: `-t 0x53a: use a mark other than 0 and 1338; the rules use 1338 themselves`},
		{args: "init -m TPROXY", environment: "ISTIO_INBOUND_TPROXY_MARK=0", code: 2, want: `ISTIO_INBOUND_TPROXY_MARK 0: use a mark other than 0 and 1338; the rules use 1338 themselves`},
		{args: "init -m TPROXY", environment: "ISTIO_INBOUND_TPROXY_ROUTE_TABLE=0xff", code: 2, want: `ISTIO_INBOUND_TPROXY_ROUTE_TABLE 0xff: use a separate routing table; 0 and 253 to 255 belong to the kernel`},
		{args: "init", environment: "ISTIO_INBOUND_TPROXY_MARK=main", code: 2, want: `environment variable ISTIO_INBOUND_TPROXY_MARK="main" (for --istio-inbound-tproxy-mark): "main" is not a number: use a decimal one such as 1337 or a hexadecimal one such as 0x539, of 32 bits`},
		{args: "init --backend=iptables", environment: "NATIVE_NFTABLES=true", code: 2, want: `--backend iptables contradicts NATIVE_NFTABLES, which means nftables: use one of them`},
		{args: "init -b " + long, code: 2, want: `invalid argument ` + cut + ` for "-b, --istio-inbound-ports" flag: ` + cut + notPorts},
		{args: "init -c " + long, code: 2, want: `invalid argument ` + cut + ` for "-c, --istio-exclude-interfaces" flag: ` + cut + ` is not an interface: use a name of at most 15 letters, digits, "_", ".", "@" and "-"; a "+" at its end is a wildcard`},
		{args: "init -m " + long, code: 2, want: `invalid argument ` + cut + ` for "-m, --istio-inbound-interception-mode" flag: ` + cut + ` is not a mode: use REDIRECT or TPROXY`},
		{args: "init --network-namespace " + long, code: 1, want: `--network-namespace ` + cut + `: file name too long: use the path of a network namespace, such as /proc/4711/ns/net or /run/netns/pod`},
		{args: "init " + long, code: 2, want: `unexpected argument ` + cut + `: values belong to flags`},
		{args: "init", environment: "ISTIO_SERVICE_CIDR=" + long, code: 2, want: `environment variable ISTIO_SERVICE_CIDR=` + cut + ` (for --istio-service-cidr): ` + cut + notANet},
		{args: "init", environment: "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE=*," + long, code: 2, want: `environment variable ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE="*,` + long[:62] + `"…: "*,` + long[:62] + `"…` + starAlone},
		{args: "init", environment: "ISTIO_OUTBOUND_OWNER_GROUPS=nobody-of-that-name", code: 2, want: `environment variable ISTIO_OUTBOUND_OWNER_GROUPS="nobody-of-that-name": "nobody-of-that-name" is neither a number nor a known name: use a number such as 1337, or a range such as 1337-1340`},
		{args: "init", environment: "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE=*", code: 2, want: `environment variable ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE="*": "*"` + starAlone},
		{args: "istio-iptables", environment: "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR=10.0.0.0/8", code: 1, want: `environment variable ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR="10.0.0.0/8": "10.0.0.0/8" is not an IPv4 loopback network: use one in 127.0.0.0/8, such as 127.0.0.1/32`},
		{args: "istio-iptables", environment: "PROBE_TIMEOUT=5", code: 1, want: `environment variable PROBE_TIMEOUT="5" (for --probe-timeout): not a time span: use a number with a unit, such as 500ms, 10s or 5m`},
		{args: "istio-iptables", environment: "REDIRECT_DNS=maybe", code: 1, want: `environment variable REDIRECT_DNS="maybe" (for --redirect-dns): "maybe" is not a boolean: use true or false`},
		{args: "istio-iptables --dual-stack=maybe", code: 255, want: `invalid argument "maybe" for "--dual-stack" flag: "maybe" is not a boolean: use true or false`},
		{args: "istio-iptables --iptables-probe-port=70000", code: 255, want: `invalid argument "70000" for "--iptables-probe-port" flag: "70000"` + notAPort},
		{args: "istio-iptables --probe-timeout=5", code: 255, want: `invalid argument "5" for "--probe-timeout" flag: not a time span: use a number with a unit, such as 500ms, 10s or 5m`},
		{args: "istio-iptables --log_output_level=loud", code: 255, want: `invalid argument "loud" for "--log_output_level" flag: "loud" is not a log level: use debug, info, warn, error, fatal or none`},
		{args: "istio-iptables --restore-format", code: 255, want: `unknown flag: --restore-format`},
		{args: "init -b", code: 2, want: `flag needs an argument: 'b' in -b`},
		{args: "init 8080", code: 2, want: `unexpected argument "8080": values belong to flags`},
		{args: "cleanup -p 15001", code: 2, want: `unknown shorthand flag: 'p' in -p`},
		{args: "cleanup all", code: 2, want: `unexpected argument "all": values belong to flags`},
	} {
		variable, value, _ := strings.Cut(test.environment, "=")
		if variable != "" {
			t.Setenv(variable, value)
		}
		got := here(t, ns, strings.Split(test.args, " ")...)
		if variable != "" {
			os.Unsetenv(variable)
		}
		if want := (outcome{test.code, "", "pillion: error: " + test.want + "\n"}); got != want {
			t.Errorf("%s %s:\ngot  %+v\nwant %+v", test.environment, test.args, got, want)
		}
	}
	if after := state(t, ns); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestInitByTheInjectorsArgumentsAndCleanup(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	before := state(t, ns)
	expect := func(what string, got outcome, want string) {
		t.Helper()
		if got != (outcome{0, want, ""}) {
			t.Errorf("%s: got %+v, want %q", what, got, want)
		}
	}
	run := func(command string) outcome {
		t.Helper()
		return pillion(t, ns, nil, nil, append([]string{command}, injectorArguments...)...)
	}
	expect("first run", run("istio-iptables"), "ipv4 rules installed in nft (15 changes)\n")
	expect("first run of init", run("init"), "ipv4 rules installed in nft (3 changes), ipv6 rules installed in nft (20 changes), ::6 added to lo\n")
	expect("second run", run("init"), "nothing to change: the rules are installed\n")
	ns.MustRun(t, "iptables-nft", "-t", "nat", "-F", "PILLION_IN_REDIRECT")
	expect("repair", run("init"), "ipv4 rules installed in nft (1 change)\n")
	expect("cleanup", pillion(t, ns, nil, nil, "cleanup"), "ipv4 rules removed from nft (23 changes), ipv6 rules removed from nft (25 changes), ::6 removed from lo\n")
	expect("cleanup of nothing", pillion(t, ns, nil, nil, "cleanup"), "")
	if after := state(t, ns); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestRunsAtTheSameTimeTakeTurns(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	var running sync.WaitGroup
	outcomes := make([]outcome, 6)
	for i := range outcomes {
		running.Go(func() {
			args := append([]string{"init"}, injectorArguments...)
			if i%2 == 1 {
				args = []string{"init", "-b", "80", "-i", "203.0.113.0/24"}
			}
			outcomes[i] = pillion(t, ns, nil, nil, args...)
		})
	}
	running.Wait()
	for _, got := range outcomes {
		if got.code != 0 {
			t.Errorf("got %+v", got)
		}
	}
	if got := strings.Count(ns.MustRun(t, "iptables-nft-save", "-t", "nat"), "-A OUTPUT"); got != 1 {
		t.Errorf("%d rules in OUTPUT, want 1", got)
	}
}

func TestDryRunShowsEachRuleWithItsReasonAndTouchesNothing(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	before := state(t, ns)
	got := pillion(t, ns, nil, nil, append([]string{"init", "-n"}, injectorArguments...)...)
	for _, want := range []string{
		"add ::6/128 on lo\n", "ipv4, nft, nat table: 16 changes\n", "ipv6, nft, nat table: 18 changes\n",
		"  missing: + -A PILLION_OUTPUT -o lo -m comment --comment \"pillion:outbound/loopback\" -j RETURN\n" +
			"      connections between processes of the workload are not captured\n",
	} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("no %q in:\n%s", want, got.stdout)
		}
	}
	if got.code != 0 || got.stderr != "" {
		t.Errorf("got %+v", got)
	}
	if after := state(t, ns); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestJSONTellsProgramsWhatHappened(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	for _, run := range []struct {
		args            []string
		dryRun, changed bool
	}{
		{append([]string{"init", "--output=json", "--dry-run"}, injectorArguments...), true, true},
		{append([]string{"init", "--output=json"}, injectorArguments...), false, true},
		{append([]string{"init", "--output=json"}, injectorArguments...), false, false},
		{[]string{"cleanup", "--output=json", "-n"}, true, true},
		{[]string{"cleanup", "--output=json"}, false, true},
		{[]string{"cleanup", "--output=json"}, false, false},
	} {
		var report struct {
			DryRun bool
			Plan   struct {
				Changed bool
				Steps   []struct {
					Family, Flavour, Input string
					Changes                []struct{ Kind, Chain, ID, Why, Rule, Found string }
				}
			}
		}
		got := pillion(t, ns, nil, nil, run.args...)
		if err := json.Unmarshal([]byte(got.stdout), &report); err != nil || got.code != 0 {
			t.Fatalf("%v: %v: %+v", run.args, err, got)
		}
		if report.DryRun != run.dryRun || report.Plan.Changed != run.changed {
			t.Errorf("%v: %+v", run.args, report)
		}
		if run.changed {
			step := report.Plan.Steps[1]
			if step.Family != "ipv6" || step.Flavour != "nft" || step.Changes[0].Chain == "" || !strings.Contains(step.Input, "*nat\n") {
				t.Errorf("%v: second step: %+v", run.args, step)
			}
		}
	}
}

func TestAMissingCapabilityIsNamed(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	const missing = "is missing: set capabilities.add: [NET_ADMIN, NET_RAW] in the container's securityContext"
	without := func(capability string) []string {
		return []string{"setpriv", "--bounding-set", "-" + capability, "--inh-caps", "-" + capability}
	}
	before := state(t, ns)
	for _, command := range []string{"init", "cleanup"} {
		got := pillion(t, ns, nil, without("net_admin"), command)
		if got.code != 1 || !strings.HasSuffix(got.stderr, "pillion: error: capability CAP_NET_ADMIN "+missing+"\n") {
			t.Errorf("%s: got %+v", command, got)
		}
	}
	got := pillion(t, ns, nil, without("net_admin"), "init", "-n", "-i", "*")
	if got.code != 0 || !strings.HasPrefix(got.stdout, "cannot read the current state (capability CAP_NET_ADMIN "+missing+")") ||
		!strings.Contains(got.stdout, "-A PILLION_OUTPUT") {
		t.Errorf("dry run without rights: got %+v", got)
	}
	if after := state(t, ns); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}

	// The legacy flavour needs a raw socket, and only it.
	if got := pillion(t, ns, nil, without("net_raw"), "init", "-i", "*"); got.code != 0 {
		t.Errorf("nft without CAP_NET_RAW: got %+v", got)
	}
	fresh := nettest.New(t, "fresh")
	got = pillion(t, fresh, nil, without("net_raw"), "init", "-i", "*", "--backend", "iptables-legacy")
	if got.code != 1 || got.stderr != "pillion: error: capability CAP_NET_RAW "+missing+"\n" {
		t.Errorf("legacy, as required, without CAP_NET_RAW: got %+v", got)
	}
	legacyAlone := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"-legacy", "-legacy-save", "-legacy-restore"} {
			path, err := exec.LookPath(name + what)
			if err := cmp.Or(err, os.Symlink(path, filepath.Join(legacyAlone, name+what))); err != nil {
				t.Fatal(err)
			}
		}
	}
	got = pillion(t, fresh, []string{"PATH=" + legacyAlone}, without("net_raw"), "init", "-i", "*")
	if got.code != 0 || !strings.Contains(got.stdout, "rules installed in nftables") || !strings.Contains(got.stderr, "because iptables is not usable: capability CAP_NET_RAW is missing") {
		t.Errorf("legacy by default, without CAP_NET_RAW: got %+v", got)
	}
	ns.MustRun(t, "iptables-legacy-save", "-t", "nat")
	got = pillion(t, ns, nil, without("net_raw"), "init", "-i", "*")
	if got.code != 1 || got.stderr != "pillion: error: capability CAP_NET_RAW "+missing+"\n" {
		t.Errorf("legacy without CAP_NET_RAW: got %+v", got)
	}
}

func TestTheEnvironmentSetsWhatTheCommandLineLeaves(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	environment := []string{
		"INBOUND_CAPTURE_PORT=16006", "INBOUND_TUNNEL_PORT=16008", "PROXY_UID=root,1338", "ISTIO_INBOUND_INTERCEPTION_MODE=REDIRECT",
		"ISTIO_INBOUND_PORTS=*", "ISTIO_LOCAL_EXCLUDE_PORTS=9091", "ISTIO_SERVICE_CIDR=203.0.113.0/24", "ISTIO_SERVICE_EXCLUDE_CIDR=203.0.113.9/32",
		"ISTIO_OUTBOUND_PORTS=5432", "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE=22", "ISTIO_EXCLUDE_INTERFACES=eth9", "DRY_RUN=true", "PROXY_GID=",
	}
	got := pillion(t, ns, environment, nil, "init", "-d", "9092")
	for _, want := range []string{
		"--to-ports 16006", "--dport 16008", "--uid-owner 0", "--uid-owner 1338", "--gid-owner 0", "--gid-owner 1338",
		"inbound/all", "--dport 9092", "-d 203.0.113.0/24", "-d 203.0.113.9/32", "--dport 5432", "--dport 22", "-i eth9", "-o eth9",
	} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("no %q", want)
		}
	}
	if got.code != 0 || got.stderr != "" || strings.Contains(got.stdout, "9091") {
		t.Errorf("got %+v", got)
	}
}

func TestCapturingNothingIsWarnedOf(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	got := pillion(t, ns, nil, nil, "init", "--dry-run", "--log_as_json")
	var line struct{ Level, Msg string }
	if err := json.Unmarshal([]byte(got.stderr), &line); err != nil || line.Level != "WARN" || !strings.HasPrefix(line.Msg, "nothing is captured") {
		t.Errorf("%v: %+v", err, got)
	}
	if got := pillion(t, ns, nil, nil, "init", "--dry-run", "--log_output_level=default:error"); got.stderr != "" {
		t.Errorf("level error: got %+v", got)
	}
}

func TestEverythingThatTheEnvironmentAloneCanSay(t *testing.T) {
	nettest.RequireRoot(t)
	ns, _ := nettest.PodAndPeer(t)
	environment := []string{
		"KUBE_VIRT_INTERFACES=vm0", "ISTIO_INBOUND_INTERCEPTION_MODE=TPROXY", "ISTIO_INBOUND_PORTS=8080", "ISTIO_INBOUND_TPROXY_MARK=0x7b",
		"ISTIO_INBOUND_TPROXY_ROUTE_TABLE=200", "ISTIO_SERVICE_CIDR=*", "ISTIO_META_DNS_CAPTURE=true", "REDIRECT_DNS=false", "CAPTURE_ALL_DNS=true",
		"INVALID_DROP=true", "DROP_INVALID=false", "ISTIO_DUAL_STACK=true", "FORCE_IPTABLES_BINARY=legacy", "ISTIO_OUTBOUND_OWNER_GROUPS=2000-2010",
		"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR=127.0.0.0/8", "ENVOY_USER=root", "DRY_RUN=true",
	}
	got := pillion(t, ns, environment, nil, "istio-iptables", "ignored")
	for _, want := range []string{
		"-i vm0", "--on-port 15006 --on-ip 0.0.0.0 --tproxy-mark 0x7b", "--dport 8080", "fwmark 0x7b lookup 200", "--to-ports 15053", "--ctstate INVALID",
		"ipv6, legacy, nat table", "--gid-owner 2000-2010", "! -d 127.0.0.0/8", "--uid-owner 0", "--gid-owner 0",
	} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("no %q", want)
		}
	}
	if got.code != 0 || got.stderr != "" {
		t.Errorf("got %+v", got)
	}
	got = pillion(t, ns, []string{"ISTIO_OUTBOUND_OWNER_GROUPS="}, nil, "init", "-n", "-i", "*")
	if got.code != 0 || strings.Contains(got.stdout, "PILLION_REDIRECT") {
		t.Errorf("a set but empty list of groups captures no group: got %+v", got)
	}
}

func TestServersOfNamesAreThoseOfResolvConf(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	file := filepath.Join(t.TempDir(), "resolv.conf")
	asResolvConf := []string{"unshare", "-m", "sh", "-c", `mount --bind ` + file + ` /etc/resolv.conf && exec "$@"`, "sh"}
	for text, want := range map[string]struct{ stdout, stderr string }{
		"nameserver 10.0.0.53\nnameserver 2001:db8::53\n": {`-d 2001:db8::53/128 -p udp -m udp --dport 53 -m comment --comment "pillion:dns/udp/2001:db8::53/128" -j REDIRECT --to-ports 15053`, ""},
		"search example.com\n":                            {"outbound/all", "DNS is not captured: /etc/resolv.conf has no name server"},
	} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		got := pillion(t, ns, nil, asResolvConf, "init", "-n", "-i", "*", "--redirect-dns")
		if got.code != 0 || !strings.Contains(got.stdout, want.stdout) || !strings.Contains(got.stderr, want.stderr) || (want.stderr == "") != (got.stderr == "") {
			t.Errorf("%q: got %+v", text, got)
		}
	}
}

// istio-iptables' ways that injectors and scripts rely on.
func TestTheWaysOfIstioIPTables(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	before := state(t, ns)
	arguments := func(more ...string) []string {
		return append(append([]string{"istio-iptables"}, injectorArguments...), more...)
	}
	commands := filepath.Join(t.TempDir(), "commands")
	got := pillion(t, ns, []string{"DRY_RUN_FILE_PATH=" + commands}, nil, arguments("--dry-run", "-m", "TPROXY")...)
	text, err := os.ReadFile(commands)
	if err != nil || got.code != 0 {
		t.Fatalf("%v: %+v", err, got)
	}
	for _, want := range []string{"ip -4 rule add fwmark 0x539 lookup 133 protocol 80\n", "ip -4 route add local default dev lo table 133 protocol 80\n", "iptables-nft-restore --noflush <<END\n*mangle\n", "COMMIT\nEND\n"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	if got := pillion(t, ns, nil, nil, arguments("--skip-rule-apply")...); got != (outcome{0, "", ""}) {
		t.Errorf("--skip-rule-apply: got %+v", got)
	}
	if after := state(t, ns); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	got = pillion(t, ns, nil, nil, arguments("-m", "tproxy", "--reconcile", "--force-apply", "--log_target=stdout", "--log_target=/x", "--vklog=9", "what", "ever")...)
	if got.code != 0 || !strings.Contains(got.stderr, `-m \"tproxy\" is not a mode: using REDIRECT`) || !strings.Contains(got.stdout, "15 changes") {
		t.Errorf("got %+v", got)
	}
	if got := pillion(t, ns, nil, nil, arguments("--cleanup-only")...); got.code != 0 || got.stdout != "ipv4 rules removed from nft (19 changes)\n" {
		t.Errorf("--cleanup-only: got %+v", got)
	}
	if after := state(t, ns); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestANetworkNamespaceIsEntered(t *testing.T) {
	nettest.RequireRoot(t)
	here, there := nettest.New(t, "here"), nettest.New(t, "there")
	before, beforeThere := state(t, here), state(t, there)
	for _, flavour := range []string{"nft", "legacy"} {
		got := pillion(t, here, nil, nil, "init", "-i", "*", "--network-namespace", there.Path(), "--cni-mode", "--force-iptables-binary", flavour)
		if got.code != 0 || !strings.Contains(got.stdout, "installed in "+flavour) {
			t.Errorf("%s: got %+v", flavour, got)
		}
	}
	if after := state(t, here); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if got := pillion(t, here, nil, nil, "cleanup", "--network-namespace", there.Path()); got.code != 0 || got.stdout == "" {
		t.Errorf("cleanup: got %+v", got)
	}
	if after := state(t, there); !strings.HasPrefix(after, strings.SplitAfter(beforeThere, "\n")[0]) || strings.Contains(after, "::6") {
		t.Errorf("there is still:\n%s", after)
	}
}

// pillionAs is pillion run by a wrapper that changes its user, to whom this program is not accessible by its path.
func pillionAs(t *testing.T, ns *nettest.Namespace, wrapper []string, args ...string) outcome {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(publicDir(t), "pillion")
	content, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	nettest.WriteProgram(t, program, string(content))
	words := append(append(slices.Clone(wrapper), program), args...)
	cmd := ns.Command(0, 0, words[0], words[1:]...)
	cmd.Env = append(os.Environ(), asPillion+"=1", "GORACE=atexit_sleep_ms=0")
	return finish(t, ns, cmd)
}

// publicDir is a directory of this test that everybody may enter.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pillion-test-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Without -g, istio-iptables passes the words of -u to the group match, and that looks them up as groups.
func TestTheAgentsGroupsFollowItsUsers(t *testing.T) {
	user, namesake, named := []capture.IDRange{{First: 5, Last: 5}}, []capture.IDRange{{First: 60, Last: 60}}, []capture.IDRange{{First: 7, Last: 7}}
	for _, test := range []struct {
		compat          bool
		gids, namesakes []capture.IDRange
		want            []capture.IDRange
	}{
		{true, nil, namesake, namesake},
		{true, nil, nil, user},
		{true, named, namesake, named},
		{false, nil, namesake, user},
	} {
		o := newInitOptions(test.compat)
		o.uids, o.gids, o.namesakes = user, test.gids, test.namesakes
		if err := o.complete(slog.New(slog.DiscardHandler)); err != nil || !slices.Equal(o.spec.ProxyGIDs, test.want) {
			t.Errorf("%+v: got %v, error %v", test, o.spec.ProxyGIDs, err)
		}
	}
	o := newInitOptions(true)
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	o.bindAgent(flags)
	if err := flags.Parse([]string{"-u", "root,1337"}); err != nil || !slices.Equal(o.namesakes, []capture.IDRange{{}, {First: 1337, Last: 1337}}) {
		t.Errorf("got %v, error %v", o.namesakes, err)
	}
}
