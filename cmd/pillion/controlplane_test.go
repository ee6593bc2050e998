package main

import (
	"bytes"
	"cmp"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/istiod"
)

// found returns the options after findControlPlane, and its log. token mounts a token for istiod.
func found(t *testing.T, token bool, prepare func(*agentOptions)) (*agentOptions, string, error) {
	t.Helper()
	var log bytes.Buffer
	o := newAgentOptions()
	o.config.Log, o.volumes = slog.New(slog.NewTextHandler(&log, nil)), t.TempDir()
	if token {
		path := filepath.Join(o.volumes, istiod.TokenFile)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("token"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	prepare(o)
	err := o.findControlPlane()
	return o, log.String(), err
}

func TestTheControlPlaneIsTheOneThatTheFlagOrThePodNames(t *testing.T) {
	const named = `{"discoveryAddress":"istiod.mesh.svc:15012"}`
	const plain = `{"discoveryAddress":"istiod.mesh.svc:15010","controlPlaneAuthPolicy":"NONE"}`
	for name, c := range map[string]struct {
		flag        string
		sidecar     bool
		token       bool
		proxyConfig string
		address     string // empty: no control plane
		log         string
	}{
		"off":                                 {flag: "off", token: true, proxyConfig: named, log: "control plane not used"},
		"off outside of a pod":                {flag: "off", token: true},
		"off, as a sidecar":                   {flag: "off", sidecar: true, token: true, proxyConfig: named, log: "control plane not used"},
		"off, as a sidecar without a token":   {flag: "off", sidecar: true, proxyConfig: named},
		"auto":                                {flag: "auto", token: true, proxyConfig: named, address: "istiod.mesh.svc:15012"},
		"auto without a token":                {flag: "auto", proxyConfig: "{}", log: "no control plane"},
		"auto outside of a pod":               {flag: "auto", token: true},
		"auto without authentication":         {flag: "auto", proxyConfig: plain, address: "istiod.mesh.svc:15010"},
		"default":                             {token: true, proxyConfig: named, address: "istiod.mesh.svc:15012"},
		"default outside of a pod":            {},
		"auto, the address is Istio's":        {flag: "auto", token: true, proxyConfig: "{}", address: istiod.DefaultAddress},
		"an address, with or without a token": {flag: "istiod:15012", proxyConfig: named, address: "istiod:15012"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("PROXY_CONFIG", c.proxyConfig)
			o, log, err := found(t, c.token, func(o *agentOptions) { o.controlPlane, o.asSidecar = cmp.Or(c.flag, o.controlPlane), c.sidecar })
			if err != nil {
				t.Fatal(err)
			}
			address := ""
			if o.config.ControlPlane.Pod != nil {
				address = o.config.ControlPlane.Pod.Discovery.Address
			}
			if address != c.address {
				t.Errorf("address %q, want %q", address, c.address)
			}
			if c.log == "" && strings.Contains(log, "control plane") || !strings.Contains(log, c.log) {
				t.Errorf("log %q, want %q", log, c.log)
			}
		})
	}
}

// A lost volume must not turn the policies off.
func TestAPodThatNamesAControlPlaneDoesNotStartWithoutCredentials(t *testing.T) {
	t.Setenv("PROXY_CONFIG", `{"discoveryAddress":"istiod.mesh.svc:15012"}`)
	for _, sidecar := range []bool{false, true} {
		_, _, err := found(t, false, func(o *agentOptions) { o.controlPlane, o.asSidecar = automatic, sidecar })
		if err == nil || !strings.Contains(err.Error(), "istiod.mesh.svc:15012") || !strings.Contains(err.Error(), "--control-plane off") {
			t.Errorf("sidecar %v: %v", sidecar, err)
		}
	}
}

func TestIstiosConfigurationReachesIstiodAsAnObject(t *testing.T) {
	t.Setenv("PROXY_CONFIG", `{"holdApplicationUntilProxyStarts":true}`)
	o, _, err := found(t, true, func(o *agentOptions) { o.controlPlane = automatic })
	if err != nil {
		t.Fatal(err)
	}
	config, ok := o.config.ControlPlane.Pod.Node.Metadata["PROXY_CONFIG"].(map[string]any)
	if !ok || config["holdApplicationUntilProxyStarts"] != true {
		t.Errorf("PROXY_CONFIG %v", config)
	}
}

func TestInvalidControlPlanesAreNamed(t *testing.T) {
	for variable, complaint := range map[string]string{
		"SECRET_TTL=x":   `environment variable SECRET_TTL="x": use a duration`,
		"PROXY_CONFIG={": "environment variable PROXY_CONFIG: it begins with {",
	} {
		name, value, _ := strings.Cut(variable, "=")
		t.Run(name, func(t *testing.T) {
			t.Setenv(name, value)
			if _, _, err := found(t, true, func(o *agentOptions) { o.controlPlane = "istiod:15012" }); err == nil || !strings.Contains(err.Error(), complaint) {
				t.Errorf("got %v", err)
			}
		})
	}
	flags := newAgent().Flags()
	if err := flags.Set("control-plane", "istiod"); err == nil || !strings.Contains(err.Error(), "use HOST:PORT") {
		t.Errorf("--control-plane istiod: %v", err)
	}
}

func TestTheConfigurationIsKeptWhereTheFlagSays(t *testing.T) {
	directory := t.TempDir()
	for flag, want := range map[string]string{"off": "", directory: directory} {
		o, _, err := found(t, true, func(o *agentOptions) { o.controlPlane, o.kept = "istiod:15012", flag })
		if err != nil || o.config.ControlPlane.Kept != want {
			t.Errorf("%s: %q, %v", flag, o.config.ControlPlane.Kept, err)
		}
	}
	_, _, err := found(t, true, func(o *agentOptions) { o.controlPlane, o.kept = "istiod:15012", "/missing" })
	if err == nil || !strings.Contains(err.Error(), "--kept-configuration \"/missing\": not a directory: create it") {
		t.Errorf("a missing directory: %v", err)
	}
}

func TestASidecarsControlPlaneIsThatOfItsAnnotation(t *testing.T) {
	p, err := settled(t, nil, map[string]string{"PROXY_CONFIG": `{"discoveryAddress":"istiod-a:15012","concurrency":1}`},
		`proxy.istio.io/config="discoveryAddress: istiod-b:15012"`, "defaultConfig:\n  discoveryAddress: istiod-c:15012\n  meshId: east\n")
	if err != nil {
		t.Fatal(err)
	}
	environment, err := p.podEnvironment()
	if err != nil {
		t.Fatal(err)
	}
	p.controlPlane = automatic
	if address := p.discoveryAddress(environment); address != "istiod-b:15012" {
		t.Errorf("address %s", address)
	}
	if config := environment.ProxyConfig; config["concurrency"] != 1.0 || config["meshId"] != "east" {
		t.Errorf("ProxyConfig %v", config)
	}
}
