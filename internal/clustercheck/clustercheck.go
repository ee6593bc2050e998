// Package clustercheck checks from outside what pods with pillion need from a cluster: versions, the webhook and its
// certificate, and the Pod Security level of a namespace. It creates nothing: pods are only sent as a dry run.
package clustercheck

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/checklist"
	"github.com/pillion-proxy/pillion/internal/kubeapi"
)

// Config describes what is checked.
type Config struct {
	Version   string // of this program
	Namespace string // in which pods are to get pillion
	Now       time.Time
}

// nativeSidecars is the minor version of Kubernetes 1 that enables native sidecars.
const nativeSidecars = 29

// fewDays is the remaining validity of a certificate below which it is a warning. cert-manager renews earlier.
const fewDays = 14

type checker struct {
	Config
	api  *kubeapi.Client
	list checklist.List
	hook *webhook // nil: the cluster has no webhook of pillion
}

// Run runs all checks.
func Run(ctx context.Context, api *kubeapi.Client, config Config) checklist.List {
	c := &checker{Config: config, api: api}
	if !c.server(ctx) {
		return c.list
	}
	c.nodes(ctx)
	c.webhook(ctx)
	c.deployment(ctx)
	c.namespace(ctx)
	return c.list
}

// failed adds an error. A missing permission is not a failure: the check is skipped.
func (c *checker) failed(name string, err error) {
	if kubeapi.IsForbidden(err) {
		c.list.Add(name, checklist.Skipped, "not permitted: "+err.Error())
		return
	}
	c.list.Add(name, checklist.Failed, err.Error())
}

func (c *checker) server(ctx context.Context) bool {
	const name = "API server"
	var version struct{ GitVersion string }
	if err := c.api.Get(ctx, "/version", &version); err != nil {
		c.list.AddWithRemedy(name, checklist.Failed, err.Error(), "is the cluster of the current context right? --context chooses another")
		return false
	}
	text := fmt.Sprintf("%s, Kubernetes %s; pillionctl %s", c.api.Server, version.GitVersion, c.Version)
	if minor, ok := minorOf(version.GitVersion); ok && minor < nativeSidecars {
		c.list.AddWithRemedy(name, checklist.Warning, text+": native sidecars are not enabled", "use --classic, for inject and for the webhook")
		return true
	}
	c.list.Add(name, checklist.OK, text)
	return true
}

// minorOf reads the minor version of v1.29.4 or v1.29+.
func minorOf(version string) (minor int, ok bool) {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 2 || parts[0] != "1" {
		return 0, false
	}
	minor, err := strconv.Atoi(strings.TrimRight(parts[1], "+"))
	return minor, err == nil
}

// maxNodes bounds the nodes that are looked at. Kubernetes supports 5,000.
const maxNodes = 20_000

func (c *checker) nodes(ctx context.Context) {
	const name = "nodes"
	type node struct {
		Metadata struct{ Name string }
		Status   struct {
			NodeInfo struct{ KubeletVersion, Architecture, OperatingSystem string }
		}
	}
	var nodes []node
	for next := ""; ; {
		var page struct {
			Metadata struct{ Continue string }
			Items    []node
		}
		if err := c.api.Get(ctx, "/api/v1/nodes?limit=500"+next, &page); err != nil {
			c.failed(name, err)
			return
		}
		nodes = append(nodes, page.Items...)
		if page.Metadata.Continue == "" || len(nodes) > maxNodes {
			break
		}
		next = "&continue=" + url.QueryEscape(page.Metadata.Continue)
	}
	var old, other []string
	for _, n := range nodes {
		info := n.Status.NodeInfo
		if minor, ok := minorOf(info.KubeletVersion); ok && minor < nativeSidecars {
			old = append(old, n.Metadata.Name+" ("+info.KubeletVersion+")")
		}
		if info.OperatingSystem != "linux" || info.Architecture != "amd64" && info.Architecture != "arm64" {
			other = append(other, fmt.Sprintf("%s (%s/%s)", n.Metadata.Name, info.OperatingSystem, info.Architecture))
		}
	}
	switch {
	case len(old) > 0:
		c.list.AddWithRemedy(name, checklist.Warning, "no native sidecars on "+some(old), "use --classic, or update the kubelets")
	case len(other) > 0:
		c.list.AddWithRemedy(name, checklist.Warning, "pillion does not run on "+some(other), "keep its pods off these nodes, by nodeSelector or taints")
	default:
		c.list.Add(name, checklist.OK, fmt.Sprintf("%d, all with native sidecars", len(nodes)))
	}
}

