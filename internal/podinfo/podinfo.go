// Package podinfo identifies the workload from the files and variables that Istio's injector and the kubelet provide. It is
// read once, when the agent starts.
//
// An unknown value is "unknown", as in Istio's telemetry, so that every field can be used as a label. On a laptop all fields
// except the revision are unknown.
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

// LabelsFile and AnnotationsFile are the files where the injector mounts the pod's labels and annotations.
const (
	LabelsFile      = "/etc/istio/pod/labels"
	AnnotationsFile = "/etc/istio/pod/annotations"
)

// Unknown is the text of an unknown value, and Latest that of an unknown revision.
const (
	Unknown = "unknown"
	Latest  = "latest"
)

// maxLabels bounds the bytes that are read of either file. Typical files have a few hundred, and the API server rejects
// objects larger than 1.5 MiB.
const maxLabels = 1 << 20

// Pod describes the workload's pod in the terms of Istio's telemetry. Fields are never empty, and all are valid UTF-8.
type Pod struct {
	Name, Namespace, IP, ServiceAccount string
	Workload                            string // name of the Deployment, StatefulSet, DaemonSet, Job or CronJob
	App, Version                        string // labels of these names
	CanonicalService, CanonicalRevision string // the grouping of Istio's dashboards
	Cluster, Mesh                       string
}

// Read reads the injector's variables by getenv, and the labels from a file in the downward API's format. A missing file is
// not an error. If the file is malformed, Read returns an error and a Pod with everything that could be parsed.
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

// first returns the first non-empty value, or an empty string.
func first(values ...string) string {
	for _, value := range values {
		if value != "" {
			return value
		}
	}
	return ""
}

// ownerName returns reviews for kubernetes://apis/apps/v1/namespaces/prod/deployments/reviews.
func ownerName(owner string) string {
	return owner[strings.LastIndexByte(owner, '/')+1:]
}

// workloadName removes the suffixes that controllers add to their names: both reviews-6d4b75cb6d-hswz6 and reviews-0 belong
// to reviews. This is a heuristic for pods that were not injected.
func workloadName(pod string) string {
	name, suffix := cutLast(pod)
	switch {
	case number(suffix):
		return name // a StatefulSet
	case len(suffix) != 5 || !random(suffix):
		return pod
	}
	owner, suffix := cutLast(name)
	if len(suffix) >= 6 && len(suffix) <= 10 && random(suffix) || len(suffix) >= 8 && number(suffix) {
		return owner // the hash of a ReplicaSet, or the minute of a CronJob
	}
	return name
}

// cutLast splits name at its last hyphen. Without one, suffix is empty.
func cutLast(name string) (before, suffix string) {
	if i := strings.LastIndexByte(name, '-'); i > 0 {
		return name[:i], name[i+1:]
	}
	return name, ""
}

// random reports whether s consists of the characters from which Kubernetes generates suffixes. They contain neither vowels
// nor digits that look like them, so most words do not match.
func random(s string) bool { return s != "" && strings.Trim(s, "bcdfghjklmnpqrstvwxz2456789") == "" }

func number(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// Annotations reads the pod's annotations from a file in the downward API's format. A missing file is not an error. If the
// file is malformed, Annotations returns an error and everything that could be parsed.
func Annotations(file string) (map[string]string, error) { return readPairs("annotations", file) }

// Labels reads the pod's labels, as Annotations does.
func Labels(file string) (map[string]string, error) { return readPairs("labels", file) }

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

// parseLabels reads lines of key="value", where value is quoted as in Go. It skips other lines and returns an error
// about the first of them.
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

// UnknownPod returns a Pod whose fields are all unknown.
func UnknownPod() Pod {
	return Pod{
		Name: Unknown, Namespace: Unknown, IP: Unknown, ServiceAccount: Unknown, Workload: Unknown, App: Unknown,
		Version: Unknown, CanonicalService: Unknown, CanonicalRevision: Latest, Cluster: Unknown, Mesh: Unknown,
	}
}
