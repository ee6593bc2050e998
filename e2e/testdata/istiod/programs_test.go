package istiod

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// credential is a certificate of a service account of the mesh, in files for other programs.
type credential struct{ directory string }

// issue has the CA issue a certificate, as it would for a proxy of another make.
func issue(t *testing.T, p *plane, account string) credential {
	t.Helper()
	chain, key, err := p.ca.GenKeyCert([]string{"spiffe://cluster.local/ns/default/sa/" + account}, certificate, false)
	if err != nil {
		t.Fatal(err)
	}
	c := credential{filepath.Join(directory, t.Name(), account)}
	if err := os.MkdirAll(c.directory, 0o755); err != nil {
		t.Fatal(err)
	}
	roots := p.ca.GetCAKeyCertBundle().GetRootCertPem()
	for name, text := range map[string][]byte{"cert.pem": chain, "key.pem": key, "roots.pem": roots, "both.pem": append(append([]byte{}, chain...), key...)} {
		if err := os.WriteFile(c.file(name), text, 0o644); err != nil { // the programs have a user of their own
			t.Fatal(err)
		}
	}
	return c
}

func (c credential) file(name string) string { return filepath.Join(c.directory, name) }

// config is for grpc-go. It verifies the chain, and no name.
func (c credential) config(t *testing.T) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(c.file("cert.pem"), c.file("key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(c.file("roots.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	return &tls.Config{
		Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots, InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			return err
		},
	}
}

// run starts a program in a namespace, as a user whose connections are not captured.
func runProgram(t *testing.T, ns *nettest.Namespace, log *output, words ...string) {
	t.Helper()
	program, err := exec.LookPath(words[0])
	if err != nil {
		t.Fatalf("%v: run scripts/install-tools", err)
	}
	cmd := ns.Command(agentUID, agentUID, program, words[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	ns.Start(t, cmd)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s:\n%s", words[0], log)
		}
	})
}

const sniOfWeb = "outbound_.8080_._.web.default.svc.cluster.local"

// haproxyDefaults begins a configuration of HAProxy.
const haproxyDefaults = "defaults\n mode http\n timeout connect 10s\n timeout client 30s\n timeout server 30s\n"

