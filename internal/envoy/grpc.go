package envoy

import "net/http"

// GRPCCode is a status code of gRPC.
type GRPCCode uint8

// The status codes of gRPC.
const (
	GRPCOK GRPCCode = iota
	GRPCCanceled
	GRPCUnknown
	GRPCInvalidArgument
	GRPCDeadlineExceeded
	GRPCNotFound
	GRPCAlreadyExists
	GRPCPermissionDenied
	GRPCResourceExhausted
	GRPCFailedPrecondition
	GRPCAborted
	GRPCOutOfRange
	GRPCUnimplemented
	GRPCInternal
	GRPCUnavailable
	GRPCDataLoss
	GRPCUnauthenticated

	// GRPCCodes is their number.
	GRPCCodes = iota
)

// grpcCodes has each code at its number. http is the status that stands for it in HTTP (google/rpc/code.proto, and
// Envoy's grpc/status.cc).
var grpcCodes = [GRPCCodes]struct {
	number, name, envoy string
	http                int
}{
	GRPCOK:                 {"0", "OK", "OK", http.StatusOK},
	GRPCCanceled:           {"1", "CANCELLED", "Canceled", 499},
	GRPCUnknown:            {"2", "UNKNOWN", "Unknown", http.StatusInternalServerError},
	GRPCInvalidArgument:    {"3", "INVALID_ARGUMENT", "InvalidArgument", http.StatusBadRequest},
	GRPCDeadlineExceeded:   {"4", "DEADLINE_EXCEEDED", "DeadlineExceeded", http.StatusGatewayTimeout},
	GRPCNotFound:           {"5", "NOT_FOUND", "NotFound", http.StatusNotFound},
	GRPCAlreadyExists:      {"6", "ALREADY_EXISTS", "AlreadyExists", http.StatusConflict},
	GRPCPermissionDenied:   {"7", "PERMISSION_DENIED", "PermissionDenied", http.StatusForbidden},
	GRPCResourceExhausted:  {"8", "RESOURCE_EXHAUSTED", "ResourceExhausted", http.StatusTooManyRequests},
	GRPCFailedPrecondition: {"9", "FAILED_PRECONDITION", "FailedPrecondition", http.StatusBadRequest},
	GRPCAborted:            {"10", "ABORTED", "Aborted", http.StatusConflict},
	GRPCOutOfRange:         {"11", "OUT_OF_RANGE", "OutOfRange", http.StatusBadRequest},
	GRPCUnimplemented:      {"12", "UNIMPLEMENTED", "Unimplemented", http.StatusNotImplemented},
	GRPCInternal:           {"13", "INTERNAL", "Internal", http.StatusInternalServerError},
	GRPCUnavailable:        {"14", "UNAVAILABLE", "Unavailable", http.StatusServiceUnavailable},
	GRPCDataLoss:           {"15", "DATA_LOSS", "DataLoss", http.StatusInternalServerError},
	GRPCUnauthenticated:    {"16", "UNAUTHENTICATED", "Unauthenticated", http.StatusUnauthorized},
}

// httpToGRPC has the code that gRPC gives a response of HTTP that is not gRPC's (grpc/doc/http-grpc-status-mapping.md).
// Other statuses are UNKNOWN.
var httpToGRPC = map[int]GRPCCode{
	http.StatusBadRequest:                  GRPCInternal,
	http.StatusUnauthorized:                GRPCUnauthenticated,
	http.StatusForbidden:                   GRPCPermissionDenied,
	http.StatusNotFound:                    GRPCUnimplemented,
	http.StatusTooManyRequests:             GRPCUnavailable,
	http.StatusRequestHeaderFieldsTooLarge: GRPCInternal,
	http.StatusBadGateway:                  GRPCUnavailable,
	http.StatusServiceUnavailable:          GRPCUnavailable,
	http.StatusGatewayTimeout:              GRPCUnavailable,
}

// ParseGRPCCode returns the code that the value of a grpc-status field stands for, if it is one of the known codes in its
// usual spelling.
func ParseGRPCCode(text []byte) (GRPCCode, bool) {
	for i := range grpcCodes {
		if string(text) == grpcCodes[i].number {
			return GRPCCode(i), true
		}
	}
	return 0, false
}

// GRPCCodeOf returns the code that stands for a status of HTTP.
func GRPCCodeOf(status int) GRPCCode {
	if code, ok := httpToGRPC[status]; ok {
		return code
	}
	return GRPCUnknown
}

// Number returns the code as it stands in a grpc-status field.
func (c GRPCCode) Number() string { return grpcCodes[c].number }

// String returns the name in gRPC's specification, such as "DEADLINE_EXCEEDED".
func (c GRPCCode) String() string { return grpcCodes[c].name }

// EnvoyName returns the name in Envoy's access log, such as "DeadlineExceeded".
func (c GRPCCode) EnvoyName() string { return grpcCodes[c].envoy }

// HTTPStatus returns the status of HTTP that stands for the code.
func (c GRPCCode) HTTPStatus() int { return grpcCodes[c].http }
