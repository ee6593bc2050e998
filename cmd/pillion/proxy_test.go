package main

import (
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// settled is an input of `pillion proxy`: a command line, an environment, annotations and a mesh configuration.
func settled(t *testing.T, args []string, env map[string]string, annotations, mesh string) (*proxyOptions, error) {
	t.Helper()
	cores := runtime.GOMAXPROCS(0)
	t.Cleanup(func() { runtime.GOMAXPROCS(cores) })
	for name, value := range env {
		t.Setenv(name, value)
	}
	dir := t.TempDir()
	p := newProxyOptions()
	p.annotations, p.meshConfig = filepath.Join(dir, "annotations"), filepath.Join(dir, "mesh")
	for name, text := range map[string]string{p.annotations: annotations, p.meshConfig: mesh} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	flags := pflag.NewFlagSet("proxy", pflag.ContinueOnError)
	p.bind(flags)
	p.unknown = unknownFlags(flags, args)
	flags.ParseErrorsAllowlist.UnknownFlags = true
	if err := flags.Parse(args); err != nil {
		return p, err
	}
	if err := p.settle(flags); err != nil {
		return p, err
	}
	p.config.Log = p.newLogger()
	p.fitDrain(flags)
	return p, p.config.Validate()
}

func TestIstiosSettingsBecomeTheAgentsConfiguration(t *testing.T) {
	drain := func(delay, timeout time.Duration) func(p *proxyOptions) bool {
		return func(p *proxyOptions) bool { return p.config.Drain.Delay == delay && p.config.Drain.Timeout == timeout }
	}
	one := func(*proxyOptions) bool { return runtime.GOMAXPROCS(0) == 1 }
	for name, c := range map[string]struct {
		args              []string
		env               map[string]string
		annotations, mesh string
		holds             func(p *proxyOptions) bool
	}{
		"domain": {args: []string{"sidecar", "--domain", "shop.svc.K8s.example."}, holds: func(p *proxyOptions) bool {
			return p.config.Workload.ClusterDomain == "k8s.example"
		}},
		"cluster domain overrides domain": {args: []string{"sidecar", "--domain", "shop.svc.k8s.example", "--cluster-domain", "other.example"}, holds: func(p *proxyOptions) bool {
			return p.config.Workload.ClusterDomain == "other.example"
		}},
		"domain without a cluster": {args: []string{"sidecar", "--domain", "shop"}, holds: func(p *proxyOptions) bool {
			return p.config.Workload.ClusterDomain == ""
		}},
		"no settings": {holds: func(p *proxyOptions) bool {
			return p.config.Ports.Status == 15020 && p.config.Interception.Mode == capture.Redirect && drain(5*time.Second, 20*time.Second)(p)
		}},
		"ports": {env: map[string]string{"PROXY_CONFIG": `{"statusPort":15120,"proxyAdminPort":15100}`, "ENVOY_STATUS_PORT": "15121", "ENVOY_PROMETHEUS_PORT": "15190"},
			holds: func(p *proxyOptions) bool {
				c := p.config
				return c.Ports.Status == 15120 && c.Ports.Admin == 15100 && c.Ports.Readiness == 15121 && c.Ports.Metrics == 15190
			}},
		"the annotation is stronger than the variable, that than the mesh": {
			env: map[string]string{"PROXY_CONFIG": `{"statusPort":2,"proxyAdminPort":22}`}, annotations: `proxy.istio.io/config="statusPort: 3\n"`,
			mesh: "defaultConfig:\n  statusPort: 1\n  proxyAdminPort: 11\n  terminationDrainDuration: 7s\nstatusPort: 9\n",
			holds: func(p *proxyOptions) bool {
				return p.config.Ports.Status == 3 && p.config.Ports.Admin == 22 && drain(7*time.Second, 20*time.Second)(p)
			}},
		"the status port's own annotation is stronger still": {
			annotations: "proxy.istio.io/config=\"statusPort: 3\"\nstatus.sidecar.istio.io/port=\"4\"\n", holds: func(p *proxyOptions) bool { return p.config.Ports.Status == 4 }},
		"our own words are strongest": {args: []string{"--status-port", "5"}, env: map[string]string{"PROXY_CONFIG": "statusPort: 2\nproxyAdminPort: 22", "PILLION_ADMIN_PORT": "6"},
			holds: func(p *proxyOptions) bool { return p.config.Ports.Status == 5 && p.config.Ports.Admin == 6 }},
		"the injector's mode is stronger than the configuration's": {env: map[string]string{"PROXY_CONFIG": "interceptionMode: REDIRECT", "ISTIO_META_INTERCEPTION_MODE": "TPROXY"},
			holds: func(p *proxyOptions) bool { return p.config.Interception.Mode == capture.TPROXY }},
		"the configuration's mode": {env: map[string]string{"PROXY_CONFIG": "interceptionMode: TPROXY"}, holds: func(p *proxyOptions) bool { return p.config.Interception.Mode == capture.TPROXY }},
		"no mode":                  {env: map[string]string{"PROXY_CONFIG": "interceptionMode: NONE", "ISTIO_META_INTERCEPTION_MODE": "NONE"}, holds: func(p *proxyOptions) bool { return p.config.Interception.Mode == capture.Redirect }},

		"drain":                         {env: map[string]string{"PROXY_CONFIG": "drainDuration: 45s\nterminationDrainDuration: 8s"}, holds: drain(8*time.Second, 45*time.Second)},
		"a long life":                   {env: map[string]string{"PROXY_CONFIG": "terminationDrainDuration: 60s"}, holds: drain(time.Minute, 75*time.Second)},
		"until nobody is left":          {env: map[string]string{"EXIT_ON_ZERO_ACTIVE_CONNECTIONS": "true", "PROXY_CONFIG": "terminationDrainDuration: 60s"}, holds: drain(5*time.Second, 24*time.Hour)},
		"until nobody is left, at most": {env: map[string]string{"EXIT_ON_ZERO_ACTIVE_CONNECTIONS": "true", "MINIMUM_DRAIN_DURATION": "3s", "TERMINATION_GRACE_PERIOD": "600"}, holds: drain(3*time.Second, 595*time.Second)},
		"the grace period gives":        {env: map[string]string{"TERMINATION_GRACE_PERIOD": "60"}, holds: drain(5*time.Second, 55*time.Second)},
		"the grace period limits":       {env: map[string]string{"TERMINATION_GRACE_PERIOD": "30s", "PILLION_DRAIN_TIMEOUT": "2m", "PROXY_CONFIG": "terminationDrainDuration: 40s"}, holds: drain(25*time.Second, 25*time.Second)},
		"a short grace period":          {env: map[string]string{"TERMINATION_GRACE_PERIOD": "4"}, holds: drain(1500*time.Millisecond, 3*time.Second)},

		"cores of the command line":      {args: []string{"--concurrency", "1"}, env: map[string]string{"PROXY_CONFIG": "concurrency: 2", "ISTIO_CPU_LIMIT": "2"}, holds: one},
		"cores of the configuration":     {env: map[string]string{"PROXY_CONFIG": "concurrency: 1", "ISTIO_CPU_LIMIT": "2"}, holds: one},
		"cores of the limit, rounded up": {env: map[string]string{"ISTIO_CPU_LIMIT": "500m"}, holds: one},
		"all cores":                      {env: map[string]string{"PROXY_CONFIG": "concurrency: 0", "ISTIO_CPU_LIMIT": "1"}, holds: func(*proxyOptions) bool { return runtime.GOMAXPROCS(0) == runtime.NumCPU() }},

		"the log":                {args: []string{"--log_output_level=default:warn,ads:debug", "--log_as_json"}, holds: func(p *proxyOptions) bool { return p.level == "warn" && p.format == "json" }},
		"our own level":          {args: []string{"--log_output_level=debug", "--log-level", "error"}, holds: func(p *proxyOptions) bool { return p.level == "error" }},
		"profiling stands alone": {args: []string{"--profiling", "sidecar"}, holds: func(p *proxyOptions) bool { return p.config.Status.Profiling }},
		"what nobody knows": {args: []string{"sidecar", "--novel", "x", "--other=y", "-q", "--domain", "d", "--status-port=7"}, holds: func(p *proxyOptions) bool {
			return p.config.Ports.Status == 7 && slices.Equal(p.unknown, []string{"--novel", "--other", "-q"})
		}},
		"what has no effect": {env: map[string]string{"PROXY_CONFIG": `{"discoveryAddress":"x:1","tracing":{"a":1,"b":2},"concurrency":1}`}, holds: func(p *proxyOptions) bool {
			slices.Sort(p.idle)
			return slices.Equal(p.idle, []string{"tracing"})
		}},
		"the injector's whole":    {args: strings.Fields("sidecar --domain shop.svc.cluster.local --proxyLogLevel=warning --proxyComponentLogLevel=misc:error --log_output_level=default:info"), env: map[string]string{"PROXY_CONFIG": "{\"discoveryAddress\":\"127.0.0.1:15010\",\"holdApplicationUntilProxyStarts\":true}\n", "ISTIO_CPU_LIMIT": "2"}, holds: func(p *proxyOptions) bool { return len(p.unknown) == 0 && p.level == "info" }},
		"broken annotations pass": {annotations: "what\n", holds: func(p *proxyOptions) bool { return p.config.Ports.Status == 15020 }},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := settled(t, c.args, c.env, c.annotations, c.mesh)
			if err != nil || !c.holds(p) {
				t.Errorf("error %v; cores %d, unknown %v, idle %v, level %s\n%+v", err, runtime.GOMAXPROCS(0), p.unknown, p.idle, p.level, p.config)
			}
		})
	}
}

