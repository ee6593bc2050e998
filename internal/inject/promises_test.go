package inject

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// Each invalid option is named by its field, or by the annotation whose default it is.
func TestValidateNamesTheField(t *testing.T) {
	valid := Options{Image: "i", PullPolicy: "Never", SidecarName: "agent", Namespace: "shop", Classic: true,
		Defaults: map[string]string{memoryAnnotation: "1Gi", "pillion.dev/access-log-encoding": "json", "pillion.dev/access-log-format": `{"a":"%PROTOCOL%"}`}}
	if err := valid.Validate(); err != nil {
		t.Errorf("valid options: %v", err)
	}
	for _, c := range []struct {
		field  string
		change func(*Options)
		want   string
	}{
		{"Image", func(o *Options) { o.Image = "" }, `Image: "" is not an image`},
		{"Image", func(o *Options) { o.Image = "a b" }, `Image: "a b" is not an image`},
		{"PullPolicy", func(o *Options) { o.PullPolicy = "always" }, `PullPolicy "always": use Always, IfNotPresent or Never`},
		{"SidecarName", func(o *Options) { o.SidecarName = "A" }, `SidecarName "A": use at most 63`},
		{"SidecarName", func(o *Options) { o.SidecarName = initName }, `SidecarName "pillion-init": use at most 63`},
		{"Namespace", func(o *Options) { o.Namespace = "a.b" }, `Namespace "a.b" is not a namespace`},
		{memoryAnnotation, func(o *Options) { o.Defaults = map[string]string{memoryAnnotation: "x"} }, memoryAnnotation + `: "x" is not a quantity`},
		{mergeMetrics, func(o *Options) { o.Defaults = map[string]string{mergeMetrics: "false"} }, mergeMetrics + ": this annotation has no default"},
		{"pillion.dev/access-log-format", func(o *Options) { o.Defaults = map[string]string{"pillion.dev/access-log-format": `{"a":"%PROTOCOL"}`} },
			"pillion.dev/access-log-format: access log format: "},
	} {
		options := Options{Image: "i"}
		c.change(&options)
		err := options.Validate()
		field := new(FieldError)
		if !errors.As(err, &field) || field.Field != c.field || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
}

// settingsOf returns the environment and resources of the sidecar of a pod with annotations.
func settingsOf(t *testing.T, options Options, annotations map[string]any, grace time.Duration) *settings {
	t.Helper()
	s, err := options.settings()
	if err == nil {
		err = parseAnnotations(s, annotations)
	}
	if err == nil {
		err = s.finish(grace)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAPodsOwnValueOverridesADefault(t *testing.T) {
	const cpuLimit, memoryLimit = "sidecar.istio.io/proxyCPULimit", "sidecar.istio.io/proxyMemoryLimit"
	for _, c := range []struct {
		defaults map[string]string
		own      map[string]any
		want     resources
	}{
		{nil, nil, resources{"10m", "16Mi", "", "128Mi"}},
		{map[string]string{cpuAnnotation: "1", memoryAnnotation: "64Mi"}, nil, resources{"1", "64Mi", "", "128Mi"}},
		{map[string]string{memoryAnnotation: "256Mi"}, nil, resources{"10m", "256Mi", "", "256Mi"}},
		{map[string]string{cpuAnnotation: "1", cpuLimit: "2"}, map[string]any{cpuAnnotation: "3"}, resources{"3", "16Mi", "3", "128Mi"}},
		{map[string]string{cpuAnnotation: "1", cpuLimit: "2"}, map[string]any{cpuLimit: "500m"}, resources{"500m", "16Mi", "500m", "128Mi"}},
		{map[string]string{memoryAnnotation: "64Mi", memoryLimit: "64Mi"}, map[string]any{memoryLimit: "32Mi"}, resources{"10m", "32Mi", "", "32Mi"}},
	} {
		if got := settingsOf(t, Options{Image: "i", Defaults: c.defaults}, c.own, time.Minute).resources; got != c.want {
			t.Errorf("%v, %v: %+v, want %+v", c.defaults, c.own, got, c.want)
		}
	}
	for _, c := range []struct {
		delay string
		own   map[string]any
		grace time.Duration
		want  time.Duration
	}{
		{"10s", nil, time.Minute, 10 * time.Second},
		{"10s", nil, 10 * time.Second, 3750 * time.Millisecond}, // half of the drain
		{"10s", map[string]any{drainDelayAnnotation: "20s"}, time.Minute, 20 * time.Second},
		{"0s", nil, 10 * time.Second, 0},
	} {
		options := Options{Image: "i", Defaults: map[string]string{drainDelayAnnotation: c.delay}}
		if got := settingsOf(t, options, c.own, c.grace).drainDelay; got != c.want {
			t.Errorf("a default of %s, %v, within %v: %v, want %v", c.delay, c.own, c.grace, got, c.want)
		}
	}
}

func TestConcurrencyZeroIsOneForEachCPU(t *testing.T) {
	for text, want := range map[string]int{"concurrency: 0": 0, "concurrency: 2": 2, "concurrency: 1024": 1024} {
		if got := settingsOf(t, Options{Image: "i"}, map[string]any{proxyConfig: text}, time.Minute).concurrency; got != want {
			t.Errorf("%s is %d", text, got)
		}
	}
}

func TestAnOverrideThatCannotWorkIsRefused(t *testing.T) {
	pod := func(fields, annotations string) string {
		return "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {" + annotations + "}}\nspec:\n  containers:\n  - {name: app, image: x}\n" +
			"  - {name: istio-proxy, image: auto, " + fields + "}\n"
	}
	for text, want := range map[string]string{
		pod("securityContext: {runAsUser: 1000}", ""):                           "securityContext.runAsUser is 1000: the rules recognise the agent by 1337",
		pod("securityContext: {runAsGroup: 0}", ""):                             "securityContext.runAsGroup is 0: the rules recognise the agent by 1337",
		pod("securityContext: {runAsUser: 1337}", tproxy):                       "securityContext.runAsUser is 1337: the rules recognise the agent by 0",
		pod("securityContext: null", ""):                                        "securityContext has no runAsUser: the rules recognise the agent by 1337",
		pod("securityContext: {runAsGroup: null}", ""):                          "securityContext has no runAsGroup: the rules recognise the agent by 1337",
		pod("securityContext: 1", ""):                                           "securityContext has no runAsUser",
		pod("resources: {requests: {cpu: 2}, limits: {cpu: 1}}", ""):            "resources.requests.cpu is 2, more than the limit of 1",
		pod("restartPolicy: Never", ""):                                         "restartPolicy is Never: the annotation sidecar.istio.io/nativeSidecar decides that",
		pod("restartPolicy: Always", `sidecar.istio.io/nativeSidecar: "false"`): "restartPolicy is Always: the annotation",
		strings.Replace(pod("", ""), "  - {name: app, image: x}\n", "", 1):      "spec.containers is empty",
	} {
		_, err := inject(text, "in", Options{Image: "pillion"}, ignore)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\n%v, want %s", text, err, want)
		}
	}
}

// A request above a limit would make the pod invalid.
func TestALimitOfOursFollowsARequestOfTheOverride(t *testing.T) {
	const cpuLimit = `sidecar.istio.io/proxyCPULimit: "1"`
	for _, c := range []struct{ annotations, override, want string }{
		{"", "{requests: {memory: 1Gi}}", "{requests: {cpu: 10m, memory: 1Gi}, limits: {memory: 1Gi}}"},
		{"", "{requests: {memory: 64Mi}}", "{requests: {cpu: 10m, memory: 64Mi}, limits: {memory: 128Mi}}"},
		{"", "{limits: {memory: 8Mi}}", "{requests: {cpu: 10m, memory: 8Mi}, limits: {memory: 8Mi}}"},
		{"", "{limits: {cpu: 5m}}", "{requests: {cpu: 5m, memory: 16Mi}, limits: {memory: 128Mi, cpu: 5m}}"},
		{cpuLimit, "{requests: {cpu: 2}}", "{requests: {cpu: 2, memory: 16Mi}, limits: {cpu: 2, memory: 128Mi}}"},
		{"", "{requests: {memory: 1Gi}, limits: {memory: 2Gi}}", "{requests: {cpu: 10m, memory: 1Gi}, limits: {memory: 2Gi}}"},
		{"", "{requests: {memory: 1Gi}, limits: null}", "{requests: {cpu: 10m, memory: 1Gi}, limits: null}"},
	} {
		text := "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {" + c.annotations + "}}\nspec:\n  containers:\n  - {name: app, image: x}\n" +
			"  - {name: istio-proxy, image: auto, resources: " + c.override + "}\n"
		out, err := inject(text, "in", Options{Image: "pillion"}, ignore)
		if err != nil {
			t.Errorf("%s: %v", c.override, err)
			continue
		}
		made, err := yamledit.Parse(out)
		if err != nil {
			t.Fatal(err)
		}
		want, err := yamledit.Parse(c.want)
		if err != nil {
			t.Fatal(err)
		}
		var got any
		for _, container := range yamledit.Get(made.Tree(), "spec", "initContainers").([]any) {
			if yamledit.Text(container, "name") == SidecarName {
				got = yamledit.Get(container, "resources")
			}
		}
		if yamledit.JSON(got) != yamledit.JSON(want.Tree()) {
			t.Errorf("%q, %s makes %s, want %s", c.annotations, c.override, yamledit.JSON(got), yamledit.JSON(want.Tree()))
		}
	}
}

const tproxy = "sidecar.istio.io/interceptionMode: TPROXY"

// Another image than auto is somebody's own sidecar.
func TestOnlyTheImageAutoIsAnOverride(t *testing.T) {
	text := "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  containers:\n  - {name: app, image: x}\n  - {name: istio-proxy, image: mine}\n"
	var outcome Outcome
	if out, err := inject(text, "in", Options{Image: "pillion"}, func(o Outcome) { outcome = o }); err != nil || out != text || outcome.Action != LeftAlone {
		t.Errorf("%v, %+v\n%s", err, outcome, out)
	}
	// With another name for the sidecar, istio-proxy is the workload's, or another mesh's.
	if _, err := inject(strings.Replace(text, "image: mine", "image: auto", 1), "in", Options{Image: "pillion", SidecarName: "agent"},
		func(o Outcome) { outcome = o }); err != nil || outcome.Action != LeftAlone {
		t.Errorf("%v, %+v", err, outcome)
	}
}

func TestAForgedRemovalIsRefused(t *testing.T) {
	for _, removed := range []string{
		`{"list":"volumes","was":"\n- a","column":0}`, `{"list":"containers","was":"a: [","column":0}`, `{"list":"containers","was":"- a\n- b","column":0}`,
		`{"list":"containers","after":"gone","was":"- a","column":0}`, `{"list":"containers","was":"1, 2","column":-1}`,
	} {
		status := `{"version":1,"removed":` + removed + `}`
		text := "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  annotations:\n    pillion.dev/status: " + yamledit.JSON(status) + "\nspec:\n  containers:\n  - name: app\n"
		if out, err := uninject(text, "x", ignore); err == nil || !strings.Contains(err.Error(), statusAnnotation) {
			t.Errorf("%s: %v\n%s", removed, err, out)
		}
	}
}

// A label that was changed after the injection stays.
func TestUninjectionKeepsALaterTLSMode(t *testing.T) {
	text := "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  labels:\n    security.istio.io/tlsMode: istio\nspec:\n  containers:\n  - name: app\n    image: x\n"
	out, _ := injected(t, "in", []byte(text))
	if !bytes.Contains(out, []byte("security.istio.io/tlsMode: disabled\n")) {
		t.Fatalf("%s", out)
	}
	later := strings.Replace(string(out), "tlsMode: disabled", "tlsMode: other", 1)
	if back, want := uninjected(t, "in", []byte(later)), strings.Replace(text, "tlsMode: istio", "tlsMode: other", 1); string(back) != want {
		t.Errorf("%s\nwant\n%s", back, want)
	}
}

// A pod on which the injection itself fails would run uncaptured.
func TestAPanicRefusesThePod(t *testing.T) {
	before := Annotations
	Annotations = append(Annotations[:len(Annotations):len(Annotations)], Annotation{Name: "pillion.dev/panic", parse: func(*settings, string) error { panic("a bug") }})
	t.Cleanup(func() { Annotations = before })
	var log bytes.Buffer
	body := ask(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","annotations":{"pillion.dev/panic":"x"}},"spec":{"containers":[{"name":"a"}]}}`)
	answer, err := Review(body, Options{Image: "pillion"}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil || !bytes.Contains(answer, []byte(`"allowed":false`)) || !bytes.Contains(answer, []byte(`"code":500`)) || bytes.Contains(answer, []byte("a bug")) {
		t.Errorf("%v %s", err, answer)
	}
	if !strings.Contains(log.String(), `msg="injection failed" namespace=shop panic="a bug"`) {
		t.Errorf("the log is %s", &log)
	}
}

// An operator searches for these.
func TestTheWebhookLogsWhatItDid(t *testing.T) {
	pod := `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","annotations":{%s}},"spec":{"containers":[{"name":"a"}]%s}}`
	for object, want := range map[string]string{
		fmt.Sprintf(pod, "", ""):                                  `level=INFO msg="pod admitted" namespace=shop object="Pod p" action=injected`,
		fmt.Sprintf(pod, "", `,"hostNetwork":true`):               `action="left alone" reason="it uses the node's network (hostNetwork)"`,
		fmt.Sprintf(pod, `"sidecar.istio.io/inject":"false"`, ""): `action="left alone" reason="the annotation sidecar.istio.io/inject is false"`,
		fmt.Sprintf(pod, `"pillion.dev/log-level":"x"`, ""):       `level=WARN msg="pod refused" namespace=shop object="Pod p" error="annotation pillion.dev/log-level: `,
	} {
		var log bytes.Buffer
		answer, err := Review(ask(object), Options{Image: "pillion"}, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil || !strings.Contains(log.String(), want) {
			t.Errorf("%s: %v, the log is %s", object, err, &log)
		}
		if strings.Contains(object, "inject\":\"false") && bytes.Contains(answer, []byte("warnings")) {
			t.Errorf("a pod that opts out causes a warning: %s", answer)
		}
	}
}

// The warnings of an injection reach the user of kubectl, cut to what it shows.
func TestWarningsReachTheClient(t *testing.T) {
	answer := reviewed(t, ask(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","annotations":{"linkerd.io/inject":"enabled","sidecar.istio.io/`+
		strings.Repeat("ü", 300)+`":"x"}},"spec":{"containers":[{"name":"a","ports":[{"containerPort":15006}]}]}}`))
	all := strings.Join(answer.Warnings, "\n")
	if !answer.Allowed || answer.Patch == nil || len(answer.Warnings) != 3 || !strings.Contains(all, "pillion: Linkerd (annotation linkerd.io/inject) selects the pod too") ||
		!strings.Contains(all, "declares port 15006") {
		t.Errorf("%+v", answer)
	}
	for _, warning := range answer.Warnings {
		if len(warning) > maxWarning || strings.ContainsRune(warning, '\uFFFD') {
			t.Errorf("%q", warning)
		}
	}
}

func TestTheWebhookRefusesOldTLS(t *testing.T) {
	dir := t.TempDir()
	pool := certify(t, dir, "x")
	address, _ := served(t, dir)
	connection, err := tls.Dial("tcp", address, &tls.Config{RootCAs: pool, ServerName: "localhost", MaxVersion: tls.VersionTLS12})
	if err == nil {
		connection.Close()
		t.Error("TLS 1.2 is accepted")
	}
}
