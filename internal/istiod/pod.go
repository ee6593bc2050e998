package istiod

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
)

// DefaultAddress is where istiod is reached unless the pod names another address.
const DefaultAddress = "istiod.istio-system.svc:15012"

// Version is the version of Istio whose configuration is understood. istiod adapts what it sends to it, and
// proxy-status shows it.
const Version = "1.32.0"

// Environment is what an injected pod gives to its sidecar.
type Environment struct {
	Variables []string          // as os.Environ returns them
	Labels    map[string]string // of the pod
	Directory string            // below which the injector's volumes are mounted; empty: the root directory

	// ProxyConfig is Istio's ProxyConfig as JSON, with all sources merged. istiod lists a proxy only if it has one.
	ProxyConfig map[string]any

	Domain string // DNS domain of the cluster; empty: cluster.local
	Type   string // of the proxy, as in Node; empty: sidecar
}

// Pod is how a pod reaches istiod, and how it describes itself. A Pod without an address has no control plane.
type Pod struct {
	Discovery Server
	CA        Server // without an address, certificates are not issued by a CA
	Node      Node
	Delta     bool // the protocol of discovery; otherwise the state of the world

	SPIFFE   string           // the identity that certificates are requested for
	Lifetime time.Duration    // of a requested certificate
	Signer   string           // CertSigner of the CA; may be empty
	Socket   *identity.Socket // in place of a CA and of Files; nil: there is none, or it does not answer
	Files    *identity.Files  // mounted in place of a CA; nil: not mounted

	Revocations  string // path of the file of revocation lists; it may be missing
	Output       string // directory that the identity is written to; may be empty
	OutputShared bool   // other users of the pod read it
}

// ReadPod returns how the pod reaches the istiod at address (host:port). An error names the variable and its remedy. A
// SPIFFE workload socket has a second to answer.
func ReadPod(ctx context.Context, address string, e *Environment) (*Pod, error) {
	variables := e.variables()
	lifetime, err := variables.duration("SECRET_TTL", 24*time.Hour)
	if err != nil {
		return nil, err
	}
	delta, err := variables.bool("ISTIO_DELTA_XDS", true)
	if err != nil {
		return nil, err
	}
	if provider := variables["CA_PROVIDER"]; provider != "" && provider != "Citadel" {
		return nil, fmt.Errorf("environment variable CA_PROVIDER=%q: use Citadel, or mount the workload's certificate as files", provider)
	}
	node, err := e.node(variables)
	if err != nil {
		return nil, err
	}
	p := &Pod{Node: *node, Delta: delta, Lifetime: lifetime, Signer: variables["ISTIO_META_CERT_SIGNER"], Output: variables["OUTPUT_CERTS"]}
	p.OutputShared = variables["KUBERNETES_SERVICE_HOST"] != "" // as istio-agent decides it
	p.Revocations = filepath.Join(e.directory(), identity.CRLFile)
	p.Discovery = e.discovery(address, variables)
	const socketFile = "WORKLOAD_IDENTITY_SOCKET_FILE"
	if p.Socket, err = identity.FindSocket(ctx, e.directory(), variables[socketFile]); err != nil {
		return nil, fmt.Errorf("environment variable %s=%q: %w", socketFile, variables[socketFile], err)
	}
	if p.Socket != nil {
		return p, nil
	}
	if files, ok := identity.FindFiles(e.directory()); ok {
		p.Files = files
		return p, nil
	}
	if variables.mounted() { // the CA is not called then
		p.Files, _ = identity.MountedFiles(variables[mountedCertificate], variables[mountedKey], variables[mountedRoots])
		return p, nil
	}
	p.CA = e.authority(address, variables)
	p.SPIFFE = fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", cmp.Or(variables["TRUST_DOMAIN"], "cluster.local"), node.Namespace, cmp.Or(variables["SERVICE_ACCOUNT"], "default"))
	return p, nil
}

