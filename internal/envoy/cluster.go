package envoy

import (
	"strconv"
	"sync"
)

// Clusters that every sidecar of Istio has.
const (
	PassthroughCluster        = "PassthroughCluster"        // outbound, to the original destination
	InboundPassthroughCluster = "InboundPassthroughCluster" // inbound, to a port that no service names
	BlackHoleCluster          = "BlackHoleCluster"          // has no endpoint: what is sent there is refused
)

// Routes and virtual hosts of a sidecar without routes of its own.
const (
	RouteInbound        = "default"
	RouteOutbound       = "allow_any"
	VirtualHostInbound  = "inbound|http|0"
	VirtualHostOutbound = "allow_any"
)

// maxNames bounds the remembered names: a port scan must not make the process grow.
const maxNames = 256

var inboundNames struct {
	sync.RWMutex
	byPort map[uint16]string
}

// InboundCluster returns the name of the cluster that stands for a port of the workload, such as "inbound|8080||". The
// names of the first 256 ports are kept, so that a connection does not cost an allocation.
func InboundCluster(port uint16) string {
	n := &inboundNames
	n.RLock()
	name, ok := n.byPort[port]
	full := len(n.byPort) >= maxNames
	n.RUnlock()
	if ok {
		return name
	}
	name = "inbound|" + strconv.Itoa(int(port)) + "||"
	if full { // after a scan of ports, others must not wait for a lock in vain
		return name
	}
	n.Lock()
	defer n.Unlock()
	if n.byPort == nil {
		n.byPort = make(map[uint16]string)
	}
	if len(n.byPort) < maxNames {
		n.byPort[port] = name
	}
	return name
}
