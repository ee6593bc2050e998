package flow

import (
	"net/http"

	"github.com/pillion-proxy/pillion/internal/envoy"
)

// Failures that a complete response reports. Other failures have the name of the record's Reason.
const (
	FailureStatus = "status_5xx"  // a status of 500 or more
	FailureGRPC   = "grpc_status" // the result of a gRPC call for which HTTP has a status of 500 or more
)

// Failure returns why a record counts as an error: the name of its Reason, FailureStatus or FailureGRPC. It is empty if
// the record ended in order, or is open. The access log's filter, the live page and pillion's own commands all use it.
//
// A gRPC call whose response has no valid grpc-status has the result that its client makes of the status of HTTP.
func (r *Record) Failure() string {
	switch {
	case r.Reason == "":
		return ""
	case r.Reason != Closed && r.Reason != Completed && r.Reason != Drained:
		return string(r.Reason)
	case r.HTTP.Status >= http.StatusInternalServerError:
		return FailureStatus
	case r.HTTP.GRPC:
		code, ok := envoy.ParseGRPCCode(r.HTTP.GRPCStatus)
		if !ok {
			code = envoy.GRPCCodeOf(r.HTTP.Status)
		}
		if code.HTTPStatus() >= http.StatusInternalServerError {
			return FailureGRPC
		}
	}
	return ""
}
