package inject

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Options apply to all pods. Image must be set.
type Options struct {
	// Image is the image of both containers, unless a pod's annotation names another.
	Image string
	// PullPolicy is the imagePullPolicy of both containers; "" omits it.
	PullPolicy string
	// SidecarName is the name of the agent's container; "" means SidecarName.
	SidecarName string
	// Classic makes the agent an ordinary container, for Kubernetes before 1.29, where native sidecars are missing.
	Classic bool
	// Namespace is the namespace of objects without one; "" means default.
	Namespace string
	// Defaults are values of annotations for pods without the annotation, by its name. The annotations with an Option can
	// have a default.
	Defaults map[string]string
}

var containerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// FieldError reports an invalid option. The caller maps the field to the flag that set it.
type FieldError struct {
	Field string // a field of Options, or the name of an annotation in Defaults
	Err   error  // begins with a space or ": "
}

func (e *FieldError) Error() string { return e.Field + e.Err.Error() }
func (e *FieldError) Unwrap() error { return e.Err }

// Validate checks all options. Its error is a FieldError.
func (o Options) Validate() error {
	invalid := func(field, format string, arguments ...any) error {
		return &FieldError{field, fmt.Errorf(format, arguments...)}
	}
	if err := toImage(&settings{}, o.Image); err != nil {
		return invalid("Image", ": %w", err)
	}
	if o.PullPolicy != "" && !slices.Contains([]string{"Always", "IfNotPresent", "Never"}, o.PullPolicy) {
		return invalid("PullPolicy", " %q: use Always, IfNotPresent or Never", o.PullPolicy)
	}
	if o.SidecarName != "" && (!containerName.MatchString(o.SidecarName) || o.SidecarName == initName) {
		return invalid("SidecarName", " %q: use at most 63 lower-case letters, digits and \"-\", and not %s", o.SidecarName, initName)
	}
	if o.Namespace != "" && !containerName.MatchString(o.Namespace) {
		return invalid("Namespace", " %q is not a namespace", o.Namespace)
	}
	for _, name := range slices.Sorted(maps.Keys(o.Defaults)) {
		if err := parseDefault(&settings{}, name, o.Defaults[name]); err != nil {
			return invalid(name, ": %w", err)
		}
	}
	s, err := o.settings()
	if err == nil {
		err = s.finish(24 * time.Hour)
	}
	if at := new(annotationError); errors.As(err, &at) {
		return invalid(at.name, ": %w", at.err)
	}
	return err
}

// parseDefault applies the default of one annotation.
func parseDefault(s *settings, name, value string) error {
	i := slices.IndexFunc(Annotations, func(a Annotation) bool { return a.Name == name && a.Option != "" })
	if i < 0 {
		return errors.New("this annotation has no default")
	}
	return Annotations[i].parse(s, value)
}

// settings returns the settings of a pod without annotations.
func (o Options) settings() (*settings, error) {
	s := &settings{
		image: o.Image, native: !o.Classic, mode: "REDIRECT", includeInbound: capture.All, includeRanges: capture.All,
		statusPort: capture.StatusPort, rewriteProbes: true, mergeMetrics: true, hold: true, drainDelay: -1,
	}
	for name, value := range o.Defaults {
		if err := parseDefault(s, name, value); err != nil {
			return nil, &annotationError{name, err}
		}
	}
	for _, r := range []struct{ request, limit, annotation string }{
		{s.cpu, s.cpuLimit, cpuAnnotation}, {s.memory, s.memoryLimit, memoryAnnotation},
	} {
		if r.limit != "" && quantity(r.request) > quantity(r.limit) {
			return nil, &annotationError{r.annotation, fmt.Errorf("%q is more than the limit of %s", r.request, r.limit)}
		}
	}
	// A pod's own request or limit overrides the default of the other, see finish.
	s.defaults = resources{cmp.Or(s.cpu, cpuRequest), cmp.Or(s.memory, memoryRequest), s.cpuLimit, cmp.Or(s.memoryLimit, memoryLimit)}
	s.resources = resources{}
	s.defaultDelay, s.drainDelay = s.drainDelay, -1
	return s, nil
}

func (o Options) sidecarName() string {
	if o.SidecarName == "" {
		return SidecarName
	}
	return o.SidecarName
}

// MaxInput bounds the bytes of one input.
const MaxInput = 64 << 20

// Read reads the documents for Inject. Errors contain name; size is the expected size, or 0.
func Read(from io.Reader, name string, size int64) (string, error) {
	var text strings.Builder
	text.Grow(int(min(size, MaxInput)))
	n, err := io.Copy(&text, io.LimitReader(from, MaxInput+1))
	if err != nil {
		return "", fmt.Errorf("reading %s: %w", name, err)
	}
	if n > MaxInput {
		return "", fmt.Errorf("%s is larger than %d MiB: split it", name, MaxInput>>20)
	}
	return text.String(), nil
}
