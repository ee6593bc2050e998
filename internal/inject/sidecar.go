package inject

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// Names in the pod. istioctl, Kiali and dashboards recognise a sidecar by the name of its container. The volume has the
// name and content of Istio's.
const (
	initName    = "pillion-init"
	SidecarName = "istio-proxy"
	volumeName  = "istio-podinfo"
)

// Default requests and limits. The requests are measured with a thousand connections; the limit leaves room for many more.
const (
	cpuRequest    = "10m"
	memoryRequest = "16Mi"
	memoryLimit   = "128Mi"
)

// agentProgram is the entrypoint of the image. Hooks need its full path.
const agentProgram = "/usr/local/bin/pilot-agent"

// ownVariables are the environment variables that the injection sets.
var ownVariables = []string{
	"POD_NAME", "POD_NAMESPACE", "INSTANCE_IP", "SERVICE_ACCOUNT", "ISTIO_META_WORKLOAD_NAME", "ISTIO_META_OWNER",
	"CANONICAL_SERVICE", "CANONICAL_REVISION", "ISTIO_KUBE_APP_PROBERS", "ISTIO_PROMETHEUS_ANNOTATIONS", "GOMAXPROCS",
	"PILLION_MEMORY_LIMIT", "PILLION_OPAQUE_PORTS", "PILLION_DRAIN_DELAY", "PILLION_DRAIN_TIMEOUT", "PILLION_LOG_LEVEL", "PILLION_ACCESS_LOG",
	"PILLION_ACCESS_LOG_FORMAT", "PILLION_ACCESS_LOG_ENCODING", "PILLION_ACCESS_LOG_FILTER", "PILLION_DNS_CAPTURE",
}

// initContainer returns the container that installs the rules. It runs init, because
// istio-iptables leaves IPv6 uncaptured in a dual-stack pod whose first address is an IPv4 one.
func (s *settings) initContainer(policy string) object {
	excluded := fmt.Sprintf("%d,%d,%d", capture.MetricsPort, capture.ReadinessPort, s.statusPort)
	if s.excludeIn != "" {
		excluded += "," + s.excludeIn
	}
	args := []string{"init",
		"-p", strconv.Itoa(capture.OutboundPort), "-z", strconv.Itoa(capture.InboundPort), "-u", strconv.Itoa(capture.DefaultProxyID),
		"-m", s.mode, "-i", s.includeRanges, "-x", s.excludeRanges, "-b", s.includeInbound, "-d", excluded}
	for _, o := range []struct{ flag, value string }{
		{"-q", s.includeOutbound}, {"-o", s.excludeOut}, {"-k", s.interfaces}, {"-c", s.excludeInterfaces},
	} {
		if o.value != "" {
			args = append(args, o.flag, o.value)
		}
	}
	if s.dnsCapture {
		args = append(args, "--redirect-dns")
	}
	c := s.container(initName, policy, args, s.environment(nil))
	return append(c, member{"securityContext", s.security(0, 0, "NET_ADMIN", "NET_RAW")})
}

// sidecar returns the agent's container.
func (s *settings) sidecar(name, policy string, environment object) object {
	args := []string{"agent"}
	if s.statusPort != capture.StatusPort {
		args = append(args, fmt.Sprintf("--status-port=%d", s.statusPort))
	}
	if s.mode == "TPROXY" {
		args = append(args, "--interception-mode="+s.mode)
	}
	c := s.container(name, policy, args, s.environment(environment))
	if s.native {
		c = append(c, member{"restartPolicy", "Always"})
	}
	c = append(c, member{"ports", []any{object{{"name", "http-envoy-prom"}, {"containerPort", capture.MetricsPort}, {"protocol", "TCP"}}}})
	c = append(c, s.probes()...)
	c = append(c, member{"lifecycle", s.lifecycle()})
	if s.mode == "TPROXY" {
		// In TPROXY mode the rules recognise the agent by its group. As user 1337 its connections to the workload would
		// return to it.
		c = append(c, member{"securityContext", s.security(0, capture.DefaultProxyID, "NET_ADMIN")})
	} else {
		c = append(c, member{"securityContext", s.security(capture.DefaultProxyID, capture.DefaultProxyID)})
	}
	return append(c, member{"volumeMounts", []any{object{{"name", volumeName}, {"mountPath", strings.TrimSuffix(podinfo.LabelsFile, "/labels")}, {"readOnly", true}}}})
}

// container returns what both containers have.
func (s *settings) container(name, policy string, args []string, environment []any) object {
	c := object{{"name", name}, {"image", s.image}}
	if policy != "" {
		c = append(c, member{"imagePullPolicy", policy})
	}
	c = append(c, member{"args", args})
	if len(environment) > 0 {
		c = append(c, member{"env", environment})
	}
	limits := object{}
	if s.cpuLimit != "" {
		limits = append(limits, member{"cpu", s.cpuLimit})
	}
	limits = append(limits, member{"memory", s.memoryLimit})
	return append(c, member{"resources", object{{"requests", object{{"cpu", s.cpu}, {"memory", s.memory}}}, {"limits", limits}}})
}

func (s *settings) environment(own object) []any {
	var list []any
	for _, v := range append(append(object{}, own...), s.metadata...) {
		switch value := v.Value.(type) {
		case object:
			list = append(list, object{{"name", v.Key}, {"valueFrom", value}})
		default:
			list = append(list, object{{"name", v.Key}, {"value", value}})
		}
	}
	return list
}

