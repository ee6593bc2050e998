package route

import (
	"net/http"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// Replies that do not depend on the request. Callers do not change them.
var (
	// NoRoute is the reply to a request that no virtual host or no route is for.
	NoRoute = &Reply{Status: http.StatusNotFound, Flags: envoy.FlagNoRouteFound, Details: envoy.DetailsRouteNotFound, Reason: flow.Completed}

	// Misdirected is the reply to a request for a host of another server than the one that its connection is for.
	Misdirected = &Reply{Status: http.StatusMisdirectedRequest, Body: "misdirected request", Details: envoy.DetailsMisdirected, Reason: flow.Completed}

	// NoUpgrade is the reply to a request for an upgrade that is not configured.
	NoUpgrade = &Reply{Status: http.StatusForbidden, Details: envoy.DetailsUpgradeFailed, Reason: flow.Completed}

	// Refused is the reply to a request whose routes, virtual host or route is not understood.
	Refused = &Reply{Status: http.StatusServiceUnavailable, Flags: envoy.FlagNoRouteFound, Reason: flow.MeshRefused}

	// noHost is the reply to a request without a host that is to be redirected to its host. A URI of http and https has a host
	// (RFC 9110 §4.2).
	noHost = &Reply{Status: http.StatusBadRequest, Flags: envoy.FlagDownstreamProtocolError, Details: envoy.DetailsMissingHost, Reason: flow.BadFraming}
)

// notFound are the replies to requests whose cluster does not exist, by RouteAction.cluster_not_found_response_code.
var notFound = map[int]*Reply{
	http.StatusServiceUnavailable:  clusterNotFound(http.StatusServiceUnavailable),
	http.StatusNotFound:            clusterNotFound(http.StatusNotFound),
	http.StatusInternalServerError: clusterNotFound(http.StatusInternalServerError),
}

func clusterNotFound(status int) *Reply {
	return &Reply{Status: status, Flags: envoy.FlagNoClusterFound, Details: envoy.DetailsClusterNotFound, Reason: flow.Completed, Edited: true}
}
