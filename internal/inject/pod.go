package inject

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// pod is a pod or a template of pods, in whatever object it stands.
type pod struct {
	path    []string
	tree    map[string]any // the pod's own part of the object
	names   names
	changes []yamledit.Change
	status  status
	// annotations are new ones, which are written with the status.
	annotations object
	// record tells how the member of a mapping is written. Paths are from the root of the document.
	record func(path []string, key string) (yamledit.Source, error)
	warn   func(format string, arguments ...any)
}

// names are what telemetry calls the pod.
type names struct {
	namespace, workload string
	owner               string // as in kubernetes://apis/apps/v1/namespaces/prod/deployments/web
}

// status is what statusAnnotation records: enough to undo the injection. Pointers are JSON pointers from the pod, but
// with names of containers in place of indices, as other injectors may move them.
type status struct {
	Version        int        `json:"version"`
	InitContainers []string   `json:"initContainers,omitempty"`
	Containers     []string   `json:"containers,omitempty"`
	Volumes        []string   `json:"volumes,omitempty"`
	Added          []string   `json:"added,omitempty"`    // members that were not there
	Replaced       []replaced `json:"replaced,omitempty"` // members that were others
}

// replaced is a member as it was written, see yamledit.Source.
type replaced struct {
	Path   string `json:"path"`
	Was    string `json:"was"`
	Column int    `json:"column"`
}

const statusVersion = 1

// maxItems is of a pod's containers or volumes, and of what a status names: what is done with them is not linear.
const maxItems = 1000

// mapping is the mapping at keys; null and nothing are an empty one.
func (p *pod) mapping(keys ...string) (map[string]any, error) {
	switch v := yamledit.Get(p.tree, keys...).(type) {
	case map[string]any:
		return v, nil
	case nil:
		return nil, nil
	}
	return nil, fmt.Errorf("%s is no mapping", strings.Join(keys, "."))
}

// items are those of a list of named things.
func (p *pod) items(keys ...string) ([]map[string]any, error) {
	where := strings.Join(keys, ".")
	v := yamledit.Get(p.tree, keys...)
	list, isList := v.([]any)
	if !isList && v != nil {
		return nil, fmt.Errorf("%s is no list", where)
	}
	if len(list) > maxItems {
		return nil, fmt.Errorf("%s has %d items, which is more than %d", where, len(list), maxItems)
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

// named finds an item by its name.
func named(items []map[string]any, name string) int {
	return slices.IndexFunc(items, func(item map[string]any) bool { return item["name"] == name })
}

// replace puts a member in the place of another one, which is recorded. At is path with names.
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

// add puts members into a mapping, which it makes when it is not there or empty.
func (p *pod) add(path []string, members object) error {
	for _, m := range members {
		p.status.Added = append(p.status.Added, yamledit.Pointer(append(slices.Clone(path), m.Key)...))
	}
	return p.put(path, members)
}

// put is add without a record of the members.
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

// fill makes the mapping or list at path, which is empty or not there.
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

// addItems puts items into a list of the pod's spec, which it makes when it is not there or empty.
func (p *pod) addItems(list string, where yamledit.Kind, items ...any) error {
	there, err := p.items("spec", list)
	if err != nil {
		return err
	}
	record := map[string]*[]string{"initContainers": &p.status.InitContainers, "containers": &p.status.Containers, "volumes": &p.status.Volumes}[list]
	for _, item := range items {
		name := item.(object)[0].Value.(string)
		if named(there, name) >= 0 {
			return fmt.Errorf("spec.%s has %q already: give it another name", list, name)
		}
		*record = append(*record, name)
	}
	if len(there) == 0 {
		return p.fill([]string{"spec", list}, items)
	}
	p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, []string{"spec", list}), Kind: where, Values: items})
	return nil
}

// undo makes the changes that take back what the status says. Whatever somebody else has changed since is left alone.
func (p *pod) undo() error {
	annotation, isText := yamledit.Get(p.tree, "metadata", "annotations", statusAnnotation).(string)
	if !isText {
		return fmt.Errorf("annotation %s is no string", statusAnnotation)
	}
	decoder := json.NewDecoder(strings.NewReader(annotation))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&p.status); err != nil || decoder.More() {
		return fmt.Errorf("annotation %s: it is not what an injection has written: take out the annotation and what was injected by hand", statusAnnotation)
	}
	if p.status.Version != statusVersion {
		return fmt.Errorf("annotation %s: version %d is not known: use the pillionctl that has written it", statusAnnotation, p.status.Version)
	}
	if len(p.status.Added) > maxItems || len(p.status.Replaced) > 5*maxItems {
		return fmt.Errorf("annotation %s: it names more than a pod can have", statusAnnotation)
	}
	for _, r := range p.status.Replaced {
		if at := yamledit.ParsePointer(r.Path); len(at) > 3 && at[0] == "spec" {
			if err := p.undoProbe(at, r); err != nil {
				return err
			}
		}
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
	return nil
}

// undoProbe brings a probe back. At is its pointer, with the container's name at the third place.
func (p *pod) undoProbe(at []string, r replaced) error {
	containers, err := p.items(at[:2]...)
	if err != nil {
		return err
	}
	i := named(containers, at[2])
	if i < 0 || !strings.HasPrefix(yamledit.Text(containers[i], append(slices.Clone(at[3:]), "path")...), "/app-") {
		p.warn("%s is not as it was injected, and is left alone", r.Path)
		return nil
	}
	path := slices.Clone(at[:len(at)-1])
	path[2] = strconv.Itoa(i)
	return p.bringBack(path, at[len(at)-1], r)
}

func (p *pod) bringBack(path []string, now string, r replaced) error {
	was := yamledit.Source{Text: r.Was, Column: r.Column}
	if was.Column > len(r.Was)+1<<16 { // it becomes blanks
		return fmt.Errorf("annotation %s: column %d", statusAnnotation, r.Column)
	}
	key, value, err := was.Decode()
	if err != nil {
		return fmt.Errorf("annotation %s: what %s was: %w", statusAnnotation, r.Path, err)
	}
	p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, path), Kind: yamledit.SetMember, Key: key, Old: now, Values: []any{value}, Was: &was})
	return nil
}

// wasAt finds what stood at a pointer, if there was something.
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
			if err := p.bringBack(at, name, r); err != nil {
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

// takeBack undoes the making of a mapping or list, if it was made by the injection.
func (p *pod) takeBack(at []string) (done bool, err error) {
	above, key := at[:len(at)-1], at[len(at)-1]
	if r, was := p.wasAt(at...); was {
		return true, p.bringBack(above, key, r)
	}
	if slices.Contains(p.status.Added, yamledit.Pointer(at...)) {
		p.changes = append(p.changes, yamledit.Change{Path: slices.Concat(p.path, above), Kind: yamledit.RemoveMember, Key: key})
		return true, nil
	}
	return false, nil
}

// setEmpty is for a mapping or list of which all that was not ours has gone since.
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
