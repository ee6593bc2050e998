package istiod

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// replaceToken writes the token as a kubelet does: another file takes the place of the old one.
func (x *proxy) replaceToken(t *testing.T, token string) {
	t.Helper()
	if err := os.WriteFile(x.server.Token+".new", []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(x.server.Token+".new", x.server.Token); err != nil {
		t.Fatal(err)
	}
}

func TestARefusedTokenIsNamedAndItsSuccessorIsUsed(t *testing.T) {
	p := startPlane(t, "")
	for name, test := range map[string]struct {
		token          string
		stream, signer string // in the errors
	}{
		"unknown":                    {"another-token", "UNAUTHENTICATED", "UNAUTHENTICATED"},
		"of another service account": {"ingress-token", "no identities", ""}, // the CA signs for the token's account
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			protocols(t, func(t *testing.T, delta bool) {
				x := newProxy(t, p, sidecar(), delta)
				x.replaceToken(t, test.token)
				x.start(t)
				await(t, func() error {
					status := x.client.Status()
					if status.Connected || status.LastError == nil || !strings.Contains(status.LastError.Error(), test.stream) {
						return fmt.Errorf("stream: %+v", status)
					}
					return nil
				})
				await(t, func() error { return x.failure(test.signer) })
				x.replaceToken(t, "nginx-token")
				x.converged(t, p, func() error { return nil })
				if test.signer != "" {
					await(t, func() error { return x.failure("") })
				}
				x.stop()
			})
		})
	}
}

// failure returns nil if the last fetch of an identity failed with text in its error; for an empty text, if it succeeded.
func (x *proxy) failure(text string) error {
	status := x.keeper.Status()
	switch {
	case text == "" && status.LastError == nil && x.keeper.Current() != nil:
		return nil
	case text != "" && status.LastError != nil && strings.Contains(status.LastError.Error(), text):
		return nil
	}
	return fmt.Errorf("identity: %+v, want an error with %q", status, text)
}

// roots returns the CA's present roots.
func (p *plane) presentRoots(t *testing.T) *identity.Roots {
	t.Helper()
	roots, err := identity.ParseRoots(p.ca.GetCAKeyCertBundle().GetRootCertPem())
	if err != nil {
		t.Fatal(err)
	}
	return roots
}

// verifies returns whether the identity's certificate was issued under roots.
func verifies(current *identity.Identity, roots *identity.Roots) error {
	_, err := current.Certificate.Leaf.Verify(x509.VerifyOptions{Roots: roots.Pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}

func TestANewRootRenewsTheIdentityAndBothAreTrustedMeanwhile(t *testing.T) {
	p := startPlane(t, "")
	x := startProxy(t, p, sidecar(), true)
	x.converged(t, p, func() error { return x.failure("") })
	before, old := x.keeper.Current(), p.presentRoots(t)
	p.rotate()
	p.anchor() // istiod announces the new root
	await(t, func() error {
		current := x.keeper.Current()
		if current == before {
			return errors.New("the identity is the one before")
		}
		if err := verifies(before, current.Roots); err != nil {
			return fmt.Errorf("peers with the old root: %w", err)
		}
		if err := verifies(current, current.Roots); err != nil {
			return fmt.Errorf("peers with the new root: %w", err)
		}
		if verifies(current, old) == nil {
			return errors.New("the identity is under the old root")
		}
		return nil
	})
	p.publishRoots()
	p.stop()
	p.start() // it serves with a certificate under the new root
	x.converged(t, p, func() error { return nil })
}

func TestAGatewayGetsItsListenersRoutesAndSecrets(t *testing.T) {
	p := startPlane(t, readCase(t, "11-gateway-tls"), gatewayCertificate(t))
	secrets := p.KubeClient().Kube().CoreV1().Secrets("default")
	protocols(t, func(t *testing.T, delta bool) {
		x := startProxy(t, p, gateway(), delta)
		x.converged(t, p, func() error { return nil })
		for kind, want := range map[xds.Type][]string{
			xds.Listeners: {"0.0.0.0_31400", "0.0.0.0_8080", "0.0.0.0_8443", "0.0.0.0_8444"},
			xds.Routes:    {"http.8080", "https.443.https.ingress.default", "https.443.mtls.ingress.default"},
			xds.Secrets:   {"kubernetes://shop-cert", "kubernetes://shop-cert-cacert"},
		} {
			if got := x.names(kind); !slices.Equal(got, want) {
				t.Errorf("%v %q, want %q", kind, got, want)
			}
		}
		check := func(secret *core.Secret) error {
			server, _, err := mesh.DecodeSecret(x.get(xds.Secrets, "kubernetes://shop-cert"))
			if err != nil {
				return err
			}
			if server.Certificate == nil || !bytes.Equal(server.Certificate.Chain, secret.Data["tls.crt"]) || !bytes.Equal(server.Certificate.Key.PEM(), secret.Data["tls.key"]) {
				return errors.New("the certificate is not the Secret's")
			}
			roots, _, err := mesh.DecodeSecret(x.get(xds.Secrets, "kubernetes://shop-cert-cacert"))
			if err != nil {
				return err
			}
			if roots.Roots == nil || !bytes.Equal(roots.Roots.CA, secret.Data["ca.crt"]) {
				return errors.New("the roots are not the Secret's")
			}
			return nil
		}
		secret, err := secrets.Get(t.Context(), "shop-cert", meta.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := check(secret); err != nil {
			t.Error(err)
		}
		other := parseSecret(t, gatewayCertificate(t))
		secret = secret.DeepCopy()
		secret.Data = maps.Clone(other.Data)
		if _, err := secrets.Update(t.Context(), secret, meta.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		await(t, func() error {
			p.secretChanged("default", "shop-cert")
			return check(secret)
		})
		x.stop()
	})
}
