package clustercheck

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/checklist"
	"github.com/pillion-proxy/pillion/internal/kubeapi"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// certificate returns a certificate in PEM that is valid for a number of days from now.
func certificate(t *testing.T, days int) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.AddDate(0, 0, days).Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// cluster is the state of an API server: responses by path. A response that begins with a number is an error of that status.
type cluster map[string]string

const (
	versionPath     = "GET /version"
	nodesPath       = "GET /api/v1/nodes"
	hooksPath       = "GET /apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
	servicePath     = "GET /api/v1/namespaces/pillion-system/services/pillion-webhook"
	deploymentsPath = "GET /apis/apps/v1/namespaces/pillion-system/deployments"
	secretPath      = "GET /api/v1/namespaces/pillion-system/secrets/pillion-webhook-tls"
	namespacePath   = "GET /api/v1/namespaces/shop"
	podPath         = "POST /api/v1/namespaces/shop/pods"
	denied          = `403 {"message":"nodes is forbidden: User \"me\" cannot list resource"}`
)

// healthy is a cluster in which everything is as it should be.
func healthy(t *testing.T) cluster {
	return cluster{
		versionPath: `{"gitVersion":"v1.31.2"}`,
		nodesPath:   `{"items":[{"metadata":{"name":"a"},"status":{"nodeInfo":{"kubeletVersion":"v1.31.2","architecture":"arm64","operatingSystem":"linux"}}}]}`,
		hooksPath: fmt.Sprintf(`{"items":[{"metadata":{"name":"others"},"webhooks":[{"name":"x"}]},{"metadata":{"name":"pillion"},"webhooks":[
			{"name":"inject.pillion.dev","failurePolicy":"Fail","namespaceSelector":{"matchLabels":{"pillion.dev/injection":"enabled"}},
			"clientConfig":{"caBundle":%q,"service":{"namespace":"pillion-system","name":"pillion-webhook","path":"/inject"}}}]}]}`,
			base64.StdEncoding.EncodeToString(certificate(t, 300))),
		servicePath: `{"spec":{"selector":{"app":"pillion-webhook"}}}`,
		deploymentsPath: `{"items":[{"metadata":{"name":"other"},"spec":{"template":{"metadata":{"labels":{"app":"other"}}}}},
			{"metadata":{"name":"pillion-webhook"},"spec":{"template":{"metadata":{"labels":{"app":"pillion-webhook","more":"x"}},
			"spec":{"containers":[{"image":"registry.example/pillionctl:1"}],"volumes":[{"secret":{"secretName":"pillion-webhook-tls"}}]}}},
			"status":{"replicas":2,"availableReplicas":2}}]}`,
		secretPath:    fmt.Sprintf(`{"data":{"tls.crt":%q}}`, base64.StdEncoding.EncodeToString(certificate(t, 60))),
		namespacePath: `{"metadata":{"labels":{"pillion.dev/injection":"enabled","pod-security.kubernetes.io/enforce":"privileged"}}}`,
		podPath:       `{"metadata":{"annotations":{"pillion.dev/status":"{}"}},"spec":{"containers":[{"name":"app"}],"initContainers":[{"name":"pillion-init"},{"name":"istio-proxy"}]}}`,
	}
}

// check runs the checks against a cluster, and fails if it is asked for anything but what it has.
func check(t *testing.T, c cluster) (map[string]checklist.Check, checklist.List, *string) {
	t.Helper()
	sent := new(string)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, known := c[r.Method+" "+r.URL.Path]
		if !known {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprintf(w, `{"message":"%s not found"}`, r.URL.Path)
			return
		}
		if r.Method == http.MethodPost {
			body, _ := io.ReadAll(r.Body)
			*sent = string(body)
			if r.URL.RawQuery != "dryRun=All" {
				t.Errorf("not a dry run: %s %s", r.Method, r.URL)
			}
		}
		if len(answer) > 4 && answer[3] == ' ' {
			code := 0
			fmt.Sscan(answer, &code)
			w.WriteHeader(code)
			answer = answer[4:]
		}
		io.WriteString(w, answer)
	}))
	t.Cleanup(server.Close)
	file := filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf("current-context: a\ncontexts: [{name: a, context: {cluster: a}}]\nclusters: [{name: a, cluster: {server: %q}}]\n", server.URL)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	api, err := kubeapi.Open(t.Context(), file, "")
	if err != nil {
		t.Fatal(err)
	}
	list := Run(t.Context(), api, Config{Version: "v1.2.3", Namespace: "shop", Now: now})
	byName := make(map[string]checklist.Check)
	for _, one := range list {
		byName[one.Name] = one
	}
	return byName, list, sent
}

