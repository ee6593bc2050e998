package inject

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/pillion-proxy/pillion/internal/probe"
	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// proberNames are the fields of a container that hold handlers, and their paths at the agent's status port. The kubelet
// probes the agent, because a captured port accepts connections even when the workload does not.
var proberNames = []struct{ field, below, path string }{
	{"livenessProbe", "", "/app-health/%s/livez"},
	{"readinessProbe", "", "/app-health/%s/readyz"},
	{"startupProbe", "", "/app-health/%s/startupz"},
	{"lifecycle", "postStart", "/app-lifecycle/%s/poststartz"},
	{"lifecycle", "preStop", "/app-lifecycle/%s/prestopz"},
}

// rewriteProbes redirects the workload's probes to the status port. It returns the probes in the agent's format, or "".
func (p *pod) rewriteProbes(s *settings) (string, error) {
	var probers object
	for _, list := range []string{"containers", "initContainers"} {
		containers, err := p.containers(list)
		if err != nil {
			return "", err
		}
		for i, c := range containers {
			if o := p.override; o != nil && o.list == list && o.index == i {
				continue
			}
			// A container that runs before the sidecar cannot be probed through it.
			if list == "initContainers" && (yamledit.Text(c, "restartPolicy") != "Always" || !s.native) {
				continue
			}
			for _, n := range proberNames {
				path := []string{"spec", list, strconv.Itoa(i), n.field}
				at := []string{"spec", list, yamledit.Text(c, "name"), n.field}
				if n.below != "" {
					path, at = append(path, n.below), append(at, n.below)
				}
				prober, err := p.rewriteProbe(s, c, path, at, fmt.Sprintf(n.path, yamledit.Text(c, "name")))
				if err != nil {
					return "", err
				}
				if prober != nil {
					probers = append(probers, member{fmt.Sprintf(n.path, yamledit.Text(c, "name")), prober})
				}
			}
		}
	}
	if probers == nil {
		return "", nil
	}
	recorded := yamledit.JSON(probers)
	// The agent refuses to start with probes that it cannot parse.
	if _, err := probe.Parse(recorded, probe.Config{Address: netip.IPv6Loopback(), StatusPort: s.statusPort}); err != nil {
		return "", err
	}
	return recorded, nil
}

// rewriteProbe redirects one probe. It returns the probe in the agent's format, or nil if it stays unchanged.
func (p *pod) rewriteProbe(s *settings, container map[string]any, path, at []string, to string) (any, error) {
	holder, _ := yamledit.Get(container, path[3:]...).(map[string]any)
	for _, handler := range []string{"httpGet", "tcpSocket", "grpc"} {
		action, has := holder[handler].(map[string]any)
		if !has {
			continue
		}
		where := yamledit.Pointer(at...)
		port, err := portOf(container, action["port"])
		switch {
		case err != nil:
			p.warn("%s stays unchanged: %v", where, err)
			return nil, nil
		case yamledit.Text(action, "host") != "":
			p.warn("%s stays unchanged: it probes the host %s, not the pod", where, yamledit.Text(action, "host"))
			return nil, nil
		case port == int(s.statusPort):
			return nil, nil
		}
		ask := object{{"path", to}, {"port", int(s.statusPort)}}
		asked := object{}
		for _, field := range []string{"path", "port", "scheme", "httpHeaders", "service"} {
			value, has := action[field]
			switch {
			case !has || value == nil:
				continue
			case field == "port":
				value = port
			case field == "httpHeaders" && !yamledit.Empty(value):
				ask = append(ask, member{field, value}) // the agent forwards the kubelet's fields
			}
			asked = append(asked, member{field, value})
		}
		timeout := holder["timeoutSeconds"]
		if path[3] == "lifecycle" {
			timeout = 0 // the kubelet bounds a hook by the grace period
		} else if timeout == nil {
			timeout = 1
		}
		if err := p.replace(path, at, handler, member{"httpGet", ask}); err != nil {
			return nil, err
		}
		return object{{handler, asked}, {"timeoutSeconds", timeout}}, nil
	}
	return nil, nil
}

// portOf returns the number of a port that is given by number or by the name of one of the container's ports.
func portOf(container map[string]any, port any) (int, error) {
	if number, ok := port.(json.Number); ok {
		n, err := strconv.ParseUint(string(number), 10, 16)
		if err != nil || n == 0 {
			return 0, fmt.Errorf("%s is not a port", number)
		}
		return int(n), nil
	}
	name, ok := port.(string)
	if !ok {
		return 0, fmt.Errorf("it has no port")
	}
	declared, _ := container["ports"].([]any)
	for _, d := range declared {
		if yamledit.Text(d, "name") == name {
			return portOf(container, yamledit.Get(d, "containerPort"))
		}
	}
	return 0, fmt.Errorf("the container has no port named %q", name)
}
