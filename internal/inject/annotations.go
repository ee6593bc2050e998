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

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// The annotations of our own that are more than a setting.
const (
	ownPrefix        = "pillion.dev/"
	injectAnnotation = ownPrefix + "inject"
	statusAnnotation = ownPrefix + "status"
	istioInject      = "sidecar.istio.io/inject"
	mergeMetrics     = "prometheus.istio.io/merge-metrics"
)

// settings are what a pod's annotations say, over the options of the injection.
type settings struct {
	image                         string
	native                        bool
	mode                          string // REDIRECT or TPROXY
	includeInbound, excludeIn     string
	includeOutbound, excludeOut   string
	includeRanges, excludeRanges  string
	excludeInterfaces, interfaces string
	statusPort                    uint16
	cpu, memory                   string // requests; "" is the default
	cpuLimit, memoryLimit         string
	rewriteProbes, mergeMetrics   bool
	hold                          bool          // the workload waits for a classic sidecar
	drainTimeout                  time.Duration // 0: from the grace period
	drainDelay                    time.Duration // negative: the agent's default
	concurrency                   int           // 0: as many as there are
	metadata                      object        // environment of both containers
	opaquePorts, logLevel, log    string        // for the agent as they are
	ignored                       []string      // of proxy.istio.io/config
	unheeded                      []string      // annotations for Istio's sidecar
}

// An Annotation is one that pods may have. Value and Meaning are for people; docs/inject.md has the same table.
type Annotation struct {
	Name, Value, Meaning string
	parse                func(*settings, string) error
}

// Annotations are all that are heeded, but for those of Prometheus, which are moved.
var Annotations = []Annotation{
	{istioInject, "`true`, `false`", "`false` leaves the pod alone. It may be a label, too", nil},
	{"sidecar.istio.io/nativeSidecar", "`true`, `false`", "a native sidecar, or one among the containers, whatever `--classic` says", toSwitch(func(s *settings) *bool { return &s.native })},
	{"sidecar.istio.io/interceptionMode", "`REDIRECT`, `TPROXY`", "how inbound connections are captured. With `TPROXY` the agent runs as root with NET_ADMIN", parseMode},
	{"sidecar.istio.io/rewriteAppHTTPProbers", "`true`, `false`", "`false` leaves the workload's probes alone", toSwitch(func(s *settings) *bool { return &s.rewriteProbes })},
	{"sidecar.istio.io/proxyImage", "image", "the image of both containers", toImage},
	{"sidecar.istio.io/proxyCPU", "quantity", "what the sidecar requests", toQuantity(func(s *settings) *string { return &s.cpu })},
	{"sidecar.istio.io/proxyMemory", "quantity", "what the sidecar requests", toQuantity(func(s *settings) *string { return &s.memory })},
	{"sidecar.istio.io/proxyCPULimit", "quantity", "its limit", toQuantity(func(s *settings) *string { return &s.cpuLimit })},
	{"sidecar.istio.io/proxyMemoryLimit", "quantity", "its limit", toQuantity(func(s *settings) *string { return &s.memoryLimit })},
	{"status.sidecar.istio.io/port", "port", "the status port in place of 15020", func(s *settings, text string) error { return toPort(&s.statusPort, text) }},
	{"traffic.sidecar.istio.io/includeInboundPorts", "`*`, ports", "inbound ports that are captured; empty is none", toList(func(s *settings) *string { return &s.includeInbound }, portsOrAll)},
	{"traffic.sidecar.istio.io/excludeInboundPorts", "ports", "inbound ports left alone", toList(func(s *settings) *string { return &s.excludeIn }, ports)},
	{"traffic.sidecar.istio.io/includeOutboundPorts", "ports", "outbound ports captured at every address", toList(func(s *settings) *string { return &s.includeOutbound }, ports)},
	{"traffic.sidecar.istio.io/excludeOutboundPorts", "ports", "outbound ports left alone", toList(func(s *settings) *string { return &s.excludeOut }, ports)},
	{"traffic.sidecar.istio.io/includeOutboundIPRanges", "`*`, networks", "outbound networks that are captured; empty is none", toList(func(s *settings) *string { return &s.includeRanges }, networksOrAll)},
	{"traffic.sidecar.istio.io/excludeOutboundIPRanges", "networks", "outbound networks left alone", toList(func(s *settings) *string { return &s.excludeRanges }, networks)},
	{"traffic.sidecar.istio.io/excludeInterfaces", "interfaces", "interfaces left alone", toList(func(s *settings) *string { return &s.excludeInterfaces }, interfaces)},
	{"traffic.sidecar.istio.io/kubevirtInterfaces", "interfaces", "what comes from them is captured as outbound", toList(func(s *settings) *string { return &s.interfaces }, interfaces)},
	{"proxy.istio.io/config", "YAML", "heeded are `holdApplicationUntilProxyStarts`, `terminationDrainDuration`, `concurrency`, `statusPort` and `proxyMetadata`; others are named in a warning", parseProxyConfig},
	{mergeMetrics, "`true`, `false`", "`false` leaves the annotations of Prometheus alone", toSwitch(func(s *settings) *bool { return &s.mergeMetrics })},
	{injectAnnotation, "`true`, `false`", "as `sidecar.istio.io/inject`", nil},
	{ownPrefix + "image", "image", "the image of both containers; it goes before `sidecar.istio.io/proxyImage`", toImage},
	{ownPrefix + "opaque-ports", "`*`, ports", "`--opaque-ports` of the agent", toList(func(s *settings) *string { return &s.opaquePorts }, portsOrAll)},
	{ownPrefix + "drain-delay", "time span", "`--drain-delay` of the agent", parseDrainDelay},
	{ownPrefix + "log-level", "`debug`, `info`, `warn`, `error`", "`--log-level` of the agent", parseLogLevel},
	{ownPrefix + "access-log", "path, `off`", "`--access-log` of the agent", parseAccessLog},
	{statusAnnotation, "JSON", "written by the injection: what it added and changed, for `pillionctl uninject`", nil},
}

