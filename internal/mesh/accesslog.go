package mesh

import (
	"bytes"
	"slices"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// AccessLog is a file that records are written to (envoy.extensions.access_loggers.file.v3.FileAccessLog), or a service that
// they are sent to.
type AccessLog struct {
	Path    string
	Service *LogService `json:",omitzero"` // nil: a file

	// Text is the format of a line. JSON is a google.protobuf.Struct: the format of a line that is a JSON object. If both
	// are empty, the format is Envoy's.
	Text      string
	JSON      []byte
	OmitEmpty bool // fields without a value

	Filter *LogFilter // nil: all records are written

	Compiled atomic.Value `json:"-"` // of package accesslog
}

const fileLogType = typePrefix + "envoy.extensions.access_loggers.file.v3.FileAccessLog"

var accessLogFields = message{"envoy.config.accesslog.v3.AccessLog", Cosmetic, []field{
	1: {"name", ignored}, // the type counts
	2: {"filter", once},
	4: {"typed_config", once},
}}

// accessLogs adds the log in the current field to logs, if it is a file. Other logs are reported. Most logs of a push are the
// same, and alone.
func (d *decoder) accessLogs(m *wire.Message, logs *[]AccessLog) {
	log := share(d, accessLogFields.name, m.Bytes(), func() []AccessLog { return d.accessLog(m.Message()) })
	if *logs == nil {
		*logs = slices.Clip(log)
	} else {
		*logs = append(*logs, log...)
	}
}

// accessLog returns a log, if it is supported. Its findings never concern security.
func (d *decoder) accessLog(m wire.Message) []AccessLog {
	refusals, shadow := d.refusals, d.shadow
	d.shadow = true
	defer func() { d.shadow, d.refusals = shadow, refusals }()
	logs := make([]AccessLog, 1)
	log := &logs[0]
	supported := false
	for d.next(&m, &accessLogFields) {
		switch m.Number {
		case 2:
			log.Filter = d.logFilter(m.Message())
		case 4:
			url, value := d.any(m.Message())
			supported = d.logOf(url, m.Nested(value), log)
		}
	}
	if !supported {
		return nil
	}
	return logs
}

// logOf reads a log of a type, and reports whether it is supported.
func (d *decoder) logOf(url string, m wire.Message, log *AccessLog) bool {
	switch url {
	case fileLogType:
		d.fileLog(m, log)
		return true
	case httpServiceType, tcpServiceType:
		log.Service = &LogService{Kind: HTTPLogs}
		if url == tcpServiceType {
			log.Service.Kind = TCPLogs
		}
		d.streamedLog(m, log.Service)
	case openTelemetryType:
		log.Service = &LogService{Kind: OpenTelemetryLogs}
		d.openTelemetryLog(m, log.Service)
	default:
		d.report(Traffic, "access logs of type "+shortType(url)+" are not supported")
		return false
	}
	to := &log.Service.To
	if to.GRPC != nil && to.GRPC.Cluster != "" || to.HTTP != nil && to.HTTP.Cluster != "" {
		return true
	}
	d.report(Traffic, "no cluster to send records to")
	return false
}

var fileLogFields = message{"envoy.extensions.access_loggers.file.v3.FileAccessLog", Cosmetic, []field{
	1: {"path", decoded},
	2: {"format", decoded},
	3: {"json_format", once},
	4: {"typed_json_format", once},
	5: {"log_format", once},
}}

var logFormatFields = message{"envoy.config.core.v3.SubstitutionFormatString", Cosmetic, []field{
	1: {"text_format", decoded},
	2: {"json_format", once},
	3: {"omit_empty_values", decoded},
	4: {"content_type", ignored}, // of local replies
	5: {"text_format_source", once},
	6: {"formatters", cosmetic},
	7: {"json_format_options", cosmetic},
}}

func (d *decoder) fileLog(m wire.Message, log *AccessLog) {
	for d.next(&m, &fileLogFields) {
		switch m.Number {
		case 1:
			log.Path = m.String()
		case 2:
			log.Text, log.JSON = m.String(), nil
		case 3, 4:
			log.Text, log.JSON = "", bytes.Clone(m.Bytes())
		case 5:
			for m := m.Message(); d.next(&m, &logFormatFields); {
				switch m.Number {
				case 1:
					log.Text, log.JSON = m.String(), nil
				case 2:
					log.Text, log.JSON = "", bytes.Clone(m.Bytes())
				case 3:
					log.OmitEmpty = m.Bool()
				case 5:
					log.Text, log.JSON = d.inlineText(m.Message()), nil
				}
			}
		}
	}
}