func TestAHealthyClusterPasses(t *testing.T) {
	got, list, _ := check(t, healthy(t))
	for name, want := range map[string]string{
		"API server":          "Kubernetes v1.31.2; pillionctl v1.2.3",
		"nodes":               "1, all with native sidecars",
		"webhook":             "MutatingWebhookConfiguration pillion, failurePolicy Fail",
		"webhook CA":          "valid for 300 days, until 2026-12-26",
		"webhook pods":        "Deployment pillion-webhook in pillion-system: 2 of 2 available, image registry.example/pillionctl:1",
		"webhook certificate": "valid for 60 days, until 2026-04-30",
		"Pod Security":        "namespace shop enforces privileged",
		"injection":           "the webhook selects namespace shop",
		"pod, dry run":        "admitted and injected",
	} {
		if c := got[name]; c.State != checklist.OK || !strings.Contains(c.Text, want) {
			t.Errorf("%s: %+v, want %q", name, c, want)
		}
	}
	if list.Failed() || len(list) != 9 {
		t.Errorf("%d checks:\n%s", len(list), list.Text(true))
	}
}

// Each fault is reported by its own check, with a remedy.
func TestEachFaultIsReportedWithItsRemedy(t *testing.T) {
	for _, c := range []struct {
		fault        string
		change       func(cluster)
		name         string
		state        checklist.State
		text, remedy string
	}{
		{"an old server", func(c cluster) { c[versionPath] = `{"gitVersion":"v1.27.1+k3s"}` },
			"API server", checklist.Warning, "native sidecars are not enabled", "--classic"},
		{"the first server with native sidecars", func(c cluster) { c[versionPath] = `{"gitVersion":"v1.29+"}` }, "API server", checklist.OK, "v1.29+", ""},
		{"a server of another major version", func(c cluster) { c[versionPath] = `{"gitVersion":"v2.0.0"}` }, "API server", checklist.OK, "v2.0.0", ""},
		{"the first kubelet with native sidecars", func(c cluster) { c[nodesPath] = strings.Replace(c[nodesPath], "v1.31.2", "v1.29.0", 1) },
			"nodes", checklist.OK, "all with native sidecars", ""},
		{"no server", func(c cluster) { c[versionPath] = `503 down` }, "API server", checklist.Failed, "503: down", "--context"},
		{"an old kubelet", func(c cluster) { c[nodesPath] = strings.Replace(c[nodesPath], "v1.31.2", "v1.28.9", 1) },
			"nodes", checklist.Warning, "no native sidecars on a (v1.28.9)", "update the kubelets"},
		{"another architecture", func(c cluster) { c[nodesPath] = strings.Replace(c[nodesPath], "arm64", "s390x", 1) },
			"nodes", checklist.Warning, "does not run on a (linux/s390x)", "nodeSelector"},
		{"no permission for nodes", func(c cluster) { c[nodesPath] = denied }, "nodes", checklist.Skipped, "not permitted", ""},
		{"no webhook", func(c cluster) { c[hooksPath] = `{"items":[]}` }, "webhook", checklist.Skipped, "pillionctl inject", ""},
		{"no caBundle", func(c cluster) { c[hooksPath] = strings.Replace(c[hooksPath], "caBundle", "other", 1) },
			"webhook CA", checklist.Failed, "does not trust the webhook", "cert-manager"},
		{"a rotation of the authority", func(c cluster) {
			both := append(certificate(t, 1), certificate(t, 200)...)
			c[hooksPath] = strings.Replace(c[hooksPath], `"caBundle":"`, `"caBundle":"`+base64.StdEncoding.EncodeToString(both)+`","was":"`, 1)
		}, "webhook CA", checklist.OK, "valid for 200 days", ""},
		{"an expired certificate", func(c cluster) {
			c[secretPath] = fmt.Sprintf(`{"data":{"tls.crt":%q}}`, base64.StdEncoding.EncodeToString(certificate(t, -3)))
		}, "webhook certificate", checklist.Failed, "expired on 2026-02-26", "renew"},
		{"a certificate that ends soon", func(c cluster) {
			c[secretPath] = fmt.Sprintf(`{"data":{"tls.crt":%q}}`, base64.StdEncoding.EncodeToString(certificate(t, 13)))
		}, "webhook certificate", checklist.Warning, "valid for 13 days", "renew"},
		{"a certificate of fourteen days", func(c cluster) {
			c[secretPath] = fmt.Sprintf(`{"data":{"tls.crt":%q}}`, base64.StdEncoding.EncodeToString(certificate(t, 14)))
		}, "webhook certificate", checklist.OK, "valid for 14 days", ""},
		{"no permission for the secret", func(c cluster) { c[secretPath] = denied }, "webhook certificate", checklist.Skipped, "not permitted", ""},
		{"no certificate", func(c cluster) { c[secretPath] = `{"data":{}}` }, "webhook certificate", checklist.Failed, "no certificate in PEM", ""},
		{"no replica", func(c cluster) {
			c[deploymentsPath] = strings.Replace(c[deploymentsPath], `"availableReplicas":2`, `"availableReplicas":0`, 1)
		}, "webhook pods", checklist.Failed, "0 of 2 available", "kubectl get pods -n pillion-system"},
		{"no service", func(c cluster) { delete(c, servicePath) }, "webhook pods", checklist.Failed, "service pillion-webhook in pillion-system: 404", ""},
		{"no deployment", func(c cluster) { c[deploymentsPath] = `{"items":[]}` }, "webhook pods", checklist.Failed, "no Deployment in pillion-system", "install"},
		{"Pod Security", func(c cluster) { c[namespacePath] = strings.Replace(c[namespacePath], "privileged", "baseline", 1) },
			"Pod Security", checklist.Failed, "enforces baseline, which refuses NET_ADMIN", "kubectl label namespace shop pod-security.kubernetes.io/enforce=privileged --overwrite"},
		{"no such namespace", func(c cluster) { delete(c, namespacePath) }, "Pod Security", checklist.Failed, "namespace shop: 404", ""},
		{"no injection", func(c cluster) { c[namespacePath] = `{"metadata":{}}` },
			"injection", checklist.Warning, "does not select namespace shop", "kubectl label namespace shop pillion.dev/injection=enabled"},
		{"an excluded namespace", func(c cluster) {
			c[hooksPath] = strings.Replace(c[hooksPath], `"namespaceSelector":{`,
				`"namespaceSelector":{"matchExpressions":[{"key":"team","operator":"NotIn","values":["system"]}],`, 1)
			c[namespacePath] = strings.Replace(c[namespacePath], `"labels":{`, `"labels":{"team":"system",`, 1)
		}, "injection", checklist.Warning, "its namespaceSelector excludes it", "another namespace"},
		{"not injected", func(c cluster) { c[podPath] = `{"spec":{"containers":[{"name":"app"}]}}` },
			"pod, dry run", checklist.Failed, "admitted, but not injected", "log of the webhook"},
		{"an unreachable webhook", func(c cluster) {
			c[podPath] = `500 {"message":"Internal error occurred: failed calling webhook \"inject.pillion.dev\": no endpoints available"}`
		}, "pod, dry run", checklist.Failed, "no endpoints available", "NetworkPolicy"},
		{"a webhook that is not trusted", func(c cluster) {
			c[podPath] = `500 {"message":"failed calling webhook \"inject.pillion.dev\": tls: failed to verify certificate: x509: certificate has expired"}`
		}, "pod, dry run", checklist.Failed, "x509: certificate has expired", "renew the webhook's certificate"},
		{"a refused pod", func(c cluster) {
			c[podPath] = `403 {"message":"pods \"pillion-check-x\" is forbidden: violates PodSecurity \"restricted:latest\""}`
		}, "pod, dry run", checklist.Failed, "violates PodSecurity", "enforce=privileged"},
		{"no permission for pods", func(c cluster) { c[podPath] = denied }, "pod, dry run", checklist.Skipped, "not permitted", ""},
	} {
		t.Run(c.fault, func(t *testing.T) {
			broken := healthy(t)
			c.change(broken)
			got, list, _ := check(t, broken)
			one := got[c.name]
			if one.State != c.state || !strings.Contains(one.Text, c.text) || !strings.Contains(one.Remedy, c.remedy) || c.remedy == "" && one.Remedy != "" {
				t.Errorf("%+v\n%s", one, list.Text(true))
			}
			for _, other := range list {
				if other.Name != c.name && other.State == checklist.Failed {
					t.Errorf("%s fails as well: %+v", other.Name, other)
				}
			}
		})
	}
}

