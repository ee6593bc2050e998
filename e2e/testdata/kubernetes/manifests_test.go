// Package kubernetes tests the contents of deploy and the manifests in documents with the programs that read them:
// kustomize, helm, Kubernetes' own decoder, and Prometheus' parser.
package kubernetes

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	admissionregistration "k8s.io/api/admissionregistration/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	"github.com/pillion-proxy/pillion/e2e/testdata/kubernetes/decode"
)

const (
	root  = "../../.."
	chart = root + "/deploy/helm/pillion"
)

// values are the values of a chart.
type values = map[string]any

// object is a manifest as a mapping.
type object map[string]any

func (o object) name() string {
	metadata := o["metadata"].(values)
	return fmt.Sprint(o["kind"], " ", metadata["namespace"], "/", metadata["name"])
}

// build returns the output of kustomize for a directory.
func build(t *testing.T, directory string) []byte {
	t.Helper()
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), directory)
	if err != nil {
		t.Fatal(err)
	}
	text, err := resources.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// checkout makes a directory with a kustomization and this repository's deploy below pillion.
func checkout(t *testing.T, kustomization string) string {
	t.Helper()
	directory := t.TempDir()
	if err := os.CopyFS(directory+"/pillion/deploy", os.DirFS(root+"/deploy")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(directory+"/kustomization.yaml", []byte(kustomization), 0o644); err != nil {
		t.Fatal(err)
	}
	return directory
}

// render returns helm's output for the chart by the templates' names. version is Kubernetes' version, such as v1.34.0.
func render(v values, version string) (map[string]string, error) {
	return renderIn("pillion-system", v, version)
}

func renderIn(namespace string, v values, version string) (map[string]string, error) {
	return renderChart(chart, "pillion", namespace, v, version)
}

func renderChart(chart, name, namespace string, v values, version string) (map[string]string, error) {
	c, err := loader.Load(chart)
	if err != nil {
		return nil, err
	}
	capabilities := chartutil.DefaultCapabilities.Copy()
	capabilities.KubeVersion.Version = version
	release := chartutil.ReleaseOptions{Name: name, Namespace: namespace, IsInstall: true}
	all, err := chartutil.ToRenderValues(c, v, release, capabilities)
	if err != nil {
		return nil, err
	}
	return engine.Render(c, all)
}

// rendered returns the same as one stream of manifests.
func rendered(t *testing.T, v values) []byte {
	t.Helper()
	files, err := render(v, "v1.34.0")
	if err != nil {
		t.Fatal(err)
	}
	return joined(files)
}

// joined returns files as one stream.
func joined(files map[string]string) []byte {
	var text bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, ".yaml") {
			fmt.Fprintf(&text, "---\n%s\n", files[name])
		}
	}
	return text.Bytes()
}

// objects returns the objects of a stream without the labels that the chart adds. Kubernetes must decode all of them.
func objects(t *testing.T, text []byte) map[string]object {
	t.Helper()
	typed, err := decode.Stream(bytes.NewReader(text))
	if err != nil {
		t.Errorf("%v\n%s", err, text)
	}
	all, foreign := make(map[string]object), 0
	for document := range strings.SplitSeq("\n"+string(text), "\n---\n") {
		var o object
		if err := yaml.UnmarshalStrict([]byte(document), &o); err != nil {
			t.Fatalf("%v\n%s", err, document)
		}
		if o == nil {
			continue
		}
		if o["apiVersion"] == "cert-manager.io/v1" || strings.HasPrefix(fmt.Sprint(o["apiVersion"]), "kustomize.config.k8s.io/") {
			foreign++
		}
		if metadata, ok := o["metadata"].(values); ok {
			if labels, ok := metadata["labels"].(values); ok {
				delete(labels, "app.kubernetes.io/managed-by")
				delete(labels, "helm.sh/chart")
				if len(labels) == 0 {
					delete(metadata, "labels")
				}
			}
			if all[o.name()] != nil {
				t.Errorf("%s exists twice", o.name())
			}
			all[o.name()] = o
		}
	}
	if err == nil && len(typed)+foreign < len(all) {
		t.Errorf("of %d objects only %d have a known kind", len(all), len(typed))
	}
	return all
}

