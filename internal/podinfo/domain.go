package podinfo

import (
	"os"
	"strings"
)

// DefaultClusterDomain is the DNS domain of most clusters.
const DefaultClusterDomain = "cluster.local"

// ClusterDomain returns the DNS domain of the cluster by the search list in path, a resolv.conf(5). The kubelet writes
// NAMESPACE.svc.DOMAIN, svc.DOMAIN and DOMAIN into it. Without such a list it returns DefaultClusterDomain.
func ClusterDomain(path string) string {
	text, _ := os.ReadFile(path)
	domain := DefaultClusterDomain
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] != "search" {
			continue
		}
		domain = DefaultClusterDomain // the last list counts
		for _, word := range words[1:] {
			if rest, found := strings.CutPrefix(strings.ToLower(strings.TrimSuffix(word, ".")), "svc."); found && rest != "" {
				domain = rest
				break
			}
		}
	}
	return domain
}
