package inject

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/accesslog"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// Annotations that are more than a setting.
const (
	ownPrefix        = "pillion.dev/"
	injectAnnotation = ownPrefix + "inject"
	statusAnnotation = ownPrefix + "status"
	istioInject      = "sidecar.istio.io/inject"
	mergeMetrics     = "prometheus.istio.io/merge-metrics"
	proxyConfig      = "proxy.istio.io/config"
	nativeAnnotation = "sidecar.istio.io/nativeSidecar"
	cpuAnnotation    = "sidecar.istio.io/proxyCPU"
	memoryAnnotation = "sidecar.istio.io/proxyMemory"

	drainDelayAnnotation = ownPrefix + "drain-delay"
)

// Annotations that are written for other programs.
const (
	istioStatusAnnotation = "sidecar.istio.io/status"
	defaultContainer      = "kubectl.kubernetes.io/default-container"
	defaultLogsContainer  = "kubectl.kubernetes.io/default-logs-container"

	revision = "pillion" // in place of the revision of an Istio control plane
)

// settings are the options of the injection with a pod's annotations applied.
type settings struct {
	image                         string
	native                        bool
	mode                          string // REDIRECT or TPROXY
	includeInbound, excludeIn     string
	includeOutbound, excludeOut   string
	includeRanges, excludeRanges  string
	excludeInterfaces, interfaces string
	statusPort                    uint16
	resources                     // of the sidecar; "" for the default
	defaults                      resources
	rewriteProbes, mergeMetrics   bool
	hold                          bool          // the workload waits for a classic sidecar to be ready
	drainTimeout                  time.Duration // 0: from the grace period
	drainDelay, defaultDelay      time.Duration // negative: the agent's default
	dnsCapture                    bool
	concurrency                   int    // 0: one for each CPU
	metadata                      object // environment variables of both containers
	opaquePorts, logLevel         string // flags of the agent, unchanged
	log, logFormat                string
	logEncoding, logFilter        string
	ignored                       []string // keys of proxy.istio.io/config without effect
	unknown                       []string // annotations of Istio's sidecar without effect
}

// resources are requests and limits, as Kubernetes' quantities.
type resources struct{ cpu, memory, cpuLimit, memoryLimit string }

// Annotation describes one annotation of pods. docs/inject.md shows Name, Value and Meaning as a table. A default for pods
// without the annotation can be set by an option, if it has one.
type Annotation struct {
	Name, Value, Meaning, Option string
	parse                        func(*settings, string) error
}

