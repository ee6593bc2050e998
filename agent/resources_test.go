package agent

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/controlplane"
)

func TestProblemsOfTheIdentityAreShown(t *testing.T) {
	now := time.Now()
	s := controlplane.IdentityStatus{Source: "CA", SPIFFE: "spiffe://a/b", NotAfter: now.Add(time.Hour)}
	if i := describeIdentity(&s, now); i.Problems != nil || i.Why != "" || i.ExpiresSeconds != 3600 {
		t.Errorf("without problems: %+v", i)
	}
	s.LastError, s.RevocationError, s.OutputError = errors.New("no route"), errors.New("truncated"), errors.New("read-only")
	want := []string{"revocation lists: truncated", "not written to the output directory: read-only"}
	if i := describeIdentity(&s, now); i.Why != "no route" || !slices.Equal(i.Problems, want) {
		t.Errorf("with problems: %+v", i)
	}
}
