package inject

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/scrape"
	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// closed lists the namespaces of the cluster's own components. A sidecar there can keep a cluster from starting.
var closed = []string{"kube-system", "kube-public", "kube-node-lease"}

// leaveAlone returns why the pod gets no sidecar, or "". requested: its author or an earlier injection asked for that.
func (p *pod) leaveAlone(options Options) (why string, requested bool, err error) {
	annotations, err := p.mapping("metadata", "annotations")
	if err != nil {
		return "", false, err
	}
	labels, err := p.mapping("metadata", "labels")
	if err != nil {
		return "", false, err
	}
	if value, has := annotations[statusAnnotation]; has {
		return "it is already injected", true, p.injected(value)
	}
	for _, from := range []struct {
		what string
		m    map[string]any
	}{{"annotation", annotations}, {"label", labels}} {
		for _, key := range []string{injectAnnotation, istioInject} {
			value, has := from.m[key]
			if !has {
				continue
			}
			inject, err := parseSwitch(fmt.Sprint(value))
			if err != nil {
				return "", false, fmt.Errorf("%s %s: %w", from.what, key, err)
			}
			if !inject {
				return fmt.Sprintf("the %s %s is false", from.what, key), true, nil
			}
		}
	}
	switch {
	case slices.Contains(closed, p.names.namespace):
		return "the namespace " + p.names.namespace + " belongs to the cluster", false, nil
	case yamledit.Get(p.tree, "spec", "hostNetwork") == true:
		return "it uses the node's network (hostNetwork)", false, nil
	case yamledit.Text(p.tree, "spec", "os", "name") == "windows":
		return "it runs on Windows", false, nil
	}
	why, err = p.otherSidecar(options)
	return why, false, err
}

// injected checks that a pod with a status has its init container. A status that was copied from another pod would leave
// this one uncaptured.
func (p *pod) injected(value any) error {
	for _, list := range []string{"containers", "initContainers"} {
		containers, err := p.containers(list)
		if err != nil {
			return err
		}
		if named(containers, initName) >= 0 {
			return nil
		}
	}
	return fmt.Errorf("annotation %s marks the pod as injected, but there is no container %s: remove the annotation", statusAnnotation, initName)
}

// inject adds the changes that inject the pod.
func (p *pod) inject(options Options) (*settings, error) {
	annotations, err := p.mapping("metadata", "annotations")
	if err != nil {
		return nil, err
	}
	spec, err := p.mapping("spec")
	if err != nil {
		return nil, err
	}
	if p.override, err = p.findOverride(options.sidecarName()); err != nil {
		return nil, err
	}
	if containers, err := p.workload("containers"); err != nil {
		return nil, err
	} else if len(containers) == 0 {
		return nil, errors.New("spec.containers is empty: a pod needs a container")
	}
	s, err := p.settings(annotations, spec, options)
	if err != nil {
		return nil, err
	}
	if err := p.warnOfConflicts(s); err != nil {
		return nil, err
	}
	probers := ""
	if s.rewriteProbes {
		if probers, err = p.rewriteProbes(s); err != nil {
			return nil, err
		}
	}
	prometheus, err := p.moveMetrics(s, annotations)
	if err != nil {
		return nil, err
	}
	sidecar := s.sidecar(options.sidecarName(), options.PullPolicy, s.agentEnvironment(p, probers, prometheus))
	if sidecar, err = p.override.apply(sidecar, s); err != nil {
		return nil, err
	}
	return s, p.place(s, options, sidecar)
}

// settings reads the annotations. A workload whose traffic the rules would not capture is an error.
func (p *pod) settings(annotations, spec map[string]any, options Options) (*settings, error) {
	s, err := options.settings()
	if err != nil {
		return nil, err
	}
	if err := parseAnnotations(s, annotations); err != nil {
		return nil, err
	}
	grace, err := graceOf(spec)
	if err != nil {
		return nil, err
	}
	if err := s.finish(grace); err != nil {
		return nil, err
	}
	if len(s.ignored) > 0 {
		p.warn("annotation proxy.istio.io/config: no effect: %s", strings.Join(s.ignored, ", "))
	}
	if len(s.unknown) > 0 {
		p.warn("annotations without effect: %s", strings.Join(s.unknown, ", "))
	}
	contexts := []any{yamledit.Get(spec, "securityContext")}
	for _, list := range []string{"containers", "initContainers"} {
		containers, err := p.workload(list)
		if err != nil {
			return nil, err
		}
		for _, c := range containers {
			// An ordinary init container with the sidecar's user bypasses the sidecar on purpose.
			if list == "containers" || yamledit.Text(c, "restartPolicy") == "Always" {
				contexts = append(contexts, c["securityContext"])
			}
		}
	}
	for _, context := range contexts {
		for _, id := range []string{"runAsUser", "runAsGroup"} {
			if fmt.Sprint(yamledit.Get(context, id)) == strconv.Itoa(capture.DefaultProxyID) {
				return nil, fmt.Errorf("securityContext.%s is %d, which is reserved for the sidecar: the rules would not capture the workload's traffic; use another number",
					id, capture.DefaultProxyID)
			}
		}
	}
	return s, nil
}

