package envoy

import "strings"

// Ends of the keys under which a filter for policies keeps the verdicts of those that are not enforced, in the metadata of a
// request; the prefix that is configured for the filter comes first.
const (
	DryRunPolicy = "shadow_effective_policy_id"
	DryRunResult = "shadow_engine_result"
)

// IsDryRunKey reports whether a key of metadata is that of a verdict.
func IsDryRunKey(key string) bool {
	return strings.HasSuffix(key, DryRunPolicy) || strings.HasSuffix(key, DryRunResult)
}
