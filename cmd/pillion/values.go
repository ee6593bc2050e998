package main

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/httpforward"
)

// The functions below add flags whose default is the value of target, and whose errors name a valid value.

func portFlag(flags *pflag.FlagSet, target *uint16, name, usage string) {
	parsed(flags, target, capture.ParsePort, name, "", strconv.Itoa(int(*target)), "port", usage)
}

// optionalPortFlag accepts 0 for no port.
func optionalPortFlag(flags *pflag.FlagSet, target *uint16, name, usage string) {
	parse := func(text string) (uint16, error) {
		if text == "0" {
			return 0, nil
		}
		return capture.ParsePort(text)
	}
	parsed(flags, target, parse, name, "", strconv.Itoa(int(*target)), "port", usage)
}

func textFlag(flags *pflag.FlagSet, target *string, name, kind, usage string) {
	parsed(flags, target, func(text string) (string, error) { return text, nil }, name, "", *target, kind, usage)
}

func durationFlag(flags *pflag.FlagSet, target *time.Duration, name, usage string) {
	parsed(flags, target, parseDuration, name, "", target.String(), "duration", usage)
}

func countFlag(flags *pflag.FlagSet, target *int, name, usage string) {
	parsed(flags, target, parseCount, name, "", strconv.Itoa(*target), "count", usage)
}

func choiceFlag(flags *pflag.FlagSet, target *string, name, usage string, choices ...string) {
	parse := func(text string) (string, error) {
		if !slices.Contains(choices, text) {
			return "", fmt.Errorf("use one of %s", strings.Join(choices, ", "))
		}
		return text, nil
	}
	parsed(flags, target, parse, name, "", *target, strings.Join(choices, "|"), usage)
}

// portsFlag selects no ports by default.
func portsFlag(flags *pflag.FlagSet, target *capture.Ports, name, usage string) {
	parsed(flags, target, capture.ParsePorts, name, "", "", "ports", usage)
}

// switchFlag sets all of its targets. They are on by default. It always needs a value, so that the value may follow a blank
// like that of every other flag of the agent.
func switchFlag(flags *pflag.FlagSet, name, usage string, targets ...*bool) {
	both := func(text string) (bool, error) {
		on, err := parseSwitch(text)
		if err == nil {
			for _, target := range targets {
				*target = on
			}
		}
		return on, err
	}
	parsed(flags, new(bool), both, name, "", "true", "true|false", usage)
}

func parseForwardedFor(text string) (httpforward.ForwardedFor, error) {
	switch text {
	case "set-if-absent":
		return httpforward.ForwardedForSetIfAbsent, nil
	case "append":
		return httpforward.ForwardedForAppend, nil
	case "off":
		return httpforward.ForwardedForOff, nil
	}
	return 0, fmt.Errorf("%s is unknown: use one of set-if-absent, append, off", capture.Quoted(text))
}

func parseDuration(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err == nil && d < 0 {
		return 0, fmt.Errorf("%s is negative: use 0s or more", capture.Quoted(text))
	}
	if err != nil {
		return 0, errors.New("not a time span: use a number with a unit, such as 500ms, 10s or 5m")
	}
	return d, nil
}

// parseGrace reads a number without a unit as seconds, as in a pod.
func parseGrace(text string) (time.Duration, error) {
	if seconds, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second, nil
	}
	return parseDuration(text)
}

func parseCount(text string) (int, error) {
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("not a count: use a whole number from 0 to %d", 1<<31-1)
	}
	return int(n), nil
}

// parseBytes reads an amount of memory, with or without a unit of Kubernetes or of GOMEMLIMIT: 128Mi, 128MiB.
func parseBytes(text string) (int, error) {
	number, unit := strings.TrimSuffix(text, "B"), 1
	for i, prefix := range []string{"Ki", "Mi", "Gi"} {
		if before, found := strings.CutSuffix(number, prefix); found {
			number, unit = before, 1<<(10*(i+1))
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 50)
	if err != nil || int(n) > math.MaxInt/unit {
		return 0, errors.New("not an amount of memory: use a whole number with a unit, such as 64Mi or 1Gi")
	}
	return int(n) * unit, nil
}

// parseServers reads DNS servers. The port is optional.
func parseServers(text string) (servers []netip.AddrPort, err error) {
	for item := range strings.SplitSeq(text, ",") {
		server, err := netip.ParseAddrPort(item)
		if err != nil {
			const domain = 53
			address, err := netip.ParseAddr(item)
			if err != nil {
				return nil, fmt.Errorf("%s is not a server: use an address such as 198.51.100.53 or 198.51.100.53:5353", capture.Quoted(item))
			}
			server = netip.AddrPortFrom(address, domain)
		}
		servers = append(servers, server)
	}
	return servers, nil
}