func TestHelmAndKustomizeMakeTheSameObjects(t *testing.T) {
	for name, c := range map[string]struct {
		values        values
		kustomization string
	}{
		// kustomize makes the namespace with its label.
		"default": {values{"podSecurity": ""}, "resources: [pillion/deploy/kustomize/base]"},
		"classic": {values{"podSecurity": "", "classic": true}, "resources: [pillion/deploy/kustomize/overlays/classic]"},
		"secret":  {values{"tls": values{"secret": "pillion-webhook-tls"}}, "resources: [pillion/deploy/kustomize/base]\ncomponents: [pillion/deploy/kustomize/components/secret]"},
		"everything": {values{"tls": values{"certManager": true}, "podMonitor": values{"enabled": true}, "prometheusRule": values{"enabled": true}, "dashboard": values{"enabled": true}},
			"resources: [pillion/deploy/kustomize/base]\ncomponents:\n- pillion/deploy/kustomize/components/cert-manager\n" +
				"- pillion/deploy/kustomize/components/podmonitor\n- pillion/deploy/kustomize/components/prometheusrule\n- pillion/deploy/grafana"},
	} {
		want, got := objects(t, build(t, checkout(t, c.kustomization))), objects(t, rendered(t, c.values))
		// helm makes the namespace with --create-namespace.
		delete(want, "Namespace <nil>/pillion-system")
		if len(want) < 5 {
			t.Errorf("%s: kustomize makes %d objects", name, len(want))
		}
		for _, key := range slices.Sorted(maps.Keys(want)) {
			if !reflect.DeepEqual(got[key], want[key]) {
				w, _ := yaml.Marshal(want[key])
				g, _ := yaml.Marshal(got[key])
				t.Errorf("%s: %s is with kustomize\n%s\nand with helm\n%s", name, key, w, g)
			}
			delete(got, key)
		}
		for key := range got {
			t.Errorf("%s: only helm makes %s", name, key)
		}
	}
}

func TestHelmLintsTheChart(t *testing.T) {
	for _, message := range lint.All(chart, values{"podMonitor": values{"enabled": true}, "dashboard": values{"enabled": true}}, "pillion-system", true).Messages {
		if message.Severity > support.InfoSev {
			t.Error(message)
		}
	}
}

func TestValuesTakeEffect(t *testing.T) {
	certificate := "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"
	all := objects(t, rendered(t, values{
		"image": "registry.example/pillionctl:1", "sidecarImage": "registry.example/pillion:1", "pullPolicy": "Always", "replicas": 1,
		"failurePolicy": "Ignore", "tls": values{"authority": certificate},
		"namespaceSelector": values{"matchLabels": nil, "matchExpressions": []any{values{"key": "team", "operator": "Exists"}}},
		"resources":         values{"limits": values{"memory": "1Gi"}},
		"podMonitor":        values{"enabled": true, "labels": values{"release": "prometheus"}},
	}))
	if all["PodDisruptionBudget pillion-system/pillion-webhook"] != nil {
		t.Error("one replica has a disruption budget: its node could not be drained")
	}
	for name, want := range map[string][]string{
		"Deployment pillion-system/pillion-webhook": {"image: registry.example/pillionctl:1\n", "- --image=registry.example/pillion:1\n",
			"imagePullPolicy: Always\n", "- --image-pull-policy=Always\n", "replicas: 1\n", "memory: 1Gi\n", "memory: 32Mi\n",
			"- name: GOMEMLIMIT\n          valueFrom:\n            resourceFieldRef:\n              resource: limits.memory\n"},
		"MutatingWebhookConfiguration <nil>/pillion": {"failurePolicy: Ignore\n", "caBundle: LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCkFBPT0K",
			"namespaceSelector:\n    matchExpressions:\n    - key: team\n      operator: Exists\n    - key: kubernetes.io/metadata.name\n      operator: NotIn\n"},
		"PodMonitor pillion-system/pillion": {"release: prometheus\n"},
	} {
		text, _ := yaml.Marshal(all[name])
		for _, want := range want {
			if !strings.Contains(string(text), want) {
				t.Errorf("%s has no %q:\n%s", name, want, text)
			}
		}
	}
}