// Without a webhook the trial has the capabilities of an injected pod, so that admission judges them.
func TestTheTrialAsksForWhatTheInitContainerNeeds(t *testing.T) {
	c := healthy(t)
	c[hooksPath] = `{"items":[]}`
	_, _, sent := check(t, c)
	var pod struct {
		Spec struct {
			InitContainers []struct {
				SecurityContext struct{ Capabilities struct{ Add []string } }
			}
		}
	}
	if err := json.Unmarshal([]byte(*sent), &pod); err != nil || len(pod.Spec.InitContainers) != 1 ||
		strings.Join(pod.Spec.InitContainers[0].SecurityContext.Capabilities.Add, " ") != "NET_ADMIN NET_RAW" {
		t.Errorf("%v: %s", err, *sent)
	}
	if _, _, sent := check(t, healthy(t)); strings.Contains(*sent, "NET_ADMIN") {
		t.Errorf("the webhook is to add the init container: %s", *sent)
	}
}

func TestSelectorsFollowKubernetes(t *testing.T) {
	for text, want := range map[string]bool{
		`{}`:                        true,
		`{"matchLabels":{"a":"1"}}`: true,
		`{"matchLabels":{"a":"2"}}`: false,
		`{"matchLabels":{"b":""}}`:  false,
		`{"matchExpressions":[{"key":"a","operator":"In","values":["1","2"]}]}`: true,
		`{"matchExpressions":[{"key":"a","operator":"In","values":["2"]}]}`:     false,
		`{"matchExpressions":[{"key":"b","operator":"In","values":[""]}]}`:      false,
		`{"matchExpressions":[{"key":"a","operator":"NotIn","values":["1"]}]}`:  false,
		`{"matchExpressions":[{"key":"b","operator":"NotIn","values":["1"]}]}`:  true,
		`{"matchExpressions":[{"key":"a","operator":"Exists"}]}`:                true,
		`{"matchExpressions":[{"key":"b","operator":"Exists"}]}`:                false,
		`{"matchExpressions":[{"key":"a","operator":"DoesNotExist"}]}`:          false,
		`{"matchExpressions":[{"key":"b","operator":"DoesNotExist"}]}`:          true,
	} {
		var s selector
		if err := json.Unmarshal([]byte(text), &s); err != nil || s.selects(map[string]string{"a": "1"}) != want {
			t.Errorf("%s: %v, want %v", text, err, want)
		}
	}
}

