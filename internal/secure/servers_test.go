package secure

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// pushed is a Source of secrets that the control plane has sent.
type pushed struct{ snapshot *mesh.Snapshot }

func (p *pushed) Snapshot() *mesh.Snapshot   { return p.snapshot }
func (*pushed) Identity() *identity.Identity { return nil }

// push puts secrets in force, as they are encoded.
func (p *pushed) push(t testing.TB, secrets ...[]byte) {
	t.Helper()
	edit := p.snapshot.Edit()
	for _, b := range secrets {
		s, findings, err := mesh.DecodeSecret(b)
		if err != nil || len(findings) > 0 {
			t.Fatal(err, findings)
		}
		edit.SetSecret(s.Name, s)
	}
	p.snapshot, _ = edit.Snapshot()
}

// meet performs a handshake between a filter chain's TLS and a client.
func (w *world) meet(t *testing.T, source Source, chain *mesh.DownstreamTLS, client *tls.Config) (*Session, error) {
	t.Helper()
	context, err := NewContexts(source, nil).Server(chain, false)
	if err != nil {
		t.Fatal(err)
	}
	far, near := w.pair(t)
	go tls.Client(far, client).Handshake()
	waiter := tcp.NewWaiter(t.Context())
	defer waiter.Close()
	return Server(waiter, near, nil, context, Memory{}, time.Now().Add(nettest.Patience))
}

// Of several certificates the client gets the one with the name that it asks for, and of these one whose key it can use.
func TestACertificateIsChosenByNameAndKey(t *testing.T) {
	w, source := newWorld(t), &pushed{}
	certificates := map[string]*tls.Certificate{
		"rsa": w.RSA(t, "shop.example"), "ecdsa": w.ECDSA(t, "shop.example"),
		"wild-rsa": w.RSA(t, "*.example"), "wild-ecdsa": w.ECDSA(t, "*.example"), "other": w.ECDSA(t, "other.test"),
	}
	for name, c := range certificates {
		source.push(t, securetest.Secret(t, name, c))
	}
	both := []string{"rsa", "ecdsa"}
	all := []string{"other", "wild-rsa", "wild-ecdsa", "rsa", "ecdsa"}
	onlyRSA := func(c *tls.Config) {
		c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	}
	onlyECDSA := func(c *tls.Config) {
		c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}
	}
	for _, test := range []struct {
		names  []string
		sni    string
		client func(*tls.Config)
		want   string
	}{
		{both, "shop.example", nil, "ecdsa"}, // as in Envoy
		{both, "shop.example", onlyRSA, "rsa"},
		{both, "shop.example", onlyECDSA, "ecdsa"},
		{both, "", onlyRSA, "rsa"},
		{both, "", nil, "ecdsa"},
		{[]string{"ecdsa", "rsa"}, "unknown.test", onlyRSA, "rsa"},
		{all, "SHOP.example", nil, "ecdsa"},
		{all, "shop.example", onlyRSA, "rsa"},
		{all, "blog.example", nil, "wild-ecdsa"},
		{all, "blog.example", onlyRSA, "wild-rsa"},
		{all, "a.b.example", nil, "other"}, // a wildcard stands for one label
		{all, "other.test", onlyECDSA, "other"},
		{all, "other.test", onlyRSA, "wild-rsa"},
		{[]string{"missing", "rsa"}, "shop.example", nil, "rsa"},
		{[]string{"rsa", "missing"}, "shop.example", nil, "rsa"},
	} {
		client := w.peer()
		if client.ServerName = test.sni; test.client != nil {
			test.client(client)
		}
		session, err := w.meet(t, source, &mesh.DownstreamTLS{Certificates: test.names}, client)
		if err != nil || !session.Local.Equal(certificates[test.want].Leaf) {
			t.Errorf("%q for %q: error %v, or another certificate than %s", test.names, test.sni, err, test.want)
		}
	}
	// Without a key that the client can use, the handshake ends.
	client := w.peer()
	onlyECDSA(client)
	if _, err := w.meet(t, source, &mesh.DownstreamTLS{Certificates: []string{"rsa", "wild-rsa"}}, client); !failedAs(err, Version) {
		t.Errorf("error %v", err)
	}
}

