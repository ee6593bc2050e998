package live

import "time"

// ControlPlane is the session with the control plane that configures the agent.
type ControlPlane struct {
	Address          string     `json:"address"`
	Server           string     `json:"server,omitempty"` // that answered last, by its own name and version
	Connected        bool       `json:"connected"`
	SinceSeconds     float64    `json:"sinceSeconds,omitempty"`   // since Connected changed; absent before the first attempt ended
	Why              string     `json:"why,omitempty"`            // what ended the last stream, or kept it from being opened
	Configured       bool       `json:"configured"`               // the first configuration is in force
	PushAgeSeconds   float64    `json:"pushAgeSeconds,omitempty"` // since something was received; absent before
	Types            []PushType `json:"types"`                    // that were received, in the order in which they are requested
	SecurityFindings int        `json:"securityFindings"`         // parts of the configuration that are not honoured: they close what they concern
	Unenforced       int        `json:"unenforcedFindings"`       // restrictions that are not carried out: they close what they concern
	TrafficFindings  int        `json:"trafficFindings"`          // traffic goes otherwise than it was configured
	CosmeticFindings int        `json:"cosmeticFindings"`
	Unbound          []string   `json:"unbound,omitempty"`  // of a gateway: listeners at which it cannot accept, and why
	Identity         *Identity  `json:"identity,omitempty"` // of the workload; absent if the agent has no source of it
}

// PushType is what was received of one type of resources.
type PushType struct {
	Type       string  `json:"type"` // as in CDS
	Resources  int     `json:"resources"`
	Pushes     int64   `json:"pushes"`   // responses
	Rejected   int64   `json:"rejected"` // those of which a resource was rejected
	AgeSeconds float64 `json:"ageSeconds"`
	Version    string  `json:"version,omitempty"` // of the last push, as the control plane names it
	Error      string  `json:"error,omitempty"`   // why a resource of the last response was rejected
}

// Identity is the workload's certificate.
type Identity struct {
	Source         string    `json:"source"`           // CA, files or socket
	SPIFFE         string    `json:"spiffe,omitempty"` // absent before the first certificate
	Expires        time.Time `json:"expires,omitzero"`
	ExpiresSeconds float64   `json:"expiresSeconds,omitempty"` // below 0: it has expired
	Renewals       int64     `json:"renewals"`
	Failures       int64     `json:"failures"`
	Why            string    `json:"why,omitempty"`      // why the last renewal failed
	Problems       []string  `json:"problems,omitempty"` // with revocation lists, and with the directory that the certificate is written to
}
