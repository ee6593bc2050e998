package tracing

import "encoding/binary"

// Sampler decides which traces that begin here are sampled, and whether a decision that arrives with a request counts.
type Sampler struct {
	Threshold     uint64 // of 1<<63: traces whose ID's last 63 bits are below it are sampled, as by OpenTelemetry's SDKs
	IgnoresParent bool
}

// all is a threshold that samples every trace.
const all = 1 << 63

// Ratio returns the threshold for a part of the traces, from 0 to 1.
func Ratio(part float64) uint64 {
	switch {
	case part >= 1:
		return all
	case part <= 0:
		return 0
	}
	return uint64(part * all)
}

func (s *Sampler) sample(id *[16]byte, c *carried) bool {
	if c.decided && !s.IgnoresParent {
		return c.sampled
	}
	return binary.BigEndian.Uint64(id[8:])>>1 < s.Threshold
}

// RequestIDs is how Envoy samples: a decision is a property of the request ID, and 15th of its characters has the reason.
type RequestIDs struct {
	Client, Random, Overall uint32 // of 10,000
	Ignored                 bool   // the ID does not decide; Random does, by chance
	Kept                    bool   // the ID is not changed
}

// The reasons in a request ID (E: source/extensions/request_id/uuid/config.h).
const (
	reasonAt     = 14
	notTraced    = '4'
	sampledHere  = '9'
	forcedHere   = 'a'
	forcedClient = 'b'
)

func isReason(c byte) bool { return c == sampledHere || c == forcedHere || c == forcedClient }

const hundredPercent = 10_000

// decide returns whether a request is traced, and writes the reason into its ID, as Envoy's
// ConnectionManagerUtility::mutateTracingRequestHeader does. A request without a UUID is not traced.
func (q *RequestIDs) decide(r *Request, c *carried) bool {
	if q.Ignored {
		return uint32(newID()%hundredPercent) < q.Random
	}
	number, ok := idNumber(r.ID)
	if !ok {
		return false
	}
	drawn := uint32(number % hundredPercent)
	reason := r.ID[reasonAt]
	if !isReason(reason) {
		switch reason = notTraced; {
		case c.client && uint32(newID()%hundredPercent) < q.Client:
			reason = forcedClient
		case c.forced:
			reason = forcedHere
		case drawn < q.Random:
			reason = sampledHere
		}
	}
	if drawn >= q.Overall {
		reason = notTraced
	}
	if !q.Kept && (reason != notTraced || isReason(r.ID[reasonAt])) {
		r.ID[reasonAt] = reason
	}
	return reason != notTraced
}

// idNumber returns the number in the first eight characters of a UUID.
func idNumber(id []byte) (n uint64, ok bool) {
	if len(id) != 36 || id[8] != '-' {
		return 0, false
	}
	for _, c := range id[:8] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c|0x20 && c|0x20 <= 'f':
			c = c | 0x20 - 'a' + 10
		default:
			return 0, false
		}
		n = n<<4 | uint64(c)
	}
	return n, true
}
