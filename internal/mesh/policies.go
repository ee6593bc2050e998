package mesh

// carriedOut has the types of policies, and whether the data plane carries them out. A policy that is not carried out is
// Unenforced if it can refuse anything: what it concerns is closed.
var carriedOut = map[string]bool{
	networkRBACType:     true,
	networkExtAuthzType: true,
	rbacType:            true,
	jwtType:             true,
	extAuthzType:        true,
}

// carry reports a policy that can restrict what passes, unless it is carried out.
func (d *decoder) carry(policy string, restricts bool) {
	if restricts && !carriedOut[policy] {
		d.report(Unenforced, "policies of type "+policy+" are not carried out yet")
	}
}

// sharedKey is the type and the bytes of a part of a resource.
type sharedKey struct{ kind, config string }

// share returns the value that was decoded from the same bytes of the same kind, if there is one. Otherwise it decodes
// them, and keeps the value unless it has findings, because each place has its own. In a listener the same policies stand
// in many filter chains, and in a push the same access logs, retries and limits in most resources.
func share[T any](d *decoder, kind string, config []byte, decode func() T) T {
	if value, ok := d.shared[sharedKey{kind, string(config)}].(T); ok {
		return value
	}
	findings, refusals := len(d.findings), d.refusals
	value := decode()
	if d.shared != nil && d.err == nil && len(d.findings) == findings && d.refusals == refusals && findings < maxFindings {
		d.shared[sharedKey{kind, string(config)}] = value
	}
	return value
}
