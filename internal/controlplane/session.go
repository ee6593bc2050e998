package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// SessionConfig is the configuration of a Session. All fields without a stated nil are required.
type SessionConfig struct {
	Pod   *istiod.Pod
	Store *Store
	Kept  *Kept // the file with the last good resources; nil: they are not kept

	// KeptIdentity is a directory in memory that keeps certificates of the CA, with their keys, for a restart. Empty: they
	// are not kept.
	KeptIdentity string

	// FreeMemory gives memory back to the system. It is called when updates have paused. nil: debug.FreeOSMemory.
	FreeMemory func()

	Log *slog.Logger
}

// Session is a pod's relation with istiod: an identity that is renewed, and a stream of configuration. Losing istiod
// changes neither. Make it with NewSession and start it with Run.
type Session struct {
	config SessionConfig
	client *xds.Client
	keeper *identity.Keeper // nil: the pod has no identity
	tidier *tidier

	mu     sync.Mutex
	counts [xds.Types]Counts
	calls  Calls
}

// Counts are what a Session has received of one type.
type Counts struct {
	Bytes   int64         // of resources
	Decoded time.Duration // spent in taking updates
	Last    int64         // bytes of the last update
}

// Calls counts the calls of the CA.
type Calls struct{ All, Failed int64 }

// NewSession returns a session that has not begun.
func NewSession(config SessionConfig) (*Session, error) {
	if config.Pod == nil || config.Store == nil || config.Log == nil {
		return nil, errors.New("controlplane: Pod, Store and Log are required")
	}
	node, err := config.Pod.Node.Encode()
	if err != nil {
		return nil, err
	}
	if config.FreeMemory == nil {
		config.FreeMemory = debug.FreeOSMemory
	}
	s := &Session{config: config}
	s.tidier = newTidier(s.tidy)
	if source := s.source(node); source != nil {
		var changed func(*identity.Identity)
		if kept, ok := source.(*keptIdentity); ok {
			changed = kept.save
		}
		s.keeper = identity.NewKeeper(identity.Config{
			Changed: changed, Source: source, Log: config.Log, Revocations: config.Pod.Revocations, Output: config.Pod.Output, OutputShared: config.Pod.OutputShared,
		})
	}
	s.client = xds.New(xds.Config{Delta: config.Pod.Delta, Node: node, Connect: s.connect, Handler: (*handler)(s), Log: config.Log})
	if config.Kept != nil {
		kept := *config.Kept
		kept.Current = func() bool { return s.client.Status().Connected }
		s.config.Kept = &kept
	}
	return s, nil
}

// source returns where the identity comes from, or nil if the pod has none.
func (s *Session) source(node []byte) identity.Source {
	pod := s.config.Pod
	switch {
	case pod.Socket != nil:
		pod.Socket.Node = node
		return pod.Socket
	case pod.Files != nil:
		return pod.Files
	case pod.CA.Address != "":
		ca := &identity.CA{Call: s.call, SPIFFE: pod.SPIFFE, Lifetime: pod.Lifetime, Signer: pod.Signer}
		if s.config.KeptIdentity == "" {
			return ca
		}
		return &keptIdentity{CA: ca, directory: s.config.KeptIdentity, log: s.config.Log}
	}
	return nil
}

// Run keeps the identity and the stream until ctx ends. The stream does not wait for the identity: istiod authenticates
// it by the token.
func (s *Session) Run(ctx context.Context) {
	if kept := s.config.Kept; kept != nil {
		kept.Restore(s.config.Store, s.config.Log)
	}
	defer s.tidier.stop()
	if s.Snapshot() != nil {
		s.tidier.updated(tidyBytes) // what was restored
	}
	var parts sync.WaitGroup
	if s.keeper != nil {
		parts.Go(func() { s.keeper.Run(ctx) })
	} else {
		s.config.Log.Warn("the pod has no workload certificate: none is mounted, and no CA is called")
	}
	parts.Go(func() { s.config.Store.Run(ctx) })
	if s.config.Kept != nil {
		parts.Go(func() { s.config.Kept.Run(ctx, s.config.Store, s.config.Log) })
	}
	parts.Go(func() { s.client.Run(ctx) })
	parts.Wait()
}