func TestPlacementAndMetadataTakeEffect(t *testing.T) {
	v := values{
		"imagePullSecrets": []any{"registry"}, "nodeSelector": values{"pool": "system"}, "priorityClassName": "system-cluster-critical",
		"tolerations": []any{values{"key": "dedicated", "operator": "Exists"}},
		"affinity":    values{"nodeAffinity": values{"requiredDuringSchedulingIgnoredDuringExecution": values{"nodeSelectorTerms": []any{values{"matchFields": []any{}}}}}},
		"labels":      values{"team": "mesh", "release": "overridden"}, "annotations": values{"owner": "someone"},
		"objectSelector": values{"matchLabels": values{"tier": "web"}, "matchExpressions": []any{values{"key": "a", "operator": "Exists"}}},
		"networkPolicy":  values{"enabled": true, "from": []any{values{"ipBlock": values{"cidr": "203.0.113.0/24"}}}},
		"podMonitor":     values{"enabled": true}, "prometheusRule": values{"enabled": true, "labels": values{"release": "prometheus"}}, "dashboard": values{"enabled": true},
	}
	all := objects(t, rendered(t, v))
	if len(all) < 13 {
		t.Errorf("only %d objects", len(all))
	}
	for name, o := range all {
		metadata := o["metadata"].(values)
		if metadata["labels"].(values)["team"] != "mesh" || metadata["annotations"].(values)["owner"] != "someone" {
			t.Errorf("%s has the metadata %v", name, metadata)
		}
	}
	for name, want := range map[string][]string{
		"Deployment pillion-system/pillion-webhook": {"      imagePullSecrets:\n      - name: registry\n", "      nodeSelector:\n        pool: system\n",
			"      priorityClassName: system-cluster-critical\n", "      tolerations:\n      - key: dedicated\n", "      affinity:\n        nodeAffinity:\n",
			"    metadata:\n      annotations:\n        owner: someone\n      labels:\n        app: pillion-webhook\n        release: overridden\n        team: mesh\n"},
		"MutatingWebhookConfiguration <nil>/pillion": {"  objectSelector:\n    matchExpressions:\n    - key: a\n      operator: Exists\n    - key: sidecar.istio.io/inject\n", "    matchLabels:\n      tier: web\n"},
		"NetworkPolicy pillion-system/pillion-webhook": {"  - from:\n    - ipBlock:\n        cidr: 203.0.113.0/24\n    ports:\n    - port: https\n", "  egress:\n  - ports:\n    - port: 443\n    - port: 6443\n",
			"  - Ingress\n  - Egress\n"},
		"PrometheusRule pillion-system/pillion": {"release: prometheus\n"},
	} {
		text, _ := yaml.Marshal(all[name])
		for _, want := range want {
			if !strings.Contains(string(text), want) {
				t.Errorf("%s has no %q:\n%s", name, want, text)
			}
		}
	}
	// Without permission to publish an authority, the webhook opens no connection.
	v["tls"] = values{"certManager": true}
	text, _ := yaml.Marshal(objects(t, rendered(t, v))["NetworkPolicy pillion-system/pillion-webhook"])
	if strings.Contains(string(text), "egress:") {
		t.Errorf("with cert-manager:\n%s", text)
	}
}

// The permissions of the webhook are these, and only if it issues its own certificate.
func TestTheWebhookHasOnlyThePermissionsThatItNeeds(t *testing.T) {
	rules := func(v values) (all []string) {
		for name, o := range objects(t, rendered(t, v)) {
			for _, r := range anyList(o["rules"]) {
				rule := r.(values)
				if rule["verbs"] != nil {
					all = append(all, fmt.Sprint(strings.Fields(name)[0], " ", rule["resources"], rule["resourceNames"], rule["verbs"]))
				}
			}
		}
		slices.Sort(all)
		return all
	}
	secret := "Role [secrets] [pillion-webhook-authority] [get update]"
	configuration := "ClusterRole [mutatingwebhookconfigurations] [pillion] [get patch]"
	for _, c := range []struct {
		values values
		want   []string
	}{
		{nil, []string{configuration, "ClusterRole [namespaces] [pillion-system] [get patch]", secret}},
		{values{"podSecurity": ""}, []string{configuration, secret}},
		{values{"tls": values{"certManager": true}}, nil},
		{values{"tls": values{"authority": "-----BEGIN CERTIFICATE-----"}}, nil},
	} {
		if got := rules(c.values); !slices.Equal(got, c.want) {
			t.Errorf("%v: %q, want %q", c.values, got, c.want)
		}
	}
}

