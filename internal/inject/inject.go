// Package inject puts pillion into pods, and takes it out again.
//
// It reads Kubernetes objects, decides from a pod's annotations what the sidecar must look like, and makes a list of
// changes. The same list is done to a text, of which every other byte stays as it is, or said to an API server as a JSON
// Patch. What was changed is recorded in an annotation of the pod, so that a second injection changes nothing, and so
// that all can be undone. Nothing is written when anything is wrong: a pod without its sidecar would run, uncaptured.
package inject

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/scrape"
	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// The names of what yamledit adds to a tree.
type (
	object = yamledit.Object
	member = yamledit.Member
)

// Options are what is the same for all pods. Image must be set.
type Options struct {
	// Image is of both containers, when annotations name no other.
	Image string
	// PullPolicy is Kubernetes' imagePullPolicy; "" leaves it out.
	PullPolicy string
	// SidecarName is the name of the agent's container; "" is SidecarName.
	SidecarName string
	// Classic puts the agent among the containers. It is for Kubernetes before 1.29, which has no native sidecars.
	Classic bool
	// Namespace is that of objects that name none; "" is default.
	Namespace string
}

var containerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// Validate names the flag that is wrong.
func (o Options) Validate() error {
	if err := toImage(&settings{}, o.Image); err != nil {
		return fmt.Errorf("--image: %w", err)
	}
	if o.PullPolicy != "" && !slices.Contains([]string{"Always", "IfNotPresent", "Never"}, o.PullPolicy) {
		return fmt.Errorf("--image-pull-policy %q: use Always, IfNotPresent or Never", o.PullPolicy)
	}
	if o.SidecarName != "" && (!containerName.MatchString(o.SidecarName) || o.SidecarName == initName) {
		return fmt.Errorf("--sidecar-name %q: use at most 63 lower-case letters, digits and \"-\", and not %s", o.SidecarName, initName)
	}
	if o.Namespace != "" && !containerName.MatchString(o.Namespace) {
		return fmt.Errorf("--namespace %q is not a namespace", o.Namespace)
	}
	return nil
}

func (o Options) sidecarName() string {
	if o.SidecarName == "" {
		return SidecarName
	}
	return o.SidecarName
}

// MaxInput is how many bytes of documents are read at once.
const MaxInput = 64 << 20

// Read reads documents as Inject takes them, whose name is for errors.
func Read(from io.Reader, name string) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(from, MaxInput+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(text) > MaxInput {
		return nil, fmt.Errorf("%s is larger than %d MiB: give it in parts", name, MaxInput>>20)
	}
	return text, nil
}

// Inject returns the documents with a sidecar in each pod that is to have one. Name is for errors and warnings, and warn
// is called with what people should know. When an object cannot be injected the error names all such, and there is no
// text.
func Inject(text []byte, name string, options Options, warn func(string)) ([]byte, error) {
	return each(text, name, warn, func(o *found) ([]yamledit.Change, error) { return o.inject(options) })
}

// Uninject takes the sidecars out again. A text that Inject made becomes what it was, byte for byte.
func Uninject(text []byte, name string, warn func(string)) ([]byte, error) {
	return each(text, name, warn, (*found).uninject)
}

const byteOrderMark = "\uFEFF"

// each has changes made to each object.
func each(text []byte, name string, warn func(string), decide func(*found) ([]yamledit.Change, error)) ([]byte, error) {
	if !utf8.Valid(text) {
		return nil, fmt.Errorf("%s is no UTF-8: convert it", name)
	}
	var out strings.Builder
	var failed []error
	stream := string(text)
	if strings.HasPrefix(stream, byteOrderMark) {
		out.WriteString(byteOrderMark)
		stream = stream[len(byteOrderMark):]
	}
	line := 1
	for i, document := range yamledit.Split([]byte(stream)) {
		in := fmt.Sprintf("(document %d of %s)", i+1, name)
		if i > 0 {
			in = fmt.Sprintf("(document %d of %s, from line %d)", i+1, name, line)
		}
		line += strings.Count(document, "\n")
		edited, err := one(document, warn, func(object string) string { return strings.TrimLeft(object+" "+in, " ") }, decide)
		if err != nil {
			failed = append(failed, err)
		}
		out.WriteString(edited)
	}
	if err := errors.Join(failed...); err != nil {
		return nil, err
	}
	return []byte(out.String()), nil
}

