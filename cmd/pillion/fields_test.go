package main

import (
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/agent"
)

// Each entry names an existing field, and an existing flag or a variable.
func TestFieldNamesMatchTheConfigurationAndTheFlags(t *testing.T) {
	flags, edge := newAgent().Flags(), newGateway().Flags()
	for field, name := range fieldNames {
		of := reflect.TypeFor[agent.Config]()
		for part := range strings.SplitSeq(field, ".") {
			found, ok := of.FieldByName(part)
			if !ok {
				t.Errorf("agent.Config has no field %s", field)
				break
			}
			of = found.Type
		}
		if flag, ok := strings.CutPrefix(name, "--"); ok && flags.Lookup(flag) == nil && edge.Lookup(flag) == nil {
			t.Errorf("%s: there is no flag %s", field, name)
		}
	}
}

// A field that a flag sets must have a name for errors.
func TestEveryFieldOfTheConfigurationHasAName(t *testing.T) {
	unset := []string{"HTTP.InboundFields", "HTTP.OutboundFields", "Workload.Pod"} // cannot be invalid, or part by part
	config := reflect.TypeFor[agent.Config]()
	for i := range config.NumField() {
		part := config.Field(i)
		if part.Type.Kind() != reflect.Struct {
			continue
		}
		for j := range part.Type.NumField() {
			field := part.Name + "." + part.Type.Field(j).Name
			if fieldNames[field] == "" && !slices.Contains(unset, field) {
				t.Errorf("%s has no name", field)
			}
		}
	}
}

func TestAnInvalidFieldIsNamedByItsFlag(t *testing.T) {
	valid := agent.Default()
	valid.Log = slog.New(slog.DiscardHandler)
	for want, change := range map[string]func(*agent.Config){
		"--outbound-port: 0 is not a port; use 1 to 65535":                             func(c *agent.Config) { c.Ports.Outbound = 0 },
		"--inbound-port 15001: this port is already used by --outbound-port":           func(c *agent.Config) { c.Ports.Inbound = 15001 },
		"--idle-timeout: -1ns is negative; use 0s or more":                             func(c *agent.Config) { c.Connections.IdleTimeout = -1 },
		"--drain-delay 30s: must not be longer than 20s, the value of --drain-timeout": func(c *agent.Config) { c.Drain.Delay = 30e9 },
		"--access-log-interval: 1ns is too short; use 10ms or more, or 0s for never":   func(c *agent.Config) { c.AccessLog.Interval = 1 },
		`--interception-mode: "x" is not a mode; use REDIRECT or TPROXY`:               func(c *agent.Config) { c.Interception.Mode = "x" },
	} {
		config := valid
		change(&config)
		if err := flagNamed(config.Validate()); err == nil || err.Error() != want || !errors.As(err, new(*agent.FieldError)) {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
	other := errors.New("other")
	if err := flagNamed(other); err != other {
		t.Errorf("an error about no field becomes %v", err)
	}
}
