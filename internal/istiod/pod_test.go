package istiod

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// injected has the variables that Istio's injector sets.
func injected(more ...string) []string {
	return append([]string{
		"CA_ADDR=istiod.istio-system.svc:15012", "POD_NAME=app-inj", "POD_NAMESPACE=shop", "INSTANCE_IP=192.0.2.7", "SERVICE_ACCOUNT=app",
		"HOST_IP=192.0.2.1", "ISTIO_META_CLUSTER_ID=Kubernetes", "ISTIO_META_NODE_NAME=node-1", "ISTIO_META_INTERCEPTION_MODE=REDIRECT",
		"ISTIO_META_WORKLOAD_NAME=app", "ISTIO_META_OWNER=kubernetes://apis/v1/namespaces/shop/pods/app-inj", "ISTIO_META_MESH_ID=mesh1",
		"TRUST_DOMAIN=mesh.example", "ISTIO_META_DNS_CAPTURE=true", "ISTIO_META_ENABLE_HBONE=true", `ISTIO_METAJSON_EXTRA={"NETWORK":"east"}`,
	}, more...)
}

func TestAnInjectedPodDescribesItselfToIstiod(t *testing.T) {
	p, err := ReadPod(t.Context(), DefaultAddress, &Environment{
		Variables: injected("XDS_HEADER_X-Tenant=a", "CA_HEADER_X-Tenant=b"), Directory: t.TempDir(),
		Labels:      map[string]string{"app": "web", "service.istio.io/canonical-name": "front"},
		ProxyConfig: map[string]any{"holdApplicationUntilProxyStarts": true},
	})
	if err != nil {
		t.Fatal(err)
	}
	if id := p.Node.ID(); id != "sidecar~192.0.2.7~app-inj.shop~shop.svc.cluster.local" {
		t.Errorf("ID %s", id)
	}
	if p.Node.Cluster != "front.shop" {
		t.Errorf("cluster %s", p.Node.Cluster)
	}
	want := map[string]any{
		"NAME": "app-inj", "NAMESPACE": "shop", "SERVICE_ACCOUNT": "app", "INSTANCE_IPS": "192.0.2.7", "ISTIO_VERSION": Version,
		"CLUSTER_ID": "Kubernetes", "NODE_NAME": "node-1", "INTERCEPTION_MODE": "REDIRECT", "WORKLOAD_NAME": "app",
		"OWNER": "kubernetes://apis/v1/namespaces/shop/pods/app-inj", "MESH_ID": "mesh1", "DNS_CAPTURE": "true", "NETWORK": "east",
		"LABELS":       map[string]any{"app": "web", "service.istio.io/canonical-name": "front"},
		"PROXY_CONFIG": map[string]any{"holdApplicationUntilProxyStarts": true},
	}
	if !reflect.DeepEqual(p.Node.Metadata, want) {
		t.Errorf("metadata %v\nwant     %v", p.Node.Metadata, want)
	}
	if p.SPIFFE != "spiffe://mesh.example/ns/shop/sa/app" || p.Lifetime != 24*time.Hour || !p.Delta {
		t.Errorf("%+v", p)
	}
	if got := p.Discovery.Header; got.Get("clusterid") != "Kubernetes" || got.Get("x-tenant") != "a" || p.CA.Header.Get("x-tenant") != "b" {
		t.Errorf("headers %v and %v", got, p.CA.Header)
	}
	if _, err := p.Node.Encode(); err != nil {
		t.Error(err)
	}
}

func TestProxyConfigIsPresentInTheMetadataOfEveryNode(t *testing.T) {
	p, err := ReadPod(t.Context(), DefaultAddress, &Environment{})
	if err != nil {
		t.Fatal(err)
	}
	if config, ok := p.Node.Metadata["PROXY_CONFIG"].(map[string]any); !ok || config == nil {
		t.Errorf("PROXY_CONFIG %v", p.Node.Metadata["PROXY_CONFIG"])
	}
}

