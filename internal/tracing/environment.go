package tracing

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/export"
)

// Options is tracing as OpenTelemetry's environment variables configure it
// (https://opentelemetry.io/docs/specs/otel/protocol/exporter/).
type Options struct {
	GRPC     bool    // gRPC; without it, protobuf over HTTP
	Endpoint url.URL // of HTTP with the path; of gRPC scheme and host
	Header   http.Header
	Timeout  time.Duration
	Roots    *x509.CertPool    // of an endpoint with TLS; nil: the system's
	Resource []export.Resource // that the variables name
	Sampler  Sampler
	Forms    Forms
}

// The names of the variables begin with these.
const (
	exporterPrefix = "OTEL_EXPORTER_OTLP_"
	tracesPrefix   = "OTEL_EXPORTER_OTLP_TRACES_"
)

// environment reads variables, and remembers the one that was read last: an error names it.
type environment struct {
	get  func(string) string
	last string
}

func (e *environment) value(name string) string {
	e.last = name
	return strings.TrimSpace(e.get(name))
}

// exporter returns a variable of the exporter. That of traces takes precedence.
func (e *environment) exporter(name string) string {
	if value := e.value(tracesPrefix + name); value != "" {
		return value
	}
	return e.value(exporterPrefix + name)
}

// FromEnvironment reads the variables. It returns nil if they name no endpoint, or turn tracing off. An error names the
// variable.
func FromEnvironment(get func(string) string) (*Options, error) {
	e := environment{get: get}
	if strings.EqualFold(e.value("OTEL_SDK_DISABLED"), "true") || e.value("OTEL_TRACES_EXPORTER") == "none" {
		return nil, nil
	}
	if get(exporterPrefix+"ENDPOINT") == "" && get(tracesPrefix+"ENDPOINT") == "" {
		return nil, nil
	}
	o := &Options{Timeout: export.DefaultTimeout}
	for _, read := range []func(*environment) error{
		exporterKind, o.readProtocol, o.readEndpoint, o.readHeaders, o.readTimeout, readCompression, o.readRoots, o.readSampler, o.readForms, o.readResource,
	} {
		if err := read(&e); err != nil {
			return nil, fmt.Errorf("environment variable %s: %w", e.last, err)
		}
	}
	return o, nil
}

func exporterKind(e *environment) error {
	if kind := e.value("OTEL_TRACES_EXPORTER"); kind != "" && kind != "otlp" {
		return fmt.Errorf("exporter %.40q is not supported: use otlp or none", kind)
	}
	return nil
}

func (o *Options) readProtocol(e *environment) error {
	switch protocol := e.exporter("PROTOCOL"); protocol {
	case "grpc":
		o.GRPC = true
	case "", "http/protobuf":
	default:
		return fmt.Errorf("protocol %.40q is not supported: use grpc or http/protobuf", protocol)
	}
	return nil
}

// readEndpoint reads the URL. To that of all signals the path of traces is appended; that of traces is used as it is.
func (o *Options) readEndpoint(e *environment) error {
	text := e.value(tracesPrefix + "ENDPOINT")
	own := text != ""
	if !own {
		text = e.value(exporterPrefix + "ENDPOINT")
	}
	name := e.last
	if o.GRPC && !strings.Contains(text, "://") {
		scheme := "https://"
		if strings.EqualFold(e.exporter("INSECURE"), "true") {
			scheme = "http://"
		}
		text, e.last = scheme+text, name
	}
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return fmt.Errorf("%.200q is not a URL: use one such as http://collector.example:4318", text)
	case u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		return fmt.Errorf("%.200q is not a URL of HTTP: use one such as http://collector.example:4318", text)
	}
	o.Endpoint = url.URL{Scheme: u.Scheme, Host: u.Host}
	if o.GRPC {
		return nil
	}
	o.Endpoint.Path, o.Endpoint.RawQuery = u.Path, u.RawQuery
	if !own {
		o.Endpoint.Path = strings.TrimSuffix(u.Path, "/") + "/v1/traces"
	} else if u.Path == "" {
		o.Endpoint.Path = "/"
	}
	return nil
}

// pairs reads a list of key=value, whose values are encoded as in URLs.
func pairs(text string, each func(key, value string) error) error {
	for item := range strings.SplitSeq(text, ",") {
		if strings.TrimSpace(item) == "" {
			continue
		}
		key, value, found := strings.Cut(item, "=")
		key = strings.TrimSpace(key)
		decoded, err := url.PathUnescape(strings.TrimSpace(value))
		if !found || key == "" || err != nil {
			return errors.New("not a list such as key=value,key=value with values encoded as in URLs")
		}
		if err := each(key, decoded); err != nil {
			return err
		}
	}
	return nil
}

func (o *Options) readHeaders(e *environment) error {
	o.Header = make(http.Header)
	return pairs(e.exporter("HEADERS"), func(key, value string) error {
		if strings.ContainsAny(key, " \t\r\n:") || strings.ContainsAny(value, "\r\n\x00") {
			return fmt.Errorf("%.40q is not a header field", key)
		}
		o.Header.Set(key, value)
		return nil
	})
}

