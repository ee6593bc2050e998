package report

import (
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Exempt lists users and groups whose outbound connections the rules do not capture, whatever the destination.
type Exempt []ruleset.Owner

// Exempted returns those that rules exempt, each one once.
func Exempted(held []ruleset.Held) (exempt Exempt) {
	for _, h := range held {
		for _, r := range h.Rules.All() {
			owner := r.Match.Owner
			if owner.Kind != ruleset.Anybody && r.Match == (ruleset.Match{Owner: owner}) && r.Target == (ruleset.Return{}) && !slices.Contains(exempt, owner) {
				exempt = append(exempt, owner)
			}
		}
	}
	return exempt
}

// Contains reports whether the user or the group is exempt.
func (e Exempt) Contains(uid, gid uint32) bool {
	return slices.ContainsFunc(e, func(o ruleset.Owner) bool {
		id := uid
		if o.Kind == ruleset.GID {
			id = gid
		}
		return o.IDs.First <= id && id <= o.IDs.Last
	})
}

// String returns a list such as "uid/1337 gid/1337".
func (e Exempt) String() string {
	var names []string
	for _, o := range e {
		names = append(names, o.String())
	}
	return strings.Join(names, " ")
}
