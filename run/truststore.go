package run

import (
	"crypto/sha1"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf16"
)

// bundles are the variables that name a file of trusted certificates for programs and libraries.
var bundles = []string{
	"SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO", "AWS_CA_BUNDLE", "PIP_CERT", "CARGO_HTTP_CAINFO",
	"NIX_SSL_CERT_FILE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "NODE_EXTRA_CA_CERTS", "DENO_CERT",
}

// systemBundles are where systems keep the certificates that they trust.
var systemBundles = []string{
	"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
}

// trusted returns the certificates that the caller trusts, in PEM: those of the files that its environment names, and the
// system's unless SSL_CERT_FILE replaces them.
func trusted(getenv func(string) string) []byte {
	var all []byte
	read := func(path string) bool {
		text, err := os.ReadFile(path)
		if err == nil {
			all = append(append(all, text...), '\n')
		}
		return err == nil
	}
	system := false
	for _, name := range bundles {
		if path := getenv(name); path != "" && read(path) && name == "SSL_CERT_FILE" {
			system = true
		}
	}
	for _, path := range systemBundles {
		if !system {
			system = read(path)
		}
	}
	return all
}

// javaPassword protects nothing: a trust store has no secrets, and Java requires a password.
const javaPassword = "pillion"

// trustStore writes the certificates into files of a directory, and returns the variables that name them.
func trustStore(dir string, certificates []byte, getenv func(string) string) ([]string, error) {
	bundle, java := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.jks")
	if err := os.WriteFile(bundle, certificates, 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(java, javaTrustStore(certificates), 0o600); err != nil {
		return nil, err
	}
	var environment []string
	for _, name := range bundles {
		environment = append(environment, name+"="+bundle)
	}
	options := fmt.Sprintf("-Djavax.net.ssl.trustStore=%s -Djavax.net.ssl.trustStoreType=JKS -Djavax.net.ssl.trustStorePassword=%s", java, javaPassword)
	return append(environment, "JAVA_TOOL_OPTIONS="+strings.TrimSpace(getenv("JAVA_TOOL_OPTIONS")+" "+options)), nil
}

// javaTrustStore returns certificates in the format JKS, version 2, of sun.security.provider.JavaKeyStore. It ends with a
// digest of the password and of what precedes it.
func javaTrustStore(certificates []byte) []byte {
	var ders [][]byte
	for rest := certificates; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			ders = append(ders, block.Bytes)
		}
	}
	const magic, version, trustedEntry = 0xfeedfeed, 2, 2
	b := binary.BigEndian.AppendUint32(nil, magic)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, uint32(len(ders)))
	text := func(s string) {
		b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
		b = append(b, s...)
	}
	for i, der := range ders {
		b = binary.BigEndian.AppendUint32(b, trustedEntry)
		text(fmt.Sprint("ca", i))
		b = binary.BigEndian.AppendUint64(b, uint64(time.Now().UnixMilli()))
		text("X.509")
		b = binary.BigEndian.AppendUint32(b, uint32(len(der)))
		b = append(b, der...)
	}
	digest := sha1.New()
	for _, unit := range utf16.Encode([]rune(javaPassword)) {
		digest.Write([]byte{byte(unit >> 8), byte(unit)})
	}
	digest.Write([]byte("Mighty Aphrodite"))
	digest.Write(b)
	return digest.Sum(b)
}
