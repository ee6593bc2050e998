package controlplane

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/grpcwire"
	"github.com/pillion-proxy/pillion/internal/identity"
)

func TestAKeptCertificateIsUsedUntilTheCAAnswers(t *testing.T) {
	certificate, key := selfSigned(t, "web")
	const web = "spiffe://cluster.local/ns/shop/sa/web"
	for name, c := range map[string]struct {
		spiffe string
		damage func(t *testing.T, directory string)
		log    string // empty: it is used
	}{
		"kept":                {web, func(*testing.T, string) {}, ""},
		"of another workload": {"spiffe://cluster.local/ns/shop/sa/cart", func(*testing.T, string) {}, "it is that of " + web},
		"damaged": {web, func(t *testing.T, directory string) {
			if err := os.WriteFile(filepath.Join(directory, "key.pem"), []byte("no key"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "kept workload certificate ignored"},
	} {
		t.Run(name, func(t *testing.T) {
			files := writeFiles(t, certificate, key)
			current, err := files.Fetch(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			var log bytes.Buffer
			denied := &grpcwire.Error{Code: envoy.GRPCUnauthenticated}
			ca := &identity.CA{SPIFFE: c.spiffe, Call: func(context.Context, string, []byte) ([]byte, error) { return nil, denied }}
			k := &keptIdentity{CA: ca, directory: filepath.Join(t.TempDir(), "kept"), log: slog.New(slog.NewTextHandler(&log, nil))}
			k.save(current)
			c.damage(t, k.directory)
			got, err := k.Fetch(t.Context())
			if c.log == "" && (err != nil || !got.Certificate.Leaf.Equal(current.Certificate.Leaf)) {
				t.Errorf("%v, %v", got, err)
			}
			if c.log != "" && (err != error(denied) || !strings.Contains(log.String(), c.log)) {
				t.Errorf("error %v, log %s", err, &log)
			}
			if _, err := k.Fetch(t.Context()); err != error(denied) { // the next one is the CA's
				t.Errorf("the second time: %v", err)
			}
		})
	}
}

func TestWithoutAKeptCertificateTheCAIsCalled(t *testing.T) {
	denied := &grpcwire.Error{Code: envoy.GRPCUnauthenticated}
	var log bytes.Buffer
	ca := &identity.CA{SPIFFE: "spiffe://a/b", Call: func(context.Context, string, []byte) ([]byte, error) { return nil, denied }}
	k := &keptIdentity{CA: ca, directory: t.TempDir(), log: slog.New(slog.NewTextHandler(&log, nil))}
	if _, err := k.Fetch(t.Context()); err != error(denied) || log.Len() > 0 {
		t.Errorf("%v, log %s", err, &log)
	}
}
