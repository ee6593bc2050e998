package controlplane

import (
	"hash/maphash"
	"log/slog"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// maxLogged bounds the findings that are logged, of one type and in sum.
const maxLogged = 200

// findingLog logs each finding once.
type findingLog struct {
	seen map[uint64]struct{}
	full bool
}

// findings logs findings that were not logged yet. The same finding of other resources is not logged again: an
// EnvoyFilter changes all resources of a type.
func (l *findingLog) findings(log *slog.Logger, t xds.Type, name string, findings []mesh.Finding) {
	for _, f := range findings {
		if f.Class == mesh.Cosmetic || l.full {
			continue
		}
		key := maphash.String(hashSeed, strings.Join([]string{t.String(), f.Class.String(), withoutIndices(f.Path), f.Problem, f.Origin}, "\x00"))
		if _, ok := l.seen[key]; ok {
			continue
		}
		if len(l.seen) >= maxLogged {
			l.full = true
			log.Warn("further findings in the configuration are not logged", "logged", len(l.seen))
			return
		}
		if l.seen == nil {
			l.seen = map[uint64]struct{}{}
		}
		l.seen[key] = struct{}{}
		log.Warn("configuration not honoured", "class", f.Class, "type", t, "resource", name, "field", f.Path, "problem", f.Problem, "origin", f.Origin)
	}
}

// withoutIndices returns a path without the indices of lists.
func withoutIndices(path string) string {
	var b strings.Builder
	for {
		before, rest, ok := strings.Cut(path, "[")
		b.WriteString(before)
		if !ok {
			return b.String()
		}
		_, path, _ = strings.Cut(rest, "]")
	}
}