func TestATokenIsNotSentInTheClear(t *testing.T) {
	plain := map[string]any{"controlPlaneAuthPolicy": "NONE"}
	p, err := ReadPod(t.Context(), "istiod:15010", &Environment{ProxyConfig: plain, Directory: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if !p.Discovery.Plaintext || p.Discovery.Token != "" || p.CA.Address != "" {
		t.Errorf("discovery %+v, CA %+v", p.Discovery, p.CA)
	}
	p, err = ReadPod(t.Context(), "istiod:15010", &Environment{ProxyConfig: plain, Directory: t.TempDir(), Variables: []string{"CA_ADDR=istiod:15012"}})
	if err != nil {
		t.Fatal(err)
	}
	if p.CA.Address != "istiod:15012" || p.CA.Plaintext || p.CA.Token == "" {
		t.Errorf("CA %+v", p.CA)
	}
}

func TestMountedCertificatesReplaceTheCA(t *testing.T) {
	directory := t.TempDir()
	certificates := filepath.Join(directory, "var/run/secrets/workload-spiffe-credentials")
	if err := os.MkdirAll(certificates, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"cert-chain.pem", "key.pem", "root-cert.pem"} {
		if err := os.WriteFile(filepath.Join(certificates, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p, err := ReadPod(t.Context(), DefaultAddress, &Environment{Directory: directory})
	if err != nil {
		t.Fatal(err)
	}
	if p.Files == nil || p.CA.Address != "" {
		t.Errorf("files %v, CA %+v", p.Files, p.CA)
	}
}

func TestAWorkloadSocketReplacesTheCAAndFiles(t *testing.T) {
	directory, err := os.MkdirTemp("", "") // the path of a Unix socket has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(directory) })
	mounts := filepath.Join(directory, "var/run/secrets/workload-spiffe-uds")
	if err := os.MkdirAll(mounts, 0o755); err != nil {
		t.Fatal(err)
	}
	e := &Environment{Directory: directory, Variables: []string{"WORKLOAD_IDENTITY_SOCKET_FILE=own", "KUBERNETES_SERVICE_HOST=10.96.0.1"}}
	if _, err := ReadPod(t.Context(), DefaultAddress, e); err == nil || !strings.Contains(err.Error(), "WORKLOAD_IDENTITY_SOCKET_FILE=\"own\"") {
		t.Errorf("without the socket: error %v", err)
	}
	socket, err := net.Listen("unix", filepath.Join(mounts, "own"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Protocols: new(http.Protocols)}
	server.Protocols.SetUnencryptedHTTP2(true)
	go server.Serve(socket)
	t.Cleanup(func() { server.Close() })
	p, err := ReadPod(t.Context(), DefaultAddress, e)
	if err != nil || p.Socket == nil || p.Socket.Path != filepath.Join(mounts, "own") || p.CA.Address != "" || p.Files != nil {
		t.Fatalf("%+v, error %v", p, err)
	}
	if want := filepath.Join(directory, "var/run/secrets/istio/crl/ca-crl.pem"); p.Revocations != want || !p.OutputShared {
		t.Errorf("revocation lists %s, output shared: %v", p.Revocations, p.OutputShared)
	}
	e.Variables = nil // a socket of another name does not count
	if p, err = ReadPod(t.Context(), DefaultAddress, e); err != nil || p.Socket != nil || p.CA.Address == "" || p.OutputShared {
		t.Errorf("%+v, error %v", p, err)
	}
}

func TestInvalidVariablesOfThePodAreNamed(t *testing.T) {
	for variable, remedy := range map[string]string{
		"SECRET_TTL=soon":              "such as 24h",
		"SECRET_TTL=-1h":               "such as 24h",
		"ISTIO_DELTA_XDS=maybe":        "use true or false",
		"CA_PROVIDER=GoogleCAS":        "use Citadel",
		"ISTIO_METAJSON_LABELS=app=we": "use a JSON object",
	} {
		_, err := ReadPod(t.Context(), DefaultAddress, &Environment{Variables: []string{variable}})
		name, _, _ := strings.Cut(variable, "=")
		if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), remedy) {
			t.Errorf("%s: %v", variable, err)
		}
	}
}

func TestTheStateOfTheWorldIsChosenByAVariable(t *testing.T) {
	p, err := ReadPod(t.Context(), DefaultAddress, &Environment{Variables: []string{"ISTIO_DELTA_XDS=false"}})
	if err != nil || p.Delta {
		t.Errorf("delta %v, %v", p.Delta, err)
	}
}

func TestCredentialsAreRootsOrAToken(t *testing.T) {
	e := &Environment{Directory: t.TempDir()}
	if HasCredentials(e) {
		t.Error("credentials in an empty directory")
	}
	token := filepath.Join(e.Directory, TokenFile)
	if err := os.MkdirAll(filepath.Dir(token), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(token, []byte("t"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !HasCredentials(e) {
		t.Error("a token is not a credential")
	}
}

func TestAddressesNeedAHostAndAPort(t *testing.T) {
	for address, valid := range map[string]bool{
		DefaultAddress: true, "[2001:db8::1]:15012": true, "localhost:15012": true,
		"istiod": false, "istiod:": false, ":15012": false, "istiod:0": false, "istiod:70000": false, "https://istiod:15012": false,
	} {
		if err := CheckAddress(address); (err == nil) != valid {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// A certificate that was provisioned is presented while it is valid.
func TestAProvisionedCertificateIsPresentedWhileItIsValid(t *testing.T) {
	if (variables{}).certificate() != nil {
		t.Error("a certificate without a directory")
	}
	for name, lifetime := range map[string]time.Duration{"valid": time.Hour, "expired": -time.Hour, "absent": 0} {
		directory := t.TempDir()
		if lifetime != 0 {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(lifetime)}
			der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
			if err != nil {
				t.Fatal(err)
			}
			raw, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			for file, block := range map[string]*pem.Block{"cert-chain.pem": {Type: "CERTIFICATE", Bytes: der}, "key.pem": {Type: "PRIVATE KEY", Bytes: raw}} {
				if err := os.WriteFile(filepath.Join(directory, file), pem.EncodeToMemory(block), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, v := range []variables{
			{"PROV_CERT": directory},
			{"FILE_MOUNTED_CERTS": "true", mountedCertificate: filepath.Join(directory, "cert-chain.pem"), mountedKey: filepath.Join(directory, "key.pem")},
		} {
			certificate, err := v.certificate()()
			if err != nil || (len(certificate.Certificate) > 0) != (name == "valid") {
				t.Errorf("%s, %v: %d certificates, error %v", name, v, len(certificate.Certificate), err)
			}
		}
	}
}

func TestMountedRootsCountOnlyWithMountedCertificates(t *testing.T) {
	for on, want := range map[string]string{"true": "/tls/ca.pem", "false": rootFile, "": rootFile} {
		directory := t.TempDir()
		e := &Environment{Directory: directory, Variables: []string{"FILE_MOUNTED_CERTS=" + on, "ISTIO_META_TLS_CLIENT_ROOT_CERT=/tls/ca.pem"}}
		if got := e.roots(e.variables()); got != want && got != filepath.Join(directory, want) {
			t.Errorf("FILE_MOUNTED_CERTS=%s: %s, want %s", on, got, want)
		}
	}
}

// With mounted certificates the CA is not called. They are the identity if the certificate has a SPIFFE ID.
func TestMountedCertificatesAreTheIdentity(t *testing.T) {
	for id, identified := range map[string]bool{"spiffe://cluster.local/ns/shop/sa/web": true, "https://web.example": false, "": false} {
		directory := t.TempDir()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
		if id != "" {
			uri, err := url.Parse(id)
			if err != nil {
				t.Fatal(err)
			}
			template.URIs = []*url.URL{uri}
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		e := &Environment{Directory: directory, Variables: []string{"FILE_MOUNTED_CERTS=true"}}
		for _, variable := range []string{mountedCertificate, mountedKey, mountedRoots} {
			file := filepath.Join(directory, variable)
			if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
				t.Fatal(err)
			}
			e.Variables = append(e.Variables, variable+"="+file)
		}
		p, err := ReadPod(t.Context(), DefaultAddress, e)
		if err != nil || p.CA.Address != "" || (p.Files != nil) != identified {
			t.Errorf("%q: error %v, CA %q, files %v", id, err, p.CA.Address, p.Files)
		}
	}
	p, err := ReadPod(t.Context(), DefaultAddress, &Environment{Directory: t.TempDir(), Variables: []string{"FILE_MOUNTED_CERTS=true"}})
	if err != nil || p.CA.Address != "" || p.Files != nil {
		t.Errorf("without files: error %v, CA %q, files %v", err, p.CA.Address, p.Files)
	}
}

func TestALifetimeHasASecondOrMore(t *testing.T) {
	for text, ok := range map[string]bool{"1s": true, "999ms": false} {
		p, err := ReadPod(t.Context(), DefaultAddress, &Environment{Variables: []string{"SECRET_TTL=" + text}})
		if (err == nil) != ok || ok && p.Lifetime != time.Second {
			t.Errorf("%s: error %v", text, err)
		}
	}
}