// A pod that another webhook has changed is not injected.
func TestAContainerOfAnotherWebhookIsNotInjection(t *testing.T) {
	c := healthy(t)
	c[podPath] = `{"metadata":{"annotations":{"vault.hashicorp.com/agent-inject-status":"injected"}},"spec":{"containers":[{"name":"app"},{"name":"vault-agent"}]}}`
	if byName, _, _ := check(t, c); byName["pod, dry run"].State != checklist.Failed {
		t.Errorf("%+v", byName["pod, dry run"])
	}
}

// The pod of the trial is one that the webhook selects.
func TestTheTrialSatisfiesTheObjectSelector(t *testing.T) {
	for selector, want := range map[string]checklist.State{
		`{"matchLabels":{"team":"a"}}`:                              checklist.OK,
		`{"matchExpressions":[{"key":"team","operator":"Exists"}]}`: checklist.Skipped,
	} {
		c := healthy(t)
		c[hooksPath] = strings.Replace(c[hooksPath], `"namespaceSelector"`, `"objectSelector":`+selector+`,"namespaceSelector"`, 1)
		byName, _, sent := check(t, c)
		if byName["pod, dry run"].State != want || want == checklist.OK && !strings.Contains(*sent, `"labels":{"team":"a"}`) {
			t.Errorf("%s: %+v, sent %s", selector, byName["pod, dry run"], *sent)
		}
	}
}
