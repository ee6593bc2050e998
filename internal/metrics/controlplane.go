package metrics

import "time"

// ControlPlane is the state of the session with a control plane.
type ControlPlane struct {
	Connected    bool
	Streams      int64 // opened and answered
	Failed, Lost int64 // streams that ended before a response, and after one
	LastPush     time.Time
	Initialized  bool          // the first configuration is in force
	Initializing time.Duration // from the start until it was

	Types    []PushType
	Findings []Findings

	Expiry             time.Time // of the workload's certificate; zero: it has not come
	Renewals, Failures int64     // of the certificate
	Calls, FailedCalls int64     // of the CA

	Authz AuthzCounts
}

// AuthzCounts are the requests of the agent's own for policies.
type AuthzCounts struct {
	Allowed, Denied, Unanswered uint64 // by servers of external authorization
	Fetched, Unfetched          uint64 // keys of tokens
}

// PushType has the counts of one type of resources.
type PushType struct {
	Name               string // as in "CDS"
	Resources          int
	Accepted, Rejected int64 // responses
	Bytes              int64 // of resources received
	Decoding           time.Duration
}

// Findings is the number of findings of one class.
type Findings struct {
	Class string
	Count int
}

// Envoy's states of a server, as the values of envoy_server_state.
const (
	stateLive         = 0
	stateDraining     = 1
	stateInitializing = 3
)

// controlPlane adds the metrics of the session with a control plane. Those of Envoy and Istio have the names that
// dashboards know.
func (f *families) controlPlane(c *ControlPlane, draining bool) {
	state := float64(stateLive)
	switch {
	case draining:
		state = stateDraining
	case !c.Initialized:
		state = stateInitializing
	}
	f.gauge("envoy_server_state", "0: live; 1: draining; 3: without the first configuration of the control plane.").is(state)
	if c.Initialized {
		var took histogram
		took.observe(uint64(c.Initializing), &durationLimits)
		f.histogram("envoy_server_initialization_time_ms", "Time from the start until the first configuration was in force.").
			observed(took.expose(float64(time.Millisecond)), nil)
	}
	f.stream(c)
	f.pushes(c)
	f.identity(c)
}

func (f *families) stream(c *ControlPlane) {
	connected := 0.0
	if c.Connected {
		connected = 1
	}
	f.gauge("pillion_mesh_connected", "1 if the stream to the control plane is open.").is(connected)
	f.counter("pillion_mesh_streams_total", "Streams to the control plane that were answered.").counts(uint64(c.Streams))
	f.counter("istio_agent_istiod_connection_failures", "Streams to the control plane that ended before an answer.").counts(uint64(c.Failed))
	f.counter("istio_agent_istiod_connection_terminations", "Streams to the control plane that ended after an answer.").counts(uint64(c.Lost))
	if !c.LastPush.IsZero() {
		f.gauge("pillion_mesh_push_age_seconds", "Time since the control plane sent something.").is(time.Since(c.LastPush).Seconds())
	}
}

func (f *families) pushes(c *ControlPlane) {
	pushes := f.counter("pillion_mesh_pushes_total", "Responses of the control plane.")
	rejected := f.counter("pillion_mesh_rejected_total", "Responses of the control plane of which a resource was rejected.")
	bytes := f.counter("pillion_mesh_received_bytes_total", "Bytes of resources that the control plane sent.")
	decoding := f.counter("pillion_mesh_decode_seconds_total", "Time spent in reading resources and putting them in force.")
	resources := f.gauge("pillion_mesh_resources", "Resources of the control plane.")
	for _, t := range c.Types {
		kind := label("type", t.Name)
		pushes.counts(uint64(t.Accepted+t.Rejected), kind)
		rejected.counts(uint64(t.Rejected), kind)
		bytes.counts(uint64(t.Bytes), kind)
		decoding.is(t.Decoding.Seconds(), kind)
		resources.is(float64(t.Resources), kind)
		switch t.Name {
		case "CDS":
			f.counter("envoy_cluster_manager_cds_update_success", "Accepted responses with clusters.").counts(uint64(t.Accepted))
			f.counter("envoy_cluster_manager_cds_update_rejected", "Responses with clusters of which one was rejected.").counts(uint64(t.Rejected))
		case "LDS":
			f.counter("envoy_listener_manager_lds_update_success", "Accepted responses with listeners.").counts(uint64(t.Accepted))
			f.counter("envoy_listener_manager_lds_update_rejected", "Responses with listeners of which one was rejected.").counts(uint64(t.Rejected))
		}
	}
	findings := f.gauge("pillion_mesh_findings", "Parts of the resources that are not honoured, by what they concern.")
	for _, found := range c.Findings {
		findings.is(float64(found.Count), label("class", found.Class))
	}
}

func (f *families) identity(c *ControlPlane) {
	checks := f.counter("pillion_authorization_checks_total", "Connections and requests that servers of external authorization were asked about, by their answer.")
	checks.counts(c.Authz.Allowed, label("result", "allowed"))
	checks.counts(c.Authz.Denied, label("result", "denied"))
	checks.counts(c.Authz.Unanswered, label("result", "failed"))
	fetches := f.counter("pillion_token_key_fetches_total", "Fetches of the keys of tokens.")
	fetches.counts(c.Authz.Fetched, label("result", "fetched"))
	fetches.counts(c.Authz.Unfetched, label("result", "failed"))
	f.counter("pillion_identity_renewals_total", "Certificates that replaced another one, and the first.").counts(uint64(c.Renewals))
	f.counter("pillion_identity_failures_total", "Failed attempts to get a certificate for the workload.").counts(uint64(c.Failures))
	csr := label("request_type", "csr")
	f.counter("istio_agent_num_outgoing_requests", "Requests to the CA.").counts(uint64(c.Calls), csr)
	f.counter("istio_agent_num_failed_outgoing_requests", "Failed requests to the CA.").counts(uint64(c.FailedCalls), csr)
	if !c.Expiry.IsZero() {
		f.gauge("istio_agent_cert_expiry_seconds", "Time until the workload's certificate expires.").
			is(time.Until(c.Expiry).Seconds(), label("resource_name", "default"))
	}
}
