package main

import (
	"context"
	"fmt"
	"os"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/proxyconfig"
)

// Values of --control-plane and --kept-configuration besides an address and a path.
const (
	automatic = "auto"
	turnedOff = "off"
)

func parseControlPlane(text string) (string, error) {
	if text == automatic || text == turnedOff {
		return text, nil
	}
	if err := istiod.CheckAddress(text); err != nil {
		return "", fmt.Errorf("%w, or one of %s, %s", err, automatic, turnedOff)
	}
	return text, nil
}

// memoryVolume is where Istio's injector mounts a volume in memory.
const memoryVolume = "/etc/istio/proxy"

// findControlPlane decides whether the agent has a control plane, and how it is reached. A pod of Istio's injector always has
// the credentials; without them istiod would not answer. A pod that names a control plane does not start without them: a lost
// volume would turn its policies off. One that only has Istio's default address is warned about.
func (o *agentOptions) findControlPlane() error {
	environment, err := o.podEnvironment()
	if err != nil {
		return err
	}
	address := o.discoveryAddress(environment)
	log := o.config.Log
	switch {
	case o.controlPlane == turnedOff:
		if address != "" && istiod.HasCredentials(environment) {
			log.Warn("control plane not used: its policies are not applied", "discovery_address", address, "remedy", "set --control-plane auto")
		}
		return nil
	case o.controlPlane == automatic && address == "":
		return nil
	case o.controlPlane == automatic && !istiod.HasCredentials(environment):
		if o.namesControlPlane(environment) {
			return valueError{fmt.Errorf("the control plane %s cannot be asked: the pod has neither a root certificate nor a token for it, "+
				"and without policies the agent would allow what they deny: mount the volumes of Istio's injector, or set --control-plane off", address)}
		}
		log.Warn("no control plane: the pod has neither a root certificate nor a token for it", "discovery_address", address,
			"remedy", "mount the volumes of Istio's injector, or set --control-plane off")
		return nil
	}
	pod, err := istiod.ReadPod(context.Background(), address, environment)
	if err != nil {
		return valueError{err}
	}
	o.config.ControlPlane.Pod = pod
	o.config.ControlPlane.Kept, err = keptDirectory(o.kept)
	return err
}

// keptDirectory returns the directory of --kept-configuration, or "" if the configuration is not kept.
func keptDirectory(flag string) (string, error) {
	directory := flag
	switch flag {
	case turnedOff:
		return "", nil
	case automatic:
		directory = memoryVolume
	}
	info, err := os.Stat(directory)
	switch {
	case err == nil && info.IsDir():
		return directory, nil
	case flag == automatic:
		return "", nil
	}
	return "", valueError{fmt.Errorf("--kept-configuration %s: not a directory: create it, or use %s", capture.Quoted(flag), turnedOff)}
}

// podEnvironment is what the injector gives. PROXY_CONFIG is read unless Istio's configuration has been.
func (o *agentOptions) podEnvironment() (*istiod.Environment, error) {
	labels, err := podinfo.Labels(podinfo.LabelsFile)
	if err != nil {
		labels = nil // readPod has logged it
	}
	if text := os.Getenv("PROXY_CONFIG"); text != "" && o.proxyConfig == nil {
		if o.proxyConfig, err = proxyconfig.Object(text); err != nil {
			return nil, valueError{fmt.Errorf("environment variable PROXY_CONFIG: %w", err)}
		}
	}
	kind := "sidecar"
	if o.config.Gateway {
		kind = "router"
	}
	return &istiod.Environment{
		Type:      kind,
		Variables: os.Environ(), Labels: labels, ProxyConfig: o.proxyConfig, Directory: o.volumes, Domain: o.config.Workload.ClusterDomain,
	}, nil
}

// discoveryAddress returns the address that the flag or the pod names. A pod with Istio's configuration has Istio's default.
func (o *agentOptions) discoveryAddress(environment *istiod.Environment) string {
	if o.controlPlane != automatic && o.controlPlane != turnedOff {
		return o.controlPlane
	}
	if address, _ := environment.ProxyConfig["discoveryAddress"].(string); address != "" {
		return address
	}
	if environment.ProxyConfig != nil {
		return istiod.DefaultAddress
	}
	return ""
}

// namesControlPlane reports whether Istio's configuration has the control plane's address.
func (o *agentOptions) namesControlPlane(environment *istiod.Environment) bool {
	address, _ := environment.ProxyConfig["discoveryAddress"].(string)
	return address != ""
}
