package main

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// lookTime bounds the look at the rules when the agent starts.
const lookTime = 5 * time.Second

// warnIfCaptured logs a warning if the rules capture, or may capture, the connections of an agent of this user and group.
// Without permission to read the rules, or without rules, it compares with the user that init exempts by default.
func warnIfCaptured(log *slog.Logger, uid, gid uint32) {
	ctx, cancel := context.WithTimeout(context.Background(), lookTime)
	defer cancel()
	live, err := iptables.Look(ctx)
	owners := exempted(live.Held)
	switch {
	case err == nil && len(owners) > 0:
		if !exempts(owners, uid, gid) {
			log.Warn("the rules do not exempt the agent's user, its own connections may loop", "uid", uid, "gid", gid,
				"exempt", ownerNames(owners), "remedy", "run the agent as one of these, or name it to init by --proxy-uid or --proxy-gid")
		}
	case uid != capture.DefaultProxyID && gid != capture.DefaultProxyID:
		log.Warn("the agent is neither user nor group 1337, its own connections may loop", "uid", uid, "gid", gid,
			"remedy", "run the agent as 1337, or name its user to init by --proxy-uid")
	}
}

// exempted returns the users and groups whose outbound connections rules let pass whatever their destination.
func exempted(held []ruleset.Held) (owners []ruleset.Owner) {
	for _, h := range held {
		for _, r := range h.Rules.All() {
			if owner := r.Match.Owner; owner.Kind != ruleset.Anybody && r.Match == (ruleset.Match{Owner: owner}) && r.Target == (ruleset.Return{}) {
				owners = append(owners, owner)
			}
		}
	}
	return owners
}

func exempts(owners []ruleset.Owner, uid, gid uint32) bool {
	for _, o := range owners {
		id := uid
		if o.Kind == ruleset.GID {
			id = gid
		}
		if o.IDs.First <= id && id <= o.IDs.Last {
			return true
		}
	}
	return false
}

// ownerNames lists owners, each one once, such as "uid/1337 gid/1337".
func ownerNames(owners []ruleset.Owner) string {
	var names []string
	seen := make(map[ruleset.Owner]bool)
	for _, o := range owners {
		if !seen[o] {
			names = append(names, o.String())
		}
		seen[o] = true
	}
	return strings.Join(names, " ")
}