// tidy gives memory back when updates have paused.
func (s *Session) tidy() {
	s.config.Store.Forget()
	s.config.FreeMemory()
}

// HasIdentity reports whether the pod has a source of an identity.
func (s *Session) HasIdentity() bool { return s.keeper != nil }

// Identity returns the workload's identity, or nil without one. It may have expired.
func (s *Session) Identity() *identity.Identity {
	if s.keeper == nil {
		return nil
	}
	return s.keeper.Current()
}

// Resources returns the resources as they are now.
func (s *Session) Resources() Resources { return s.config.Store.Resources() }

// Snapshot returns the configuration in force, or nil before the first.
func (s *Session) Snapshot() *mesh.Snapshot { return s.config.Store.Snapshot() }

// Initialized returns a channel that is closed when the first configuration is in force.
func (s *Session) Initialized() <-chan struct{} { return s.config.Store.Initialized() }

// callTimeout bounds one call of the CA.
const callTimeout = 10 * time.Second

// call makes one call of the CA, on a connection of its own: calls are hours apart, and a new connection reads the roots
// again.
func (s *Session) call(ctx context.Context, method string, message []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	connection, err := s.config.Pod.CA.Connect()
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	response, err := connection.Call(ctx, method, message)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls.All++
	if err != nil {
		s.calls.Failed++
	}
	return response, err
}

// connect opens a stream on a connection of its own, so that each stream reads the roots again.
func (s *Session) connect(ctx context.Context) (xds.Stream, error) {
	connection, err := s.config.Pod.Discovery.Connect()
	if err != nil {
		return nil, err
	}
	stream, err := connection.Stream(ctx, xds.Method(s.config.Pod.Delta))
	if err != nil {
		connection.Close()
		return nil, err
	}
	return &ownStream{stream, connection}, nil
}

// ownStream is a stream with a connection of its own.
type ownStream struct {
	xds.Stream
	connection *istiod.Connection
}

func (s *ownStream) Close() {
	s.Stream.Close()
	s.connection.Close()
}

// handler is a Session that takes updates.
type handler Session

// Update passes an update on. Roots of the mesh concern the identity as well.
func (h *handler) Update(u xds.Update) xds.Outcome {
	bytes := 0
	for i := range u.Resources {
		bytes += len(u.Resources[i].Value)
	}
	start := time.Now()
	outcome := h.config.Store.Update(u)
	h.mu.Lock()
	counts := &h.counts[u.Type]
	counts.Bytes += int64(bytes)
	counts.Last = int64(bytes)
	counts.Decoded += time.Since(start)
	h.mu.Unlock()
	h.tidier.updated(bytes)
	if u.Type == xds.ProxyConfigs && len(outcome.Rejected) == 0 {
		h.anchor(u.Resources)
	}
	return outcome
}

// anchor trusts the roots that istiod announces for the mesh.
func (h *handler) anchor(resources []xds.Resource) {
	if h.keeper == nil {
		return
	}
	var texts [][]byte
	for _, resource := range resources {
		roots, _, err := mesh.DecodeTrustBundle(resource.Value)
		if err != nil {
			h.config.Log.Warn("roots of the mesh not used", "err", fmt.Errorf("decoding them: %w", err))
			return
		}
		for _, root := range roots {
			texts = append(texts, []byte(root))
		}
	}
	if len(texts) == 0 {
		return
	}
	roots, err := identity.ParseRoots(texts...)
	if err != nil {
		h.config.Log.Warn("roots of the mesh not used", "err", err)
		return
	}
	h.keeper.Anchor(roots)
}