// Variables with the paths of certificates that are mounted for connections to others, with FILE_MOUNTED_CERTS.
const (
	mountedCertificate = "ISTIO_META_TLS_CLIENT_CERT_CHAIN"
	mountedKey         = "ISTIO_META_TLS_CLIENT_KEY"
	mountedRoots       = "ISTIO_META_TLS_CLIENT_ROOT_CERT"
)

// mounted reports whether certificates are mounted in place of those of a CA.
func (v variables) mounted() bool {
	on, _ := strconv.ParseBool(v["FILE_MOUNTED_CERTS"])
	return on
}

// HasCredentials reports whether the injector mounted what the pod and istiod authenticate each other with: the roots of
// istiod's certificate or the workload's token. An istiod that is reached without TLS needs neither.
func HasCredentials(e *Environment) bool {
	if policy, _ := e.ProxyConfig["controlPlaneAuthPolicy"].(string); policy == "NONE" {
		return true
	}
	variables := e.variables()
	for _, path := range []string{e.roots(variables), filepath.Join(e.directory(), TokenFile)} {
		if path == SystemRoots {
			return true
		}
		if _, err := os.Stat(path); err == nil {
			return true
		}
	}
	return false
}

// CheckAddress returns an error with a remedy if address is not host:port.
func CheckAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if number, parsing := strconv.ParseUint(port, 10, 16); err != nil || host == "" || parsing != nil || number == 0 {
		return errors.New("not an address: use HOST:PORT, such as " + DefaultAddress)
	}
	return nil
}

func (e *Environment) directory() string { return cmp.Or(e.Directory, "/") }

func (e *Environment) roots(variables variables) string {
	mounted := ""
	if variables.mounted() {
		mounted = variables[mountedRoots]
	}
	return FindRoots(e.directory(), variables["XDS_ROOT_CA"], variables["PROV_CERT"], mounted)
}

// discovery returns how the discovery service is reached. A token is not sent in the clear: an istiod without TLS does not
// authenticate the pod.
func (e *Environment) discovery(address string, variables variables) Server {
	s := Server{
		Address:     address,
		ServerName:  ServerName(address, variables["ISTIOD_SAN"]),
		Roots:       e.roots(variables),
		Token:       filepath.Join(e.directory(), TokenFile),
		Header:      variables.header("XDS_HEADER_"),
		Certificate: variables.certificate(),
	}
	if policy, _ := e.ProxyConfig["controlPlaneAuthPolicy"].(string); policy == "NONE" {
		s.Plaintext, s.Token, s.Certificate = true, "", nil
	}
	return s
}

// authority returns how the CA is reached. It has no address if it would be reached without TLS, because a certificate
// from an unknown CA proves nothing.
func (e *Environment) authority(address string, variables variables) Server {
	if policy, _ := e.ProxyConfig["controlPlaneAuthPolicy"].(string); policy == "NONE" && variables["CA_ADDR"] == "" {
		return Server{}
	}
	address = cmp.Or(variables["CA_ADDR"], address)
	return Server{
		Address:     address,
		ServerName:  ServerName(address, variables["ISTIOD_SAN"]),
		Roots:       FindRoots(e.directory(), variables["CA_ROOT_CA"], variables["PROV_CERT"], ""),
		Token:       filepath.Join(e.directory(), TokenFile),
		Header:      variables.header("CA_HEADER_"),
		Certificate: variables.certificate(),
	}
}

// certificate returns the function that reads the certificate that istiod is shown: the one that was provisioned, or the one
// that is mounted. It returns nil if there is neither. A certificate that is missing or has expired is not presented: the
// token may suffice.
func (v variables) certificate() func() (*tls.Certificate, error) {
	file, key := "", ""
	switch directory := v["PROV_CERT"]; {
	case directory != "":
		file, key = filepath.Join(directory, "cert-chain.pem"), filepath.Join(directory, "key.pem")
	case v.mounted():
		file, key = v[mountedCertificate], v[mountedKey]
	}
	if file == "" || key == "" {
		return nil
	}
	return func() (*tls.Certificate, error) {
		certificate, err := tls.LoadX509KeyPair(file, key)
		if err != nil || time.Now().After(certificate.Leaf.NotAfter) {
			return &tls.Certificate{}, nil
		}
		return &certificate, nil
	}
}