func anyList(v any) []any { list, _ := v.([]any); return list }

// Every flag of the webhook for sidecars has a value in the chart.
func TestSidecarDefaultsBecomeFlags(t *testing.T) {
	v := values{"sidecar": values{
		"resources": values{"requests": values{"cpu": "20m", "memory": "32Mi"}, "limits": values{"cpu": 2, "memory": "256Mi"}},
		"logLevel":  "warn", "accessLog": values{"path": "/dev/stderr", "format": "%START_TIME% $(POD_NAME)", "encoding": "text", "filter": "errors; sample=1%"},
		"interceptionMode": "TPROXY", "excludeInboundPorts": 9090, "excludeOutboundPorts": "25,465", "includeOutboundIPRanges": "10.0.0.0/8",
		"excludeOutboundIPRanges": "169.254.169.254/32", "opaquePorts": "3306", "dnsCapture": true, "drainDelay": "10s",
	}}
	var got []string
	for _, o := range objects(t, rendered(t, v)) {
		if o["kind"] == "Deployment" {
			container := o["spec"].(values)["template"].(values)["spec"].(values)["containers"].([]any)[0].(values)
			for _, argument := range container["args"].([]any) {
				if name, _, is := strings.Cut(argument.(string), "="); is && strings.HasPrefix(name, "--sidecar-") {
					got = append(got, argument.(string))
				}
			}
		}
	}
	want := []string{
		"--sidecar-access-log-encoding=text", "--sidecar-access-log-filter=errors; sample=1%", "--sidecar-access-log-format=%START_TIME% $$(POD_NAME)",
		"--sidecar-access-log=/dev/stderr", "--sidecar-cpu-limit=2", "--sidecar-cpu=20m", "--sidecar-dns-capture=true", "--sidecar-drain-delay=10s",
		"--sidecar-exclude-inbound-ports=9090", "--sidecar-exclude-outbound-ip-ranges=169.254.169.254/32", "--sidecar-exclude-outbound-ports=25,465",
		"--sidecar-include-outbound-ip-ranges=10.0.0.0/8", "--sidecar-interception-mode=TPROXY", "--sidecar-log-level=warn", "--sidecar-memory-limit=256Mi",
		"--sidecar-memory=32Mi", "--sidecar-opaque-ports=3306",
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant\n%q", got, want)
	}
	documented := regexp.MustCompile("`(--sidecar-[a-z-]+)` \\|").FindAllStringSubmatch(read(t, "docs/inject.md"), -1)
	var names, inChart []string
	for _, m := range documented {
		if m[1] != "--sidecar-name" {
			names = append(names, m[1])
		}
	}
	for _, argument := range got {
		name, _, _ := strings.Cut(argument, "=")
		inChart = append(inChart, name)
	}
	slices.Sort(names)
	slices.Sort(inChart)
	if !slices.Equal(names, inChart) {
		t.Errorf("the webhook has the flags\n%q\nthe chart sets\n%q", names, inChart)
	}
}

func TestObjectsAreInTheNamespaceOfTheRelease(t *testing.T) {
	files, err := renderIn("mesh", values{"tls": values{"certManager": true}, "podMonitor": values{"enabled": true}, "dashboard": values{"enabled": true}}, "v1.34.0")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if strings.Contains(text, "pillion-system") {
			t.Errorf("%s names another namespace:\n%s", name, text)
		}
	}
	for _, want := range []string{"kube-node-lease, mesh]", "inject-ca-from: mesh/pillion-webhook", "namespace: mesh\n      path: /inject"} {
		if !strings.Contains(files["pillion/templates/webhook.yaml"], want) {
			t.Errorf("no %q", want)
		}
	}
}