// parseAnnotations heeds a pod's annotations. Each value that cannot be heeded is one error.
func parseAnnotations(s *settings, all map[string]any) error {
	var failed []error
	for _, a := range Annotations {
		value, has := all[a.Name]
		if !has {
			continue
		}
		text, isText := value.(string)
		if !isText {
			failed = append(failed, fmt.Errorf("annotation %s: it is no string: put quotes around the value", a.Name))
			continue
		}
		if a.parse == nil {
			continue
		}
		if err := a.parse(s, text); err != nil {
			failed = append(failed, fmt.Errorf("annotation %s: %w", a.Name, err))
		}
	}
	for _, name := range yamledit.SortedKeys(all) {
		domain, _, _ := strings.Cut(name, "/")
		switch {
		case slices.ContainsFunc(Annotations, func(a Annotation) bool { return a.Name == name }):
		case domain+"/" == ownPrefix:
			failed = append(failed, fmt.Errorf("annotation %s is unknown: there are %s", name, strings.Join(ownNames(), ", ")))
		case domain == "sidecar.istio.io" || strings.HasSuffix(domain, ".sidecar.istio.io"):
			s.unheeded = append(s.unheeded, name)
		}
	}
	return errors.Join(failed...)
}

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
	return false, fmt.Errorf("%q is neither on nor off: use \"true\" or \"false\"", text)
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

// toList keeps the text, for rules and the agent read it themselves. It is checked by the reader that they have.
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

