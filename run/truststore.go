package run

import (
	"cmp"
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

// directories is the variable that names directories of trusted certificates, and systemDirectory the usual value.
const directories, systemDirectory = "SSL_CERT_DIR", "/etc/ssl/certs"

// trusted returns the certificates that the caller trusts, in PEM: those of the files and directories that its environment
// names, and the system's unless SSL_CERT_FILE replaces them.
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
	for dir := range strings.SplitSeq(getenv(directories), ":") {
		all = append(all, inDirectory(dir)...)
	}
	for _, path := range systemBundles {
		if !system {
			system = read(path)
		}
	}
	return all
}

// inDirectory returns the certificates in the files of a directory. OpenSSL finds a file by a link to it, which is left out.
func inDirectory(dir string) (all []byte) {
	entries, _ := os.ReadDir(dir) // none if it cannot be read
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		if target, err := os.Readlink(path); err == nil && !strings.Contains(target, "/") {
			continue
		}
		if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() || info.Size() > maxCertificates {
			continue
		}
		text, _ := os.ReadFile(path)
		all = append(append(all, text...), '\n')
	}
	return all
}

// maxCertificates bounds a file in a directory of certificates.
const maxCertificates = 4 << 20

// hashName is the name by which OpenSSL finds a certificate in a directory: the SHA-1 of its subject in a canonical form
// (X509_NAME_hash(3)). The subject is one common name of less than 100 letters.
func hashName(subject string) string {
	text := []byte(strings.ToLower(subject))
	oid := []byte{6, 3, 0x55, 4, 3}
	value := append([]byte{12, byte(len(text))}, text...)
	pair := append([]byte{0x30, byte(len(oid) + len(value))}, append(oid, value...)...)
	digest := sha1.Sum(append([]byte{0x31, byte(len(pair))}, pair...))
	return fmt.Sprintf("%08x.0", binary.LittleEndian.Uint32(digest[:]))
}

// javaPassword protects nothing: a trust store has no secrets, and Java requires a password.
const javaPassword = "pillion"

// trustStore writes the certificates into files of a directory, and returns the variables that name them.
func trustStore(dir string, certificates []byte, ca *authority, getenv func(string) string) ([]string, error) {
	certificates = append(certificates, ca.pem...)
	bundle, java := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.jks")
	if err := os.WriteFile(filepath.Join(dir, hashName(ca.certificate.Subject.CommonName)), ca.pem, 0o600); err != nil {
		return nil, err
	}
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
	environment = append(environment, directories+"="+dir+":"+cmp.Or(getenv(directories), systemDirectory))
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
