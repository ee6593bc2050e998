package secure

import (
	"crypto/x509"
	"fmt"
	"regexp"
	"strings"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Names compiles the matchers of a configuration. A matcher that cannot be compiled is an error, because a list without it
// would accept other names.
func Names(matchers []mesh.NameMatcher) ([]Name, error) {
	names := make([]Name, 0, len(matchers))
	for _, m := range matchers {
		if m.Kind == mesh.MatchRegex {
			if _, err := regexp.Compile(m.Text); err != nil {
				return nil, fmt.Errorf("the pattern of a subject alternative name: %w", err)
			}
		}
		names = append(names, name{m, match.Compile(&m.StringMatcher)})
	}
	return names, nil
}

// name is a mesh.NameMatcher.
type name struct {
	mesh.NameMatcher
	text match.Text
}

// Match implements Name. Types that the matcher is not for are not looked at.
func (n name) Match(leaf *x509.Certificate) bool {
	if n.accepts(mesh.URIName) {
		for _, uri := range leaf.URIs {
			if n.matches(uri.String()) {
				return true
			}
		}
	}
	if n.accepts(mesh.DNSName) {
		for _, host := range leaf.DNSNames {
			if n.matchesHost(host) {
				return true
			}
		}
	}
	if n.accepts(mesh.EmailName) {
		for _, address := range leaf.EmailAddresses {
			if n.matches(address) {
				return true
			}
		}
	}
	if n.accepts(mesh.IPName) {
		for _, address := range leaf.IPAddresses {
			if n.matches(address.String()) {
				return true
			}
		}
	}
	return false
}

func (n name) accepts(t mesh.NameType) bool { return n.Type == mesh.AnyName || n.Type == t }

// matchesHost matches a DNS name. As in Envoy, an exact matcher ignores case, and accepts a name of the certificate such as
// *.example.com if the matcher has one label in the place of the star.
func (n name) matchesHost(host string) bool {
	if n.Kind != mesh.MatchExact {
		return n.matches(host)
	}
	if strings.EqualFold(host, n.Text) {
		return true
	}
	rest, wildcard := strings.CutPrefix(host, "*.")
	if !wildcard {
		return false
	}
	label, domain, ok := strings.Cut(n.Text, ".")
	return ok && label != "" && strings.EqualFold(domain, rest)
}

func (n name) matches(text string) bool { return n.text.MatchString(text) == match.Yes }

func (n name) String() string {
	kinds := [...]string{mesh.MatchExact: "%q", mesh.MatchPrefix: "%q…", mesh.MatchSuffix: "…%q", mesh.MatchContains: "…%q…", mesh.MatchRegex: "the pattern %q"}
	return fmt.Sprintf(kinds[n.Kind], n.Text)
}