func TestBadValuesAreNamed(t *testing.T) {
	for _, c := range []struct {
		values  values
		version string
		want    string
	}{
		{values{"failurePolicy": "fail"}, "v1.34.0", "failurePolicy"},
		{values{"pullPolicy": "Sometimes"}, "v1.34.0", "pullPolicy"},
		{values{"replicas": 0}, "v1.34.0", "replicas"},
		{values{"replicas": "two"}, "v1.34.0", "replicas"},
		{values{"image": ""}, "v1.34.0", "image"},
		{values{"sidecarImage": "a b"}, "v1.34.0", "sidecarImage"},
		{values{"classic": "yes"}, "v1.34.0", "classic"},
		{values{"clasic": true}, "v1.34.0", "clasic"},
		{values{"tls": values{"authority": "LS0t"}}, "v1.34.0", "authority"},
		{values{"podMonitor": true}, "v1.34.0", "podMonitor"},
		{values{"namespaceSelector": values{"matchExpressions": []any{values{"key": "a", "operator": "Is"}}}}, "v1.34.0", "operator"},
		{values{"resources": values{"request": values{}}}, "v1.34.0", "request"},
		{values{"labels": values{"app": "web"}}, "v1.34.0", "'/labels/app'"},
		{values{"labels": values{"app.kubernetes.io/managed-by": "me"}}, "v1.34.0", "managed-by'"},
		{values{"labels": values{"helm.sh/chart": "mine"}}, "v1.34.0", "chart'"},
		{values{"podMonitor": values{"enabled": true, "labels": values{"helm.sh/chart": "mine"}}}, "v1.34.0", "chart'"},
		{nil, "v1.29.3", "Kubernetes v1.29.3 is older than 1.30: use --set classic=true"},
	} {
		if _, err := render(c.values, c.version); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want %q", c.values, err, c.want)
		}
	}
	if _, err := render(values{"classic": true}, "v1.29.3"); err != nil {
		t.Error(err)
	}
}

func TestNotesNameTheNextSteps(t *testing.T) {
	const untrusted = "API servers do not trust it yet"
	for _, c := range []struct {
		values    values
		want, not string
	}{
		{nil, "issues and renews its certificate itself", "kubectl create secret"},
		{nil, "the level restricted", "only if Helm"},
		{values{"podSecurity": ""}, "issues and renews its certificate itself", "restricted"},
		{values{"tls": values{"secret": "mine"}}, "such namespaces get no new pods", "uncaptured"},
		{values{"tls": values{"secret": "mine"}}, "in the secret mine:", "pillion-webhook-tls"},
		{values{"tls": values{"secret": "mine"}, "failurePolicy": "Ignore"}, "pods there run uncaptured", "no new pods"},
		{values{"tls": values{"certManager": true}}, "cert-manager writes", untrusted},
		{values{"tls": values{"authority": "-----BEGIN CERTIFICATE-----"}}, "kubectl create secret tls", untrusted},
	} {
		files, err := render(c.values, "v1.34.0")
		if notes := files["pillion/templates/NOTES.txt"]; err != nil || !strings.Contains(notes, c.want) || strings.Contains(notes, c.not) {
			t.Errorf("%v: %v\n%s", c.values, err, notes)
		}
	}
}