// moveMetrics directs Prometheus to the agent. The agent scrapes the workload. It returns the workload's target for the
// agent, or "". A pod that opts out of scraping stays as it is.
func (p *pod) moveMetrics(s *settings, annotations map[string]any) (string, error) {
	if !s.mergeMetrics || yamledit.Text(annotations, "prometheus.io/scrape") == "false" {
		return "", nil
	}
	at := []string{"metadata", "annotations"}
	var asked, fresh object
	for _, m := range []member{
		{"scrape", "true"}, {"path", "/stats/prometheus"}, {"port", strconv.Itoa(int(s.statusPort))},
	} {
		key := "prometheus.io/" + m.Key
		value, has := annotations[key]
		if !has {
			fresh = append(fresh, member{key, m.Value})
			continue
		}
		if _, isText := value.(string); !isText {
			return "", fmt.Errorf("annotation %s is not a string: put quotes around the value", key)
		}
		asked = append(asked, member{m.Key, value})
		if value == m.Value {
			continue
		}
		if err := p.replace(at, at, key, member{key, m.Value}); err != nil {
			return "", err
		}
	}
	p.annotations = append(p.annotations, fresh...)
	if asked == nil {
		return "", nil
	}
	recorded := yamledit.JSON(asked)
	if yamledit.Text(annotations, "prometheus.io/port") == strconv.Itoa(int(s.statusPort)) {
		return "", nil // it named the agent already
	}
	// The agent refuses to start with targets that it cannot parse or that are its own ports.
	spec := capture.Default()
	if _, err := scrape.ParseTargets(recorded, append(spec.OwnPorts(), s.statusPort)...); err != nil {
		return "", fmt.Errorf("annotations prometheus.io/…: %w", err)
	}
	return recorded, nil
}

// place adds the containers, the volume and the annotations to the pod.
func (p *pod) place(s *settings, options Options, sidecar object) error {
	init := s.initContainer(options.PullPolicy)
	if err := p.removeOverride(); err != nil {
		return err
	}
	lists := func() error {
		if s.native {
			// First: the init containers after them need the agent, since the rules redirect their traffic to it.
			return p.addItems("initContainers", yamledit.AddFront, init, sidecar)
		}
		// Last: the agent does not run yet while init containers run.
		if err := p.addItems("initContainers", yamledit.AddBack, init); err != nil {
			return err
		}
		where := yamledit.AddFront
		if !s.hold {
			where = yamledit.AddBack
		}
		return p.addItems("containers", where, sidecar)
	}
	if err := lists(); err != nil {
		return err
	}
	if err := p.addItems("volumes", yamledit.AddBack, labelsVolume()); err != nil {
		return err
	}
	if err := p.disableMeshTLS(); err != nil {
		return err
	}
	if err := p.announce(); err != nil {
		return err
	}
	return p.writeAnnotations()
}

// writeAnnotations writes the new annotations and the status.
func (p *pod) writeAnnotations() error {
	at := []string{"metadata", "annotations"}
	for _, m := range p.annotations {
		p.status.Added = append(p.status.Added, yamledit.Pointer(append(slices.Clone(at), m.Key)...))
	}
	p.status.Version = statusVersion
	write := func() error {
		return p.put(at, append(slices.Clone(p.annotations), member{statusAnnotation, yamledit.JSON(p.status)}))
	}
	// The status also records whether the mapping of annotations is new. The first call finds that out; its changes are
	// discarded.
	mark := len(p.changes)
	if err := write(); err != nil {
		return err
	}
	p.changes = p.changes[:mark]
	return write()
}

// istioStatus is the content of the annotation by which Kiali and istioctl recognise a sidecar, as Istio's injector writes
// it.
type istioStatus struct {
	InitContainers   []string `json:"initContainers"`
	Containers       []string `json:"containers"`
	Volumes          []string `json:"volumes"`
	ImagePullSecrets []string `json:"imagePullSecrets"`
	Revision         string   `json:"revision"`
}

// announce adds the annotations for other programs: Istio's status, and the container that kubectl selects by default.
func (p *pod) announce() error {
	annotations, err := p.mapping("metadata", "annotations")
	if err != nil {
		return err
	}
	containers, err := p.workload("containers")
	if err != nil {
		return err
	}
	status, err := json.Marshal(istioStatus{p.status.InitContainers, p.status.Containers, p.status.Volumes, nil, revision})
	if err != nil {
		return err
	}
	for _, m := range []member{
		{defaultContainer, containers[0]["name"]}, {defaultLogsContainer, containers[0]["name"]}, {istioStatusAnnotation, string(status)},
	} {
		_, has := annotations[m.Key]
		switch {
		case !has:
			p.annotations = append(p.annotations, m)
		case m.Key == istioStatusAnnotation: // copied from another pod
			at := []string{"metadata", "annotations"}
			if err := p.replace(at, at, m.Key, m); err != nil {
				return err
			}
		}
	}
	return nil
}
