package inject

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// override is a container with the sidecar's name and the image autoImage. As with Istio's injector, its fields override
// those of the sidecar.
type override struct {
	list  string // initContainers or containers
	index int
	name  string
	tree  map[string]any
}

const autoImage = "auto"

// findOverride returns the pod's override, or nil.
func (p *pod) findOverride(name string) (*override, error) {
	for _, list := range []string{"containers", "initContainers"} {
		containers, err := p.containers(list)
		if err != nil {
			return nil, err
		}
		if i := named(containers, name); i >= 0 && containers[i]["image"] == autoImage {
			return &override{list, i, name, containers[i]}, nil
		}
	}
	return nil, nil
}

// itemKeys are the keys that identify the items of a container's lists, as in a strategic merge patch.
var itemKeys = map[string]string{"env": "name", "ports": "containerPort", "volumeMounts": "mountPath", "volumeDevices": "devicePath"}

// handlers are the alternatives of a probe and of a hook. One in the override replaces the sidecar's.
var handlers = []string{"exec", "httpGet", "tcpSocket", "grpc", "sleep"}

// apply returns the sidecar's container with the fields of the override.
func (o *override) apply(sidecar object, s *settings) (object, error) {
	if o == nil {
		return sidecar, nil
	}
	theirs := make(map[string]any, len(o.tree))
	for key, value := range o.tree {
		if key != "name" && key != "image" {
			theirs[key] = value
		}
	}
	if policy := theirs["restartPolicy"]; policy != nil && (!s.native || policy != "Always") {
		return nil, fmt.Errorf("container %s: restartPolicy is %v: the annotation %s decides that; remove the field", o.name, policy, nativeAnnotation)
	}
	merged := overlay(sidecar, theirs)
	for _, id := range []string{"runAsUser", "runAsGroup"} {
		want, got := within(sidecar, "securityContext", id), within(merged, "securityContext", id)
		if got == nil { // as in securityContext: null
			return nil, fmt.Errorf("container %s: securityContext has no %s: the rules recognise the agent by %v; remove the field that is null", o.name, id, want)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return nil, fmt.Errorf("container %s: securityContext.%s is %v: the rules recognise the agent by %v; remove the field", o.name, id, got, want)
		}
	}
	return o.fitResources(merged, theirs)
}

// fitResources adjusts a request or limit of ours to that of the override, because a request above the limit makes the pod
// invalid.
func (o *override) fitResources(merged object, theirs map[string]any) (object, error) {
	for _, name := range []string{"cpu", "memory"} {
		request, limit := within(merged, "resources", "requests", name), within(merged, "resources", "limits", name)
		if request == nil || limit == nil {
			continue
		}
		requested, allowed := quantity(fmt.Sprint(request)), quantity(fmt.Sprint(limit))
		if requested <= allowed || allowed < 0 {
			continue
		}
		fitted := map[string]any{}
		switch {
		case yamledit.Get(theirs, "resources", "limits", name) == nil:
			fitted["limits"] = map[string]any{name: request}
		case yamledit.Get(theirs, "resources", "requests", name) == nil:
			fitted["requests"] = map[string]any{name: limit}
		default:
			return nil, fmt.Errorf("container %s: resources.requests.%s is %v, more than the limit of %v", o.name, name, request, limit)
		}
		merged = overlay(merged, map[string]any{"resources": fitted})
	}
	return merged, nil
}

// within returns the value at a path, or nil.
func within(o object, path ...string) any {
	value := memberOf(o, path[0])
	if len(path) == 1 {
		return value
	}
	below, _ := value.(object)
	return within(below, path[1:]...)
}