// some lists at most three names.
func some(names []string) string {
	const most = 3
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// webhook is an entry of a MutatingWebhookConfiguration that injects pillion.
type webhook struct {
	Name         string
	ClientConfig struct {
		CABundle []byte `json:"caBundle"`
		URL      string
		Service  struct{ Namespace, Name, Path string }
	}
	FailurePolicy     string
	NamespaceSelector selector
	ObjectSelector    selector
}

// selector is a label selector.
type selector struct {
	MatchLabels      map[string]string
	MatchExpressions []struct {
		Key, Operator string
		Values        []string
	}
}

// selects reports whether labels match. An empty selector matches everything.
func (s selector) selects(labels map[string]string) bool {
	if len(s.MatchLabels) > 0 && !matches(s.MatchLabels, labels) {
		return false
	}
	for _, e := range s.MatchExpressions {
		value, has := labels[e.Key]
		if listed := has && slices.Contains(e.Values, value); e.Operator == "In" && !listed || e.Operator == "NotIn" && listed ||
			e.Operator == "Exists" && !has || e.Operator == "DoesNotExist" && has {
			return false
		}
	}
	return true
}

// webhookName is the name of the entry in deploy.
const webhookName = "inject.pillion.dev"

func (c *checker) webhook(ctx context.Context) {
	const name = "webhook"
	var configurations struct {
		Items []struct {
			Metadata struct{ Name string }
			Webhooks []webhook
		}
	}
	if err := c.api.Get(ctx, "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations", &configurations); err != nil {
		c.failed(name, err)
		return
	}
	found := ""
	for _, configuration := range configurations.Items {
		for _, hook := range configuration.Webhooks {
			if hook.Name == webhookName {
				c.hook, found = &hook, configuration.Metadata.Name
			}
		}
	}
	if c.hook == nil {
		c.list.Add(name, checklist.Skipped, "the cluster has none of pillion: pods are injected by pillionctl inject")
		return
	}
	c.list.Add(name, checklist.OK, fmt.Sprintf("MutatingWebhookConfiguration %s, failurePolicy %s", found, c.hook.FailurePolicy))
	switch authority := c.hook.ClientConfig.CABundle; {
	case len(authority) > 0:
		c.certificate("webhook CA", authority, true)
	case c.hook.ClientConfig.URL == "": // a URL may have a certificate of a public authority
		c.list.AddWithRemedy("webhook CA", checklist.Failed, "no caBundle: the API server does not trust the webhook",
			"look at the log of the webhook, or of cert-manager's CA injector: one of them sets it; see docs/kubernetes.md")
	}
}

// certificate checks how many days a certificate in PEM remains valid: the first one of a chain, or the latest of a
// bundle of authorities. During a rotation a bundle has an old and a new one.
func (c *checker) certificate(name string, text []byte, bundle bool) {
	var certificate *x509.Certificate
	for block, rest := pem.Decode(text); block != nil && (certificate == nil || bundle); block, rest = pem.Decode(rest) {
		one, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			c.list.Add(name, checklist.Failed, err.Error())
			return
		}
		if certificate == nil || one.NotAfter.After(certificate.NotAfter) {
			certificate = one
		}
	}
	if certificate == nil {
		c.list.Add(name, checklist.Failed, "no certificate in PEM")
		return
	}
	const renew = "renew it: see docs/kubernetes.md"
	days := int(certificate.NotAfter.Sub(c.Now).Hours() / 24)
	until := certificate.NotAfter.UTC().Format(time.DateOnly)
	switch {
	case c.Now.After(certificate.NotAfter):
		c.list.AddWithRemedy(name, checklist.Failed, "expired on "+until, renew)
	case c.Now.Before(certificate.NotBefore):
		c.list.Add(name, checklist.Failed, "not valid before "+certificate.NotBefore.UTC().Format(time.DateOnly))
	case days < fewDays:
		c.list.AddWithRemedy(name, checklist.Warning, fmt.Sprintf("valid for %d days, until %s", days, until), renew)
	default:
		c.list.Add(name, checklist.OK, fmt.Sprintf("valid for %d days, until %s", days, until))
	}
}

