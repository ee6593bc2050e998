// Package envoy is the vocabulary that users of Istio search and alert for: response flags, response code details, the
// names of clusters and routes, and gRPC's status codes. Each word is defined here and nowhere else; a test in this
// package holds the rest of the tree to that. It imports no other room.
package envoy

import (
	"slices"
	"strings"
)

// Response flags (%RESPONSE_FLAGS%), by their long names in Envoy's source/common/stream_info/utility.h. Several are
// joined by commas, as in "UF,URX".
const (
	FlagDownstreamConnectionTermination = "DC"
	FlagDownstreamProtocolError         = "DPE"
	FlagDurationTimeout                 = "DT"
	FlagDownstreamRemoteReset           = "DR"
	FlagDelayInjected                   = "DI"
	FlagFaultInjected                   = "FI"
	FlagLocalReset                      = "LR"
	FlagNoClusterFound                  = "NC"
	FlagNoHealthyUpstream               = "UH"
	FlagNoRouteFound                    = "NR"
	FlagOverloadManager                 = "OM"
	FlagStreamIdleTimeout               = "SI"
	FlagUpstreamConnectionFailure       = "UF"
	FlagUpstreamConnectionTermination   = "UC"
	FlagUpstreamOverflow                = "UO"
	FlagUpstreamProtocolError           = "UPE"
	FlagUpstreamRemoteReset             = "UR"
	FlagUpstreamRequestTimeout          = "UT"
	FlagUpstreamRetryLimitExceeded      = "URX"

	// FlagsConnectFailed are those of Envoy's TCP proxy when every attempt to connect has failed.
	FlagsConnectFailed = FlagUpstreamConnectionFailure + "," + FlagUpstreamRetryLimitExceeded
)

// Response code details (%RESPONSE_CODE_DETAILS%), except those of a reset: see ResetBeforeResponse.
const (
	DetailsViaUpstream        = "via_upstream"
	DetailsClusterNotFound    = "cluster_not_found"
	DetailsCORS               = "cors_response"
	DetailsDirectResponse     = "direct_response"
	DetailsDownstreamLeft     = "downstream_remote_disconnect"
	DetailsFaultAbort         = "fault_filter_abort"
	DetailsHeadTimeout        = "request_header_timeout"
	DetailsIdleTimeout        = "stream_idle_timeout"
	DetailsMaxDuration        = "max_duration_timeout"
	DetailsMissingHost        = "missing_host_header"
	DetailsMisdirected        = "misdirected_request"
	DetailsNoHealthyUpstream  = "no_healthy_upstream"
	DetailsOverload           = "overload"
	DetailsPathNotNormal      = "path_normalization_failed"
	DetailsPathNormalized     = "path_normalization_redirect" // Envoy has no details of its own for it
	DetailsRequestTimeout     = "request_overall_timeout"
	DetailsResponseTimeout    = "response_timeout"
	DetailsTryTimeout         = "upstream_per_try_timeout"
	DetailsHTTP1CodecError    = "http1.codec_error"
	DetailsHTTP1HeadTooLarge  = "http1.headers_too_large"
	DetailsHTTP1TooManyFields = "http1.too_many_headers"
	DetailsUnderscore         = "http1.unexpected_underscore"
	DetailsHTTP2InvalidField  = "http2.invalid.header.field"
	DetailsHTTP2TooManyFields = "http2.too_many_headers"
	DetailsRouteNotFound      = "route_not_found"
	DetailsUpgradeFailed      = "upgrade_failed"
	DetailsHTTP2Violation     = "http2.violation.of.messaging.rule"
)

// Reset reasons, spelled as in the body of a reply.
const (
	ResetByTermination            = "connection termination"
	ResetByConnectTimeout         = "connection timeout"
	ResetByLocalConnectFailure    = "local connection failure"
	ResetByRemoteConnectFailure   = "remote connection failure"
	ResetByLocal                  = "local reset"
	ResetByOverflow               = "overflow"
	ResetByProtocolError          = "protocol error"
	ResetByRemote                 = "remote reset"
	ResetByRemoteRefusingToStream = "remote refused stream reset"
)

const (
	resetBefore = "upstream_reset_before_response_started{"
	resetAfter  = "upstream_reset_after_response_started{"
)

// ResetBeforeResponse returns the details of an upstream that failed before the head of its response.
func ResetBeforeResponse(reset string) string { return resetBefore + underscored(reset) + "}" }

// ResetAfterResponse returns the details of an upstream that failed after the head of its response.
func ResetAfterResponse(reset string) string { return resetAfter + underscored(reset) + "}" }

// WithRule returns details, such as those of a malformed message, with the rule that was broken in braces behind them. A
// search for Envoy's words still finds them.
func WithRule(details, rule string) string { return details + "{" + underscored(rule) + "}" }

const deniedByPolicy = "rbac_access_denied_matched_policy["

// DeniedByPolicy returns the details of a connection or a request that an authorization policy denies. An empty name is of
// none: no policy allowed it.
func DeniedByPolicy(name string) string {
	if name == "" {
		return deniedByPolicy + "none]"
	}
	return deniedByPolicy + name + "]"
}

// IsDenial reports whether details came from DeniedByPolicy.
func IsDenial(details string) bool { return strings.HasPrefix(details, deniedByPolicy) }

// ProtocolErrorBeforeResponse and ProtocolErrorAfterResponse return the details of an upstream whose response breaks a
// rule.
func ProtocolErrorBeforeResponse(rule string) string {
	return ResetBeforeResponse(ResetByProtocolError + "|" + rule)
}

func ProtocolErrorAfterResponse(rule string) string {
	return ResetAfterResponse(ResetByProtocolError + "|" + rule)
}

// IsResetBeforeResponse reports whether details came from ResetBeforeResponse.
func IsResetBeforeResponse(details string) bool { return strings.HasPrefix(details, resetBefore) }

func underscored(reset string) string { return strings.ReplaceAll(reset, " ", "_") }

// flagBits has the response flags in the order of Envoy's bits (CoreResponseFlag).
var flagBits = strings.Fields("LH UH UT LR UR UF UC UO NR DI FI RL UAEX RLSE DC URX SI IH DPE UMSDR RFCF NFCF DT UPE NC OM DF DO DR UDO")

// FlagBits returns the bits of response flags that are separated by commas, as Envoy's attribute response.flags has them.
func FlagBits(flags string) (bits int64) {
	for len(flags) > 0 {
		var flag string
		flag, flags, _ = strings.Cut(flags, ",")
		if i := slices.Index(flagBits, flag); i >= 0 {
			bits |= 1 << i
		}
	}
	return bits
}
