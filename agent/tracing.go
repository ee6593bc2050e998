package agent

import (
	"context"
	"slices"

	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/tracing"
)

// spans is the tracing of requests.
type spans struct {
	policy    *tracing.Policy   // of Config.Tracing; may be nil
	exporters tracing.Exporters // that a control plane asks for
	counts    export.Counts
}

// traceRequests starts the exporter that the configuration asks for.
func (a *Agent) traceRequests() {
	s := &a.telling.spans
	if o := a.config.Tracing; o != nil {
		s.policy = o.Start(a.resource(), &s.counts, a.log)
	}
	s.exporters.Resource = a.attributes()
	s.exporters.Counts, s.exporters.Log = &s.counts, a.log
}

// attributes are those of this process where a control plane names the receiver.
func (a *Agent) attributes() []export.Resource {
	return export.WithDefaults(slices.Clone(a.config.SpanAttributes), a.resource())
}

// exporters returns those that a control plane asks for; nil: there is no control plane.
func (a *Agent) exporters() *tracing.Exporters {
	if a.plane.session == nil {
		return nil
	}
	return &a.telling.spans.exporters
}

// resource describes this workload in spans, by OpenTelemetry's names. The name of the service is the canonical one with
// its namespace, as istiod gives it.
func (a *Agent) resource() []export.Resource {
	pod := &a.config.Workload.Pod
	service, namespace := known(pod.CanonicalService), known(pod.Namespace)
	if service == "" {
		service = known(pod.Workload)
	}
	switch {
	case service == "":
		service = "unknown_service:pillion" // the name that OpenTelemetry requires
	case namespace != "":
		service += "." + namespace
	}
	return []export.Resource{
		{Name: "service.name", Value: service},
		{Name: "service.version", Value: known(pod.CanonicalRevision)},
		{Name: "k8s.namespace.name", Value: namespace},
		{Name: "k8s.pod.name", Value: known(pod.Name)},
		{Name: "telemetry.sdk.name", Value: "pillion"},
		{Name: "telemetry.sdk.language", Value: "go"},
		{Name: "telemetry.sdk.version", Value: a.config.Version},
	}
}

func (s *spans) counted() (exported, dropped, failed uint64) {
	return s.counts.Exported.Load(), s.counts.Dropped.Load(), s.counts.Failed.Load()
}

// close exports what is left, and ends the exporters.
func (s *spans) close(ctx context.Context) {
	all := s.exporters.All()
	if s.policy != nil {
		all = append(all, s.policy.Exporter)
	}
	export.CloseAll(ctx, all)
}
