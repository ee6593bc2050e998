package mesh

// carriedOut has the types of policies, and whether the data plane carries them out. A policy that is not carried out is
// Unenforced if it can refuse anything: what it concerns is closed.
var carriedOut = map[string]bool{
	networkRBACType: false,
	rbacType:        false,
}

// carry reports a policy that can restrict what passes, unless it is carried out.
func (d *decoder) carry(policy string, restricts bool) {
	if restricts && !carriedOut[policy] {
		d.report(Unenforced, "policies of type "+policy+" are not carried out yet")
	}
}

// sharedKey is the type and the bytes of a configuration.
type sharedKey struct{ url, config string }

// share returns the value that was decoded from the same bytes of the same type, if there is one. Otherwise it decodes
// them, and keeps the value unless it has findings, because each place has its own. In a listener the same policies stand
// in many filter chains.
func share[T any](d *decoder, url string, config []byte, decode func() T) T {
	if value, ok := d.shared[sharedKey{url, string(config)}].(T); ok {
		return value
	}
	findings, refusals := len(d.findings), d.refusals
	value := decode()
	if d.err == nil && len(d.findings) == findings && d.refusals == refusals && findings < maxFindings {
		if d.shared == nil {
			d.shared = map[sharedKey]any{}
		}
		d.shared[sharedKey{url, string(config)}] = value
	}
	return value
}
