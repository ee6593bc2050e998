package admin

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/pillion-proxy/pillion/internal/configdump"
)

// certs prints the certificates in use: the workload's, then those of the control plane's secrets. Keys are not read.
func (h *handler) certs(w http.ResponseWriter, r *http.Request) {
	if !h.begin(w, r) {
		return
	}
	defer h.end()
	certificates := []object{}
	add := func(roots, chain []*x509.Certificate, path string) {
		if len(roots)+len(chain) > 0 {
			certificates = append(certificates, object{"ca_cert": describeAll(roots, path), "cert_chain": describeAll(chain, path)})
		}
	}
	if h.ControlPlane != nil {
		if identity := h.ControlPlane.Identity(); identity != nil {
			add(parseCertificates(identity.Roots), identity.Chain, "<inline>")
		}
		d, err := h.newDump(r.Context())
		if err != nil {
			answer(w, http.StatusInternalServerError, err.Error()+"\n")
			return
		}
		for secret := range d.of(secretType, active) {
			roots, chain := d.certificatesOf(secret)
			add(roots, chain, secret.Name)
		}
	}
	answerJSON(w, object{"certificates": certificates})
}

// certificatesOf returns the certificates of a secret.
func (d *dump) certificatesOf(r *configdump.Resource) (roots, chain []*x509.Certificate) {
	var secret struct {
		Certificate struct {
			Chain dataSource `json:"certificate_chain"`
		} `json:"tls_certificate"`
		Context struct {
			CA dataSource `json:"trusted_ca"`
		} `json:"validation_context"`
	}
	text, ok := d.print(r.TypeURL, r.Bytes).(json.RawMessage)
	if !ok || json.Unmarshal(text, &secret) != nil {
		return nil, nil
	}
	return parseCertificates(secret.Context.CA.pem()), parseCertificates(secret.Certificate.Chain.pem())
}

// dataSource is an envoy.config.core.v3.DataSource.
type dataSource struct {
	Bytes []byte `json:"inline_bytes"`
	Text  string `json:"inline_string"`
}

func (s dataSource) pem() []byte { return append(s.Bytes, s.Text...) }

// parseCertificates returns the certificates in PEM text. Those that cannot be parsed are left out.
func parseCertificates(text []byte) (list []*x509.Certificate) {
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			return list
		}
		if certificate, err := x509.ParseCertificate(block.Bytes); err == nil && block.Type == "CERTIFICATE" {
			list = append(list, certificate)
		}
		text = rest
	}
}

func describeAll(list []*x509.Certificate, path string) []object {
	described := []object{}
	for _, certificate := range list {
		names := []object{}
		for _, uri := range certificate.URIs {
			names = append(names, object{"uri": uri.String()})
		}
		for _, name := range certificate.DNSNames {
			names = append(names, object{"dns": name})
		}
		for _, ip := range certificate.IPAddresses {
			names = append(names, object{"ip_address": ip.String()})
		}
		days := max(0, int64(time.Until(certificate.NotAfter)/(24*time.Hour)))
		described = append(described, object{
			"path": path, "serial_number": fmt.Sprintf("%x", certificate.SerialNumber), "subject_alt_names": names,
			"days_until_expiration": strconv.FormatInt(days, 10),
			"valid_from":            timestamp(certificate.NotBefore), "expiration_time": timestamp(certificate.NotAfter),
		})
	}
	return described
}
