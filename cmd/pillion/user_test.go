package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables"
)

func TestTheAgentWarnsWhenTheRulesDoNotExemptItsUser(t *testing.T) {
	nettest.RequireRoot(t)
	ids := func(n uint32) []capture.IDRange { return []capture.IDRange{{First: n, Last: n}} }
	for _, c := range []struct {
		name       string
		uids, gids []capture.IDRange // exempted by the rules; nil: no rules
		uid, gid   uint32
		want       string // of the warning; empty: no warning
	}{
		{"no rules, the default user", nil, nil, 1337, 1000, ""},
		{"no rules, the default group", nil, nil, 0, 1337, ""},
		{"no rules, another user", nil, nil, 1000, 1000, "neither user nor group 1337"},
		{"the default user", ids(1337), ids(1337), 1337, 1337, ""},
		{"the default group", ids(1337), ids(1337), 0, 1337, ""},
		{"another user", ids(1337), ids(1337), 1000, 1000, `uid=1000 gid=1000 exempt="uid/1337 gid/1337"`},
		{"a configured user", ids(1000), ids(1337), 1000, 1000, ""},
		{"a configured group", ids(1000), ids(2000), 1337, 2000, ""},
		{"the default user where others are configured", ids(1000), ids(2000), 1337, 1337, `exempt="uid/1000 gid/2000"`},
		{"a range", []capture.IDRange{{First: 1000, Last: 1010}}, ids(1337), 1005, 5, ""},
	} {
		ns := nettest.New(t, "user")
		var log bytes.Buffer
		ns.Do(t, func() error {
			if c.uids != nil {
				spec := capture.Default()
				spec.ProxyUIDs, spec.ProxyGIDs = c.uids, c.gids
				plan, err := iptables.PlanInit(t.Context(), spec, iptables.NFTables)
				if err == nil {
					err = plan.Commit(t.Context())
				}
				if err != nil {
					return err
				}
			}
			warnIfCaptured(slog.New(slog.NewTextHandler(&log, nil)), c.uid, c.gid)
			return nil
		})
		lines := strings.Count(log.String(), "level=WARN")
		if c.want == "" && lines != 0 || c.want != "" && (lines != 1 || !strings.Contains(log.String(), c.want) || !strings.Contains(log.String(), "--proxy-uid")) {
			t.Errorf("%s: logged %q, want %q", c.name, &log, c.want)
		}
	}
}
