package secure

import (
	"crypto/tls"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// VersionName returns the version of TLS by its name in OpenSSL and Envoy, such as TLSv1.3.
func (s *Session) VersionName() string {
	return strings.Replace(tls.VersionName(s.Version), "TLS ", "TLSv", 1)
}

// CipherName returns the cipher suite by its name in OpenSSL and Envoy. Suites of TLS 1.3 have the same name there as in the
// standard.
func (s *Session) CipherName() string {
	for _, suite := range mesh.Suites {
		if suite.Number == s.Suite {
			return suite.Name
		}
	}
	return tls.CipherSuiteName(s.Suite)
}
