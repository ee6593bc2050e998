package terminal

import (
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/certview"
)

var noon = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

func leaf() certview.Certificate {
	return certview.Certificate{
		URIs: "spiffe://cluster.local/ns/shop/sa/web", Issuer: "O=cluster.local", Serial: "0a00ff", Key: "ECDSA P-256",
		NotBefore: noon.Add(-time.Hour), NotAfter: noon.Add(23 * time.Hour), SHA256: "685a2db5",
	}
}

func root() certview.Certificate {
	return certview.Certificate{Subject: "O=cluster.local", Serial: "01", NotBefore: noon.Add(-time.Hour), NotAfter: noon.Add(87600 * time.Hour)}
}

func TestTheIdentityOnOneScreen(t *testing.T) {
	i := &certview.Identity{
		Source: "CA", SPIFFE: "spiffe://cluster.local/ns/shop/sa/web", Chain: []certview.Certificate{leaf(), root()}, Roots: []certview.Certificate{root()},
		Renewal: noon.Add(11 * time.Hour), Renewals: 2, Failures: 1, Why: "no CA\n", Revocations: true,
	}
	want := `Certificate of this workload, from the CA
  identity  spiffe://cluster.local/ns/shop/sa/web
  issuer    O=cluster.local
  serial    0a00ff
  SHA-256   685a2db5
  key       ECDSA P-256
  valid     2026-11-29 11:00:00Z to 2026-11-30 11:00:00Z, 23h0m0s left
  chain     O=cluster.local, serial 01, until 2036-11-26 12:00:00Z, 87600h0m0s left
  renewal   2026-11-29 23:00:00Z (in 11h0m0s); 2 certificates so far, 1 failures
            the last attempt failed: no CA�

Roots of trust
  O=cluster.local, serial 01, until 2036-11-26 12:00:00Z, 87600h0m0s left
  Revocation lists are in force.
`
	if got := Identity(i, noon, false); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	i.Chain[0].NotAfter = noon.Add(-time.Minute)
	if got := Identity(i, noon, false); !strings.Contains(got, "expired 1m0s ago") {
		t.Errorf("an expired certificate is\n%s", got)
	}
	i.Chain[0].NotBefore = noon.Add(time.Minute)
	if got := Identity(i, noon, false); !strings.Contains(got, "not valid yet") {
		t.Errorf("an early certificate is\n%s", got)
	}
	if got := Identity(&certview.Identity{Source: "files"}, noon, false); !strings.Contains(got, "there is none yet") || !strings.Contains(got, "Roots of trust\n  none\n") {
		t.Errorf("no certificate is\n%s", got)
	}
}

func TestAHandshakeOnOneScreen(t *testing.T) {
	h := &certview.Handshake{
		Address: "web.shop:8080", Peer: "192.0.2.7:8080", ServerName: "web.shop", Offered: []string{"istio"}, Version: "TLSv1.3", Cipher: "TLS_AES_128_GCM_SHA256",
		SPIFFE: "spiffe://cluster.local/ns/shop/sa/web", Chain: []certview.Certificate{leaf(), root()},
		Requested: true, AcceptableCAs: []string{"O=cluster.local", "O=old\x1b"}, Presented: "spiffe://cluster.local/ns/shop/sa/client", Verified: true,
	}
	want := `web.shop:8080 (192.0.2.7:8080)
  TLS       TLSv1.3, TLS_AES_128_GCM_SHA256
  ALPN      istio offered, none agreed on
  SNI       web.shop
  identity  spiffe://cluster.local/ns/shop/sa/web
  issuer    O=cluster.local
  serial    0a00ff
  SHA-256   685a2db5
  key       ECDSA P-256
  valid     2026-11-29 11:00:00Z to 2026-11-30 11:00:00Z, 23h0m0s left
  chain     O=cluster.local, serial 01, until 2036-11-26 12:00:00Z, 87600h0m0s left
  client    presented spiffe://cluster.local/ns/shop/sa/client
  CAs       O=cluster.local
            O=old�
  verified  by the roots of trust
`
	if got := Handshake(h, noon, false); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	for name, c := range map[string]struct {
		h    certview.Handshake
		want string
	}{
		"refused":        {certview.Handshake{Address: "a:1", Chain: []certview.Certificate{leaf()}, Refused: "the peer's certificate is expired"}, "  verified  no: the peer's certificate is expired\n"},
		"rejected":       {certview.Handshake{Address: "a:1", Rejected: "certificate required"}, "  rejected  by the server: certificate required\n"},
		"no TLS":         {certview.Handshake{Address: "a:1", Error: "the server does not speak TLS"}, "a:1\n  SNI       not sent\n  failed    the server does not speak TLS\n"},
		"no roots":       {certview.Handshake{Address: "a:1", Chain: []certview.Certificate{leaf()}}, "  verified  no: there are no roots of trust to verify it with\n"},
		"not asked":      {certview.Handshake{Address: "a:1", Version: "TLSv1.2"}, "  client    the server has not asked for a certificate\n"},
		"none presented": {certview.Handshake{Address: "a:1", Requested: true}, "and none was presented\n  CAs       the server names none\n"},
	} {
		if got := Handshake(&c.h, noon, false); !strings.Contains(got, c.want) {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, c.want)
		}
	}
}
