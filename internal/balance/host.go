package balance

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Host is the state of a host of a cluster. It lives as long as the host is one of its cluster, or has a request in
// progress.
type Host struct {
	Address netip.AddrPort // invalid for the one host of OriginalDestination
	Stats   HostStats

	cluster *Cluster
	active  atomic.Int64 // requests and connections
	added   time.Time    // zero: with the cluster

	group  *tcp.Group        // of connections that are made to it as long as the following does not change
	usable bool              // in the last view that has it
	tls    *mesh.UpstreamTLS // likewise

	outlier outlier
}

// HostStats counts what a host was used for.
type HostStats struct {
	Requests, Successes, Failures atomic.Uint64 // connections count as requests
	Refused                       atomic.Uint64 // requests whose connection could not be opened
}

// Active returns the number of requests and connections in progress.
func (h *Host) Active() int64 { return h.active.Load() }

// Ejected reports whether the host is ejected for its failures.
func (h *Host) Ejected() bool { return h.outlier.ejected.Load() }

func (h *Host) start() {
	h.active.Add(1)
	h.Stats.Requests.Add(1)
}

// Outcome is the result of an attempt of a request, or of a connection.
type Outcome struct {
	Status    int           // of the host's response; 0: none arrived
	GRPC      int           // grpc-status in the head of the response; -1: none
	Reason    flow.Reason   // flow.Completed or flow.Closed, or why it failed
	Connected bool          // there was a connection to the host
	Duration  time.Duration // of the attempt
}

// End ends a request.
func (h *Host) End(o Outcome) {
	h.active.Add(-1)
	h.cluster.requests.Add(-1)
	h.observe(o)
}

// Wait implements Queue.
func (h *Host) Wait() bool {
	c := h.cluster
	if !take(&c.pending, int64(c.view.Load().config.Breakers.Pending)) {
		c.Stats.Overflowed.Add(1)
		return false
	}
	return true
}

// Go implements Queue.
func (h *Host) Go() { h.cluster.pending.Add(-1) }

// renew has further connections to the host belong to another group if they are secured otherwise, or if the host is not usable
// any more.
func (h *Host) renew(usable bool, tls *mesh.UpstreamTLS) {
	if h.group == nil || h.usable && !usable || h.tls != tls {
		h.group = new(tcp.Group)
	}
	h.usable, h.tls = usable, tls
}

// Retry implements Retrier.
func (h *Host) Retry() bool {
	c := h.cluster
	if !take(&c.retries, c.retryLimit(&c.view.Load().config.Breakers)) {
		c.Stats.RetriesOverflowed.Add(1)
		return false
	}
	return true
}

// EndRetry implements Retrier.
func (h *Host) EndRetry() { h.cluster.retries.Add(-1) }

// connection is a Host as the lease of a connection of opaque bytes.
type connection Host

// End ends a connection.
func (c *connection) End(o Outcome) {
	h := (*Host)(c)
	h.active.Add(-1)
	h.cluster.connections.Add(-1)
	h.observe(o)
}

// result is what an outcome means for the host.
type result uint8

const (
	unrelated result = iota // ended by downstream or by us
	success
	failure      // a status of 500 and more, or a broken connection
	gateway      // 502, 503 and 504
	localConnect // no connection
	localTimeout // no response in time
)

// observe counts an outcome, and ejects the host if it was one failure too many.
func (h *Host) observe(o Outcome) {
	r := o.result()
	switch r {
	case unrelated:
		return
	case success:
		h.Stats.Successes.Add(1)
	case localConnect:
		h.Stats.Refused.Add(1)
		h.Stats.Failures.Add(1)
	default:
		h.Stats.Failures.Add(1)
	}
	if outliers := h.cluster.view.Load().config.Outliers; outliers != nil && h.outlier.count(outliers, r) {
		h.cluster.eject(h)
	}
}

// result maps an outcome as Envoy's router does: the status of gRPC stands for one of HTTP, a connection that failed for
// 503, a timeout for 504, and another failure of upstream for 500.
func (o *Outcome) result() result {
	status := o.Status
	if status != 0 && o.GRPC >= 0 {
		status = 500
		if o.GRPC < envoy.GRPCCodes {
			status = envoy.GRPCCode(o.GRPC).HTTPStatus()
		}
	}
	switch {
	case status == 502, status == 503, status == 504:
		return gateway
	case status >= 500, status != 0 && (o.Reason == flow.ResponseIncomplete || o.Reason == flow.UpstreamReset):
		return failure
	case status != 0:
		return success
	}
	switch o.Reason {
	case flow.Closed, flow.Completed:
		return success
	case flow.UpstreamTimeout:
		if o.Connected {
			return localTimeout
		}
		return localConnect
	case flow.RequestTimeout:
		return localTimeout
	case flow.UpstreamRefused, flow.UpstreamUnreachable, flow.UpstreamTLS:
		return localConnect
	case flow.UpstreamReset, flow.UpstreamClosed, flow.BadResponse, flow.ResponseIncomplete:
		return failure
	}
	return unrelated
}
