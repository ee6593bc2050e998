package main

import (
	"fmt"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/commandline"
	"github.com/pillion-proxy/pillion/iptables"
)

// backendOptions select the back end: by our flag, and by those of istio-iptables.
type backendOptions struct {
	backend iptables.Backend
	native  bool
	forced  iptables.Backend

	backendFlag, nativeFlag, forcedFlag *pflag.Flag // to name them in errors
}

func (o *backendOptions) bind(flags *pflag.FlagSet) {
	parsed(flags, &o.backend, parseBackend, "backend", "", "auto", "name",
		"back end for the rules: iptables (iptables-nft, iptables-legacy), nftables (needs no program), or auto: where rules of ours are, else iptables if installed, else nftables")
	parsedSwitch(flags, &o.native, "native-nftables", "", "same as --backend nftables; overrides --force-iptables-binary")
	parsed(flags, &o.forced, parseForced, "force-iptables-binary", "", "", "name",
		"legacy or nft: same as --backend iptables-legacy or iptables-nft")
	o.backendFlag, o.nativeFlag, o.forcedFlag = flags.Lookup("backend"), flags.Lookup("native-nftables"), flags.Lookup("force-iptables-binary")
	commandline.SetChoices(o.backendFlag, "auto", "iptables", "iptables-nft", "iptables-legacy", "nftables")
	commandline.SetChoices(o.forcedFlag, "legacy", "nft")
	twin(flags, "native-nftables", "NATIVE_NFTABLES")
	twin(flags, "force-iptables-binary", "FORCE_IPTABLES_BINARY")
}

// choose combines the flags.
func (o *backendOptions) choose() (iptables.Backend, error) {
	alias, flag := o.forced, o.forcedFlag
	if o.native {
		alias, flag = iptables.NFTables, o.nativeFlag
	}
	switch {
	case o.backend == iptables.Auto:
		return alias, nil
	case alias == iptables.Auto, alias == o.backend:
		return o.backend, nil
	}
	return "", valueError{fmt.Errorf("%s %s contradicts %s, which means %s: use one of them", settingName(o.backendFlag), o.backend, settingName(flag), alias)}
}

func parseBackend(text string) (iptables.Backend, error) {
	if text == "auto" {
		return iptables.Auto, nil
	}
	switch b := iptables.Backend(text); b {
	case iptables.IPTables, iptables.IPTablesNFT, iptables.IPTablesLegacy, iptables.NFTables:
		return b, nil
	}
	return "", fmt.Errorf("unknown back end %s: use auto, iptables, iptables-nft, iptables-legacy or nftables", capture.Quoted(text))
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
	return "", fmt.Errorf("unknown flavour of iptables %s: use legacy or nft", capture.Quoted(text))
}
