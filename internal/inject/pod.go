package inject

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// pod is a pod or a pod template within an object.
type pod struct {
	path    []string
	tree    map[string]any // the part of the object that is the pod
	names   names
	changes []yamledit.Change
	status  status
	// annotations are new ones. They are written together with the status.
	annotations object
	override    *override
	// record returns the text of a member of a mapping, and recordItem that of an item of a list. Paths begin at the root
	// of the document.
	record     func(path []string, key string) (yamledit.Source, error)
	recordItem func(path []string, index int) (yamledit.Source, error)
	warn       func(format string, arguments ...any)
}

// names identify the pod in telemetry.
type names struct {
	namespace, workload string
	owner               string // such as kubernetes://apis/apps/v1/namespaces/prod/deployments/web
}

// status is the content of statusAnnotation, from which an injection can be undone. Pointers are JSON pointers that
// begin at the pod. They have names of containers in place of indices, because other injectors may move containers.
type status struct {
	Version        int        `json:"version"`
	InitContainers []string   `json:"initContainers,omitempty"`
	Containers     []string   `json:"containers,omitempty"`
	Volumes        []string   `json:"volumes,omitempty"`
	Added          []string   `json:"added,omitempty"`    // new members
	Replaced       []replaced `json:"replaced,omitempty"` // members that replaced others
	Removed        *removed   `json:"removed,omitempty"`  // the override container
}

// replaced is the source text of a replaced member, see yamledit.Source.
type replaced struct {
	Path   string `json:"path"`
	Was    string `json:"was"`
	Column int    `json:"column"`
}

// removed is the source text of a container that was removed from a list, see yamledit.CutItem.
type removed struct {
	List   string `json:"list"`
	After  string `json:"after,omitempty"` // name of the container before it
	Was    string `json:"was"`
	Column int    `json:"column"`
}

const statusVersion = 1

// maxItems bounds a pod's containers and volumes, and the entries of a status, because some passes are quadratic.
const maxItems = 1000

// mapping returns the mapping at keys. A missing or null value counts as an empty mapping.
func (p *pod) mapping(keys ...string) (map[string]any, error) {
	switch v := yamledit.Get(p.tree, keys...).(type) {
	case map[string]any:
		return v, nil
	case nil:
		return nil, nil
	}
	return nil, fmt.Errorf("%s is not a mapping", strings.Join(keys, "."))
}

// items returns the items of a list, each of which must have a unique name.
func (p *pod) items(keys ...string) ([]map[string]any, error) {
	where := strings.Join(keys, ".")
	v := yamledit.Get(p.tree, keys...)
	list, isList := v.([]any)
	if !isList && v != nil {
		return nil, fmt.Errorf("%s is not a list", where)
	}
	if len(list) > maxItems {
		return nil, fmt.Errorf("%s has %d items: at most %d are supported", where, len(list), maxItems)
	}
	items := make([]map[string]any, len(list))
	for i := range list {
		item, _ := list[i].(map[string]any)
		if yamledit.Text(item, "name") == "" {
			return nil, fmt.Errorf("%s[%d] has no name", where, i)
		}
		if slices.ContainsFunc(items[:i], func(other map[string]any) bool { return other["name"] == item["name"] }) {
			return nil, fmt.Errorf("%s has the name %q twice", where, item["name"])
		}
		items[i] = item
	}
	return items, nil
}

func (p *pod) containers(list string) ([]map[string]any, error) { return p.items("spec", list) }

// workload returns the containers of a list without the override of the sidecar.
func (p *pod) workload(list string) ([]map[string]any, error) {
	containers, err := p.containers(list)
	if o := p.override; err == nil && o != nil && o.list == list {
		containers = slices.Delete(slices.Clone(containers), o.index, o.index+1)
	}
	return containers, err
}

// named returns the index of the item with a name, or -1.
func named(items []map[string]any, name string) int {
	return slices.IndexFunc(items, func(item map[string]any) bool { return item["name"] == name })
}

