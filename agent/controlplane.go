package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/healthz"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/peers"
	"github.com/pillion-proxy/pillion/internal/serve"
)

// controlPlane is the agent's session with its control plane.
type controlPlane struct {
	pod     *istiod.Pod           // how it is reached; nil: there is no control plane
	session *controlplane.Session // likewise
	peers   *peers.Exchange       // likewise
	end     context.CancelFunc
	ended   chan struct{} // nil before start
}

// addControlPlane makes the session. It does not connect.
func (a *Agent) addControlPlane() error {
	c := a.config.ControlPlane
	if c.Pod == nil {
		return nil
	}
	pod := *c.Pod
	pod.Node.Metadata = withAddresses(pod.Node.Metadata, a.addresses.All())
	if addresses, _ := pod.Node.Metadata["INSTANCE_IPS"].(string); pod.Node.IP == "" {
		pod.Node.IP, _, _ = strings.Cut(addresses, ",")
	}
	store, err := controlplane.NewStore(controlplane.StoreConfig{Log: a.log, Names: a.setNames, Bound: a.followBound, Stored: a.followHosts, Listeners: a.telling.follow})
	if err != nil {
		return err
	}
	config := controlplane.SessionConfig{Pod: &pod, Store: store, Log: a.log, KeptIdentity: identityDirectory(c.Kept), FreeMemory: a.freeMemory}
	if c.Kept != "" {
		cluster, _ := pod.Node.Metadata["CLUSTER_ID"].(string)
		config.Kept = &controlplane.Kept{Path: filepath.Join(c.Kept, keptFile), Node: pod.Node.ID(), Cluster: cluster}
	}
	session, err := controlplane.NewSession(config)
	if err != nil {
		return &FieldError{Field: "ControlPlane.Pod", Err: err}
	}
	own := a.config.Workload.Pod
	description, err := pod.Node.Description(known(own.Workload), known(own.CanonicalService), known(own.CanonicalRevision))
	if err != nil {
		return &FieldError{Field: "ControlPlane.Pod", Err: err}
	}
	a.plane.pod, a.plane.session, a.plane.peers = &pod, session, peers.New(pod.Node.ID(), description)
	if logs := a.telling.planned; logs != nil {
		logs.NodeID, logs.Cluster = pod.Node.ID(), pod.Node.Cluster
		if logs.Node, err = pod.Node.Encode(); err != nil {
			return &FieldError{Field: "ControlPlane.Pod", Err: err}
		}
	}
	return nil
}

// followBound makes open connections look at the configuration in force, and a gateway's sockets follow it.
func (a *Agent) followBound() {
	a.poller.WakeAll()
	if a.accepting != nil {
		a.accepting.Notify()
	}
}

// followHosts closes idle connections to hosts that the configuration in force does not have.
func (a *Agent) followHosts() {
	if a.balancer != nil {
		a.balancer.Follow()
	}
}

// keptFile is the file with the last configuration.
const keptFile = "pillion-configuration"

// withAddresses returns the node's metadata with the pod's other addresses: istiod computes inbound listeners for all of
// them. The first stays first.
func withAddresses(metadata map[string]any, addresses []netip.Addr) map[string]any {
	var all []string
	if first, _ := metadata["INSTANCE_IPS"].(string); first != "" {
		all = strings.Split(first, ",")
	}
	for _, address := range addresses {
		address = address.Unmap().WithZone("")
		if !address.IsGlobalUnicast() || address == capture.InboundSource6 || slices.Contains(all, address.String()) {
			continue
		}
		all = append(all, address.String())
	}
	extended := map[string]any{}
	for key, value := range metadata {
		extended[key] = value
	}
	if len(all) > 0 {
		extended["INSTANCE_IPS"] = strings.Join(all, ",")
	}
	return extended
}

// mesh returns the configuration that connections obey, or nil without one.
func (a *Agent) mesh() serve.Mesh {
	switch {
	case a.plane.session != nil:
		return a.plane.session
	case a.config.Edge != nil:
		return a.config.Edge
	}
	return nil
}

// startControlPlane begins the session. Connections that are held for the first configuration are woken by it.
func (a *Agent) startControlPlane() {
	p := &a.plane
	if p.session == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.end, p.ended = cancel, make(chan struct{})
	go a.holdSession(ctx)
}

func (a *Agent) holdSession(ctx context.Context) {
	defer close(a.plane.ended)
	woken := make(chan struct{})
	go a.wakeHeld(ctx, woken)
	a.plane.session.Run(ctx)
	<-woken
}

// wakeHeld wakes the connections that are held, once the first configuration is in force.
func (a *Agent) wakeHeld(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	select {
	case <-ctx.Done():
	case <-a.plane.session.Initialized():
		a.log.Info("configured by the control plane")
		a.poller.WakeAll()
	}
}

// stopControlPlane ends the session. Its configuration stays in force. A second call does nothing.
func (a *Agent) stopControlPlane() {
	if a.plane.ended != nil {
		a.plane.end()
		<-a.plane.ended
	}
}

// controlPlaneGates are the conditions of readiness that a control plane adds.
func (a *Agent) controlPlaneGates() []healthz.Gate {
	if a.plane.session == nil {
		return nil
	}
	gates := []healthz.Gate{{Name: "configuration", Open: a.configured}}
	if a.plane.session.HasIdentity() {
		gates = append(gates, healthz.Gate{Name: "identity", Open: a.identified})
	}
	return gates
}

// identified is the gate of the first certificate. An expired one does not close it again: a pod that cannot be reached by
// mutual TLS may still be reached otherwise.
func (a *Agent) identified() error {
	if a.plane.session.Identity() != nil {
		return nil
	}
	if status := a.plane.session.Status().Identity; status.LastError != nil {
		return fmt.Errorf("no workload certificate from the %s: %w", status.Source, status.LastError)
	}
	return errors.New("no workload certificate yet")
}

// configured is the gate of the first configuration. Losing the control plane does not close it again.
func (a *Agent) configured() error {
	select {
	case <-a.plane.session.Initialized():
		return nil
	default:
	}
	status := a.plane.session.Status()
	if status.Stream.LastError != nil && !status.Stream.Connected {
		return errors.New("no configuration from " + status.Address + ": " + status.Stream.LastError.Error())
	}
	return errors.New("no configuration from " + status.Address + " yet")
}
