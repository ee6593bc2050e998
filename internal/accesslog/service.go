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

// serve makes l a log that sends records to a service. It returns the cluster, and what of the form is not understood.
func (s *Sinks) serve(l *Log, c *mesh.LogService) (cluster string, problems []error) {
	config := export.Config{
		What: "access log records", Counts: &s.counts, Log: s.Log,
		Delay: min(cmp.Or(c.Delay, serviceDelay), maxServiceDelay), BatchBytes: int(min(cmp.Or(c.Bytes, serviceBytes), maxServiceBytes)),
	}
	name := ""
	if c.Kind == mesh.OpenTelemetryLogs {
		l.entry, problems = s.otelRecord(c)
		config.Levels, config.Field = export.OTLP(s.resource(c), attributesOf(c.Resource)), export.OTLPItem
		name, config.Target, config.Sender = export.To(&c.To, otelMethod, s.Transport)
	} else {
		l.entry, problems = s.alsEntry(c)
		config.Levels, config.Field = []export.Level{{Number: 2 + int(c.Kind)}}, 1 // http_logs or tcp_logs, and their entries
		var sender export.Sender
		name, config.Target, sender = export.To(&c.To, streamMethod, s.Transport)
		identifier := wire.AppendString(wire.AppendBytes(nil, 1, s.Node), 2, c.Name)
		config.Sender = &export.StreamSender{GRPCSender: *sender.(*export.GRPCSender), First: wire.AppendBytes(nil, 1, identifier)}
	}
	for _, part := range []string{c.Name, strconv.Itoa(int(c.Kind)), config.Delay.String(), strconv.Itoa(config.BatchBytes), string(config.Levels[0].Head)} {
		name += " " + part
	}
	l.service = s.exporter(name, config)
	return config.Target, problems
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
	if len(s.services) == maxFiles {
		s.Log.Error("too many access logs", "path", config.Target, "limit", maxFiles)
		return nil
	}
	e := export.New(config)
	s.services[name] = e
	return e
}