// agentEnvironment returns the variables that describe the pod and configure the agent.
func (s *settings) agentEnvironment(p *pod, probers, prometheus string) object {
	field := func(path string) object { return object{{"fieldRef", object{{"fieldPath", path}}}} }
	labels, _ := p.mapping("metadata", "labels")
	label := func(names ...string) string {
		for _, name := range names {
			if value := yamledit.Text(labels, name); value != "" {
				return value
			}
		}
		return ""
	}
	env := object{
		{"POD_NAME", field("metadata.name")},
		{"POD_NAMESPACE", field("metadata.namespace")},
		{"INSTANCE_IP", field("status.podIP")},
		{"SERVICE_ACCOUNT", field("spec.serviceAccountName")},
		// The agent keeps Go's memory below this. GOMEMLIMIT would leave nothing for the kernel's memory.
		{"PILLION_MEMORY_LIMIT", object{{"resourceFieldRef", object{{"resource", "limits.memory"}}}}},
	}
	delay, concurrency, dns := "", "", ""
	if s.dnsCapture {
		dns = "true"
	}
	if s.drainDelay >= 0 {
		delay = s.drainDelay.String()
	}
	if s.concurrency > 0 {
		concurrency = strconv.Itoa(s.concurrency)
	}
	for _, v := range []member{
		{"ISTIO_META_WORKLOAD_NAME", p.names.workload},
		{"ISTIO_META_OWNER", p.names.owner},
		{"CANONICAL_SERVICE", label("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")},
		{"CANONICAL_REVISION", label("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")},
		{"ISTIO_KUBE_APP_PROBERS", probers},
		{"ISTIO_PROMETHEUS_ANNOTATIONS", prometheus},
		{"PILLION_DRAIN_TIMEOUT", s.drainTimeout.String()},
		{"PILLION_DRAIN_DELAY", delay},
		{"PILLION_OPAQUE_PORTS", s.opaquePorts},
		{"PILLION_LOG_LEVEL", s.logLevel},
		{"PILLION_ACCESS_LOG", s.log},
		{"PILLION_ACCESS_LOG_FORMAT", s.logFormat},
		{"PILLION_ACCESS_LOG_ENCODING", s.logEncoding},
		{"PILLION_ACCESS_LOG_FILTER", s.logFilter},
		{"PILLION_DNS_CAPTURE", dns},
		{"GOMAXPROCS", concurrency},
	} {
		if v.Value != "" {
			// Kubernetes expands $(NAME) in values and reads $$ as $.
			env = append(env, member{v.Key, strings.ReplaceAll(v.Value.(string), "$", "$$")})
		}
	}
	return env
}

// probes returns the agent's own probes, at the readiness port. The process that carries the traffic answers them. A
// native sidecar must pass its startup probe before the next container starts.
func (s *settings) probes() object {
	probe := func(period, failures int) object {
		return object{
			{"httpGet", object{{"path", "/healthz/ready"}, {"port", capture.ReadinessPort}}},
			{"periodSeconds", period}, {"timeoutSeconds", 3}, {"failureThreshold", failures},
		}
	}
	return object{{"startupProbe", probe(1, 600)}, {"readinessProbe", probe(15, 4)}}
}

// lifecycle returns the hooks. preStop announces the drain as soon as the pod terminates: a native sidecar receives
// SIGTERM only after the workload has exited, and by then the drain delay has passed. postStart of a classic sidecar
// delays the workload's start until the agent is ready.
func (s *settings) lifecycle() object {
	exec := func(command ...string) object {
		return object{{"exec", object{{"command", append([]string{agentProgram}, command...)}}}}
	}
	var hooks object
	if !s.native && s.hold {
		hooks = append(hooks, member{"postStart", exec("wait")})
	}
	if s.statusPort == capture.StatusPort {
		return append(hooks, member{"preStop", exec("request", "POST", "drain", fmt.Sprintf("--debug-port=%d", s.statusPort))})
	}
	// `request drain` uses only the default status port. Envoy's path on the admin port has the same effect.
	return append(hooks, member{"preStop", exec("request", "POST", "drain_listeners?inboundonly&graceful&skip_exit")})
}

// security returns a security context with a user and, if required, capabilities, and no other privilege.
func (s *settings) security(user, group int, capabilities ...string) object {
	c := object{{"drop", []string{"ALL"}}}
	if len(capabilities) > 0 {
		c = append(c, member{"add", capabilities})
	}
	return object{
		{"runAsUser", user}, {"runAsGroup", group}, {"runAsNonRoot", user != 0},
		{"allowPrivilegeEscalation", false}, {"privileged", false}, {"readOnlyRootFilesystem", true},
		{"capabilities", c}, {"seccompProfile", object{{"type", "RuntimeDefault"}}},
	}
}

// labelsVolume returns the volume with the pod's labels and annotations that podinfo reads.
func labelsVolume() object {
	return object{{"name", volumeName}, {"downwardAPI", object{{"items", []any{
		object{{"path", "labels"}, {"fieldRef", object{{"fieldPath", "metadata.labels"}}}},
		object{{"path", "annotations"}, {"fieldRef", object{{"fieldPath", "metadata.annotations"}}}},
	}}}}}
}