func one(text string, warn func(string), where func(string) string, decide func(*found) ([]yamledit.Change, error)) (string, error) {
	if says := strings.TrimLeft(text, " \t\r\n"); says == "" || says[0] == '%' {
		return text, nil // directives are of the document behind them
	}
	d, err := yamledit.Parse(text)
	if err != nil {
		return "", fmt.Errorf("%s: %w", where(""), err)
	}
	var changes []yamledit.Change
	var failed []error
	for _, o := range objects(d.Tree(), nil) {
		o.record = d.Source
		o.warn = func(format string, arguments ...any) {
			warn(where(o.String()) + ": " + fmt.Sprintf(format, arguments...))
		}
		more, err := decide(o)
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", where(o.String()), err))
		}
		changes = append(changes, more...)
	}
	if err := errors.Join(failed...); err != nil || len(changes) == 0 {
		return text, err
	}
	edited, err := d.Edit(changes)
	if err != nil {
		return "", fmt.Errorf("%s: %w", where(""), err)
	}
	return edited, nil
}

// found is an object that has a pod or a template of pods.
type found struct {
	kind     string
	tree     any
	path     []string // from the document to the object
	template []string // from the object to the pod
	record   func(path []string, key string) (yamledit.Source, error)
	warn     func(format string, arguments ...any)
}

// templates are where the kinds that have pods have them. Group is that of their apiVersion.
var templates = []struct {
	kind, group string
	path        []string
}{
	{"Pod", "", nil},
	{"Deployment", "apps", []string{"spec", "template"}},
	{"StatefulSet", "apps", []string{"spec", "template"}},
	{"DaemonSet", "apps", []string{"spec", "template"}},
	{"ReplicaSet", "apps", []string{"spec", "template"}},
	{"Job", "batch", []string{"spec", "template"}},
	{"CronJob", "batch", []string{"spec", "jobTemplate", "spec", "template"}},
}

const maxNested = 8 // lists in lists

// objects finds those of the kinds that matter.
func objects(tree any, path []string) []*found {
	kind := yamledit.Text(tree, "kind")
	group, _, hasGroup := strings.Cut(yamledit.Text(tree, "apiVersion"), "/")
	if !hasGroup {
		group = ""
	}
	if kind == "List" && group == "" && len(path) <= 2*maxNested {
		var all []*found
		items, _ := yamledit.Get(tree, "items").([]any)
		for i, item := range items {
			all = append(all, objects(item, append(slices.Clone(path), "items", strconv.Itoa(i)))...)
		}
		return all
	}
	for _, t := range templates {
		if t.kind == kind && t.group == group {
			return []*found{{kind: kind, tree: tree, path: path, template: t.path}}
		}
	}
	return nil
}

// String names the object for people.
func (o *found) String() string {
	name := yamledit.Text(o.tree, "metadata", "name")
	if name == "" {
		name = yamledit.Text(o.tree, "metadata", "generateName") + "…"
	}
	if namespace := yamledit.Text(o.tree, "metadata", "namespace"); namespace != "" {
		name = namespace + "/" + name
	}
	return o.kind + " " + name
}

// pod is the object's.
func (o *found) pod() (*pod, error) {
	tree, ok := yamledit.Get(o.tree, o.template...).(map[string]any)
	if !ok {
		return nil, fmt.Errorf("it has no %s", strings.Join(o.template, "."))
	}
	return &pod{path: slices.Concat(o.path, o.template), tree: tree, record: o.record, warn: o.warn}, nil
}

// uninject makes the changes that undo an injection, if there was one.
func (o *found) uninject() ([]yamledit.Change, error) {
	p, err := o.pod()
	if err != nil {
		return nil, err
	}
	if _, injected := yamledit.Get(p.tree, "metadata", "annotations", statusAnnotation).(string); !injected {
		return nil, nil
	}
	err = p.undo()
	return p.changes, err
}

// closed are the namespaces that a cluster itself lives in: a sidecar there can keep it from coming up.
var closed = []string{"kube-system", "kube-public", "kube-node-lease"}

