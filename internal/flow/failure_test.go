package flow

import "testing"

func TestARecordCountsAsAnErrorForOneReason(t *testing.T) {
	for _, c := range []struct {
		reason     Reason
		status     int
		grpc       bool
		grpcStatus string
		want       string
	}{
		{reason: ""}, // open
		{reason: Closed},
		{reason: Drained},
		{reason: Completed, status: 200},
		{reason: Completed, status: 499},
		{reason: Completed, status: 500, want: FailureStatus},
		{reason: Completed, status: 503, grpc: true, want: FailureStatus},
		{reason: UpstreamRefused, want: "upstream_refused"},
		{reason: BadFraming, status: 400, want: "bad_framing"},
		{reason: BadResponse, status: 502, want: "bad_response"},
		{reason: DownstreamLeft, status: 200, want: "downstream_left"},
		{reason: Completed, status: 200, grpc: true, grpcStatus: "0"},
		{reason: Completed, status: 200, grpc: true, grpcStatus: "5"}, // NOT_FOUND is the caller's fault
		{reason: Completed, status: 200, grpc: true, grpcStatus: "14", want: FailureGRPC},
		{reason: Completed, status: 200, grpc: true, grpcStatus: "99", want: FailureGRPC}, // clients read UNKNOWN
		{reason: Completed, status: 200, grpc: true, want: FailureGRPC},                   // likewise
		{reason: Completed, status: 404, grpc: true, want: FailureGRPC},                   // UNIMPLEMENTED
		{reason: Completed, status: 401, grpc: true},                                      // UNAUTHENTICATED
		{reason: Completed, status: 200, grpcStatus: "14"},                                // not a gRPC call
	} {
		r := &Record{Reason: c.reason, HTTP: &Request{Status: c.status, GRPC: c.grpc, GRPCStatus: []byte(c.grpcStatus)}}
		if got := r.Failure(); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}
