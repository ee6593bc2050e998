package main

import (
	"errors"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// specSettings are the flags that set the fields of a capture.Spec, or the variables of the fields that have no flag. It is
// a function because only an error needs it.
func specSettings() map[string]string {
	return map[string]string{
		"Mode":                  "istio-inbound-interception-mode",
		"IPv6":                  "dual-stack",
		"OutboundPort":          "envoy-port",
		"InboundPort":           "inbound-capture-port",
		"TunnelPort":            "inbound-tunnel-port",
		"ProxyUIDs":             "proxy-uid",
		"ProxyGIDs":             "proxy-gid",
		"Inbound":               "istio-inbound-ports",
		"InboundExcluded":       "istio-local-exclude-ports",
		"Outbound":              "istio-service-cidr",
		"OutboundExcluded":      "istio-service-exclude-cidr",
		"OutboundPorts":         "istio-outbound-ports",
		"OutboundPortsExcluded": "istio-local-outbound-ports-exclude",
		"OwnerGroups":           "ISTIO_OUTBOUND_OWNER_GROUPS",
		"OwnerGroupsExcluded":   "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE",
		"Localhost4":            "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
		"InterfacesExcluded":    "istio-exclude-interfaces",
		"VirtualInterfaces":     "kube-virt-interfaces",
		"DropInvalid":           "drop-invalid",
		"RedirectDNS":           "redirect-dns",
		"CaptureAllDNS":         "capture-all-dns",
		"DNSServers":            resolvConf,
		"TPROXYMark":            "istio-inbound-tproxy-mark",
		"TPROXYTable":           "istio-inbound-tproxy-route-table",
	}
}

// nameSettings rewrites an error about a field of a capture.Spec to name the setting that the user has used, and its value
// as the user wrote it.
func nameSettings(flags *pflag.FlagSet, err error) error {
	var field *capture.FieldError
	if !errors.As(err, &field) {
		return err
	}
	settings := specSettings()
	named := *field
	if flag := flags.Lookup(settings[field.Field]); flag != nil && flag.Changed && slices.Contains([]string{"number", "port"}, flag.Value.Type()) {
		named.Value = flag.Value.String() // as it was written, such as 0x539
	}
	text := named.Text(func(field string) string {
		setting := settings[field]
		flag := flags.Lookup(setting)
		switch {
		case setting == "":
			return field
		case flag == nil:
			return setting
		}
		return settingName(flag)
	})
	return &namedError{strings.Replace(err.Error(), field.Error(), text, 1), err}
}

// settingName names a flag in an error: the environment variable if that has set the flag, else the flag, by its shorthand
// if it has one.
func settingName(flag *pflag.Flag) string {
	switch {
	case len(flag.Annotations[setByAnnotation]) > 0:
		return flag.Annotations[setByAnnotation][0]
	case flag.Shorthand != "":
		return "-" + flag.Shorthand
	}
	return "--" + flag.Name
}