// inject makes the changes that put pillion into the object's pods; none if they are left alone.
func (o *found) inject(options Options) ([]yamledit.Change, error) {
	p, err := o.pod()
	if err != nil {
		return nil, err
	}
	p.names = o.names(p, options)
	annotations, err := p.mapping("metadata", "annotations")
	if err != nil {
		return nil, err
	}
	if leave, err := p.leaveAlone(annotations, options); leave || err != nil {
		return nil, err
	}
	spec, err := p.mapping("spec")
	if err != nil {
		return nil, err
	}
	if containers, err := p.containers("containers"); err != nil {
		return nil, err
	} else if len(containers) == 0 {
		return nil, errors.New("spec.containers is empty: a pod needs one")
	}
	s, err := p.settings(annotations, spec, options)
	if err != nil {
		return nil, err
	}
	if !s.native && (o.kind == "Job" || o.kind == "CronJob") {
		p.warn("it does not end by itself with a classic sidecar: its last act must be a POST to localhost:%d/quitquitquit", s.statusPort)
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
	if err := p.place(s, options, s.sidecar(options.sidecarName(), options.PullPolicy, s.agentEnvironment(p, probers, prometheus))); err != nil {
		return nil, err
	}
	return p.changes, nil
}

// leaveAlone decides whether the pod gets no sidecar, and warns when nobody has asked for that.
func (p *pod) leaveAlone(annotations map[string]any, options Options) (bool, error) {
	labels, err := p.mapping("metadata", "labels")
	if err != nil {
		return false, err
	}
	if value, has := annotations[statusAnnotation]; has {
		return true, p.injected(value)
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
				return false, fmt.Errorf("%s %s: %w", from.what, key, err)
			}
			if !inject {
				return true, nil
			}
		}
	}
	why := ""
	switch {
	case slices.Contains(closed, p.names.namespace):
		why = "the namespace " + p.names.namespace + " is the cluster's own"
	case yamledit.Get(p.tree, "spec", "hostNetwork") == true:
		why = "its network is the node's (hostNetwork)"
	case yamledit.Text(p.tree, "spec", "os", "name") == "windows":
		why = "it is for Windows"
	}
	for _, list := range []string{"containers", "initContainers"} {
		containers, err := p.containers(list)
		if err != nil {
			return false, err
		}
		for _, name := range []string{options.sidecarName(), SidecarName, initName, "istio-init"} {
			if named(containers, name) >= 0 {
				why = fmt.Sprintf("it has a container %q already", name)
			}
		}
	}
	if why != "" {
		p.warn("left alone: %s", why)
	}
	return why != "", nil
}

// injected checks that what the status names is there: somebody may have copied it, and the pod would run uncaptured.
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
	return fmt.Errorf("annotation %s says that it has been injected, but there is no container %s: take the annotation out", statusAnnotation, initName)
}

// settings reads the annotations, and refuses what would go past the sidecar.
func (p *pod) settings(annotations, spec map[string]any, options Options) (*settings, error) {
	s := &settings{
		image: options.Image, native: !options.Classic, mode: "REDIRECT", includeInbound: capture.All, includeRanges: capture.All,
		statusPort: capture.StatusPort, rewriteProbes: true, mergeMetrics: true, hold: true, drainDelay: -1,
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
		p.warn("annotation proxy.istio.io/config: nothing here for %s", strings.Join(s.ignored, ", "))
	}
	if len(s.unheeded) > 0 {
		p.warn("not heeded: %s", strings.Join(s.unheeded, ", "))
	}
	contexts := []any{yamledit.Get(spec, "securityContext")}
	for _, list := range []string{"containers", "initContainers"} {
		containers, err := p.containers(list)
		if err != nil {
			return nil, err
		}
		for _, c := range containers {
			// An init container that goes past the sidecar does so on purpose.
			if list == "containers" || yamledit.Text(c, "restartPolicy") == "Always" {
				contexts = append(contexts, c["securityContext"])
			}
		}
	}
	for _, context := range contexts {
		for _, id := range []string{"runAsUser", "runAsGroup"} {
			if fmt.Sprint(yamledit.Get(context, id)) == strconv.Itoa(capture.DefaultProxyID) {
				return nil, fmt.Errorf("securityContext.%s is %d, the sidecar's own: the rules would let the workload's traffic pass uncaptured; use another number",
					id, capture.DefaultProxyID)
			}
		}
	}
	return s, nil
}

// moveMetrics has Prometheus scrape the agent, which scrapes the workload, and returns what tells the agent how. A pod
// that says it is not to be scraped is not.
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
			return "", fmt.Errorf("annotation %s: it is no string: put quotes around the value", key)
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
		return "", nil // it has been for the agent all along
	}
	// The agent does not start with targets that it cannot read, or that are its own.
	spec := capture.Default()
	if _, err := scrape.ParseTargets(recorded, append(spec.OwnPorts(), s.statusPort)...); err != nil {
		return "", fmt.Errorf("annotations prometheus.io/…: %w", err)
	}
	return recorded, nil
}

// place puts the containers, the volume and the annotations into the pod.
func (p *pod) place(s *settings, options Options, sidecar object) error {
	init := s.initContainer(options.PullPolicy)
	lists := func() error {
		if s.native {
			// In front of all: what comes behind them has a network, which the rules have made the agent's.
			return p.addItems("initContainers", yamledit.AddFront, init, sidecar)
		}
		// Behind all: there is no agent yet while init containers run.
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
	// That a mapping is made for them is part of the status. So the first time is to learn that, and does not count.
	mark := len(p.changes)
	if err := write(); err != nil {
		return err
	}
	p.changes = p.changes[:mark]
	return write()
}
