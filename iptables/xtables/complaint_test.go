package xtables

import (
	"errors"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/iptables/kernel"
)

// Real messages of programs when something is missing, with the cause.
func TestTheMessageOfAProgramNamesTheMissingPart(t *testing.T) {
	const (
		ownerLine = `-A PILLION_OUTPUT -p tcp -m tcp --dport 80 -m owner --uid-owner 1337 -m comment --comment "pillion:x" -j RETURN`
		proxyLine = `-A PILLION_TPROXY -p tcp -j TPROXY --on-port 15006`
	)
	for _, test := range []struct {
		stderr, line string
		want         error
		says         string // for an error that is made for the line
	}{
		{"iptables v1.8.9 (legacy): can't initialize iptables table `nat': Table does not exist (do you need to insmod?)\n", "", kernel.ErrNoKernelSupport, ""},
		{"iptables v1.8.9 (legacy): can't initialize iptables table `nat': Permission denied (you must be root)\n", "", errRefused, ""},
		{"iptables-nft-restore v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)\n", "", errRefused, ""},
		{"iptables v1.8.7 (nf_tables): Could not fetch rule set generation id: Invalid argument\n", "", kernel.ErrNoKernelSupport, ""},
		{"iptables/1.8.7 Failed to initialize nft: Protocol not supported\n", "", kernel.ErrNoKernelSupport, ""},
		{"line 2: TABLE_ADD failed (Operation not supported): table nat\n", "", kernel.ErrNoKernelSupport, ""},
		{"Fatal: can't open lock file /run/xtables.lock: Read-only file system\n", "", errLockFile, ""},
		{"Fatal: can't open lock file /run/xtables.lock: Permission denied\n", "", errLockFile, ""},
		{"Another app is currently holding the xtables lock; still 4s 0us time ahead to have a chance to grab the lock...\nAnother app is currently holding the xtables lock. Stopped waiting after 5s.\n", "", errLockHeld, ""},
		{"iptables-restore v1.4.21: unrecognized option '--wait=5'\n", "", errTooOld, ""},
		{"iptables-restore v1.8.9 (legacy): Couldn't load match `owner':No such file or directory\n", ownerLine, errNoExtension, ""},
		{"iptables-nft-restore v1.8.9 (nf_tables): Couldn't load target `TPROXY':No such file or directory\n", proxyLine, errNoExtension, ""},
		{"iptables v1.8.9 (nf_tables): unknown option \"--on-port\"\n", proxyLine, errNoExtension, ""},
		{"iptables v1.8.9 (nf_tables): table `nat' is incompatible, use 'nft' tool.\n", "", ErrIncompatible, ""},
		{"line 9: RULE_APPEND failed (No such file or directory): rule in chain PILLION_OUTPUT\n", ownerLine, nil, "load the modules xt_owner, xt_comment on the node"},
		{"iptables-restore: No chain/target/match by that name.\n", proxyLine, nil, "load the modules xt_TPROXY on the node"},
		{"Warning: Extension owner revision 0 not supported, missing kernel module?\niptables-restore: line 9 failed\n", ownerLine, nil, "load the modules xt_owner, xt_comment on the node"},
		{"line 3: RULE_APPEND failed (Invalid argument): rule in chain PILLION_A\n", proxyLine, nil, ""},
		{"iptables-restore: No chain/target/match by that name.\n", "-A OUTPUT -j PILLION_OUTPUT", nil, ""},
		{"", "", nil, ""},
	} {
		got := diagnose(test.stderr, test.line)
		switch {
		case test.want == errRefused && kernel.IsRefused(got): // by a cause that this process has
		case test.says == "" && !errors.Is(got, test.want),
			test.says != "" && (got == nil || !strings.Contains(got.Error(), test.says)):
			t.Errorf("%s: got %v, want %v%s", test.stderr, got, test.want, test.says)
		}
	}
}