// replace replaces the member old by m and records old. at is path with names in place of indices.
func (p *pod) replace(path, at []string, old string, m member) error {
	full := slices.Concat(p.path, path)
	was, err := p.record(full, old)
	if err != nil {
		return err
	}
	p.status.Replaced = append(p.status.Replaced, replaced{yamledit.Pointer(append(slices.Clone(at), m.Key)...), was.Text, was.Column})
	p.changes = append(p.changes, yamledit.Change{Path: full, Kind: yamledit.SetMember, Key: m.Key, Old: old, Values: []any{m.Value}})
	return nil
}

// add adds members to a mapping. It creates a mapping that is missing or empty.
func (p *pod) add(path []string, members object) error {
	for _, m := range members {
		p.status.Added = append(p.status.Added, yamledit.Pointer(append(slices.Clone(path), m.Key)...))
	}
	return p.put(path, members)
}

// put is add without recording the members.
func (p *pod) put(path []string, members object) error {
	if there, err := p.mapping(path...); err != nil {
		return err
	} else if len(there) > 0 {
		for _, m := range members {
			p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, path), Kind: yamledit.SetMember, Key: m.Key, Values: []any{m.Value}})
		}
		return nil
	}
	return p.fill(path, members)
}

// fill sets a mapping or list that is missing or empty.
func (p *pod) fill(path []string, value any) error {
	above, key := path[:len(path)-1], path[len(path)-1]
	holder, err := p.mapping(above...)
	if err != nil {
		return err
	}
	if _, has := holder[key]; has {
		return p.replace(above, above, key, member{key, value})
	}
	return p.add(above, object{{key, value}})
}

// addItems adds items to a list of the pod's spec. It creates a list that is missing or empty.
func (p *pod) addItems(list string, where yamledit.Kind, items ...any) error {
	there, err := p.items("spec", list)
	if err != nil {
		return err
	}
	record := map[string]*[]string{"initContainers": &p.status.InitContainers, "containers": &p.status.Containers, "volumes": &p.status.Volumes}[list]
	isOverride := func(name string) bool { return p.override != nil && p.override.list == list && p.override.name == name }
	for _, item := range items {
		name := item.(object)[0].Value.(string)
		if named(there, name) >= 0 && !isOverride(name) {
			return fmt.Errorf("spec.%s already has %q: rename it", list, name)
		}
		*record = append(*record, name)
	}
	if len(there) == 0 || len(there) == 1 && isOverride(there[0]["name"].(string)) {
		return p.fill([]string{"spec", list}, items)
	}
	p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, []string{"spec", list}), Kind: where, Values: items})
	return nil
}

// undo adds the changes that reverse the status. Later changes of others stay.
func (p *pod) undo() error {
	annotation, isText := yamledit.Get(p.tree, "metadata", "annotations", statusAnnotation).(string)
	if !isText {
		return fmt.Errorf("annotation %s is not a string", statusAnnotation)
	}
	decoder := json.NewDecoder(strings.NewReader(annotation))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&p.status); err != nil || decoder.More() {
		return fmt.Errorf("annotation %s was not written by an injection: remove the annotation and the sidecar by hand", statusAnnotation)
	}
	if p.status.Version != statusVersion {
		return fmt.Errorf("annotation %s: unknown version %d: use the pillionctl that wrote it", statusAnnotation, p.status.Version)
	}
	if len(p.status.Added) > maxItems || len(p.status.Replaced) > 5*maxItems {
		return fmt.Errorf("annotation %s has more entries than a pod can have", statusAnnotation)
	}
	for _, r := range p.status.Replaced {
		if at := yamledit.ParsePointer(r.Path); len(at) > 3 && at[0] == "spec" {
			if err := p.undoProbe(at, r); err != nil {
				return err
			}
		}
	}
	if err := p.undoMeshTLS(); err != nil {
		return err
	}
	if err := p.undoAnnotations(); err != nil {
		return err
	}
	for _, list := range []struct {
		key  string
		ours []string
	}{{"initContainers", p.status.InitContainers}, {"containers", p.status.Containers}, {"volumes", p.status.Volumes}} {
		if err := p.undoList(list.key, list.ours); err != nil {
			return err
		}
	}
	return p.restoreOverride()
}

