package nft

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

func bothRulesets(spec capture.Spec) [2]ruleset.Ruleset {
	return [2]ruleset.Ruleset{policy.Rules(spec, ruleset.IPv4), policy.Rules(spec, ruleset.IPv6)}
}

func TestForeignCommentsAreReadWithinTheirBounds(t *testing.T) {
	for _, test := range []struct{ data, want string }{
		{"", ""}, {"\x00", ""}, {"\x00\x05abcd\x00", "abcd"}, {"\x00\x05abcd", ""}, {"\x07\x01x\x00\x02y\x00", "y"},
		{"\x00\xff" + strings.Repeat("z", 255), strings.Repeat("z", 255)}, {"\x07\xff", ""}, {"\x00\x00", ""}, {"\x07\xfe" + strings.Repeat("z", 254) + "\x00", ""},
	} {
		if got := commentOf([]byte(test.data)); got != test.want {
			t.Errorf("%q: got %q, want %q", test.data, got, test.want)
		}
	}
}

func TestARefusalNamesTheRuleAndTheMissingModule(t *testing.T) {
	rule := func(r ruleset.Rule) subject {
		return subject{id: r.ID, rule: encode(ruleset.IPv4, ruleset.Place{Table: ruleset.NAT, Chain: ruleset.ChainOutput}, r)[0]}
	}
	for _, test := range []struct {
		subject subject
		err     error
		want    string
	}{
		{rule(ruleset.Rule{ID: "a", Target: ruleset.Redirect(1)}), unix.ENOENT, "rule a: no such file or directory: " + kernel.ErrNoKernelSupport.Error() + "; load nft_redir on the node, or use iptables"},
		{rule(ruleset.Rule{ID: "a", Target: ruleset.ToSocket{}}), unix.EOPNOTSUPP, "load nft_tproxy on the node"},
		{rule(ruleset.Rule{ID: "a", Target: ruleset.Zone(1)}), unix.EOPNOTSUPP, "load nft_ct, with marks and zones of connection tracking on the node"},
		{rule(ruleset.Rule{ID: "a", Target: ruleset.Return{}}), unix.ENOENT, "load nf_tables on the node"},
		{rule(ruleset.Rule{ID: "a", Target: ruleset.Return{}}), unix.EINVAL, "rule a: invalid argument"},
		{subject{hook: hooks[ruleset.Place{Table: ruleset.NAT, Chain: ruleset.ChainBuiltOutput}]}, unix.EOPNOTSUPP, "a chain of type nat in family inet: operation not supported: "},
		{subject{}, unix.EPERM, kernel.Refused(false).Error()},
		{subject{}, unix.EBUSY, "device or resource busy"},
	} {
		err := test.subject.explain(test.err)
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("got %q, want %q", err, test.want)
		}
		if lacks := strings.Contains(test.want, "load"); lacks != errors.Is(err, kernel.ErrNoKernelSupport) && test.subject.hook.kind == "" {
			t.Errorf("%v: blamed on the kernel: %t", err, !lacks)
		}
	}
}

// The kernel's answer is about the request that it refused, however many there are.
func TestTheRefusedRequestIsFound(t *testing.T) {
	nettest.RequireRoot(t)
	pod := nettest.New(t, "pod")
	change := Transition(bothRulesets(rulestest.CaptureAll), Table{})
	bad := encode(ruleset.IPv4, ruleset.Place{Table: ruleset.NAT, Chain: ruleset.ChainOutput}, ruleset.Rule{ID: "bad", Target: ruleset.Jump("PILLION_NOWHERE")})[0]
	change.addRule(ruleset.Rule{ID: "bad"}, bad)
	err := pod.Try(change.Apply)
	if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "rule bad: ") {
		t.Errorf("got error %v", err)
	}
	if strings.Contains(rulestest.Everything(t, pod), TableName) {
		t.Error("something was made")
	}
}

// A dump that a concurrent change has interrupted is repeated.
func TestAnInterruptedDumpIsRepeated(t *testing.T) {
	nettest.RequireRoot(t)
	pod := nettest.New(t, "pod")
	table := func(name string) *nl.NetlinkRequest {
		return newRequest(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, unix.NFPROTO_IPV4, nameAttribute(unix.NFTA_TABLE_NAME, name))
	}
	const others = 2000 // more than one answer of the kernel holds
	requests := []*nl.NetlinkRequest{table("many")}
	for i := range others {
		requests = append(requests, newRequest(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, unix.NFPROTO_IPV4,
			nameAttribute(unix.NFTA_CHAIN_TABLE, "many"), nameAttribute(unix.NFTA_CHAIN_NAME, fmt.Sprint("chain", i))))
	}
	pod.Do(t, func() error { return transact(requests) })
	done, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- pod.Try(func() error {
			for {
				select {
				case <-done:
					return nil
				default:
				}
				if err := transact([]*nl.NetlinkRequest{table("restless"),
					newRequest(unix.NFT_MSG_DELTABLE, 0, unix.NFPROTO_IPV4, nameAttribute(unix.NFTA_TABLE_NAME, "restless"))}); err != nil {
					return err
				}
			}
		})
	}()
	pod.Do(t, func() error {
		for range 30 {
			if found, err := Chains(); err != nil || len(found) != others {
				t.Errorf("%d chains: %v", len(found), err)
			}
		}
		return nil
	})
	close(done)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
