package kubernetes

import (
	"bytes"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	apps "k8s.io/api/apps/v1"
	autoscaling "k8s.io/api/autoscaling/v2"
	core "k8s.io/api/core/v1"
	policy "k8s.io/api/policy/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"github.com/pillion-proxy/pillion/e2e/testdata/kubernetes/decode"
)

const gatewayChart = root + "/deploy/helm/pillion-gateway"

func renderGateway(v values) (map[string]string, error) {
	return renderChart(gatewayChart, "istio-ingressgateway", "istio-ingress", v, "v1.34.0")
}

func gateway(t *testing.T, v values) map[string]object {
	t.Helper()
	files, err := renderGateway(v)
	if err != nil {
		t.Fatal(err)
	}
	return objects(t, joined(files))
}

func TestHelmAndKustomizeMakeTheSameGateway(t *testing.T) {
	want := objects(t, build(t, checkout(t, "namespace: istio-ingress\nresources: [pillion/deploy/kustomize/gateway]")))
	got := gateway(t, nil)
	if len(want) != 7 {
		t.Errorf("kustomize makes %d objects", len(want))
	}
	for _, key := range slices.Sorted(maps.Keys(want)) {
		if !reflect.DeepEqual(got[key], want[key]) {
			w, _ := yaml.Marshal(want[key])
			g, _ := yaml.Marshal(got[key])
			t.Errorf("%s is with kustomize\n%s\nand with helm\n%s", key, w, g)
		}
		delete(got, key)
	}
	for key := range got {
		t.Errorf("only helm makes %s", key)
	}
}

// A rollout takes no pod away before another one is ready, and the drain fits the pod's end.
func TestAGatewayIsReplacedWithoutLoss(t *testing.T) {
	typed, err := decode.Stream(bytes.NewReader(build(t, root+"/deploy/kustomize/gateway")))
	if err != nil {
		t.Fatal(err)
	}
	var deployment *apps.Deployment
	var service *core.Service
	var scaler *autoscaling.HorizontalPodAutoscaler
	var budget *policy.PodDisruptionBudget
	for _, o := range typed {
		switch o := o.(type) {
		case *apps.Deployment:
			deployment = o
		case *core.Service:
			service = o
		case *autoscaling.HorizontalPodAutoscaler:
			scaler = o
		case *policy.PodDisruptionBudget:
			budget = o
		}
	}
	pod := deployment.Spec.Template.Spec
	if update := deployment.Spec.Strategy.RollingUpdate; update.MaxUnavailable.IntValue() != 0 || update.MaxSurge.IntValue() < 1 || deployment.Spec.Replicas != nil {
		t.Errorf("the strategy is %v with %v replicas", update, deployment.Spec.Replicas)
	}
	if scaler.Spec.ScaleTargetRef.Name != deployment.Name || *scaler.Spec.MinReplicas < 2 || !labels.SelectorFromSet(service.Spec.Selector).Matches(labels.Set(deployment.Spec.Template.Labels)) {
		t.Errorf("the autoscaler is for %v, the service for %v", scaler.Spec.ScaleTargetRef, service.Spec.Selector)
	}
	// A node can be drained, one pod after the other, and the autoscaler computes from what a pod requests.
	selected, err := meta.LabelSelectorAsSelector(budget.Spec.Selector)
	if err != nil || selected.Empty() || !selected.Matches(labels.Set(deployment.Spec.Template.Labels)) {
		t.Errorf("the budget of disruptions is for %v, %v", budget.Spec.Selector, err)
	}
	if most := budget.Spec.MaxUnavailable.IntValue(); most < 1 || most >= int(*scaler.Spec.MinReplicas) || budget.Spec.MinAvailable != nil {
		t.Errorf("%d of at least %d pods may be disrupted, %v must be available", most, *scaler.Spec.MinReplicas, budget.Spec.MinAvailable)
	}
	if *scaler.Spec.MinReplicas >= scaler.Spec.MaxReplicas || len(scaler.Spec.Metrics) == 0 {
		t.Errorf("the autoscaler has %d to %d replicas, and the metrics %v", *scaler.Spec.MinReplicas, scaler.Spec.MaxReplicas, scaler.Spec.Metrics)
	}
	for _, metric := range scaler.Spec.Metrics {
		if requested := pod.Containers[0].Resources.Requests; metric.Resource == nil || requested.Name(metric.Resource.Name, "").IsZero() {
			t.Errorf("the autoscaler looks at %v, and a pod requests %v", metric.Resource, requested)
		}
	}
	container := pod.Containers[0]
	variables := map[string]string{}
	for _, v := range container.Env {
		variables[v.Name] = v.Value
	}
	if *pod.TerminationGracePeriodSeconds != 60 || variables["PILLION_TERMINATION_GRACE_PERIOD"] != "60" || variables["PILLION_DRAIN_DELAY"] != "10s" {
		t.Errorf("grace period %d, variables %v", *pod.TerminationGracePeriodSeconds, variables)
	}
	// istiod resolves the name of a target port only for a pod that describes its ports.
	for _, port := range service.Spec.Ports {
		if !slices.ContainsFunc(container.Ports, func(p core.ContainerPort) bool {
			return int(p.ContainerPort) == port.TargetPort.IntValue() && p.Name == port.Name
		}) {
			t.Errorf("port %s of the service leads to %v", port.Name, &port.TargetPort)
		}
	}
}