func (o *Options) readTimeout(e *environment) error {
	text := e.exporter("TIMEOUT")
	if text == "" {
		return nil
	}
	const most = 600_000
	ms, err := strconv.Atoi(text)
	if err != nil || ms < 1 || ms > most {
		return fmt.Errorf("%.40q is not a number of milliseconds: use 1 to %d", text, most)
	}
	o.Timeout = time.Duration(ms) * time.Millisecond
	return nil
}

func readCompression(e *environment) error {
	if c := e.exporter("COMPRESSION"); c != "" && c != "none" {
		return fmt.Errorf("compression %.40q is not supported: use none", c)
	}
	return nil
}

func (o *Options) readRoots(e *environment) error {
	path := e.exporter("CERTIFICATE")
	if path == "" {
		return nil
	}
	pem, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	o.Roots = x509.NewCertPool()
	if !o.Roots.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%s has no certificate in PEM", path)
	}
	return nil
}

// readSampler reads the sampler. The default is that of OpenTelemetry's SDKs.
func (o *Options) readSampler(e *environment) error {
	name := e.value("OTEL_TRACES_SAMPLER")
	root, ofParent := strings.CutPrefix(name, "parentbased_")
	o.Sampler.IgnoresParent = name != "" && !ofParent
	switch root {
	case "", "always_on":
		o.Sampler.Threshold = all
	case "always_off":
	case "traceidratio":
		text := e.value("OTEL_TRACES_SAMPLER_ARG")
		part, err := strconv.ParseFloat(text, 64)
		if text == "" {
			part, err = 1, nil
		}
		if err != nil || !(part >= 0 && part <= 1) {
			return fmt.Errorf("%.40q is not a part of the traces: use a number from 0 to 1", text)
		}
		o.Sampler.Threshold = Ratio(part)
	default:
		return fmt.Errorf("sampler %.40q is not supported: use always_on, always_off or traceidratio, or one of them after parentbased_", name)
	}
	return nil
}

// readForms reads in which forms contexts are sent. Baggage passes as it is.
func (o *Options) readForms(e *environment) error {
	text := e.value("OTEL_PROPAGATORS")
	if text == "" {
		text = "tracecontext"
	}
	for name := range strings.SplitSeq(text, ",") {
		switch strings.TrimSpace(name) {
		case "tracecontext":
			o.Forms |= W3C
		case "b3":
			o.Forms |= B3
		case "b3multi":
			o.Forms |= B3Multi
		case "baggage", "none", "":
		default:
			return fmt.Errorf("propagator %.40q is not supported: use tracecontext, b3, b3multi, baggage or none", name)
		}
	}
	return nil
}

// readResource reads the attributes of the process. OTEL_SERVICE_NAME takes precedence.
func (o *Options) readResource(e *environment) error {
	if name := e.value("OTEL_SERVICE_NAME"); name != "" {
		o.Resource = append(o.Resource, export.Resource{Name: serviceName, Value: name})
	}
	return pairs(e.value("OTEL_RESOURCE_ATTRIBUTES"), func(key, value string) error {
		o.Resource = export.WithDefaults(o.Resource, []export.Resource{{Name: key, Value: value}})
		return nil
	})
}

// ResourceFromEnvironment reads only the attributes of the process. An error names the variable.
func ResourceFromEnvironment(get func(string) string) ([]export.Resource, error) {
	e, o := environment{get: get}, Options{}
	if err := o.readResource(&e); err != nil {
		return nil, fmt.Errorf("environment variable %s: %w", e.last, err)
	}
	return o.Resource, nil
}

const serviceName = "service.name"

// Start starts the exporter and returns the policy. defaults are attributes that the variables do not name.
func (o *Options) Start(defaults []export.Resource, counts *export.Counts, log *slog.Logger) *Policy {
	transport := &http.Transport{
		Protocols: new(http.Protocols), TLSClientConfig: &tls.Config{RootCAs: o.Roots}, MaxIdleConnsPerHost: 1, MaxConnsPerHost: 1,
		DialContext: (&net.Dialer{Timeout: o.Timeout}).DialContext, IdleConnTimeout: time.Minute, DisableCompression: true,
	}
	var sender export.Sender
	if o.GRPC {
		transport.Protocols.SetHTTP2(true)
		transport.Protocols.SetUnencryptedHTTP2(true)
		sender = export.NewGRPCSender(transport, o.Endpoint, o.Header, exportMethod, o.Timeout)
	} else {
		transport.Protocols.SetHTTP1(true)
		sender = &export.HTTPSender{Transport: transport, URL: o.Endpoint, Header: o.Header, Timeout: o.Timeout}
	}
	e := newExporter(sender, o.Endpoint.Redacted(), export.WithDefaults(slices.Clone(o.Resource), defaults), counts, log)
	return &Policy{Sampler: o.Sampler, Forms: o.Forms, Exporter: e}
}
