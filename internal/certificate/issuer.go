package certificate

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/kubeapi"
)

// Lifetimes. A replica checks everything once in checkEvery, so an authority that has been in use for longer than overlap
// is the one of all replicas.
const (
	authorityLife  = 5 * 365 * 24 * time.Hour
	authorityRenew = 365 * 24 * time.Hour // before its end
	leafLife       = 30 * 24 * time.Hour
	leafRenew      = 10 * 24 * time.Hour
	checkEvery     = 5 * time.Minute
	retryAfter     = time.Minute
	overlap        = time.Hour
	backdate       = 10 * time.Minute // clocks differ
	spread         = 10 * time.Second // until API servers use a changed configuration
	attempts       = 5                // at changes that others make at the same time
)

// API sends requests to a Kubernetes API server. Errors are those of kubeapi.
type API interface {
	Get(ctx context.Context, path string, into any) error
	Put(ctx context.Context, path string, body any) error
	Patch(ctx context.Context, path, contentType string, patch any) error
}

// IssuerConfig names the objects that an Issuer reads and writes. All fields except PodSecurity must be set.
type IssuerConfig struct {
	API       API
	Namespace string
	Service   string // of the webhook; the certificate is for SERVICE.NAMESPACE.svc
	// Secret has the authority's certificate and key. It must exist and may be empty. All replicas share it.
	Secret string
	// Configuration is the MutatingWebhookConfiguration in which the authority is published.
	Configuration string
	// PodSecurity is the Pod Security level for a namespace that is the webhook's own and has no level; "" leaves it alone.
	PodSecurity string
	Log         *slog.Logger
}

// Issuer issues the webhook's certificate.
type Issuer struct {
	IssuerConfig

	mu   sync.Mutex
	leaf *tls.Certificate
	of   []byte // the authority of leaf, DER
}

// NewIssuer issues the first certificate. When it returns, the authority is published.
func NewIssuer(ctx context.Context, config IssuerConfig) (*Issuer, error) {
	i := &Issuer{IssuerConfig: config}
	return i, i.check(ctx)
}

// Get returns the current certificate. It is a tls.Config.GetCertificate.
func (i *Issuer) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.leaf == nil {
		return nil, errors.New("no certificate has been issued")
	}
	return i.leaf, nil
}

// Run renews the certificate and its authority, and repairs the configuration, until ctx ends.
func (i *Issuer) Run(ctx context.Context) {
	wait := checkEvery
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		wait = checkEvery
		if err := i.check(ctx); err != nil && ctx.Err() == nil {
			i.Log.Warn("checking the certificate failed", "error", err, "retry", retryAfter)
			wait = retryAfter
		}
	}
}

