package accesslog

import (
	"cmp"
	"strconv"
	"time"

	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/wire"
)

const (
	streamMethod = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
	otelMethod   = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"
)

// Envoy's defaults, and our bounds.
const (
	serviceBytes    = 16 << 10
	maxServiceBytes = 512 << 10
	serviceDelay    = time.Second
	maxServiceDelay = time.Minute
)

// service is how records are sent to a service, and a name that differs if anything about that does.
type service struct {
	export.Config
	name string
}

// config returns how records are sent to a service.
func (s *Sinks) config(c *mesh.LogService) (to service) {
	to.Config = export.Config{
		What: "access log records", Counts: &s.counts, Log: s.Log, CloseTime: s.CloseTime,
		Delay: min(cmp.Or(c.Delay, serviceDelay), maxServiceDelay), BatchBytes: int(min(cmp.Or(c.Bytes, serviceBytes), maxServiceBytes)),
	}
	if c.Kind == mesh.OpenTelemetryLogs {
		to.Levels, to.Field = export.OTLP(s.resource(c), attributesOf(c.Resource)), export.OTLPItem
		to.name, to.Target, to.Sender = export.To(&c.To, otelMethod, s.Transport)
	} else {
		to.Levels, to.Field = []export.Level{{Number: 2 + int(c.Kind)}}, 1 // http_logs or tcp_logs, and their entries
		var sender export.Sender
		to.name, to.Target, sender = export.To(&c.To, streamMethod, s.Transport)
		identifier := wire.AppendString(wire.AppendBytes(nil, 1, s.Node), 2, c.Name)
		to.Sender = &export.StreamSender{GRPCSender: *sender.(*export.GRPCSender), First: wire.AppendBytes(nil, 1, identifier)}
	}
	to.name = "service " + to.name
	for _, part := range []string{c.Name, strconv.Itoa(int(c.Kind)), to.Delay.String(), strconv.Itoa(to.BatchBytes), string(to.Levels[0].Head)} {
		to.name += " " + part
	}
	return to
}

// serve makes l a log that sends records to a service. It returns the cluster, and what of the form is not understood.
func (s *Sinks) serve(l *Log, c *mesh.LogService) (cluster string, problems []error) {
	if c.Kind == mesh.OpenTelemetryLogs {
		l.entry, problems = s.otelRecord(c)
	} else {
		l.entry, problems = s.alsEntry(c)
	}
	to := s.config(c)
	l.service = s.exporter(to.name, to.Config)
	return to.Target, problems
}

// resource returns the attributes of this process, with those of Envoy that name the log and the node.
func (s *Sinks) resource(c *mesh.LogService) []export.Resource {
	if c.NoLabels {
		return s.Resource
	}
	labels := []export.Resource{{Name: "log_name", Value: c.Name}, {Name: "cluster_name", Value: s.Cluster}, {Name: "node_name", Value: s.NodeID}}
	return export.WithDefaults(labels, s.Resource)
}

// attributesOf returns a KeyValueList as it is, if it can be read.
func attributesOf(list []byte) []byte {
	var err error
	for m := wire.Read(list, &err); m.Next(); {
		if m.Number != 1 {
			return nil
		}
		m.Bytes()
	}
	if err != nil {
		return nil
	}
	return list
}

// otelRecord compiles the form of the records of a service.
func (s *Sinks) otelRecord(c *mesh.LogService) (*otelRecord, []error) {
	var err error
	values := anyValues{Sinks: s}
	o := &otelRecord{body: values.read(wire.Read(c.Body, &err)), attributes: values.members(wire.Read(c.Attributes, &err))}
	if err != nil {
		values.problems = append(values.problems, err)
	}
	return o, values.problems
}

// exporter returns the exporter with a name; nil: there are too many.
func (s *Sinks) exporter(name string, config export.Config) *export.Exporter {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, known := s.services[name]; known || s.closed {
		return e
	}
	if s.services == nil {
		s.services = map[string]*export.Exporter{}
	}
	if s.crowded(true, config.Target) {
		return nil
	}
	e := export.New(config)
	if s.gone(name) {
		e.Retire(true)
	}
	s.services[name] = e
	return e
}
