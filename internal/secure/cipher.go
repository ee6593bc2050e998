package secure

import (
	"crypto/tls"
	"strings"
)

// VersionName returns the version of TLS by its name in OpenSSL and Envoy, such as TLSv1.3.
func (s *Session) VersionName() string {
	return strings.Replace(tls.VersionName(s.Version), "TLS ", "TLSv", 1)
}

// CipherName returns the cipher suite by its name in OpenSSL and Envoy. Suites of TLS 1.3 have the same name there as in the
// standard.
func (s *Session) CipherName() string {
	switch s.Suite {
	case tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256:
		return "ECDHE-ECDSA-AES128-GCM-SHA256"
	case tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384:
		return "ECDHE-ECDSA-AES256-GCM-SHA384"
	case tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256:
		return "ECDHE-RSA-AES128-GCM-SHA256"
	case tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384:
		return "ECDHE-RSA-AES256-GCM-SHA384"
	}
	return tls.CipherSuiteName(s.Suite)
}
