package secure

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

// without is a Source of a pod without a configuration and without an identity.
type without struct{}

func (without) Snapshot() *mesh.Snapshot     { return nil }
func (without) Identity() *identity.Identity { return nil }

// Certificates and roots in files do not come from the control plane.
func TestSecretsInFilesNeedNoControlPlane(t *testing.T) {
	authority := securetest.New(t, "root")
	leaf := authority.Leaf(t, "spiffe://cluster.local/ns/shop/sa/web", nil)
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	chain := []byte{}
	for _, raw := range leaf.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})...)
	}
	for name, text := range map[string][]byte{"chain": chain, "key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})} {
		if err := os.WriteFile(filepath.Join(directory, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := NewContexts(without{}, nil)
	got, err := c.certificate("file-cert:" + directory + "/chain~" + directory + "/key")
	if err != nil || string(got.Certificate[0]) != string(leaf.Certificate[0]) {
		t.Errorf("error %v, or another certificate", err)
	}
	trust, err := c.trust("file-root:" + directory + "/chain")
	if err != nil || trust.Roots.Pool == nil || string(trust.Roots.PEM) != string(chain) {
		t.Errorf("trust %+v, error %v", trust, err)
	}
	if trust, err := c.trust("file-root:system"); err != nil || trust.Roots.Pool != nil {
		t.Errorf("trust %+v, error %v", trust, err)
	}
	for _, name := range []string{"file-root:" + directory + "/none", "kubernetes://shop/web"} {
		if _, err := c.trust(name); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v", name, err)
		}
		if _, err := c.certificate(name); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}
