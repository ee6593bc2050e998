package inject

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// found is an object with a pod or a pod template.
type found struct {
	tree     any
	path     []string // from the document to the object
	template []string // from the object to the pod
	refused  string   // why objects of this kind are not injected, if they are not
	outcome  Outcome

	// record returns the text of a member of a mapping, and recordItem that of an item of a list.
	record     func(path []string, key string) (yamledit.Source, error)
	recordItem func(path []string, index int) (yamledit.Source, error)
}

// templates holds the path from an object of each kind to its pod template, by kind and API group.
var templates = []struct {
	kind, group string
	path        []string
	refused     string
}{
	{"Pod", "", nil, ""},
	{"Deployment", "apps", []string{"spec", "template"}, ""},
	{"StatefulSet", "apps", []string{"spec", "template"}, ""},
	{"DaemonSet", "apps", []string{"spec", "template"}, ""},
	{"ReplicaSet", "apps", []string{"spec", "template"}, ""},
	{"ReplicationController", "", []string{"spec", "template"}, ""},
	{"Job", "batch", []string{"spec", "template"}, ""},
	{"CronJob", "batch", []string{"spec", "jobTemplate", "spec", "template"}, ""},
	{"DeploymentConfig", "apps.openshift.io", []string{"spec", "template"}, ""},
	{"Rollout", "argoproj.io", []string{"spec", "template"}, ""},
	{"Service", "serving.knative.dev", []string{"spec", "template"},
		"Knative Serving refuses init containers in its templates; let the webhook inject its pods"},
	{"Configuration", "serving.knative.dev", []string{"spec", "template"},
		"Knative Serving refuses init containers in its templates; let the webhook inject its pods"},
}

// otherTemplates are the usual paths to a pod template in an object of an unknown kind.
var otherTemplates = [][]string{{"spec", "template"}, {"spec", "podTemplate"}, {"template"}, {"spec", "jobTemplate", "spec", "template"}}

const maxNested = 8 // lists in lists

// objects returns the objects in tree that have a pod, also in lists.
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
			return []*found{newFound(tree, path, t.path, t.refused)}
		}
	}
	for _, template := range otherTemplates {
		if containers, _ := yamledit.Get(tree, append(slices.Clone(template), "spec", "containers")...).([]any); len(containers) > 0 && kind != "" {
			return []*found{newFound(tree, path, template, "the kind is unknown; let the webhook inject its pods")}
		}
	}
	return nil
}

func newFound(tree any, path, template []string, refused string) *found {
	if yamledit.Get(tree, "spec", "workloadRef") != nil && yamledit.Get(tree, template...) == nil {
		refused = "its pods come from spec.workloadRef; inject that object"
	}
	o := &found{tree: tree, path: path, template: template, refused: refused}
	o.outcome.Kind, o.outcome.Namespace = yamledit.Text(tree, "kind"), yamledit.Text(tree, "metadata", "namespace")
	if o.outcome.Name = yamledit.Text(tree, "metadata", "name"); o.outcome.Name == "" {
		o.outcome.Name = yamledit.Text(tree, "metadata", "generateName") + "…"
	}
	return o
}

func (o *found) kind() string { return o.outcome.Kind }

func (o *found) warn(format string, arguments ...any) {
	o.outcome.Warnings = append(o.outcome.Warnings, fmt.Sprintf(format, arguments...))
}

// pod returns the object's pod or pod template.
func (o *found) pod() (*pod, error) {
	tree, ok := yamledit.Get(o.tree, o.template...).(map[string]any)
	if !ok {
		return nil, fmt.Errorf("it has no %s", strings.Join(o.template, "."))
	}
	return &pod{path: slices.Concat(o.path, o.template), tree: tree, record: o.record, recordItem: o.recordItem, warn: o.warn}, nil
}

// leaveAlone sets the outcome of an object that is not changed. requested: its author or an earlier injection asked for
// that.
func (o *found) leaveAlone(why string, requested bool) ([]yamledit.Change, error) {
	o.outcome.Action, o.outcome.Reason, o.outcome.requested = LeftAlone, why, requested
	return nil, nil
}

// uninject returns the changes that undo an injection, or no change for a pod that is not injected.
func (o *found) uninject() ([]yamledit.Change, error) {
	if o.refused != "" {
		return o.leaveAlone(o.refused, false)
	}
	p, err := o.pod()
	if err != nil {
		return nil, err
	}
	if _, injected := yamledit.Get(p.tree, "metadata", "annotations", statusAnnotation).(string); !injected {
		return o.leaveAlone("it is not injected", true)
	}
	o.outcome.Action = Uninjected
	err = p.undo()
	return p.changes, err
}

// inject returns the changes that inject the object's pods, or no change if they are left alone.
func (o *found) inject(options Options) ([]yamledit.Change, error) {
	if o.refused != "" {
		return o.leaveAlone(o.refused, false)
	}
	p, err := o.pod()
	if err != nil {
		return nil, err
	}
	p.names = o.names(p, options)
	if why, requested, err := p.leaveAlone(options); why != "" || err != nil {
		if err != nil {
			return nil, err
		}
		return o.leaveAlone(why, requested)
	}
	s, err := p.inject(options)
	if err != nil {
		return nil, err
	}
	if !s.native && (o.kind() == "Job" || o.kind() == "CronJob") {
		p.warn("a classic sidecar keeps it from completing: its last command must be a POST to localhost:%d/quitquitquit", s.statusPort)
	}
	o.outcome.Action, o.outcome.Image = Injected, s.image
	return p.changes, nil
}