// quantity is how much a resource's quantity is, or -1.
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
		return fmt.Errorf("%q is no place for the access log: use off, or a path such as /dev/stdout", text)
	}
	s.log = text
	return nil
}

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// parseProxyConfig heeds what has a counterpart here. The rest is about a control plane and Envoy.
func parseProxyConfig(s *settings, text string) error {
	tree, err := yamledit.Decode(text)
	if err != nil {
		return fmt.Errorf("not valid YAML: %w", err)
	}
	config, ok := tree.(map[string]any)
	if !ok && tree != nil {
		return fmt.Errorf("%.100q is no mapping: use lines such as holdApplicationUntilProxyStarts: true", text)
	}
	for _, key := range yamledit.SortedKeys(config) {
		value, isKnown := config[key], true
		var err error
		switch key {
		case "holdApplicationUntilProxyStarts":
			s.hold, err = parseSwitch(fmt.Sprint(value))
		case "terminationDrainDuration":
			if s.drainTimeout, err = parseSpan(fmt.Sprint(value)); err == nil && s.drainTimeout == 0 {
				err = errors.New("0s lets nothing finish: use 1s or more")
			}
		case "concurrency":
			number, isNumber := value.(json.Number)
			if s.concurrency, err = strconv.Atoi(string(number)); !isNumber || err != nil || s.concurrency < 0 || s.concurrency > 1024 {
				err = fmt.Errorf("%v is not a count: use a number from 0 to 1024; 0 is as many as there are", value)
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

// parseMetadata takes variables for the environment, as Istio's injector does.
func parseMetadata(s *settings, value any) error {
	variables, ok := value.(map[string]any)
	if !ok {
		return errors.New("it is no mapping of variables to values")
	}
	for _, name := range yamledit.SortedKeys(variables) {
		if !variableName.MatchString(name) || slices.Contains(ownVariables, name) {
			return fmt.Errorf("%q cannot be set: use the name of a variable that the injection does not set itself", name)
		}
		switch value := variables[name].(type) {
		case string, bool, json.Number:
			s.metadata = append(s.metadata, member{name, fmt.Sprint(value)})
		default:
			return fmt.Errorf("%s: the value is no text: put quotes around it", name)
		}
	}
	return nil
}

// finish settles what depends on more than one annotation, and on the pod's grace period.
func (s *settings) finish(grace time.Duration) error {
	spec := capture.Default()
	if s.statusPort != capture.StatusPort && slices.Contains(spec.OwnPorts(), s.statusPort) {
		return fmt.Errorf("annotation status.sidecar.istio.io/port: the sidecar has another use for port %d: use another one", s.statusPort)
	}
	for _, r := range []struct {
		request, limit                  *string
		defaultRequest, defaultLimit    string
		requestAnnotation, limitSetting string
	}{
		{&s.memory, &s.memoryLimit, memoryRequest, memoryLimit, "sidecar.istio.io/proxyMemory", "sidecar.istio.io/proxyMemoryLimit"},
		{&s.cpu, &s.cpuLimit, cpuRequest, "", "sidecar.istio.io/proxyCPU", "sidecar.istio.io/proxyCPULimit"},
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
			return fmt.Errorf("annotation %s: %q is more than the limit of %s: raise %s too", r.requestAnnotation, *r.request, *r.limit, r.limitSetting)
		}
	}
	return s.finishDrain(grace)
}

// What is left of the grace period when the drain is over: for the kubelet, and to write logs out.
const drainMargin = 5 * time.Second

// finishDrain gives the drain all of the grace period but a margin. The agent's own delay must fit in.
func (s *settings) finishDrain(grace time.Duration) error {
	asked := s.drainTimeout
	if asked > grace {
		return fmt.Errorf("annotation proxy.istio.io/config: terminationDrainDuration: %v is longer than terminationGracePeriodSeconds (%v): raise that too", asked, grace)
	}
	if asked == 0 {
		s.drainTimeout = grace - min(drainMargin, grace/4)
	}
	if s.drainDelay > s.drainTimeout {
		return fmt.Errorf("annotation %sdrain-delay: %v is longer than the drain itself (%v, of a terminationGracePeriodSeconds of %v): raise that, or wait less",
			ownPrefix, s.drainDelay, s.drainTimeout, grace)
	}
	if s.drainDelay < 0 && s.drainTimeout < 2*agentDrainDelay {
		s.drainDelay = s.drainTimeout / 2
	}
	return nil
}

const agentDrainDelay = 5 * time.Second // what --drain-delay is when nothing is said

// graceOf reads terminationGracePeriodSeconds.
func graceOf(spec map[string]any) (time.Duration, error) {
	value, has := spec["terminationGracePeriodSeconds"]
	if !has || value == nil {
		return 30 * time.Second, nil
	}
	number, isNumber := value.(json.Number)
	seconds, err := strconv.ParseInt(string(number), 10, 64)
	if !isNumber || err != nil || seconds < 0 || seconds > math.MaxInt32 {
		return 0, fmt.Errorf("terminationGracePeriodSeconds: %v is no number of seconds", value)
	}
	return time.Duration(seconds) * time.Second, nil
}
