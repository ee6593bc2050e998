package main

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Each field of a Spec has a setting, and each setting is a flag of init, a variable that init reads, or a file.
func TestEveryFieldOfASpecHasASetting(t *testing.T) {
	flags, settings := newInit().Flags(), specSettings()
	of := reflect.TypeFor[capture.Spec]()
	for i := range of.NumField() {
		field := of.Field(i).Name
		setting := settings[field]
		if field == "Compat" {
			continue // the command itself
		}
		if setting == "" {
			t.Errorf("%s has no setting", field)
		}
		if strings.HasPrefix(setting, "ISTIO_") || setting == resolvConf {
			continue
		}
		if flags.Lookup(setting) == nil {
			t.Errorf("%s: there is no flag %s", field, setting)
		}
	}
	for field := range settings {
		if _, ok := of.FieldByName(field); !ok {
			t.Errorf("a Spec has no field %s", field)
		}
	}
}

// The text of each flag reaches the field to which errors map it.
func TestASettingSetsItsField(t *testing.T) {
	samples := map[string]string{
		"Mode": "TPROXY", "OutboundPort": "16001", "InboundPort": "16006", "TunnelPort": "16008", "Inbound": "81", "InboundExcluded": "82",
		"Outbound": "10.0.0.0/8", "OutboundExcluded": "11.0.0.0/8", "OutboundPorts": "83", "OutboundPortsExcluded": "84",
		"InterfacesExcluded": "eth7", "VirtualInterfaces": "vm7", "DropInvalid": "false", "RedirectDNS": "true", "CaptureAllDNS": "true",
		"TPROXYMark": "7", "TPROXYTable": "8",
	}
	for field, text := range samples {
		options := newInitOptions(false)
		cmd := &cobra.Command{}
		options.bind(cmd)
		before := fmt.Sprint(reflect.ValueOf(options.spec).FieldByName(field))
		if err := cmd.Flags().Set(specSettings()[field], text); err != nil {
			t.Errorf("%s: %v", field, err)
			continue
		}
		if after := fmt.Sprint(reflect.ValueOf(options.spec).FieldByName(field)); after == before {
			t.Errorf("--%s leaves %s as it was: %s", specSettings()[field], field, after)
		}
	}
}

func TestAnErrorNamesTheSettingThatWasUsed(t *testing.T) {
	table := &capture.FieldError{Field: "TPROXYTable", Value: "133", Err: errors.New("in use")}
	for _, test := range []struct {
		name     string
		args     []string
		variable [2]string
		err      func(capture.Spec) error
		want     string
	}{
		{"a flag", []string{"-p", "15006"}, [2]string{}, capture.Spec.Validate, "-z 15006: this is the outbound port already; use another port"},
		{"a flag with a long name only", nil, [2]string{}, func(capture.Spec) error { return &capture.FieldError{Field: "RedirectDNS", Err: errors.New("x")} }, "--redirect-dns: x"},
		{"a variable", nil, [2]string{"INBOUND_CAPTURE_PORT", "15001"}, capture.Spec.Validate, "INBOUND_CAPTURE_PORT 15001: this is the outbound port already; use another port"},
		{"a variable that the flag overrides", []string{"-z", "15021"}, [2]string{"INBOUND_CAPTURE_PORT", "15001"}, capture.Spec.Validate, "-z 15021: this is the readiness port already; use another port"},
		{"a variable without a flag", nil, [2]string{}, func(capture.Spec) error { return &capture.FieldError{Field: "Localhost4", Err: errors.New("x")} }, "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: x"},
		{"two fields", nil, [2]string{}, func(s capture.Spec) error {
			s.ProxyUIDs, s.ProxyGIDs = nil, nil
			return s.Validate()
		}, "-u: name a user or a group, or the agent's own connections would be captured; a group is named by -g"},
		{"a wrapped error", nil, [2]string{}, func(capture.Spec) error { return fmt.Errorf("adding a route: %w; the former state is restored", table) },
			"adding a route: -r 133: in use; the former state is restored"},
		{"an unknown field", nil, [2]string{}, func(capture.Spec) error { return &capture.FieldError{Field: "New", Err: errors.New("x")} }, "New: x"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.variable[0] != "" {
				t.Setenv(test.variable[0], test.variable[1])
			}
			options := newInitOptions(false)
			cmd := &cobra.Command{}
			options.bind(cmd)
			if err := cmd.Flags().Parse(test.args); err != nil {
				t.Fatal(err)
			}
			if err := applyEnvironment(cmd.Flags()); err != nil {
				t.Fatal(err)
			}
			options.spec.ProxyUIDs = []capture.IDRange{{First: 1, Last: 1}}
			err := nameSettings(cmd.Flags(), test.err(options.spec))
			if err == nil || err.Error() != test.want {
				t.Errorf("got %v\nwant %s", err, test.want)
			}
			if !errors.As(err, new(*capture.FieldError)) {
				t.Errorf("%v has lost its field", err)
			}
		})
	}
	other := errors.New("other")
	if err := nameSettings(pflag.NewFlagSet("", pflag.ContinueOnError), other); err != other {
		t.Errorf("an error about no field becomes %v", err)
	}
}