// Annotations lists the annotations that have an effect, except those of Prometheus
// (see moveMetrics).
var Annotations = []Annotation{
	{istioInject, "`true`, `false`", "`false` leaves the pod alone. Also accepted as a label", "", nil},
	{nativeAnnotation, "`true`, `false`", "whether the sidecar is a native one; overrides `--classic`", "", toSwitch(func(s *settings) *bool { return &s.native })},
	{"sidecar.istio.io/interceptionMode", "`REDIRECT`, `TPROXY`", "how inbound connections are captured. With `TPROXY` the agent runs as root with NET_ADMIN", "interception-mode", parseMode},
	{"sidecar.istio.io/rewriteAppHTTPProbers", "`true`, `false`", "`false` leaves the workload's probes unchanged", "", toSwitch(func(s *settings) *bool { return &s.rewriteProbes })},
	{"sidecar.istio.io/proxyImage", "image", "the image of both containers", "", toImage},
	{cpuAnnotation, "quantity", "CPU request of the sidecar", "cpu", toQuantity(func(s *settings) *string { return &s.cpu })},
	{memoryAnnotation, "quantity", "memory request of the sidecar", "memory", toQuantity(func(s *settings) *string { return &s.memory })},
	{"sidecar.istio.io/proxyCPULimit", "quantity", "CPU limit of the sidecar", "cpu-limit", toQuantity(func(s *settings) *string { return &s.cpuLimit })},
	{"sidecar.istio.io/proxyMemoryLimit", "quantity", "memory limit of the sidecar", "memory-limit", toQuantity(func(s *settings) *string { return &s.memoryLimit })},
	{"status.sidecar.istio.io/port", "port", "the status port; default 15020", "", func(s *settings, text string) error { return toPort(&s.statusPort, text) }},
	{"traffic.sidecar.istio.io/includeInboundPorts", "`*`, ports", "inbound ports to capture; empty for no port", "", toList(func(s *settings) *string { return &s.includeInbound }, portsOrAll)},
	{"traffic.sidecar.istio.io/excludeInboundPorts", "ports", "inbound ports not captured", "exclude-inbound-ports", toList(func(s *settings) *string { return &s.excludeIn }, ports)},
	{"traffic.sidecar.istio.io/includeOutboundPorts", "ports", "outbound ports captured at every address", "", toList(func(s *settings) *string { return &s.includeOutbound }, ports)},
	{"traffic.sidecar.istio.io/excludeOutboundPorts", "ports", "outbound ports not captured", "exclude-outbound-ports", toList(func(s *settings) *string { return &s.excludeOut }, ports)},
	{"traffic.sidecar.istio.io/includeOutboundIPRanges", "`*`, networks", "outbound networks to capture; empty for no network", "include-outbound-ip-ranges", toList(func(s *settings) *string { return &s.includeRanges }, networksOrAll)},
	{"traffic.sidecar.istio.io/excludeOutboundIPRanges", "networks", "outbound networks not captured", "exclude-outbound-ip-ranges", toList(func(s *settings) *string { return &s.excludeRanges }, networks)},
	{"traffic.sidecar.istio.io/excludeInterfaces", "interfaces", "interfaces not captured", "", toList(func(s *settings) *string { return &s.excludeInterfaces }, interfaces)},
	{"traffic.sidecar.istio.io/kubevirtInterfaces", "interfaces", "interfaces whose incoming connections are captured as outbound", "", toList(func(s *settings) *string { return &s.interfaces }, interfaces)},
	{proxyConfig, "YAML", "`holdApplicationUntilProxyStarts`, `terminationDrainDuration`, `concurrency`, `statusPort` and `proxyMetadata` have an effect; a warning names the others", "", parseProxyConfig},
	{mergeMetrics, "`true`, `false`", "`false` leaves Prometheus' annotations unchanged", "", toSwitch(func(s *settings) *bool { return &s.mergeMetrics })},
	{injectAnnotation, "`true`, `false`", "as `sidecar.istio.io/inject`", "", nil},
	{ownPrefix + "image", "image", "the image of both containers; overrides `sidecar.istio.io/proxyImage`", "", toImage},
	{ownPrefix + "opaque-ports", "`*`, ports", "`--opaque-ports` of the agent", "opaque-ports", toList(func(s *settings) *string { return &s.opaquePorts }, portsOrAll)},
	{drainDelayAnnotation, "time span", "`--drain-delay` of the agent", "drain-delay", parseDrainDelay},
	{ownPrefix + "log-level", "`debug`, `info`, `warn`, `error`", "`--log-level` of the agent", "log-level", parseLogLevel},
	{ownPrefix + "access-log", "path, `off`", "`--access-log` of the agent", "access-log", parseAccessLog},
	{ownPrefix + "access-log-format", "format", "`--access-log-format` of the agent", "access-log-format", toText(func(s *settings) *string { return &s.logFormat }, nil)},
	{ownPrefix + "access-log-encoding", "`text`, `json`", "`--access-log-encoding` of the agent", "access-log-encoding", toText(func(s *settings) *string { return &s.logEncoding }, encoding)},
	{ownPrefix + "access-log-filter", "filter", "`--access-log-filter` of the agent", "access-log-filter", toText(func(s *settings) *string { return &s.logFilter }, filter)},
	{ownPrefix + "dns-capture", "`true`, `false`", "capture DNS queries: `--redirect-dns` of init and `--dns-capture` of the agent", "dns-capture", toSwitch(func(s *settings) *bool { return &s.dnsCapture })},
	{istioStatusAnnotation, "JSON", "written by the injection, in Istio's format, for Kiali and istioctl", "", nil},
	{defaultContainer, "container", "written by the injection, unless the pod has it, as is `kubectl.kubernetes.io/default-logs-container`: the first container of the workload", "", nil},
	{statusAnnotation, "JSON", "written by the injection: its changes, for `pillionctl uninject`", "", nil},
}

