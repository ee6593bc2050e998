package main

import (
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// The injector runs the validation without any right, as the agent's user, or as root; a container of the workload's may,
// too.
func TestValidationReportsWhatIsCaptured(t *testing.T) {
	nettest.RequireRoot(t)
	pod, peer := nettest.PodAndPeer(t)
	// Only the peer's router may see uncaptured packets, and only from processes that cannot read the rules.
	for program, network := range map[string]string{"iptables-nft": "192.0.2.0/24 -m ttl ! --ttl-eq 1", "ip6tables-nft": "100::/64 -m hl ! --hl-eq 1"} {
		peer.MustRun(t, "sh", "-c", program+" -t raw -A PREROUTING -d "+network)
	}
	const (
		quick  = "--probe-timeout=1ms"
		slowly = "--probe-timeout=20s"
	)
	arguments := append([]string{"init", "--run-validation", "--skip-rule-apply", "--redirect-dns", "--capture-all-dns"}, injectorArguments...)
	user := func(id string) []string { return []string{"setpriv", "--reuid", id, "--regid", id, "--clear-groups"} }
	root, asAgent, asNobody := []string{"env"}, user("1337"), user("65534")
	modestRoot := []string{"setpriv", "--bounding-set", "-setuid", "--inh-caps", "-setuid"}
	expect := func(what string, wrapper []string, patience string, code int, says ...string) {
		t.Helper()
		got := pillionAs(t, pod, wrapper, append(arguments, patience)...)
		if got.code != code {
			t.Errorf("%s: got %+v, want %d", what, got, code)
		}
		for _, words := range says {
			if !strings.Contains(got.stderr, words) {
				t.Errorf("%s: got %s, want %s", what, got.stderr, words)
			}
		}
	}
	install := func() {
		t.Helper()
		if got := pillion(t, pod, nil, nil, append([]string{"init", "--redirect-dns", "--capture-all-dns"}, injectorArguments...)...); got.code != 0 {
			t.Fatalf("got %+v", got)
		}
	}

	pod.MustRun(t, "/sbin/ip", "addr", "add", "::6/128", "dev", "lo")
	expect("agent without rules", asAgent, quick, 126, "pillion: error: validation failed: not captured: inbound ipv4: user 1337: ", "127.0.0.6:15002: connect: connection refused", "; inbound ipv6: user 1337: ")
	expect("root without rules", root, quick, 126,
		"not captured: inbound ipv4: in the rules in force, traffic of user 1337 to 127.0.0.6:15002 is not captured: no rule matches; outbound ipv4: in the rules in force, traffic of user 0 to 192.0.2.1:15002 is not captured: no rule matches; DNS over udp ipv4: ",
		"; DNS over tcp ipv4: ", "; outbound ipv6: in the rules in force, traffic of user 0 to [100::1]:15002 is not captured")
	expect("somebody without rules", asNobody, quick, 126, "outbound ipv4: user 65534: ", "DNS over udp ipv4: traffic of user 65534 to 127.0.0.1:53 did not reach port 15053: ", "inbound ipv4, inbound ipv6 not tried: needs user 1337 and group 1337")
	for program, flag := range map[string]string{"iptables-nft": "ttl", "ip6tables-nft": "hl"} {
		if counted := peer.MustRun(t, program+"-save", "-c", "-t", "raw"); !strings.Contains(counted, "[0:0] -A PREROUTING") || !strings.Contains(counted, flag) {
			t.Errorf("packets went on:\n%s", counted)
		}
	}

	install()
	expect("agent", asAgent, slowly, 0, "outbound ipv4, DNS over udp ipv4, DNS over tcp ipv4, outbound ipv6, DNS over udp ipv6, DNS over tcp ipv6 not tried: needs user 65534")
	expect("root", root, slowly, 0)
	expect("root that cannot be somebody else", modestRoot, slowly, 0, "inbound ipv4, inbound ipv6 not tried: needs user 1337 and group 1337, or CAP_SETUID")
	expect("somebody", asNobody, slowly, 0)

	for _, test := range []struct {
		done    string
		wrapper []string
		says    string
	}{
		{"iptables-nft -t nat -F PILLION_REDIRECT", root, "not captured: outbound ipv4: in the rules in force, traffic of user 0 to 192.0.2.1:15002 is not captured: no rule matches\n"},
		{"iptables-nft -t nat -I OUTPUT -m ttl --ttl-eq 1 -j ACCEPT", root, "; outbound ipv4: user 0: "},
		{"ip6tables-nft -t nat -F PILLION_IN_REDIRECT", root, "not captured: inbound ipv6: in the rules in force, traffic of user 1337 to [::6]:15002 is not captured"},
		{"ip6tables-nft -t nat -F PILLION_IN_REDIRECT", modestRoot, "not captured: inbound ipv6: in the rules in force, traffic of user 1337 to [::6]:15002 is not captured"},
		{"ip6tables-nft -t nat -F PILLION_IN_REDIRECT", asAgent, "not captured: inbound ipv6: user 1337: "},
		{"ip addr del ::6/128 dev lo", asAgent, "not captured: inbound ipv6: ::6 is missing on lo"},
		{"iptables-nft -t nat -D PILLION_OUTPUT -p udp -m udp --dport 53 -m comment --comment pillion:dns/udp -j REDIRECT --to-ports 15053", asNobody,
			"not captured: DNS over udp ipv4: traffic of user 65534 to 127.0.0.1:53 did not reach port 15053"},
	} {
		pod.MustRun(t, "sh", "-c", test.done)
		expect(test.done, test.wrapper, quick, 126, test.says)
		install()
		pod.MustRun(t, "sh", "-c", "iptables-nft -t nat -D OUTPUT -m ttl --ttl-eq 1 -j ACCEPT 2>&- || true")
	}

	arguments = []string{"init", "--run-validation", "--skip-rule-apply", "-m", "TPROXY", "-b", "8080", "-u", "1337"}
	if got := pillion(t, pod, nil, nil, "init", "-m", "TPROXY", "-b", "8080", "-u", "1337", "--run-validation"); got.code != 0 {
		t.Errorf("TPROXY: got %+v", got)
	}
	expect("TPROXY as the agent", asAgent, quick, 126, "no connection can be tried: inbound ipv4, inbound ipv6 not tried: needs CAP_NET_ADMIN to listen for TPROXY")
}

func TestAListenerInTheWayOfTheValidationIsNamed(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	ns.Listen(t, "tcp", "127.0.0.1:15006")
	got := pillion(t, ns, nil, nil, "init", "-b", "*", "--run-validation", "--probe-timeout=1ms")
	if got.code != 126 || !strings.Contains(got.stderr, "inbound ipv4: listen tcp 127.0.0.1:15006: bind: address already in use") {
		t.Errorf("got %+v", got)
	}
}