// overlays returns the objects of each directory with a Kustomization, by its name.
func overlays(t *testing.T) map[string][]runtime.Object {
	t.Helper()
	all := make(map[string][]runtime.Object)
	for _, pattern := range []string{"base", "gateway", "overlays/*"} {
		directories, err := filepath.Glob(root + "/deploy/kustomize/" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, directory := range directories {
			typed, err := decode.Stream(bytes.NewReader(build(t, directory)))
			if err != nil {
				t.Errorf("%s: %v", directory, err)
			}
			all[filepath.Base(directory)] = typed
		}
	}
	if len(all) != 5 {
		t.Fatalf("%d overlays", len(all))
	}
	return all
}

func TestContainersHaveNoNeedlessPrivileges(t *testing.T) {
	for overlay, objects := range overlays(t) {
		for _, o := range objects {
			d, ok := o.(*apps.Deployment)
			if !ok {
				continue
			}
			pod, seen := d.Spec.Template.Spec, map[string]core.Container{}
			issues := slices.ContainsFunc(pod.Containers, func(c core.Container) bool { return slices.Contains(c.Args, "--issue-certificate") })
			if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken != issues {
				t.Errorf("%s: the token of the service account is mounted, or missing", overlay)
			}
			for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
				seen[c.Name] = c
				s, what := c.SecurityContext, overlay+": "+c.Name
				if s == nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || s.ReadOnlyRootFilesystem == nil ||
					!*s.ReadOnlyRootFilesystem || s.Privileged != nil && *s.Privileged {
					t.Fatalf("%s: %+v", what, s)
				}
				seccomp := s.SeccompProfile
				if seccomp == nil {
					seccomp = pod.SecurityContext.SeccompProfile
				}
				if seccomp.Type != core.SeccompProfileTypeRuntimeDefault {
					t.Errorf("%s: seccomp is %v", what, seccomp)
				}
				var want []core.Capability
				if c.Name == "pillion-init" {
					want = []core.Capability{"NET_ADMIN", "NET_RAW"}
				} else if nonRoot := s.RunAsNonRoot; nonRoot == nil || !*nonRoot {
					if pod.SecurityContext == nil || pod.SecurityContext.RunAsNonRoot == nil || !*pod.SecurityContext.RunAsNonRoot {
						t.Errorf("%s may be root", what)
					}
				}
				if !slices.Equal(s.Capabilities.Add, want) || !slices.Equal(s.Capabilities.Drop, []core.Capability{"ALL"}) {
					t.Errorf("%s: capabilities %+v", what, s.Capabilities)
				}
				if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() || c.Resources.Limits.Memory().IsZero() {
					t.Errorf("%s: resources %+v", what, c.Resources)
				}
			}
			if d.Name != "nginx" {
				continue
			}
			agent := seen["istio-proxy"]
			if *agent.SecurityContext.RunAsUser != 1337 || agent.StartupProbe.HTTPGet.Port.IntValue() != 15021 || agent.ReadinessProbe.HTTPGet.Port.IntValue() != 15021 {
				t.Errorf("%s: %+v", overlay, agent)
			}
			if native := agent.RestartPolicy != nil; native != (overlay == "example") {
				t.Errorf("%s: a native sidecar: %v", overlay, native)
			}
			// The agent starts with 9 MB, and an idle connection takes at most 8 KiB: the request allows a thousand.
			if got := agent.Resources.Requests.Memory().Value(); got < 9e6+1000*6<<10 || got > 4*9e6 {
				t.Errorf("%s: the sidecar requests %d bytes of memory", overlay, got)
			}
			if d.Spec.Template.Annotations["prometheus.io/port"] != "15020" {
				t.Errorf("%s: %v", overlay, d.Spec.Template.Annotations)
			}
		}
	}
}

func TestServicesAndWebhooksNameExistingObjects(t *testing.T) {
	for overlay, objects := range overlays(t) {
		services := make(map[string]*core.Service)
		for _, o := range objects {
			if s, ok := o.(*core.Service); ok {
				services[s.Namespace+"/"+s.Name] = s
				found := slices.ContainsFunc(objects, func(o runtime.Object) bool {
					d, ok := o.(*apps.Deployment)
					return ok && labels.SelectorFromSet(s.Spec.Selector).Matches(labels.Set(d.Spec.Template.Labels)) &&
						slices.ContainsFunc(d.Spec.Template.Spec.Containers, func(c core.Container) bool {
							return slices.ContainsFunc(c.Ports, func(p core.ContainerPort) bool {
								to := s.Spec.Ports[0].TargetPort
								return p.Name == to.String() || p.ContainerPort == to.IntVal
							})
						})
				})
				if !found {
					t.Errorf("%s: service %s selects no pod", overlay, s.Name)
				}
			}
		}
		for _, o := range objects {
			if w, ok := o.(*admissionregistration.MutatingWebhookConfiguration); ok {
				to := w.Webhooks[0].ClientConfig.Service
				if s := services[to.Namespace+"/"+to.Name]; s == nil || s.Spec.Ports[0].Port != *to.Port {
					t.Errorf("%s: the webhook names the service %v", overlay, to)
				}
			}
		}
		if len(services) == 0 {
			t.Errorf("%s has no service", overlay)
		}
	}
}