// check makes one round: authority, configuration, certificate.
func (i *Issuer) check(ctx context.Context) error {
	authority, err := i.authority(ctx)
	if err != nil {
		return err
	}
	if err := i.publish(ctx, authority.Leaf); err != nil {
		return err
	}
	i.labelNamespace(ctx)
	i.mu.Lock()
	current, of := i.leaf, i.of
	i.mu.Unlock()
	known := bytes.Equal(of, authority.Leaf.Raw)
	if current != nil && known && time.Until(current.Leaf.NotAfter) > leafRenew {
		return nil
	}
	if current != nil && !known { // another replica may have published the authority only now
		if err := sleep(ctx, spread); err != nil {
			return err
		}
	}
	leaf, err := i.issue(authority)
	if err != nil {
		return fmt.Errorf("issuing a certificate: %w", err)
	}
	i.mu.Lock()
	i.leaf, i.of = leaf, authority.Leaf.Raw
	i.mu.Unlock()
	i.Log.Info("certificate issued", "name", i.host(), "until", leaf.Leaf.NotAfter)
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

func (i *Issuer) host() string { return i.Service + "." + i.Namespace + ".svc" }

// object is an object of the API whose unknown fields are kept.
type object = map[string]any

// The names of the Secret's members.
const (
	authorityCertificate = "ca.crt"
	authorityKey         = "ca.key"
)

// authority returns the authority in the Secret. It replaces a missing or invalid one, and one that
// ends soon.
func (i *Issuer) authority(ctx context.Context) (*tls.Certificate, error) {
	path := "/api/v1/namespaces/" + i.Namespace + "/secrets/" + i.Secret
	var err error
	for range attempts {
		var secret struct {
			APIVersion string            `json:"apiVersion"`
			Kind       string            `json:"kind"`
			Metadata   object            `json:"metadata"`
			Type       string            `json:"type,omitempty"`
			Data       map[string][]byte `json:"data"`
		}
		if err := i.API.Get(ctx, path, &secret); err != nil {
			return nil, fmt.Errorf("reading the Secret %s/%s: %w", i.Namespace, i.Secret, err)
		}
		found, broken := i.parseAuthority(secret.Data[authorityCertificate], secret.Data[authorityKey])
		if broken == nil && time.Until(found.Leaf.NotAfter) > authorityRenew {
			return found, nil
		}
		if broken != nil && len(secret.Data) > 0 {
			i.Log.Warn("the authority in the Secret cannot be used", "secret", i.Secret, "error", broken)
		}
		fresh, certificate, key, err2 := i.newAuthority()
		if err2 != nil {
			return nil, fmt.Errorf("making an authority: %w", err2)
		}
		if secret.Data == nil {
			secret.Data = make(map[string][]byte)
		}
		secret.APIVersion, secret.Kind = "v1", "Secret"
		secret.Data[authorityCertificate], secret.Data[authorityKey] = certificate, key
		// The resource version in the metadata makes the server refuse the update if another replica was faster.
		if err = i.API.Put(ctx, path, secret); err == nil {
			i.Log.Info("authority created", "secret", i.Secret, "until", fresh.Leaf.NotAfter)
			return fresh, nil
		} else if !kubeapi.IsConflict(err) {
			break
		}
	}
	return nil, fmt.Errorf("updating the Secret %s/%s: %w", i.Namespace, i.Secret, err)
}

// parseAuthority checks that the pair is an authority for the webhook's name.
func (i *Issuer) parseAuthority(certificate, key []byte) (*tls.Certificate, error) {
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, err
	}
	ca := pair.Leaf
	if !ca.IsCA || ca.KeyUsage&x509.KeyUsageCertSign == 0 || !slices.Equal(ca.PermittedDNSDomains, []string{i.host()}) || len(ca.ExcludedIPRanges) != len(allAddresses) {
		return nil, fmt.Errorf("it is not an authority for %s alone", i.host())
	}
	if time.Until(ca.NotBefore) > backdate {
		return nil, fmt.Errorf("it is not valid before %v", ca.NotBefore)
	}
	return &pair, nil
}

// allAddresses are the IP ranges for which the authority must not sign.
var allAddresses = []*net.IPNet{
	{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
	{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
}

func (i *Issuer) newAuthority() (pair *tls.Certificate, certificate, key []byte, err error) {
	now := time.Now()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, nil, err
	}
	template := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "authority of " + i.Service},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
		// The key can sign for the webhook's name, and names below it, only.
		PermittedDNSDomainsCritical: true, PermittedDNSDomains: []string{i.host()}, ExcludedIPRanges: allAddresses,
	}
	der, err := sign(template, template, private.Public(), private)
	if err != nil {
		return nil, nil, nil, err
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, nil, err
	}
	certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded})
	pair, err = i.parseAuthority(certificate, key)
	return pair, certificate, key, err
}

// issue returns a certificate whose key never leaves this process.
func (i *Issuer) issue(authority *tls.Certificate) (*tls.Certificate, error) {
	now := time.Now()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: i.Service}, DNSNames: []string{i.host()},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(leafLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := sign(template, authority.Leaf, private.Public(), authority.PrivateKey)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority.Leaf)
	if now.Before(authority.Leaf.NotBefore) { // by less than backdate; API servers have their own clocks
		now = authority.Leaf.NotBefore
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: i.host(), CurrentTime: now}); err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private, Leaf: leaf}, nil
}

func sign(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.PrivateKey) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	return x509.CreateCertificate(rand.Reader, template, parent, public, key)
}