// parseAnnotations applies a pod's annotations to s. The error names each wrong value.
func parseAnnotations(s *settings, all map[string]any) error {
	var failed []error
	for _, a := range Annotations {
		value, has := all[a.Name]
		if !has {
			continue
		}
		text, isText := value.(string)
		if !isText {
			failed = append(failed, fmt.Errorf("annotation %s is not a string: put quotes around the value", a.Name))
			continue
		}
		if a.parse == nil {
			continue
		}
		if err := a.parse(s, text); err != nil {
			failed = append(failed, &annotationError{a.Name, err})
		}
	}
	for _, name := range yamledit.SortedKeys(all) {
		domain, _, _ := strings.Cut(name, "/")
		switch {
		case slices.ContainsFunc(Annotations, func(a Annotation) bool { return a.Name == name }):
		case domain+"/" == ownPrefix:
			failed = append(failed, fmt.Errorf("annotation %s is unknown: use one of %s", name, strings.Join(ownNames(), ", ")))
		case domain == "sidecar.istio.io" || strings.HasSuffix(domain, ".sidecar.istio.io"):
			s.unknown = append(s.unknown, name)
		}
	}
	return errors.Join(failed...)
}

// annotationError reports the value of an annotation.
type annotationError struct {
	name string
	err  error
}

func (e *annotationError) Error() string { return "annotation " + e.name + ": " + e.err.Error() }
func (e *annotationError) Unwrap() error { return e.err }

func ownNames() []string {
	var names []string
	for _, a := range Annotations {
		if strings.HasPrefix(a.Name, ownPrefix) && a.Name != statusAnnotation {
			names = append(names, a.Name)
		}
	}
	return names
}

func parseSwitch(text string) (bool, error) {
	switch text {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf("%q is not a boolean: use \"true\" or \"false\"", text)
}

func toSwitch(at func(*settings) *bool) func(*settings, string) error {
	return func(s *settings, text string) (err error) {
		*at(s), err = parseSwitch(text)
		return err
	}
}

func parseMode(s *settings, text string) error {
	if text != "REDIRECT" && text != "TPROXY" {
		return fmt.Errorf("%q is not a mode: use REDIRECT or TPROXY; %s: \"false\" leaves the pod alone", text, istioInject)
	}
	s.mode = text
	return nil
}

func toImage(s *settings, text string) error {
	if text == "" || strings.ContainsAny(text, " \t\r\n") {
		return fmt.Errorf("%q is not an image: use one such as registry.example/pillion:1.0", text)
	}
	s.image = text
	return nil
}

func toPort(into *uint16, text string) (err error) {
	*into, err = capture.ParsePort(text)
	return err
}

// toList keeps the text for init and the agent. check is the parser that they use.
func toList(at func(*settings) *string, check func(string) error) func(*settings, string) error {
	return func(s *settings, text string) error {
		*at(s) = strings.Join(strings.Fields(text), "")
		return check(text)
	}
}

func ports(text string) error         { _, err := capture.ParsePortList(text); return err }
func portsOrAll(text string) error    { _, err := capture.ParsePorts(text); return err }
func networks(text string) error      { _, err := capture.ParsePrefixList(text); return err }
func networksOrAll(text string) error { _, err := capture.ParsePrefixes(text); return err }
func interfaces(text string) error    { _, err := capture.ParseInterfaces(text); return err }

var quantityForm = regexp.MustCompile(`^([0-9]{1,15}(?:\.[0-9]{1,9})?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$`)

var quantityUnits = map[string]float64{
	"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
}

// quantity returns the value of a Kubernetes quantity, or -1 if text is not one.
func quantity(text string) float64 {
	parts := quantityForm.FindStringSubmatch(text)
	if parts == nil {
		return -1
	}
	number, err := strconv.ParseFloat(parts[1], 64)
	if err != nil {
		return -1
	}
	return number * quantityUnits[parts[2]]
}

func toQuantity(at func(*settings) *string) func(*settings, string) error {
	return func(s *settings, text string) error {
		if quantity(text) <= 0 {
			return fmt.Errorf("%q is not a quantity: use one such as 100m or 64Mi", text)
		}
		*at(s) = text
		return nil
	}
}

func parseSpan(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not a time span: use a number with a unit, such as 500ms, 10s or 5m", text)
	}
	return d, nil
}

