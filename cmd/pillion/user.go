package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/report"
)

// lookTime bounds the time for reading the rules when the agent starts.
const lookTime = 5 * time.Second

// warnIfCaptured logs a warning if the rules capture, or may capture, the connections of an agent of this user and group.
// Without permission to read the rules, or without rules, it compares with the user that init exempts by default.
func warnIfCaptured(log *slog.Logger, uid, gid uint32) {
	ctx, cancel := context.WithTimeout(context.Background(), lookTime)
	defer cancel()
	live, err := iptables.Look(ctx)
	exempt := report.Exempted(live.Held)
	switch {
	case err == nil && len(exempt) > 0:
		if !exempt.Contains(uid, gid) {
			log.Warn("the rules do not exempt the agent's user, its own connections may loop", "uid", uid, "gid", gid,
				"exempt", exempt.String(), "remedy", "run the agent as one of these, or name it to init by --proxy-uid or --proxy-gid")
		}
	case uid != capture.DefaultProxyID && gid != capture.DefaultProxyID:
		log.Warn("the agent is neither user nor group 1337, its own connections may loop", "uid", uid, "gid", gid,
			"remedy", "run the agent as 1337, or name its user to init by --proxy-uid")
	}
}
