package scrape

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// maxTargets bounds the targets. They share maxBytes and maxSamples.
const maxTargets = 16

// Target is one place where the workload serves metrics. Path begins with a slash and may have a query.
type Target struct {
	Port uint16
	Path string
}

// ParseTargets parses the workload's annotations for Prometheus, as Istio's injector records them: JSON with "scrape",
// "port" and "path", or with "targets", a list of ports and paths that overrides the two. The default port is 80 and the
// default path /metrics. If value is empty or scrape is "false", there are no targets. A port in own is an error, because
// the agent would scrape itself endlessly.
func ParseTargets(value string, own ...uint16) ([]Target, error) {
	if value == "" {
		return nil, nil
	}
	type target struct {
		Port port   `json:"port"`
		Path string `json:"path"`
	}
	var config struct {
		target
		Scrape  string   `json:"scrape"`
		Targets []target `json:"targets"`
	}
	if err := json.Unmarshal([]byte(value), &config); err != nil {
		return nil, fmt.Errorf("invalid JSON: %w", err)
	}
	if config.Scrape == "false" {
		return nil, nil
	}
	wanted := config.Targets
	if len(wanted) == 0 {
		wanted = []target{config.target}
	}
	if len(wanted) > maxTargets {
		return nil, fmt.Errorf("%d targets are more than %d", len(wanted), maxTargets)
	}
	var targets []Target
	for _, w := range wanted {
		t := Target{80, "/metrics"}
		if w.Port != "" {
			number, err := strconv.ParseUint(string(w.Port), 10, 16)
			if err != nil || number == 0 {
				return nil, fmt.Errorf("invalid port %q; use a number from 1 to 65535", string(w.Port))
			}
			t.Port = uint16(number)
		}
		if slices.Contains(own, t.Port) {
			return nil, fmt.Errorf("port %d is the agent's own, so it would scrape itself endlessly; set the port on which the workload serves its metrics", t.Port)
		}
		if w.Path != "" {
			t.Path = "/" + strings.TrimPrefix(w.Path, "/")
			if _, err := url.ParseRequestURI(t.Path); err != nil {
				return nil, fmt.Errorf("invalid path %q: %w", w.Path, err)
			}
		}
		if !slices.Contains(targets, t) {
			targets = append(targets, t)
		}
	}
	return targets, nil
}

// port accepts a JSON string or number.
type port string

func (p *port) UnmarshalJSON(text []byte) error {
	if text[0] == '"' {
		return json.Unmarshal(text, (*string)(p))
	}
	var number json.Number
	err := json.Unmarshal(text, &number)
	*p = port(number)
	return err
}