func parseDrainDelay(s *settings, text string) (err error) {
	s.drainDelay, err = parseSpan(text)
	return err
}

func parseLogLevel(s *settings, text string) error {
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, text) {
		return fmt.Errorf("%q is not a level: use debug, info, warn or error", text)
	}
	s.logLevel = text
	return nil
}

func parseAccessLog(s *settings, text string) error {
	if text != "off" && (!strings.HasPrefix(text, "/") || strings.ContainsAny(text, "\x00\n")) {
		return fmt.Errorf("%q is not a place for the access log: use off, or a path such as /dev/stdout", text)
	}
	s.log = text
	return nil
}

// toText keeps the text after check, if there is one.
func toText(at func(*settings) *string, check func(string) error) func(*settings, string) error {
	return func(s *settings, text string) error {
		*at(s) = text
		if check == nil {
			return nil
		}
		return check(text)
	}
}

func encoding(text string) error {
	if text != "text" && text != "json" {
		return fmt.Errorf("%q is not an encoding: use text or json", text)
	}
	return nil
}

func filter(text string) error { _, err := accesslog.ParseFilter(text); return err }

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// parseProxyConfig applies the keys that have a counterpart here. The others concern a control plane and Envoy.
func parseProxyConfig(s *settings, text string) error {
	tree, err := yamledit.Decode(text)
	if err != nil {
		return fmt.Errorf("not valid YAML: %w", err)
	}
	config, ok := tree.(map[string]any)
	if !ok && tree != nil {
		return fmt.Errorf("%.100q is not a mapping: use lines such as holdApplicationUntilProxyStarts: true", text)
	}
	for _, key := range yamledit.SortedKeys(config) {
		value, isKnown := config[key], true
		var err error
		switch key {
		case "holdApplicationUntilProxyStarts":
			s.hold, err = parseSwitch(fmt.Sprint(value))
		case "terminationDrainDuration":
			if s.drainTimeout, err = parseSpan(fmt.Sprint(value)); err == nil && s.drainTimeout == 0 {
				err = errors.New("0s resets every open connection: use 1s or more")
			}
		case "concurrency":
			number, isNumber := value.(json.Number)
			if s.concurrency, err = strconv.Atoi(string(number)); !isNumber || err != nil || s.concurrency < 0 || s.concurrency > 1024 {
				err = fmt.Errorf("%v is not a count: use a number from 0 to 1024; 0 means one for each CPU", value)
			}
		case "statusPort":
			err = toPort(&s.statusPort, fmt.Sprint(value))
		case "proxyMetadata":
			err = parseMetadata(s, value)
		default:
			s.ignored, isKnown = append(s.ignored, key), false
		}
		if isKnown && err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	return nil
}

// parseMetadata adds environment variables, as Istio's injector does.
func parseMetadata(s *settings, value any) error {
	variables, ok := value.(map[string]any)
	if !ok {
		return errors.New("not a mapping of variables to values")
	}
	for _, name := range yamledit.SortedKeys(variables) {
		if !variableName.MatchString(name) || slices.Contains(ownVariables, name) {
			return fmt.Errorf("%q cannot be set: use the name of a variable that the injection does not set", name)
		}
		switch value := variables[name].(type) {
		case string, bool, json.Number:
			s.metadata = append(s.metadata, member{name, fmt.Sprint(value)})
		default:
			return fmt.Errorf("%s: the value is not text: put quotes around it", name)
		}
	}
	return nil
}

// finish sets what depends on several annotations and on the pod's grace period.
func (s *settings) finish(grace time.Duration) error {
	spec := capture.Default()
	if s.statusPort != capture.StatusPort && slices.Contains(spec.OwnPorts(), s.statusPort) {
		return &annotationError{"status.sidecar.istio.io/port", fmt.Errorf("the sidecar uses port %d otherwise: use another port", s.statusPort)}
	}
	for _, r := range []struct {
		request, limit                  *string
		defaultRequest, defaultLimit    string
		requestAnnotation, limitSetting string
	}{
		{&s.memory, &s.memoryLimit, s.defaults.memory, s.defaults.memoryLimit, memoryAnnotation, "sidecar.istio.io/proxyMemoryLimit"},
		{&s.cpu, &s.cpuLimit, s.defaults.cpu, s.defaults.cpuLimit, cpuAnnotation, "sidecar.istio.io/proxyCPULimit"},
	} {
		request, limit := *r.request, *r.limit
		if request == "" {
			*r.request = r.defaultRequest
			if limit != "" && quantity(limit) < quantity(r.defaultRequest) {
				*r.request = limit
			}
		}
		if limit == "" {
			*r.limit = r.defaultLimit
			if r.defaultLimit != "" && quantity(*r.request) > quantity(r.defaultLimit) {
				*r.limit = *r.request
			}
		}
		if *r.limit != "" && quantity(*r.request) > quantity(*r.limit) {
			return &annotationError{r.requestAnnotation, fmt.Errorf("%q is more than the limit of %s: raise %s too", *r.request, *r.limit, r.limitSetting)}
		}
	}
	format := accesslog.ParseFormat
	if s.logEncoding == "json" {
		format = accesslog.ParseJSONFormat
	}
	if _, err := format(s.logFormat); err != nil {
		return &annotationError{ownPrefix + "access-log-format", err}
	}
	return s.finishDrain(grace)
}

// drainMargin is the rest of the grace period after the drain, for flushing logs and for the kubelet.
const drainMargin = 5 * time.Second

// finishDrain sets the drain timeout to the grace period minus a margin. The drain delay must fit into it.
func (s *settings) finishDrain(grace time.Duration) error {
	requested := s.drainTimeout
	if requested > grace {
		return &annotationError{proxyConfig, fmt.Errorf("terminationDrainDuration: %v is longer than terminationGracePeriodSeconds (%v): raise that too", requested, grace)}
	}
	if requested == 0 {
		s.drainTimeout = grace - min(drainMargin, grace/4)
	}
	switch {
	case s.drainDelay > s.drainTimeout:
		return &annotationError{drainDelayAnnotation, fmt.Errorf("%v is longer than the drain itself (%v, of a terminationGracePeriodSeconds of %v): raise that, or shorten the delay",
			s.drainDelay, s.drainTimeout, grace)}
	case s.drainDelay >= 0:
	case s.defaultDelay >= 0:
		s.drainDelay = min(s.defaultDelay, s.drainTimeout/2)
	case s.drainTimeout < 2*agentDrainDelay:
		s.drainDelay = s.drainTimeout / 2
	}
	return nil
}

const agentDrainDelay = 5 * time.Second // the agent's default of --drain-delay

// graceOf returns terminationGracePeriodSeconds, by default 30 s as Kubernetes has it.
func graceOf(spec map[string]any) (time.Duration, error) {
	value, has := spec["terminationGracePeriodSeconds"]
	if !has || value == nil {
		return 30 * time.Second, nil
	}
	number, isNumber := value.(json.Number)
	seconds, err := strconv.ParseInt(string(number), 10, 64)
	if !isNumber || err != nil || seconds < 0 || seconds > math.MaxInt32 {
		return 0, fmt.Errorf("terminationGracePeriodSeconds: %v is not a number of seconds", value)
	}
	return time.Duration(seconds) * time.Second, nil
}