// deployment checks the Deployments behind the webhook's Service, and the certificate that they serve.
func (c *checker) deployment(ctx context.Context) {
	const name = "webhook pods"
	if c.hook == nil || c.hook.ClientConfig.Service.Name == "" {
		return
	}
	service := c.hook.ClientConfig.Service
	in := url.PathEscape(service.Namespace)
	var selected struct {
		Spec struct{ Selector map[string]string }
	}
	if err := c.api.Get(ctx, "/api/v1/namespaces/"+in+"/services/"+url.PathEscape(service.Name), &selected); err != nil {
		c.failed(name, fmt.Errorf("service %s in %s: %w", service.Name, service.Namespace, err))
		return
	}
	var deployments struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct {
				Template struct {
					Metadata struct{ Labels map[string]string }
					Spec     struct {
						Containers []struct{ Image string }
						Volumes    []struct{ Secret struct{ SecretName string } }
					}
				}
			}
			Status struct{ Replicas, AvailableReplicas int }
		}
	}
	if err := c.api.Get(ctx, "/apis/apps/v1/namespaces/"+in+"/deployments", &deployments); err != nil {
		c.failed(name, err)
		return
	}
	found := false
	for _, d := range deployments.Items {
		if !matches(selected.Spec.Selector, d.Spec.Template.Metadata.Labels) {
			continue
		}
		found = true
		text := fmt.Sprintf("Deployment %s in %s: %d of %d available", d.Metadata.Name, service.Namespace, d.Status.AvailableReplicas, d.Status.Replicas)
		if containers := d.Spec.Template.Spec.Containers; len(containers) > 0 {
			text += ", image " + containers[0].Image
		}
		if d.Status.AvailableReplicas == 0 {
			c.list.AddWithRemedy(name, checklist.Failed, text, "kubectl get pods -n "+service.Namespace)
		} else {
			c.list.Add(name, checklist.OK, text)
		}
		for _, volume := range d.Spec.Template.Spec.Volumes {
			if secret := volume.Secret.SecretName; secret != "" {
				c.served(ctx, service.Namespace, secret)
			}
		}
	}
	if !found {
		c.list.AddWithRemedy(name, checklist.Failed, fmt.Sprintf("no Deployment in %s is selected by Service %s", service.Namespace, service.Name), "install the webhook again")
	}
}

// served checks the certificate in a Secret.
func (c *checker) served(ctx context.Context, namespace, secret string) {
	const name = "webhook certificate"
	var held struct{ Data map[string][]byte }
	if err := c.api.Get(ctx, "/api/v1/namespaces/"+url.PathEscape(namespace)+"/secrets/"+url.PathEscape(secret), &held); err != nil {
		c.failed(name, fmt.Errorf("secret %s: %w", secret, err))
		return
	}
	c.certificate(name, held.Data["tls.crt"], false)
}

// matches reports whether labels have every pair of a selector. An empty selector selects nothing.
func matches(selector, labels map[string]string) bool {
	for key, value := range selector {
		if held, has := labels[key]; !has || held != value {
			return false
		}
	}
	return len(selector) > 0
}

const enforce = "pod-security.kubernetes.io/enforce"

