package xtables

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/kernel"
)

// Real messages of programs on failure, and the one-line error made of them.
func TestTheErrorOfAProgramIsOneLineThatNamesTheRule(t *testing.T) {
	const input = "*nat\n:PILLION_A - [0:0]\n-A PILLION_A -p tcp -m tcp --dport 99999 -j RETURN\nCOMMIT\n"
	for _, test := range []struct {
		name, stderr, want string
		unsupported        bool
	}{
		{"nft refuses an option",
			"iptables-nft-restore v1.8.9 (nf_tables): invalid port/service `99999' specified\nError occurred at line: 3\nTry `iptables-nft-restore -h' or 'iptables-nft-restore --help' for more information.\n",
			"invalid port/service `99999' specified (in: -A PILLION_A -p tcp -m tcp --dport 99999 -j RETURN)", false},
		{"the kernel refuses a rule",
			"iptables-nft-restore v1.8.9 (nf_tables): \nline 3: RULE_APPEND failed (Invalid argument): rule in chain PILLION_A\n",
			"line 3: RULE_APPEND failed (Invalid argument): rule in chain PILLION_A (in: -A PILLION_A", false},
		{"legacy names only the line", "iptables-restore: line 3 failed\n",
			"iptables-restore: line 3 failed (in: -A PILLION_A", false},
		{"a line that we did not write", "iptables-restore: line 7 failed\n", "iptables-restore: line 7 failed", false},
		{"line 0", "iptables-restore: line 0 failed\n", "iptables-restore: line 0 failed", false},
		{"the last line", "iptables-restore: line 4 failed\n", "iptables-restore: line 4 failed (in: COMMIT)", false},
		{"no table in the kernel",
			"ip6tables-restore v1.8.9 (legacy): ip6tables-restore: unable to initialize table 'nat'\n\nError occurred at line: 1\n",
			"unable to initialize table 'nat' (in: *nat)", false},
		{"no module for it",
			"iptables v1.8.9 (legacy): can't initialize iptables table `nat': Table does not exist (do you need to insmod?)\nPerhaps iptables or your kernel needs to be upgraded.\n",
			"Table does not exist (do you need to insmod?); Perhaps iptables or your kernel needs to be upgraded.: the kernel lacks support", true},
		{"silence", "", "exit status 3", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			program := filepath.Join(t.TempDir(), "iptables-restore")
			complaint := filepath.Join(t.TempDir(), "complaint")
			if err := os.WriteFile(complaint, []byte(test.stderr), 0o644); err != nil {
				t.Fatal(err)
			}
			nettest.WriteProgram(t, program, "#!/bin/sh\ncat "+complaint+" >&2\nexit 3\n")
			_, err := run(context.Background(), input, program)
			if err == nil || !strings.HasPrefix(err.Error(), "running iptables-restore: exit status 3") || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got error %v, want %q", err, test.want)
			}
			if strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "--help") {
				t.Errorf("not one line of substance: %q", err)
			}
			if got := errors.Is(err, kernel.ErrNoKernelSupport); got != test.unsupported {
				t.Errorf("blamed on the kernel: %t", got)
			}
		})
	}
}

func TestAProgramWithEndlessOutputIsEnded(t *testing.T) {
	if _, err := run(context.Background(), "", "yes"); !errors.Is(err, errTooMuchOutput) {
		t.Errorf("got error %v", err)
	}
}

func TestProgramsRunInTheCLocale(t *testing.T) {
	t.Setenv("LC_ALL", "de_DE.UTF-8")
	out, err := run(context.Background(), "", "sh", "-c", "echo $LC_ALL")
	if err != nil || out != "C\n" {
		t.Errorf("got %q, %v", out, err)
	}
}
