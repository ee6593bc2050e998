// Package podinfo tells who the workload is, from what Istio's injector and the kubelet put beside it.
//
// It is read once, when the agent starts. What is not known is "unknown", as Istio's telemetry has it, so that all fields
// may stand in labels as they are; on a laptop all of them are, but for the revision.
package podinfo

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// LabelsFile and AnnotationsFile are where the injector mounts the pod's.
const (
	LabelsFile      = "/etc/istio/pod/labels"
	AnnotationsFile = "/etc/istio/pod/annotations"
)

// Unknown stands for what is not known, and Latest for a revision that is not.
const (
	Unknown = "unknown"
	Latest  = "latest"
)

// maxLabels is how much of the labels, or of the annotations, is read. A pod has a few; the API server takes no object larger than 1.5 MiB.
const maxLabels = 1 << 20

// Pod is the workload's pod, in the terms of Istio's telemetry. No field is empty, and all are valid UTF-8.
type Pod struct {
	Name, Namespace, IP, ServiceAccount string
	Workload                            string // the deployment or the like that the pod belongs to
	App, Version                        string // the labels of these names
	CanonicalService, CanonicalRevision string // what Istio's dashboards group by
	Cluster, Mesh                       string
}

// Read asks getenv for the injector's variables, and the file of labels, which is in the downward API's format. That there
// is no file is no error. When the file is broken, the error says how, and the pod is what could be read all the same.
func Read(getenv func(string) string, labelsFile string) (Pod, error) {
	labels, err := readPairs("labels", labelsFile)
	env := func(name string) string { return strings.ToValidUTF8(getenv(name), "\uFFFD") }
	pod := Pod{
		Name:           first(env("POD_NAME"), Unknown),
		Namespace:      first(env("POD_NAMESPACE"), Unknown),
		IP:             first(env("INSTANCE_IP"), Unknown),
		ServiceAccount: first(env("SERVICE_ACCOUNT"), Unknown),
		Workload:       first(env("ISTIO_META_WORKLOAD_NAME"), ownerName(env("ISTIO_META_OWNER")), workloadName(env("POD_NAME")), Unknown),
		App:            first(labels["app"], Unknown),
		Version:        first(labels["version"], Unknown),
		Cluster:        first(env("ISTIO_META_CLUSTER_ID"), Unknown),
		Mesh:           first(env("ISTIO_META_MESH_ID"), env("TRUST_DOMAIN"), Unknown),
	}
	pod.CanonicalService = first(labels["service.istio.io/canonical-name"], env("CANONICAL_SERVICE"),
		labels["app.kubernetes.io/name"], labels["app"], pod.Workload)
	pod.CanonicalRevision = first(labels["service.istio.io/canonical-revision"], env("CANONICAL_REVISION"),
		labels["app.kubernetes.io/version"], labels["version"], Latest)
	return pod, err
}

// first returns the first of values that is not empty.
func first(values ...string) string {
	for _, value := range values {
		if value != "" {
			return value
		}
	}
	return ""
}

// ownerName is the last part of kubernetes://apis/apps/v1/namespaces/prod/deployments/reviews.
func ownerName(owner string) string {
	return owner[strings.LastIndexByte(owner, '/')+1:]
}

// workloadName is a pod's name without what its controllers have put behind their own: reviews-6d4b75cb6d-hswz6 is of
// reviews, and so is reviews-0. It is a guess, for a pod that was not injected.
func workloadName(pod string) string {
	name, suffix := cutLast(pod)
	switch {
	case number(suffix):
		return name // of a stateful set
	case len(suffix) != 5 || !random(suffix):
		return pod
	}
	owner, suffix := cutLast(name)
	if len(suffix) >= 6 && len(suffix) <= 10 && random(suffix) || len(suffix) >= 8 && number(suffix) {
		return owner // of a replica set's hash, or a cron job's minute
	}
	return name
}

// cutLast returns the whole name when there is nothing to cut.
func cutLast(name string) (before, suffix string) {
	if i := strings.LastIndexByte(name, '-'); i > 0 {
		return name[:i], name[i+1:]
	}
	return name, ""
}

// random reports whether s has only characters of which Kubernetes makes names: no vowels and nothing that looks like one,
// so that most words are none.
func random(s string) bool { return s != "" && strings.Trim(s, "bcdfghjklmnpqrstvwxz2456789") == "" }

func number(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// Annotations reads the file of annotations, which is in the downward API's format, with the same understanding for one
// that is missing or broken.
func Annotations(file string) (map[string]string, error) { return readPairs("annotations", file) }

func readPairs(what, name string) (map[string]string, error) {
	file, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("reading the pod's %s: %w", what, err)
	}
	defer file.Close()
	labels, err := parseLabels(file)
	if err != nil {
		return labels, fmt.Errorf("reading the pod's %s from %s: %w", what, name, err)
	}
	return labels, nil
}

// parseLabels reads lines of key="value", whose value is quoted as in Go. A line that is not like this is passed over, and
// the first of them is the error.
func parseLabels(r io.Reader) (map[string]string, error) {
	labels := make(map[string]string)
	var broken error
	lines := bufio.NewScanner(io.LimitReader(r, maxLabels))
	lines.Buffer(nil, maxLabels+1)
	for n := 1; lines.Scan(); n++ {
		if lines.Text() == "" {
			continue
		}
		key, quoted, _ := strings.Cut(lines.Text(), "=")
		value, err := strconv.Unquote(quoted)
		if err != nil || key == "" || !strings.HasPrefix(quoted, `"`) {
			if broken == nil {
				broken = fmt.Errorf(`line %d is not key="value": %.100q`, n, lines.Text())
			}
			continue
		}
		labels[key] = strings.ToValidUTF8(value, "\uFFFD")
	}
	return labels, errors.Join(broken, lines.Err())
}

// Nobody is a pod of which nothing is known.
func Nobody() Pod {
	return Pod{
		Name: Unknown, Namespace: Unknown, IP: Unknown, ServiceAccount: Unknown, Workload: Unknown, App: Unknown,
		Version: Unknown, CanonicalService: Unknown, CanonicalRevision: Latest, Cluster: Unknown, Mesh: Unknown,
	}
}
