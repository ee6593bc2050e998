package secure

import (
	"crypto/tls"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// VersionName returns the version of TLS by its name in OpenSSL and Envoy, such as TLSv1.3.
func (s *Session) VersionName() string {
	switch s.Version {
	case tls.VersionTLS12:
		return "TLSv1.2"
	case tls.VersionTLS13:
		return "TLSv1.3"
	}
	return tls.VersionName(s.Version)
}

// CipherName returns the cipher suite by its name in OpenSSL and Envoy. Suites of TLS 1.3 have the same name there as in the
// standard.
func (s *Session) CipherName() string {
	switch s.Suite { // crypto/tls allocates all of its suites to find a name
	case tls.TLS_AES_128_GCM_SHA256:
		return "TLS_AES_128_GCM_SHA256"
	case tls.TLS_AES_256_GCM_SHA384:
		return "TLS_AES_256_GCM_SHA384"
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		return "TLS_CHACHA20_POLY1305_SHA256"
	}
	for _, suite := range mesh.Suites {
		if suite.Number == s.Suite {
			return suite.Name
		}
	}
	return tls.CipherSuiteName(s.Suite)
}
