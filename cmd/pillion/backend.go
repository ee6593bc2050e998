package main

import (
	"fmt"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/iptables"
)

// backendOptions say where rules are made: in our words, and in those of istio-iptables.
type backendOptions struct {
	backend iptables.Backend
	native  bool
	forced  iptables.Backend
}

func (o *backendOptions) bind(flags *pflag.FlagSet) {
	parsed(flags, &o.backend, parseBackend, "backend", "", "auto", "name",
		"what makes the rules: iptables (iptables-nft, iptables-legacy), nftables, which needs no program, or auto: where they are already, else iptables if it is there, else nftables")
	parsedSwitch(flags, &o.native, "native-nftables", "", "the same as --backend nftables; --force-iptables-binary has no effect then")
	parsed(flags, &o.forced, parseForced, "force-iptables-binary", "", "", "name",
		"legacy or nft: the same as --backend iptables-legacy or iptables-nft")
	twin(flags, "native-nftables", "NATIVE_NFTABLES")
	twin(flags, "force-iptables-binary", "FORCE_IPTABLES_BINARY")
}

// choose is what all the flags say together.
func (o *backendOptions) choose() (iptables.Backend, error) {
	alias, name := o.forced, "--force-iptables-binary"
	if o.native {
		alias, name = iptables.NFTables, "--native-nftables"
	}
	switch {
	case o.backend == iptables.Auto:
		return alias, nil
	case alias == iptables.Auto, alias == o.backend:
		return o.backend, nil
	}
	return "", fmt.Errorf("--backend %s and %s, which means %s, contradict each other: use one of them", o.backend, name, alias)
}

func parseBackend(text string) (iptables.Backend, error) {
	if text == "auto" {
		return iptables.Auto, nil
	}
	switch b := iptables.Backend(text); b {
	case iptables.IPTables, iptables.IPTablesNFT, iptables.IPTablesLegacy, iptables.NFTables:
		return b, nil
	}
	return "", fmt.Errorf("%q is not a back end: use auto, iptables, iptables-nft, iptables-legacy or nftables", text)
}

func parseForced(text string) (iptables.Backend, error) {
	switch text {
	case "":
		return iptables.Auto, nil
	case "nft":
		return iptables.IPTablesNFT, nil
	case "legacy":
		return iptables.IPTablesLegacy, nil
	}
	return "", fmt.Errorf("%q is not a flavour of iptables: use legacy or nft", text)
}
