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
	for _, domain := range SearchList(path) {
		if rest, found := strings.CutPrefix(domain, "svc."); found && rest != "" {
			return rest
		}
	}
	return DefaultClusterDomain
}

// SearchList returns the search list in path, a resolv.conf(5), in lower case and without final dots. The last list counts.
// A file that cannot be read has none.
func SearchList(path string) (domains []string) {
	text, _ := os.ReadFile(path)
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] != "search" {
			continue
		}
		domains = nil
		for _, word := range words[1:] {
			domains = append(domains, strings.ToLower(strings.TrimSuffix(word, ".")))
		}
	}
	return domains
}
