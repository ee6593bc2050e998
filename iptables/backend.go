package iptables

import (
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Backend selects where new rules are installed. Rules of ours in other places are removed.
type Backend string

// The backends.
const (
	// Auto keeps rules where they are. Otherwise it selects IPTables if its programs exist and can use the tables they
	// keep, and NFTables if not.
	Auto           Backend = ""
	IPTables       Backend = "iptables" // the flavour that holds our rules, else the one that holds rules of others, else nft
	IPTablesNFT    Backend = "iptables-nft"
	IPTablesLegacy Backend = "iptables-legacy"
	NFTables       Backend = "nftables"
)

// flavour returns the only flavour that the backend allows, or "" if it leaves a choice.
func (b Backend) flavour() ruleset.Flavour {
	return map[Backend]ruleset.Flavour{IPTablesNFT: ruleset.NFT, IPTablesLegacy: ruleset.Legacy, NFTables: ruleset.Native}[b]
}