func failedAs(err error, failure Failure) bool {
	var failed *Error
	return errors.As(err, &failed) && failed.Failure == failure
}

// Each mode of a gateway's server, with each client.
func TestModesOfServersWithEachClient(t *testing.T) {
	w, source := newWorld(t), &pushed{}
	stranger := securetest.New(t, "root of strangers")
	good := w.Leaf(t, "", func(c *x509.Certificate) { c.DNSNames = []string{"partner.example"} })
	revoked := w.Leaf(t, "", func(c *x509.Certificate) { c.SerialNumber.SetInt64(99) })
	source.push(t, securetest.Secret(t, "cert", w.ECDSA(t, "shop.example")), securetest.RootsSecret("ca", w.Roots, nil),
		securetest.RootsSecret("ca-with-list", w.Roots, w.Revoke(t, revoked)))
	clients := map[string]*tls.Certificate{
		"none": nil, "good": good, "of another CA": stranger.ECDSA(t, "partner.example"), "revoked": revoked,
		"expired":          w.Leaf(t, "", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
		"not valid yet":    w.Leaf(t, "", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
		"for servers only": w.Leaf(t, "", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }),
	}
	file := func(text []byte) string {
		path := filepath.Join(t.TempDir(), "crl.pem")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	lists, others := mesh.CRL{Path: file(w.Revoke(t, revoked))}, mesh.CRL{Path: file(stranger.Revoke(t, revoked))}
	const accepted = Failure(255)
	invalid := func(none, good, revoked Failure) map[string]Failure {
		return map[string]Failure{"none": none, "good": good, "revoked": revoked, "of another CA": UnknownRoot, "expired": Expired, "not valid yet": NotYetValid, "for servers only": WrongUsage}
	}
	every := map[string]Failure{}
	for name := range clients {
		every[name] = accepted
	}
	lacking := map[string]Failure{}
	for name := range clients {
		lacking[name] = NoIdentity
	}
	names := []mesh.NameMatcher{{StringMatcher: mesh.StringMatcher{Text: "other.example"}}}
	certificateHash, keyHash := sha256.Sum256(good.Leaf.Raw), sha256.Sum256(good.Leaf.RawSubjectPublicKeyInfo)
	for mode, test := range map[string]struct {
		chain mesh.DownstreamTLS
		want  map[string]Failure
	}{
		"SIMPLE":                                   {mesh.DownstreamTLS{}, every},
		"MUTUAL":                                   {mesh.DownstreamTLS{Roots: "ca", RequireClient: true}, invalid(NoCertificate, accepted, accepted)},
		"MUTUAL with a list":                       {mesh.DownstreamTLS{Roots: "ca-with-list", RequireClient: true}, invalid(NoCertificate, accepted, Revoked)},
		"MUTUAL with lists in a file":              {mesh.DownstreamTLS{Roots: "ca", RequireClient: true, CRL: lists}, invalid(NoCertificate, accepted, Revoked)},
		"MUTUAL with lists in a file, of leaves":   {mesh.DownstreamTLS{Roots: "ca", RequireClient: true, CRL: mesh.CRL{Path: lists.Path, LeafOnly: true}}, invalid(NoCertificate, accepted, Revoked)},
		"MUTUAL with lists of another CA":          {mesh.DownstreamTLS{Roots: "ca", RequireClient: true, CRL: others}, invalid(NoCertificate, Revoked, Revoked)},
		"MUTUAL with lists of a file and a secret": {mesh.DownstreamTLS{Roots: "ca-with-list", RequireClient: true, CRL: others}, invalid(NoCertificate, accepted, Revoked)},
		"MUTUAL whose file of lists is missing":    {mesh.DownstreamTLS{Roots: "ca", RequireClient: true, CRL: mesh.CRL{Path: lists.Path + "x"}}, lacking},
		"MUTUAL whose file of lists is none":       {mesh.DownstreamTLS{Roots: "ca", RequireClient: true, CRL: mesh.CRL{Path: file([]byte("no list"))}}, lacking},
		"OPTIONAL_MUTUAL":                          {mesh.DownstreamTLS{Roots: "ca"}, invalid(accepted, accepted, accepted)},
		"OPTIONAL_MUTUAL with a list":              {mesh.DownstreamTLS{Roots: "ca-with-list"}, invalid(accepted, accepted, Revoked)},
		"MUTUAL with names":                        {mesh.DownstreamTLS{Roots: "ca", RequireClient: true, Names: names}, invalid(NoCertificate, NameRefused, NameRefused)},
		"MUTUAL with a hash":                       {mesh.DownstreamTLS{Roots: "ca", RequireClient: true, Pins: []mesh.Pin{{Hash: certificateHash}}}, invalid(NoCertificate, accepted, NotPinned)},
		"MUTUAL with a key's hash":                 {mesh.DownstreamTLS{Roots: "ca", RequireClient: true, Pins: []mesh.Pin{{}, {Key: true, Hash: keyHash}}}, invalid(NoCertificate, accepted, NotPinned)},
		"MUTUAL with a hash of the other kind":     {mesh.DownstreamTLS{Roots: "ca", RequireClient: true, Pins: []mesh.Pin{{Hash: keyHash}}}, invalid(NoCertificate, NotPinned, NotPinned)},
		"MUTUAL whose roots are missing":           {mesh.DownstreamTLS{Roots: "cert-cacert", RequireClient: true}, lacking},
		"OPTIONAL_MUTUAL whose roots are missing":  {mesh.DownstreamTLS{Roots: "cert-cacert"}, lacking},
		"a certificate in the place of roots":      {mesh.DownstreamTLS{Roots: "cert"}, lacking},
	} {
		t.Run(mode, func(t *testing.T) {
			chain := test.chain
			chain.Certificates = []string{"cert"}
			for name, certificate := range clients {
				client := w.peer()
				client.Certificates = nil
				if certificate != nil {
					client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil }
				}
				session, err := w.meet(t, source, &chain, client)
				want := test.want[name]
				if want == accepted && err != nil || want != accepted && (session != nil || !failedAs(err, want)) {
					t.Errorf("%s: session %v, error %v", name, session != nil, err)
				}
				if err == nil && (session.Peer != nil) != (certificate != nil && chain.Roots != "") {
					t.Errorf("%s: the session's peer is %v", name, session.Peer)
				}
			}
		})
	}
}

// The secret that is missing is named, and the handshake succeeds when it has come. A new version is for the next handshake.
func TestAMissingSecretIsNamedUntilItComes(t *testing.T) {
	w, source := newWorld(t), &pushed{snapshot: &mesh.Snapshot{}}
	chain := &mesh.DownstreamTLS{Certificates: []string{"kubernetes://shop-cert"}}
	if _, err := w.meet(t, source, chain, w.peer()); !failedAs(err, NoIdentity) || !strings.Contains(err.Error(), "kubernetes://shop-cert") {
		t.Errorf("error %v", err)
	}
	for range 2 {
		next := w.ECDSA(t, "shop.example")
		source.push(t, securetest.Secret(t, "kubernetes://shop-cert", next))
		if session, err := w.meet(t, source, chain, w.peer()); err != nil || !session.Local.Equal(next.Leaf) {
			t.Errorf("error %v, or another certificate", err)
		}
	}
}

// Versions and cipher suites are those that the configuration names.
func TestServersHaveTheConfiguredVersionsAndSuites(t *testing.T) {
	w, source := newWorld(t), &pushed{}
	source.push(t, securetest.Secret(t, "cert", w.ECDSA(t, "shop.example")))
	const chacha, cbc, gcm = tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
	for _, test := range []struct {
		chain          mesh.DownstreamTLS
		version, suite uint16 // of the client
		ok             bool
	}{
		{mesh.DownstreamTLS{}, tls.VersionTLS11, cbc, false},
		{mesh.DownstreamTLS{}, tls.VersionTLS12, chacha, true},
		{mesh.DownstreamTLS{}, tls.VersionTLS12, cbc, false},
		{mesh.DownstreamTLS{}, tls.VersionTLS13, 0, true},
		{mesh.DownstreamTLS{Suites: []uint16{cbc}}, tls.VersionTLS12, cbc, true},
		{mesh.DownstreamTLS{Suites: []uint16{cbc}}, tls.VersionTLS12, gcm, false},
		{mesh.DownstreamTLS{Suites: []uint16{cbc}}, tls.VersionTLS13, 0, true},
		{mesh.DownstreamTLS{MinVersion: 4}, tls.VersionTLS12, gcm, false},
		{mesh.DownstreamTLS{MaxVersion: 3}, tls.VersionTLS13, 0, false},
		{mesh.DownstreamTLS{MinVersion: 1, MaxVersion: 3}, tls.VersionTLS12, gcm, true},
		{mesh.DownstreamTLS{MinVersion: 1, MaxVersion: 2}, tls.VersionTLS11, cbc, false},
	} {
		client, chain := w.peer(), test.chain
		chain.Certificates = []string{"cert"}
		client.MinVersion, client.MaxVersion, client.CipherSuites = test.version, test.version, []uint16{test.suite}
		session, err := w.meet(t, source, &chain, client)
		if ok := err == nil; ok != test.ok || ok && (session.Version != test.version || session.Version < tls.VersionTLS13 && session.Suite != test.suite) {
			t.Errorf("%+v with version %#x and suite %#x: session %+v, error %v", test.chain, test.version, test.suite, session, err)
		}
	}
}

// owning is a Source with an identity of the workload besides secrets.
type owning struct {
	pushed
	own *identity.Identity
}

func (o *owning) Identity() *identity.Identity { return o.own }

// reach performs a handshake with a server that presents a certificate, as a cluster's TLS has it.
func (w *world) reach(t *testing.T, source Source, cluster *mesh.UpstreamTLS, host string, server *tls.Certificate) error {
	t.Helper()
	context, err := NewContexts(source, nil).Client(cluster, HTTP1, host)
	if err != nil {
		t.Fatal(err)
	}
	far, near := w.pair(t)
	go tls.Server(far, &tls.Config{Certificates: []tls.Certificate{*server}}).Handshake()
	waiter := tcp.NewWaiter(t.Context())
	defer waiter.Close()
	_, err = Client(waiter, near, context, time.Now().Add(nettest.Patience))
	return err
}

// What a cluster's TLS demands of a server's certificate.
func TestServersAreVerifiedAsConfigured(t *testing.T) {
	w := newWorld(t)
	named := func(name string) *tls.Certificate {
		return w.Leaf(t, "", func(c *x509.Certificate) { c.DNSNames = []string{name} })
	}
	issuer := w.issuer(t, func(c *x509.Certificate) {
		c.SerialNumber.SetInt64(98)
		c.KeyUsage |= x509.KeyUsageCRLSign
	})
	revoked := w.Leaf(t, idOfServer, func(c *x509.Certificate) { c.SerialNumber.SetInt64(99) })
	servers := map[string]*tls.Certificate{
		"workload": w.server, "revoked": revoked, "web.example": named("web.example"), "wild": named("*.example"),
		"for clients only": w.Leaf(t, idOfServer, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }),
		"of another CA":    securetest.New(t, "another root").Leaf(t, idOfServer, nil),
		"under a revoked":  issuer.Leaf(t, idOfServer, nil),
	}
	servers["under a revoked"].Certificate = append(servers["under a revoked"].Certificate, issuer.Certificate.Raw)
	lists := append(w.Revoke(t, revoked, &tls.Certificate{Leaf: issuer.Certificate}), issuer.Revoke(t)...)
	file := filepath.Join(t.TempDir(), "crl.pem")
	if err := os.WriteFile(file, lists, 0o600); err != nil {
		t.Fatal(err)
	}
	parsed, err := identity.ParseRevocations(lists)
	if err != nil {
		t.Fatal(err)
	}
	plain, listed := &owning{own: &identity.Identity{Roots: w.Roots}}, &owning{own: &identity.Identity{Roots: w.Roots, Revocations: parsed}}
	for _, source := range []*owning{plain, listed} {
		source.push(t, securetest.RootsSecret("ca", w.Roots, nil))
		edit := source.snapshot.Edit()
		refused := *source.snapshot.Secret("ca")
		refused.Name, refused.Refused = "refused", true
		edit.SetSecret("refused", &refused)
		source.snapshot, _ = edit.Snapshot()
	}
	const accepted = Failure(255)
	each := func(workload, revoked, web, wild, under Failure) map[string]Failure {
		return map[string]Failure{
			"workload": workload, "revoked": revoked, "web.example": web, "wild": wild, "under a revoked": under,
			"for clients only": WrongUsage, "of another CA": UnknownRoot,
		}
	}
	none := map[string]Failure{}
	for name := range servers {
		none[name] = NoIdentity
	}
	lines := []mesh.NameMatcher{{StringMatcher: mesh.StringMatcher{Kind: mesh.MatchRegex, Text: ".*"}}}
	for name, c := range map[string]struct {
		source  *owning
		cluster mesh.UpstreamTLS
		host    string
		want    map[string]Failure
	}{
		"roots":                         {plain, mesh.UpstreamTLS{Roots: "ca"}, "", each(accepted, accepted, accepted, accepted, accepted)},
		"roots that are not supported":  {plain, mesh.UpstreamTLS{Roots: "refused"}, "", none},
		"the mesh":                      {plain, mesh.UpstreamTLS{Roots: OwnRoots}, "", each(accepted, accepted, NoSPIFFE, NoSPIFFE, accepted)},
		"the mesh, with lists":          {listed, mesh.UpstreamTLS{Roots: OwnRoots}, "", each(accepted, Revoked, NoSPIFFE, NoSPIFFE, Revoked)},
		"lists in a file":               {plain, mesh.UpstreamTLS{Roots: "ca", CRL: mesh.CRL{Path: file}}, "", each(accepted, Revoked, accepted, accepted, Revoked)},
		"lists in a file, of leaves":    {plain, mesh.UpstreamTLS{Roots: "ca", CRL: mesh.CRL{Path: file, LeafOnly: true}}, "", each(accepted, Revoked, accepted, accepted, accepted)},
		"the host of the request":       {plain, mesh.UpstreamTLS{Roots: "ca", HostName: true}, "web.example", each(NameRefused, NameRefused, accepted, accepted, NameRefused)},
		"another host":                  {plain, mesh.UpstreamTLS{Roots: "ca", HostName: true}, "a.web.example", each(NameRefused, NameRefused, NameRefused, NameRefused, NameRefused)},
		"the host instead of the names": {plain, mesh.UpstreamTLS{Roots: "ca", HostName: true, Names: lines}, "other.example", each(NameRefused, NameRefused, NameRefused, accepted, NameRefused)},
		"another hash":                  {plain, mesh.UpstreamTLS{Roots: OwnRoots, Pins: []mesh.Pin{{}}}, "", each(NotPinned, NotPinned, NoSPIFFE, NoSPIFFE, NotPinned)},
	} {
		for server, want := range c.want {
			if err := w.reach(t, c.source, &c.cluster, c.host, servers[server]); want == accepted && err != nil || want != accepted && !failedAs(err, want) {
				t.Errorf("%s, the server %s: %v", name, server, err)
			}
		}
	}
	// A server of the mesh demands a SPIFFE ID of its clients as well.
	chain := &mesh.DownstreamTLS{Certificates: []string{OwnCertificate}, Roots: OwnRoots, RequireClient: true}
	plain.own.Certificate, listed.own.Certificate = *w.server, *w.server
	for name, want := range each(accepted, Revoked, NoSPIFFE, NoSPIFFE, Revoked) {
		client := w.peer()
		client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return servers[name], nil }
		if name == "for clients only" {
			want = accepted
		}
		if session, err := w.meet(t, listed, chain, client); want == accepted && err != nil || want != accepted && (session != nil || !failedAs(err, want)) {
			t.Errorf("the client %s: %v", name, err)
		}
	}
}