// publish writes the authority to the webhook's configuration. Others stay there as long as other replicas may use them.
func (i *Issuer) publish(ctx context.Context, authority *x509.Certificate) (err error) {
	path := "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/" + i.Configuration
	for range attempts {
		var configuration struct {
			Metadata struct {
				ResourceVersion string `json:"resourceVersion"`
			} `json:"metadata"`
			Webhooks []struct {
				ClientConfig struct {
					CABundle []byte `json:"caBundle"`
					Service  *struct{ Name, Namespace string }
				} `json:"clientConfig"`
			} `json:"webhooks"`
		}
		if err := i.API.Get(ctx, path, &configuration); err != nil {
			return fmt.Errorf("reading the MutatingWebhookConfiguration %s: %w", i.Configuration, err)
		}
		patch, ours := []any{object{"op": "test", "path": "/metadata/resourceVersion", "value": configuration.Metadata.ResourceVersion}}, false
		for n, webhook := range configuration.Webhooks {
			c := webhook.ClientConfig
			if c.Service == nil || c.Service.Name != i.Service || c.Service.Namespace != i.Namespace {
				continue
			}
			ours = true
			if bundle := i.bundle(authority, c.CABundle); !bytes.Equal(bundle, c.CABundle) {
				patch = append(patch, object{"op": "add", "path": fmt.Sprintf("/webhooks/%d/clientConfig/caBundle", n), "value": bundle})
			}
		}
		if !ours {
			return fmt.Errorf("MutatingWebhookConfiguration %s has no webhook for the service %s/%s", i.Configuration, i.Namespace, i.Service)
		}
		if len(patch) == 1 {
			return nil
		}
		if err = i.API.Patch(ctx, path, "application/json-patch+json", patch); err == nil {
			i.Log.Info("authority published", "configuration", i.Configuration)
			return nil
		} else if !kubeapi.IsConflict(err) {
			break
		}
	}
	return fmt.Errorf("patching the MutatingWebhookConfiguration %s: %w", i.Configuration, err)
}

const maxAuthorities = 8 // in the configuration

// bundle returns the authorities for a configuration that now has was, as PEM, the newest first. Older ones than ours stay
// until overlap has passed. A newer one always stays: ours may have been read from the Secret just before it was replaced.
func (i *Issuer) bundle(authority *x509.Certificate, was []byte) []byte {
	now := time.Now()
	settled := now.Sub(authority.NotBefore) > overlap+backdate
	newest := func(a, b *x509.Certificate) int {
		return cmp.Or(b.NotBefore.Compare(a.NotBefore), bytes.Compare(a.Raw, b.Raw))
	}
	var all []*x509.Certificate
	for block, rest := pem.Decode(was); block != nil; block, rest = pem.Decode(rest) {
		other, err := x509.ParseCertificate(block.Bytes)
		if err != nil || other.Equal(authority) || now.After(other.NotAfter) || settled && !other.NotBefore.After(authority.NotBefore) {
			continue
		}
		all = append(all, other)
	}
	slices.SortFunc(all, newest)
	all = append(slices.CompactFunc(all, (*x509.Certificate).Equal), authority)
	if len(all) > maxAuthorities {
		all = append(all[:maxAuthorities-1], authority)
	}
	slices.SortFunc(all, newest)
	var bundle []byte
	for _, one := range all {
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: one.Raw})...)
	}
	return bundle
}

const podSecurityLabel = "pod-security.kubernetes.io/enforce"

// ownNamespace is the namespace that the documents use. Helm labels a namespace that it creates with its name.
const (
	ownNamespace = "pillion-system"
	createdLabel = "name"
)

// labelNamespace sets the Pod Security level of the webhook's namespace if the namespace is its own and has no level. In
// another one, pods of others could violate the level. `helm install --create-namespace` cannot set it. The webhook works
// without it, so a failure is only logged.
func (i *Issuer) labelNamespace(ctx context.Context) {
	if i.PodSecurity == "" {
		return
	}
	path := "/api/v1/namespaces/" + i.Namespace
	var namespace struct {
		Metadata struct {
			Labels map[string]string `json:"labels"`
		} `json:"metadata"`
	}
	err := i.API.Get(ctx, path, &namespace)
	labels := namespace.Metadata.Labels
	own := i.Namespace == ownNamespace || labels[createdLabel] == i.Namespace
	if _, has := labels[podSecurityLabel]; err == nil && own && !has {
		err = i.API.Patch(ctx, path, "application/merge-patch+json", object{"metadata": object{"labels": object{podSecurityLabel: i.PodSecurity}}})
	}
	if err != nil {
		i.Log.Warn("cannot set the Pod Security level of the namespace", "namespace", i.Namespace, "error", err)
	}
}