func TestValuesOfTheGatewayTakeEffect(t *testing.T) {
	all := gateway(t, values{
		"name": "istio-eastwest", "image": "registry.example/pillion:1", "pullPolicy": "Always", "imagePullSecrets": []any{"registry"},
		"discoveryAddress": "istiod-1-30.istio-system.svc:15012", "clusterID": "east", "meshID": "mesh", "trustDomain": "example.org", "clusterDomain": "cluster.example",
		"autoscaling": values{"enabled": false}, "replicas": 1, "drainDelay": 20, "gracePeriod": 90, "logLevel": "warn",
		"accessLog": values{"path": "off", "filter": "errors"}, "labels": values{"team": "mesh"}, "annotations": values{"owner": "someone"},
		"nodeSelector": values{"pool": "edge"}, "priorityClassName": "system-cluster-critical", "tolerations": []any{values{"key": "dedicated", "operator": "Exists"}},
		"affinity":      values{"nodeAffinity": values{"requiredDuringSchedulingIgnoredDuringExecution": values{"nodeSelectorTerms": []any{values{"matchFields": []any{}}}}}},
		"resources":     values{"limits": values{"memory": "1Gi"}},
		"service":       values{"type": "NodePort", "externalTrafficPolicy": "Local", "annotations": values{"a": "b"}, "ports": []any{values{"name": "tls", "port": 15443, "targetPort": 15443, "nodePort": 30443}}},
		"networkPolicy": values{"enabled": true, "from": []any{values{"ipBlock": values{"cidr": "203.0.113.0/24"}}}, "metricsFrom": []any{values{"namespaceSelector": values{}}}},
	})
	for _, absent := range []string{"PodDisruptionBudget", "HorizontalPodAutoscaler"} {
		if all[absent+" istio-ingress/istio-eastwest"] != nil {
			t.Errorf("one replica has a %s", absent)
		}
	}
	for name, want := range map[string][]string{
		"Deployment": {"image: registry.example/pillion:1\n", "imagePullPolicy: Always\n", "- name: registry\n", "replicas: 1\n", "istio: eastwest\n", "team: mesh\n", "owner: someone\n",
			`value: '{"discoveryAddress":"istiod-1-30.istio-system.svc:15012"}'`, "value: east\n", "value: mesh\n", "value: example.org\n", "- $(POD_NAMESPACE).svc.cluster.example\n",
			"value: 20s\n", "value: \"90\"\n", "terminationGracePeriodSeconds: 90\n", "value: warn\n", "value: \"off\"\n", "value: errors\n", "pool: edge\n", "system-cluster-critical\n",
			"key: dedicated\n", "nodeAffinity:\n", "memory: 1Gi\n", "containerPort: 15443\n", "deployments/istio-eastwest\n"},
		"Service": {"type: NodePort\n", "externalTrafficPolicy: Local\n", "a: b\n", "nodePort: 30443\n", "istio: eastwest\n", "targetPort: 15443\n"},
		"NetworkPolicy": {"cidr: 203.0.113.0/24\n    ports:\n    - port: tls\n    - port: status-port\n", "- namespaceSelector: {}\n    ports:\n    - port: 15020\n    - port: http-envoy-prom\n",
			"policyTypes:\n  - Ingress\n"},
	} {
		text, _ := yaml.Marshal(all[name+" istio-ingress/istio-eastwest"])
		for _, want := range want {
			if !strings.Contains(string(text), want) {
				t.Errorf("%s has no %q:\n%s", name, want, text)
			}
		}
	}
}

func TestBadValuesOfTheGatewayAreNamed(t *testing.T) {
	for _, c := range []struct {
		values values
		want   string
	}{
		{values{"image": ""}, "image"},
		{values{"name": "Gateway_1"}, "name"},
		{values{"discoveryAddress": "istiod"}, "discoveryAddress"},
		{values{"service": values{"type": "Ingress"}}, "type"},
		{values{"service": values{"ports": []any{values{"name": "http", "port": 80, "targetPort": 80}}}}, "targetPort"},
		{values{"replica": 2}, "replica"},
		{values{"resources": values{"limits": values{"memory": nil}}}, "memory"},
		{values{"labels": values{"istio": "other"}}, "invalid propertyName 'istio'"},
		{values{"drainDelay": 60}, "drainDelay 60 leaves connections no time of gracePeriod 60: make it smaller"},
	} {
		if _, err := renderGateway(c.values); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want %q", c.values, err, c.want)
		}
	}
}

func TestHelmLintsTheChartOfTheGateway(t *testing.T) {
	for _, message := range lint.All(gatewayChart, values{"networkPolicy": values{"enabled": true}}, "istio-ingress", true).Messages {
		if message.Severity > support.InfoSev {
			t.Error(message)
		}
	}
}