// undoProbe restores a probe. at is its pointer, whose third key is the container's name.
func (p *pod) undoProbe(at []string, r replaced) error {
	containers, err := p.items(at[:2]...)
	if err != nil {
		return err
	}
	i := named(containers, at[2])
	if i < 0 || !strings.HasPrefix(yamledit.Text(containers[i], append(slices.Clone(at[3:]), "path")...), "/app-") {
		p.warn("%s was changed after the injection and stays", r.Path)
		return nil
	}
	path := slices.Clone(at[:len(at)-1])
	path[2] = strconv.Itoa(i)
	return p.restore(path, at[len(at)-1], r)
}

func (p *pod) restore(path []string, now string, r replaced) error {
	was := yamledit.Source{Text: r.Was, Column: r.Column}
	if was.Column > len(r.Was)+1<<16 { // Decode writes that many spaces
		return fmt.Errorf("annotation %s: column %d", statusAnnotation, r.Column)
	}
	key, value, err := was.Decode()
	if err != nil {
		return fmt.Errorf("annotation %s: former text of %s: %w", statusAnnotation, r.Path, err)
	}
	p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, path), Kind: yamledit.SetMember, Key: key, Old: now, Values: []any{value}, Was: &was})
	return nil
}

// wasAt returns the replaced member at a pointer.
func (p *pod) wasAt(keys ...string) (replaced, bool) {
	i := slices.IndexFunc(p.status.Replaced, func(r replaced) bool { return r.Path == yamledit.Pointer(keys...) })
	if i < 0 {
		return replaced{}, false
	}
	return p.status.Replaced[i], true
}

func (p *pod) undoAnnotations() error {
	at := []string{"metadata", "annotations"}
	annotations, err := p.mapping(at...)
	if err != nil {
		return err
	}
	foreign, ours := false, []string{statusAnnotation}
	for _, name := range yamledit.SortedKeys(annotations) {
		switch {
		case name == statusAnnotation:
		case slices.Contains(p.status.Added, yamledit.Pointer("metadata", "annotations", name)):
			ours = append(ours, name)
		default:
			foreign = true
		}
	}
	if !foreign {
		metadata, _ := p.mapping("metadata")
		if len(metadata) == 1 {
			if done, err := p.takeBack(at[:1]); done || err != nil {
				return err
			}
		}
		if done, err := p.takeBack(at); done || err != nil {
			return err
		}
	}
	for _, name := range yamledit.SortedKeys(annotations) {
		if r, was := p.wasAt("metadata", "annotations", name); was {
			if err := p.restore(at, name, r); err != nil {
				return err
			}
		}
	}
	if !foreign {
		return p.setEmpty(at, map[string]any{})
	}
	for _, name := range ours {
		p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, at), Kind: yamledit.RemoveMember, Key: name})
	}
	return nil
}

// takeBack restores or removes a mapping or list that the injection created.
func (p *pod) takeBack(at []string) (done bool, err error) {
	above, key := at[:len(at)-1], at[len(at)-1]
	if r, was := p.wasAt(at...); was {
		return true, p.restore(above, key, r)
	}
	if slices.Contains(p.status.Added, yamledit.Pointer(at...)) {
		p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, above), Kind: yamledit.RemoveMember, Key: key})
		return true, nil
	}
	return false, nil
}

// setEmpty empties a mapping or list whose other members have been removed since the injection.
func (p *pod) setEmpty(at []string, value any) error {
	above, key := at[:len(at)-1], at[len(at)-1]
	p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, above), Kind: yamledit.SetMember, Key: key, Values: []any{value}})
	return nil
}

func (p *pod) undoList(key string, ours []string) error {
	at := []string{"spec", key}
	items, err := p.items(at...)
	if err != nil || len(items) == 0 || len(ours) == 0 {
		return err
	}
	foreign := slices.ContainsFunc(items, func(item map[string]any) bool { return !slices.Contains(ours, yamledit.Text(item, "name")) })
	if !foreign {
		if done, err := p.takeBack(at); done || err != nil {
			return err
		}
		return p.setEmpty(at, []any{})
	}
	for i, item := range slices.Backward(items) {
		if slices.Contains(ours, yamledit.Text(item, "name")) {
			p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, at), Kind: yamledit.RemoveItem, Key: strconv.Itoa(i)})
		}
	}
	return nil
}