const (
	metaPrefix     = "ISTIO_META_"
	metaJSONPrefix = "ISTIO_METAJSON_"
)

// node describes the proxy, as istio-agent does. HBONE is not offered: endpoints would have internal addresses.
func (e *Environment) node(variables variables) (*Node, error) {
	metadata := map[string]any{}
	for name, value := range variables {
		if key, ok := strings.CutPrefix(name, metaPrefix); ok {
			metadata[key] = value
			continue
		}
		if !strings.HasPrefix(name, metaJSONPrefix) {
			continue
		}
		var more map[string]any
		if err := json.Unmarshal([]byte(value), &more); err != nil {
			return nil, fmt.Errorf("environment variable %s: %w: use a JSON object", name, err)
		}
		for key, value := range more {
			metadata[key] = value
		}
	}
	for _, hbone := range []string{"ENABLE_HBONE", "DISABLE_HBONE_SEND"} {
		delete(metadata, hbone)
	}
	labels, _ := metadata["LABELS"].(map[string]any)
	if labels == nil {
		labels = map[string]any{}
	}
	for key, value := range e.Labels {
		labels[key] = value
	}
	proxyConfig := e.ProxyConfig
	if proxyConfig == nil {
		proxyConfig = map[string]any{}
	}
	metadata["LABELS"], metadata["PROXY_CONFIG"] = labels, proxyConfig
	for key, value := range map[string]string{
		"NAME": variables["POD_NAME"], "NAMESPACE": variables["POD_NAMESPACE"], "SERVICE_ACCOUNT": variables["SERVICE_ACCOUNT"],
		"INSTANCE_IPS": variables["INSTANCE_IP"], "ISTIO_VERSION": cmp.Or(variables[metaPrefix+"ISTIO_VERSION"], Version),
	} {
		if value != "" {
			metadata[key] = value
		}
	}
	namespace := cmp.Or(variables["POD_NAMESPACE"], "default")
	return &Node{
		Type: cmp.Or(e.Type, "sidecar"), IP: variables["INSTANCE_IP"], Pod: variables["POD_NAME"], Namespace: namespace, Domain: e.Domain,
		Cluster: e.service(variables, namespace), Metadata: metadata,
	}, nil
}

// service returns istio-agent's name of the service that the proxy belongs to.
func (e *Environment) service(variables variables, namespace string) string {
	name := cmp.Or(e.Labels["service.istio.io/canonical-name"], e.Labels["app"], variables[metaPrefix+"WORKLOAD_NAME"], "istio-proxy")
	return name + "." + namespace
}

// variables are environment variables by name.
type variables map[string]string

func (e *Environment) variables() variables {
	v := variables{}
	for _, text := range e.Variables {
		name, value, _ := strings.Cut(text, "=")
		v[name] = value
	}
	return v
}

// header returns the fields of calls: the ID of the cluster, by which istiod chooses the API server that reviews the token,
// and those in variables with a prefix.
func (v variables) header(prefix string) http.Header {
	header := http.Header{}
	if cluster := v[metaPrefix+"CLUSTER_ID"]; cluster != "" {
		header.Set("clusterid", cluster)
	}
	for name, value := range v {
		if field, ok := strings.CutPrefix(name, prefix); ok && field != "" {
			header.Set(field, value)
		}
	}
	return header
}

func (v variables) duration(name string, otherwise time.Duration) (time.Duration, error) {
	if v[name] == "" {
		return otherwise, nil
	}
	d, err := time.ParseDuration(v[name])
	if err != nil || d < time.Second {
		return 0, fmt.Errorf("environment variable %s=%q: use a duration of a second or more, such as 24h", name, v[name])
	}
	return d, nil
}

func (v variables) bool(name string, otherwise bool) (bool, error) {
	if v[name] == "" {
		return otherwise, nil
	}
	b, err := strconv.ParseBool(v[name])
	if err != nil {
		return false, fmt.Errorf("environment variable %s=%q: use true or false", name, v[name])
	}
	return b, nil
}