func TestInvalidIstioSettingsAreNamedWithTheirSource(t *testing.T) {
	for _, c := range []struct {
		args        []string
		env         map[string]string
		annotations string
		complaint   string
	}{
		{env: map[string]string{"PROXY_CONFIG": "statusPort: x"}, complaint: `environment variable PROXY_CONFIG: statusPort: "x" (for --status-port)`},
		{env: map[string]string{"PROXY_CONFIG": "statusPort:\n- 1"}, complaint: "PROXY_CONFIG: statusPort: unsupported YAML"},
		{env: map[string]string{"PROXY_CONFIG": "concurrency: &a 2"}, complaint: "PROXY_CONFIG: concurrency: unsupported YAML"},
		{env: map[string]string{"PROXY_CONFIG": "concurrency: -1"}, complaint: `PROXY_CONFIG: concurrency: "-1": not a count`},
		{env: map[string]string{"PROXY_CONFIG": "{"}, complaint: "environment variable PROXY_CONFIG: it begins with {"},
		{annotations: `proxy.istio.io/config="drainDuration: soon"`, complaint: `annotation proxy.istio.io/config: drainDuration: "soon"`},
		{env: map[string]string{"EXIT_ON_ZERO_ACTIVE_CONNECTIONS": "true", "MINIMUM_DRAIN_DURATION": "x"}, complaint: `environment variable MINIMUM_DRAIN_DURATION: "x"`},
		{env: map[string]string{"ISTIO_CPU_LIMIT": "many"}, complaint: `environment variable ISTIO_CPU_LIMIT="many"`},
		{env: map[string]string{"TERMINATION_GRACE_PERIOD": "long"}, complaint: `environment variable TERMINATION_GRACE_PERIOD="long" (for --termination-grace-period)`},
		{env: map[string]string{"ENVOY_STATUS_PORT": "70000"}, complaint: `environment variable ENVOY_STATUS_PORT="70000" (for --readiness-port)`},
		{args: []string{"--log_output_level=default:loud"}, complaint: `"loud" is not a level`},
	} {
		t.Run(c.complaint, func(t *testing.T) {
			if _, err := settled(t, c.args, c.env, c.annotations, ""); err == nil || !strings.Contains(err.Error(), c.complaint) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestVariablesWithoutEffectAreNamed(t *testing.T) {
	environment := []string{"XDS_HEADER_A=1", "PATH=/", "CA_ADDR=", "ISTIO_META_MESH_ID=m", "POD_NAME=p", "ISTIOD_SERVICE_PORT=1", "DISABLE_ENVOY=true"}
	if got := idleVariables(environment, false); !slices.Equal(got, []string{"CA_ADDR", "DISABLE_ENVOY", "XDS_HEADER_A"}) {
		t.Errorf("without a control plane: %v", got)
	}
	if got := idleVariables(environment, true); !slices.Equal(got, []string{"DISABLE_ENVOY"}) {
		t.Errorf("with a control plane: %v", got)
	}
}

func TestProcessorsAreRoundedUp(t *testing.T) {
	for text, want := range map[string]int{"0": 0, "1": 1, "0.1": 1, "1.5": 2, "2": 2, "500m": 1, "6500m": 7, "2000m": 2} {
		if got, err := parseCPU(text); err != nil || got != want {
			t.Errorf("%s: %d and %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "m", "-1", "1e9", "NaN", "2k"} {
		if got, err := parseCPU(text); err == nil {
			t.Errorf("%q is %d", text, got)
		}
	}
}

func TestTheMemoryLimitOfBothVersionsOfControlGroups(t *testing.T) {
	for name, c := range map[string]struct {
		files  map[string]string
		want   int64
		refuse bool
	}{
		"none":                  {},
		"version 2":             {map[string]string{"memory.max": "134217728\n"}, 128 << 20, false},
		"version 2, no limit":   {map[string]string{"memory.max": "max\n"}, 0, false},
		"version 1":             {map[string]string{"memory/memory.limit_in_bytes": "134217728\n"}, 128 << 20, false},
		"version 1, no limit":   {map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 0, false},
		"what is no number":     {map[string]string{"memory.max": "much\n"}, 0, true},
		"both, as hybrids have": {map[string]string{"memory/memory.limit_in_bytes": "1048576\n", "unified/memory.max": "max\n"}, 1 << 20, false},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for file, text := range c.files {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(root, file)), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, file), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := memoryLimit(root); got != c.want || err != nil != c.refuse {
				t.Errorf("%d and %v, want %d", got, err, c.want)
			}
		})
	}
}

// Istio's injector sets GOMEMLIMIT to the container's limit. The difference has to stay even then.
func TestGoGetsLessThanTheMemoryLimit(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "memory.max"), []byte("1000000000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const unlimited = math.MaxInt64
	before := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(before)
	for _, c := range []struct {
		flag      int64
		inherited int64 // the runtime's limit, as GOMEMLIMIT sets it
		root      string
		want      int64
	}{
		{0, unlimited, root, 900_000_000},
		{0, 1_000_000_000, root, 900_000_000},
		{0, 500_000_000, root, 500_000_000},
		{0, 500_000_000, t.TempDir(), 500_000_000},
		{0, unlimited, t.TempDir(), unlimited},
		{2e9, unlimited, root, 1_800_000_000},
		{2e9, 5 << 30, root, 1_800_000_000},
		{128 << 20, unlimited, root, 96 << 20},
		{64 << 20, unlimited, root, 48 << 20},
	} {
		debug.SetMemoryLimit(c.inherited)
		err := limitMemory(c.flag, c.root)
		if got := debug.SetMemoryLimit(before); got != c.want || err != nil {
			t.Errorf("%+v: the limit is %d, and %v", c, got, err)
		}
	}
}

func TestAGatewayCollectsLessUnlessItIsTold(t *testing.T) {
	const inherited = 70
	before := debug.SetGCPercent(inherited)
	defer debug.SetGCPercent(before)
	for variable, want := range map[string]int{"": 200, "70": inherited, "off": inherited} { // the runtime itself applies GOGC
		debug.SetGCPercent(inherited)
		t.Setenv("GOGC", variable)
		collectLess()
		if got := debug.SetGCPercent(inherited); got != want {
			t.Errorf("GOGC=%s: %d, want %d", variable, got, want)
		}
	}
}

func TestAmountsOfMemory(t *testing.T) {
	for text, want := range map[string]int{
		"0": 0, "134217728": 128 << 20, "128Mi": 128 << 20, "128MiB": 128 << 20, "512Ki": 512 << 10, "2Gi": 2 << 30, "77B": 77,
		"": -1, "Mi": -1, "-1": -1, "1.5Gi": -1, "1 Mi": -1, "1M": -1, "1e3": -1, "1MiMi": -1, "1125899906842624Gi": -1, "1000000000000Gi": -1,
	} {
		if got, err := parseBytes(text); err == nil && got != want || err != nil && want >= 0 {
			t.Errorf("%q: %d and %v, want %d", text, got, err, want)
		}
	}
}

func TestVersionHasPilotAgentsFormats(t *testing.T) {
	for args, want := range map[string]string{
		"version -s":        "devel\n",
		"version --short":   "devel\n",
		"version":           `version.BuildInfo{Version:"devel", GitRevision:"`,
		"version -o json":   "{\n  \"clientVersion\": {\n    \"version\": \"devel\",\n    \"revision\": ",
		"version -o yaml":   "clientVersion:\n  golang_version: \"" + runtime.Version() + "\"\n",
		"version -s -ojson": "{",
	} {
		var out strings.Builder
		root := newRoot(nil)
		root.SetOut(&out)
		root.SetArgs(strings.Fields(args))
		if err := root.Execute(); err != nil || !strings.HasPrefix(out.String(), want) {
			t.Errorf("%s: %v\n%s", args, err, &out)
		}
	}
}

func TestProxyRejectsOtherRoles(t *testing.T) {
	root := newRoot(nil)
	root.SetArgs([]string{"proxy", "waypoint", "--novel"})
	if err := root.Execute(); err == nil || !strings.Contains(err.Error(), `role "waypoint" is not supported`) {
		t.Errorf("got %v", err)
	}
}

// A gateway's listeners come from its control plane: without one it does not start.
func TestAGatewayNeedsAControlPlane(t *testing.T) {
	t.Setenv(interceptionVariable, "TPROXY") // captures nothing, so the mode does not matter
	root := newRoot(nil)
	root.SetArgs([]string{"proxy", "router", "--control-plane", "off"})
	if err := root.Execute(); err == nil || !strings.Contains(err.Error(), "--control-plane: a gateway needs a control plane") {
		t.Errorf("got %v", err)
	}
}