// overlay returns ours with the members of theirs. Mappings are merged, lists of named items by item; other values of
// theirs replace ours.
func overlay(ours object, theirs map[string]any) object {
	merged := slices.Clone(ours)
	if slices.ContainsFunc(handlers, func(handler string) bool { return theirs[handler] != nil }) {
		merged = slices.DeleteFunc(merged, func(m member) bool { return slices.Contains(handlers, m.Key) })
	}
	for _, key := range yamledit.SortedKeys(theirs) {
		value := theirs[key]
		i := slices.IndexFunc(merged, func(m member) bool { return m.Key == key })
		if i < 0 {
			merged = append(merged, member{key, value})
			continue
		}
		switch was := merged[i].Value.(type) {
		case object:
			if mapping, ok := value.(map[string]any); ok {
				value = overlay(was, mapping)
			}
		case []any:
			if items, ok := value.([]any); ok && itemKeys[key] != "" {
				value = overlayItems(was, items, itemKeys[key])
			}
		}
		merged[i].Value = value
	}
	return merged
}

// overlayItems replaces the items of ours that theirs has by the same key, and appends the others.
func overlayItems(ours, theirs []any, key string) []any {
	merged := slices.Clone(ours)
	for _, item := range theirs {
		id := fmt.Sprint(yamledit.Get(item, key))
		i := slices.IndexFunc(merged, func(m any) bool {
			if ours, ok := m.(object); ok {
				return fmt.Sprint(memberOf(ours, key)) == id
			}
			return fmt.Sprint(yamledit.Get(m, key)) == id
		})
		if i < 0 {
			merged = append(merged, item)
		} else {
			merged[i] = item
		}
	}
	return merged
}

// memberOf returns the value of a member of an object, or nil.
func memberOf(o object, key string) any {
	for _, m := range o {
		if m.Key == key {
			return m.Value
		}
	}
	return nil
}

// removeOverride removes the container from its list and records it. If it is the only container of its list, addItems
// replaces the list.
func (p *pod) removeOverride() error {
	o := p.override
	if o == nil {
		return nil
	}
	containers, err := p.containers(o.list)
	if err != nil {
		return err
	}
	if len(containers) == 1 {
		return nil
	}
	path := slices.Concat(p.path, []string{"spec", o.list})
	was, err := p.recordItem(path, o.index)
	if err != nil {
		return err
	}
	p.status.Removed = &removed{List: o.list, Was: was.Text, Column: was.Column}
	if o.index > 0 {
		p.status.Removed.After = yamledit.Text(containers[o.index-1], "name")
	}
	p.changes = append(p.changes, yamledit.Change{Path: path, Kind: yamledit.CutItem, Key: strconv.Itoa(o.index)})
	return nil
}

// restoreOverride inserts the removed container again, after the changes that remove the sidecar.
func (p *pod) restoreOverride() error {
	r := p.status.Removed
	if r == nil {
		return nil
	}
	if r.List != "containers" && r.List != "initContainers" {
		return fmt.Errorf("annotation %s: %q is not a list of containers", statusAnnotation, r.List)
	}
	was := yamledit.Source{Text: r.Was, Column: r.Column}
	item, err := was.DecodeItem()
	if err != nil {
		return fmt.Errorf("annotation %s: former text of a container: %w", statusAnnotation, err)
	}
	containers, err := p.containers(r.List)
	if err != nil {
		return err
	}
	ours := p.status.Containers
	if r.List == "initContainers" {
		ours = p.status.InitContainers
	}
	after, index := "", 0
	for i, c := range containers {
		name := yamledit.Text(c, "name")
		if !slices.Contains(ours, name) {
			index++
		}
		if name == r.After {
			after = strconv.Itoa(i)
			break
		}
	}
	switch {
	case r.After == "":
		index = 0
	case after == "": // the container before it was removed since
		return errors.New("annotation " + statusAnnotation + ": the container " + r.After + " is missing: remove the sidecar by hand")
	}
	p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, []string{"spec", r.List}), Kind: yamledit.InsertItem,
		Key: strconv.Itoa(index), Old: after, Values: []any{item}, Was: &was})
	return nil
}