// namespace checks what is configured for the namespace, and then what happens to a pod in it.
func (c *checker) namespace(ctx context.Context) {
	const name = "Pod Security"
	var namespace struct {
		Metadata struct{ Labels map[string]string }
	}
	in := url.PathEscape(c.Namespace)
	if err := c.api.Get(ctx, "/api/v1/namespaces/"+in, &namespace); err != nil {
		c.failed(name, fmt.Errorf("namespace %s: %w", c.Namespace, err))
		return
	}
	labels := namespace.Metadata.Labels
	permit := fmt.Sprintf("kubectl label namespace %s %s=privileged --overwrite", c.Namespace, enforce)
	switch level := labels[enforce]; level {
	case "baseline", "restricted":
		c.list.AddWithRemedy(name, checklist.Failed, fmt.Sprintf("namespace %s enforces %s, which refuses NET_ADMIN and NET_RAW of the init container", c.Namespace, level), permit)
	case "":
		c.list.Add(name, checklist.OK, fmt.Sprintf("namespace %s enforces no level of its own", c.Namespace))
	default:
		c.list.Add(name, checklist.OK, fmt.Sprintf("namespace %s enforces %s", c.Namespace, level))
	}
	injects := false
	if c.hook != nil {
		selector := c.hook.NamespaceSelector
		injects = selector.selects(labels)
		none := fmt.Sprintf("the webhook does not select namespace %s", c.Namespace)
		switch {
		case injects:
			c.list.Add("injection", checklist.OK, fmt.Sprintf("the webhook selects namespace %s", c.Namespace))
		case len(selector.MatchLabels) > 0 && !matches(selector.MatchLabels, labels):
			var pairs []string
			for _, key := range slices.Sorted(maps.Keys(selector.MatchLabels)) {
				pairs = append(pairs, key+"="+selector.MatchLabels[key])
			}
			c.list.AddWithRemedy("injection", checklist.Warning, none, fmt.Sprintf("kubectl label namespace %s %s", c.Namespace, strings.Join(pairs, " ")))
		default:
			c.list.AddWithRemedy("injection", checklist.Warning, none+": its namespaceSelector excludes it", "use another namespace")
		}
	}
	c.trial(ctx, injects, permit)
}

// object is JSON.
type object = map[string]any

// injectedBy is the annotation that injection sets. Other webhooks may add containers as well.
const injectedBy = "pillion.dev/status"

// trial sends a pod as a dry run. If the webhook injects the namespace, that proves that the API server reaches it, trusts
// its certificate, and admits what it makes. Otherwise the pod has the capabilities of an injected one.
func (c *checker) trial(ctx context.Context, injects bool, permit string) {
	const name = "pod, dry run"
	spec := object{"restartPolicy": "Never", "containers": []object{{"name": "app", "image": "pillion.example/check"}}}
	if !injects {
		spec["initContainers"] = []object{{"name": "pillion-init", "image": "pillion.example/check", "securityContext": object{
			"runAsUser": 0, "runAsNonRoot": false, "capabilities": object{"add": []string{"NET_ADMIN", "NET_RAW"}, "drop": []string{"ALL"}}}}}
	}
	metadata := object{"generateName": "pillion-check-"}
	if injects {
		metadata["labels"] = c.hook.ObjectSelector.MatchLabels
		if !c.hook.ObjectSelector.selects(c.hook.ObjectSelector.MatchLabels) {
			c.list.Add(name, checklist.Skipped, "the objectSelector of the webhook has expressions that this program cannot satisfy")
			return
		}
	}
	pod := object{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
	var made struct {
		Metadata struct{ Annotations map[string]string }
		Spec     struct {
			Containers, InitContainers []struct{ Name string }
		}
	}
	err := c.api.Post(ctx, "/api/v1/namespaces/"+url.PathEscape(c.Namespace)+"/pods?dryRun=All", pod, &made)
	switch {
	case err == nil && injects && made.Metadata.Annotations[injectedBy] == "":
		c.list.AddWithRemedy(name, checklist.Failed, "admitted, but not injected", "look at the log of the webhook")
	case err == nil && injects:
		c.list.Add(name, checklist.OK, "admitted and injected: the API server reaches the webhook and trusts its certificate")
	case err == nil:
		c.list.Add(name, checklist.OK, "a pod with an init container of pillion is admitted")
	case strings.Contains(err.Error(), "violates PodSecurity"):
		c.list.AddWithRemedy(name, checklist.Failed, err.Error(), permit)
	case strings.Contains(err.Error(), "x509:"), strings.Contains(err.Error(), "tls:"):
		c.list.AddWithRemedy(name, checklist.Failed, err.Error(), "renew the webhook's certificate and its caBundle: see docs/kubernetes.md")
	case strings.Contains(err.Error(), "failed calling webhook"):
		c.list.AddWithRemedy(name, checklist.Failed, err.Error(), "is the webhook running, and does a NetworkPolicy let the API server reach it?")
	default:
		c.failed(name, err)
	}
}