// writeConfig writes a program's configuration, and returns its path.
func writeConfig(t *testing.T, text string) string {
	t.Helper()
	dir, err := os.MkdirTemp(directory, "config-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil { // nginx writes here
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIRECTORY", dir)), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

const nginxMain = "daemon off; pid DIRECTORY/pid; error_log stderr; events {}\nhttp {\n access_log off; client_body_temp_path DIRECTORY/a; proxy_temp_path DIRECTORY/b;" +
	" fastcgi_temp_path DIRECTORY/c; uwsgi_temp_path DIRECTORY/d; scgi_temp_path DIRECTORY/e;\n"

// Other programs' TLS, with Istio's ALPN and SNI where they can send them, is ended as that of Istio's proxies.
func TestOtherClientsSpeakMutualTLSWithTheAgent(t *testing.T) {
	c := newCouple(t, "STRICT")
	from, d := c.pods[0], c.pods[1]
	own := issue(t, c.plane, "openssl")
	http1 := []string{"-cert", own.file("cert.pem"), "-key", own.file("key.pem"), "-CAfile", own.file("roots.pem"), "-verify_return_error", "-quiet", "-ign_eof", "-servername", sniOfWeb}
	openssl := func(port, input string, more ...string) (string, error) {
		words := append(append([]string{"s_client", "-connect", d.ip + ":" + port}, http1...), more...)
		cmd := from.Command(agentUID, agentUID, "openssl", words...)
		cmd.Stdin = strings.NewReader(input)
		return from.Run(cmd)
	}
	request := func(path string) string {
		return "GET " + path + " HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"
	}
	identity := "URI=spiffe://cluster.local/ns/default/sa/openssl"
	await(t, func() error { // an agent is ready with its first configuration, and istiod's may not have the services yet
		out, err := openssl("8080", request("/first"))
		if err == nil && !strings.Contains(out, identity) {
			err = errors.New(out)
		}
		return err
	})
	for _, version := range []string{"-tls1_2", "-tls1_3"} {
		for _, alpn := range []string{"istio-http/1.1,istio,http/1.1", "istio", "istio-peer-exchange,istio", "other"} {
			if out, err := openssl("8080", request("/openssl"), version, "-alpn", alpn); err != nil || !strings.Contains(out, "HTTP/1.1 200 OK") || !strings.Contains(out, identity) {
				t.Errorf("openssl %s, ALPN %s: %v\n%s", version, alpn, err, out)
			}
		}
		if greeting := greet(t, from.Command(agentUID, agentUID, "openssl", append(append([]string{"s_client", "-connect", d.ip + ":8083"}, http1...), version, "-alpn", "istio")...), from.Namespace); greeting != "220 welcome\r\n" {
			t.Errorf("openssl %s, server first: %q", version, greeting)
		}
	}
	curl := []string{"curl", "-sS", "--cert", own.file("cert.pem"), "--key", own.file("key.pem"), "--cacert", own.file("roots.pem"), "-k", "--max-time", "60"}
	for _, version := range []string{"--http1.1", "--http2"} {
		out, err := from.Run(from.Command(agentUID, agentUID, curl[0], append(curl[1:], version, "https://"+d.ip+":8080/curl")...))
		if err != nil || !strings.Contains(out, identity) {
			t.Errorf("curl %s: %v\n%s", version, err, out)
		}
	}
	runProgram(t, from.Namespace, &output{}, "haproxy", "-f", writeConfig(t, haproxyDefaults+"frontend in\n bind 127.0.0.1:7001\n default_backend web\nbackend web\n server web "+
		d.ip+":8080 ssl crt "+own.file("both.pem")+" ca-file "+own.file("roots.pem")+" verify none sni str("+sniOfWeb+") alpn istio-http/1.1,istio,http/1.1\n"))
	runProgram(t, from.Namespace, &output{}, "nginx", "-c", writeConfig(t, nginxMain+" server { listen 127.0.0.1:7002; location / { proxy_http_version 1.1; proxy_pass https://"+d.ip+":8080; proxy_ssl_name "+sniOfWeb+
		"; proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.2 TLSv1.3; proxy_ssl_certificate "+own.file("cert.pem")+"; proxy_ssl_certificate_key "+own.file("key.pem")+"; } }\n}\n"))
	for name, port := range map[string]string{"haproxy": "7001", "nginx": "7002"} {
		await(t, func() error {
			out, err := from.Run(from.Command(agentUID, agentUID, "curl", "-sS", "--max-time", "60", "http://127.0.0.1:"+port+"/"+name))
			if err != nil || !strings.Contains(out, identity) {
				return fmt.Errorf("%s: %v %s", name, err, out)
			}
			return nil
		})
	}
	call(t, "grpc-go", grpc.WithTransportCredentials(credentials.NewTLS(own.config(t))), func(context.Context, string) (net.Conn, error) { return from.Dial("tcp", d.ip+":8081", patience) })
	known := "peer=spiffe://cluster.local/ns/default/sa/openssl- tls=TLSv1.3- workload=-- namespace=-- app=-- cluster=-- port="
	for _, want := range []string{"HTTP/1.1 /openssl " + known, "HTTP/1.1 /curl " + known, "HTTP/2 /curl " + known, "HTTP/1.1 /haproxy " + known, "HTTP/1.1 /nginx " + known, "HTTP/2 /grpc.health.v1.Health/Check " + known} {
		await(t, func() error {
			if !strings.Contains(d.log.String(), "SEEN INBOUND "+want) {
				return fmt.Errorf("the access log has no line with %q", want)
			}
			return nil
		})
	}
}

// greet returns the first line that a program prints while its input stays open: a server speaks first.
func greet(t *testing.T, cmd *exec.Cmd, ns *nettest.Namespace) string {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	process := ns.Start(t, cmd)
	line, _ := bufio.NewReader(out).ReadString('\n')
	in.Close()
	process.Kill()
	return line
}

func call(t *testing.T, who string, security grpc.DialOption, dial func(context.Context, string) (net.Conn, error)) {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///web.default.svc.cluster.local:8081", security, grpc.WithContextDialer(dial))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if answer, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil || answer.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("%s: %v, %v", who, answer, err)
	}
}

// The agent speaks with other programs' servers as with Istio's proxies: they see its certificate, SNI and ALPN.
func TestTheAgentSpeaksMutualTLSWithOtherServers(t *testing.T) {
	d := newPodOf(t, nginx())
	far := nettest.New(t, "far")
	far.AddAddress(t, "lo", netip.MustParsePrefix("203.0.113.8/32"))
	far.AddAddress(t, "lo", netip.MustParsePrefix("198.51.100.210/32"))
	nettest.Join(t, d.Namespace, far)
	for _, to := range []string{"203.0.113.8", "198.51.100.210"} {
		d.MustRun(t, "ip", "route", "add", to+"/32", "dev", "eth0", "src", d.ip)
	}
	far.MustRun(t, "ip", "route", "add", d.ip+"/32", "dev", "eth0", "src", "203.0.113.8")
	p := startPlaneOf(t, []*pod{d}, peerAuthentication("STRICT"), mutualServices)
	d.launch(t, p, "PILLION_ACCESS_LOG=/dev/stdout", "PILLION_ACCESS_LOG_FORMAT="+seenFormat)
	d.awaitReady(t)
	d.awaitIdentity(t)
	own := issue(t, p, "client") // of the endpoint's service account
	calls := grpc.NewServer(grpc.Creds(credentials.NewTLS(own.config(t))))
	healthpb.RegisterHealthServer(calls, health.NewServer())
	listener, served := far.Listen(t, "tcp", "0.0.0.0:8081"), make(chan struct{})
	go func() { defer close(served); calls.Serve(listener) }()
	t.Cleanup(func() { calls.Stop(); <-served })
	for name, c := range map[string]struct{ words, seen []string }{
		"openssl": {[]string{"openssl", "s_server", "-accept", "8080", "-cert", own.file("cert.pem"), "-key", own.file("key.pem"), "-CAfile", own.file("roots.pem"), "-Verify", "1", "-verify_return_error",
			"-alpn", "istio-http/1.1", "-www"}, []string{"TLSv1.3", "Client certificate"}},
		"nginx": {[]string{"nginx", "-c", writeConfig(t, nginxMain+" server { listen 8080 ssl; ssl_certificate "+own.file("cert.pem")+"; ssl_certificate_key "+own.file("key.pem")+"; ssl_client_certificate "+
			own.file("roots.pem")+"; ssl_verify_client on; ssl_protocols TLSv1.2 TLSv1.3; location / { return 200 \"$ssl_client_verify $ssl_server_name $ssl_alpn_protocol [$http_x_envoy_peer_metadata_id]\"; } }\n}\n")},
			[]string{"SUCCESS " + sniOfWeb + " http/1.1 [sidecar~" + d.ip + "~" + sidecarPod + ".default~default.svc.cluster.local]"}},
		"haproxy": {[]string{"haproxy", "-f", writeConfig(t, haproxyDefaults+"frontend in\n bind :8080 ssl crt "+own.file("both.pem")+" ca-file "+own.file("roots.pem")+" verify required alpn istio-http/1.1\n"+
			" http-request return status 200 content-type text/plain lf-string \"%[ssl_c_verify] %[ssl_fc_sni] %[ssl_fc_alpn]\"\n")}, []string{"0 " + sniOfWeb + " istio-http/1.1"}},
	} {
		t.Run(name, func(t *testing.T) {
			runProgram(t, far, &output{}, c.words...)
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
				return d.Dial("tcp", "198.51.100.210:8080", patience)
			}}, Timeout: patience}
			await(t, func() error {
				response, err := client.Get("http://web.default.svc.cluster.local:8080/" + name)
				if err != nil {
					return err
				}
				defer response.Body.Close()
				body, err := io.ReadAll(response.Body)
				for _, want := range c.seen {
					if err != nil || !strings.Contains(string(body), want) {
						return errors.Join(err, errors.New(response.Status+" "+string(body)))
					}
				}
				return nil
			})
		})
	}
	call(t, "grpc-go", grpc.WithTransportCredentials(insecure.NewCredentials()), func(context.Context, string) (net.Conn, error) {
		return d.Dial("tcp", "198.51.100.210:8081", patience)
	})
	await(t, func() error {
		if !strings.Contains(d.log.String(), "SEEN OUTBOUND HTTP/2 /grpc.health.v1.Health/Check peer=-spiffe://cluster.local/ns/default/sa/client tls=-TLSv1.3") {
			return errors.New("the call is not in the access log")
		}
		return nil
	})
}
