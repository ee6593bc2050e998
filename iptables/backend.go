package iptables

import (
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Backend is the caller's choice of where new rules are made. Wherever else ours are, they are taken away.
type Backend string

// The backends.
const (
	// Auto is where our rules are already; else IPTables, if its programs are there and the tables that they keep can be
	// used; else NFTables.
	Auto           Backend = ""
	IPTables       Backend = "iptables" // in the flavour that holds our rules or other people's, else in nft
	IPTablesNFT    Backend = "iptables-nft"
	IPTablesLegacy Backend = "iptables-legacy"
	NFTables       Backend = "nftables"
)

// flavour is the only one that the backend allows, if there is one.
func (b Backend) flavour() ruleset.Flavour {
	return map[Backend]ruleset.Flavour{IPTablesNFT: ruleset.NFT, IPTablesLegacy: ruleset.Legacy, NFTables: ruleset.Native}[b]
}
