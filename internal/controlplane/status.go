package controlplane

import (
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Status is the state of a Session, for people and metrics.
type Status struct {
	Address      string
	Stream       xds.Status
	Counts       [xds.Types]Counts
	Findings     [xds.Types][mesh.Security + 1]int // of the resources, by class
	Calls        Calls
	LastPush     time.Time // of any type; zero before the first
	Initialized  bool
	Initializing time.Duration // how long it has taken
	Identity     IdentityStatus
}

// IdentityStatus is the state of the workload's identity.
type IdentityStatus struct {
	Source    string // "CA", "files", "socket", or empty: the pod has no identity
	SPIFFE    string // empty before the first certificate
	NotBefore time.Time
	NotAfter  time.Time
	Renewals  int64
	Failures  int64
	LastError error
	Renewal   time.Time // when the next certificate is fetched, or after a failure the next attempt; zero: not known

	// Why revocation lists are not used as they are, and why the output directory does not have the current identity. nil: all
	// is well.
	RevocationError, OutputError error
}

// Status returns the current state.
func (s *Session) Status() Status {
	status := Status{Address: s.config.Pod.Discovery.Address, Stream: s.client.Status(), Identity: s.identityStatus()}
	s.mu.Lock()
	status.Counts, status.Calls = s.counts, s.calls
	s.mu.Unlock()
	for _, t := range status.Stream.Types {
		if t.Last.After(status.LastPush) {
			status.LastPush = t.Last
		}
	}
	for t, counts := range s.config.Store.TypeCounts() {
		status.Findings[t] = counts.Findings
	}
	status.Initializing, status.Initialized = s.config.Store.Initializing()
	return status
}

func (s *Session) identityStatus() IdentityStatus {
	if s.keeper == nil {
		return IdentityStatus{}
	}
	kept := s.keeper.Status()
	status := IdentityStatus{Source: "CA", Renewals: kept.Renewals, Failures: kept.Failures, LastError: kept.LastError, RevocationError: kept.RevocationError, OutputError: kept.OutputError, Renewal: kept.Next}
	switch {
	case s.config.Pod.Socket != nil:
		status.Source = "socket"
	case s.config.Pod.Files != nil:
		status.Source = "files"
	}
	if current := s.keeper.Current(); current != nil {
		status.SPIFFE, status.NotBefore, status.NotAfter = current.SPIFFE, current.Certificate.Leaf.NotBefore, current.NotAfter()
	}
	return status
}
