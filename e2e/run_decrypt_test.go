package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// site is a server with TLS at good.example, and the file of the authority that has certified it.
type site struct {
	*caller
	home, roots string
	pin         string // the hash of its key, as curl takes it
}

func newSite(t *testing.T, c *caller) *site {
	t.Helper()
	s := &site{caller: c, home: c.home(t)}
	c.peer.AddAddress(t, "lo", netip.MustParsePrefix(goodAddress+"/32"))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "roots of the test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		DNSNames: []string{"good.example"}, IPAddresses: []net.IP{net.ParseIP(goodAddress)}, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(public)
	s.pin = "sha256//" + base64.StdEncoding.EncodeToString(hash[:])
	s.roots = filepath.Join(s.home, "roots.pem")
	if err := os.WriteFile(s.roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	listener := tls.NewListener(c.peer.Listen(t, "tcp", goodAddress+":443"), &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{raw}, PrivateKey: key}}, NextProtos: []string{"h2", "http/1.1"},
	})
	server := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s by %s", r.URL.Path, r.Proto)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(listener)
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	return s
}

// decrypted runs a command with --decrypt. It trusts the site only if trusts is set.
func (s *site) decrypted(t testing.TB, trusts bool, command ...string) (output, complaints string, records []live.Record) {
	t.Helper()
	return s.decryptedBy(t, nil, trusts, command...)
}

// decryptedBy is decrypted with further flags. Go's server closes a connection on which a client's settings of HTTP/2 do not come within
// two seconds. A client may need longer on a busy machine, and the command runs again then.
func (s *site) decryptedBy(t testing.TB, flags []string, trusts bool, command ...string) (output, complaints string, records []live.Record) {
	t.Helper()
	for tries := 1; ; tries++ {
		output, complaints, records = s.decryptedOnce(t, flags, trusts, command...)
		if tries == 5 || !slices.ContainsFunc(records, func(r live.Record) bool { return r.Flags == "UC" && r.Protocol == "HTTP/2" }) {
			return output, complaints, records
		}
		t.Logf("%q runs again after %+v", command, records)
	}
}

func (s *site) decryptedOnce(t testing.TB, flags []string, trusts bool, command ...string) (output, complaints string, records []live.Record) {
	t.Helper()
	file := filepath.Join(s.home, fmt.Sprintf("%d.jsonl", time.Now().UnixNano()))
	cmd := s.command(slices.Concat([]string{"--decrypt", "--log", "off", "--record", file}, flags, []string{"--"}, command)...)
	cmd.Dir = s.home
	cmd.Env = append(os.Environ(), "HOME="+s.home, "TMPDIR="+s.home, "XDG_RUNTIME_DIR="+s.home, "NO_PROXY=*", "no_proxy=*")
	if trusts {
		cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+s.roots)
	}
	var out, complaint strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if _, err := s.net.Run(cmd); cmd.ProcessState == nil || errors.Is(err, nettest.ErrHanging) {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v\n%s", err, complaint.String())
	}
	if left, _ := filepath.Glob(filepath.Join(s.home, "pillion-run-*")); len(left) > 0 {
		t.Errorf("%q is left", left)
	}
	return out.String(), complaint.String(), recorded(t, string(text))
}

// With --decrypt, requests inside TLS are shown like others, in both versions of HTTP, for programs of several languages.
func TestRunDecryptsTLS(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		s := newSite(t, c)
		const inGo = `package main
import ("fmt"; "io"; "net/http"; "os")
func main() {
	response, err := http.Get(os.Args[1])
	if err != nil { fmt.Println(err); os.Exit(1) }
	text, _ := io.ReadAll(response.Body)
	os.Stdout.Write(text)
}`
		const inJava = `public class Get {
	public static void main(String[] arguments) throws Exception {
		var client = java.net.http.HttpClient.newHttpClient();
		var request = java.net.http.HttpRequest.newBuilder(java.net.URI.create(arguments[0])).build();
		System.out.print(client.send(request, java.net.http.HttpResponse.BodyHandlers.ofString()).body());
	}
}`
		for name, text := range map[string]string{"main.go": inGo, "Get.java": inJava} {
			if err := os.WriteFile(filepath.Join(s.home, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		build := exec.Command("go", "build", "-o", filepath.Join(s.home, "client"), filepath.Join(s.home, "main.go"))
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		os.Chmod(filepath.Join(s.home, "client"), 0o755)
		for _, client := range []struct {
			name, proto string
			command     []string
		}{
			{"curl", "HTTP/2.0", []string{"curl", "-sS", "https://good.example/curl"}},
			{"curl by HTTP/1", "HTTP/1.1", []string{"curl", "-sS", "--http1.1", "https://good.example/curl"}},
			{"curl by address", "HTTP/2.0", []string{"curl", "-sS", "https://" + goodAddress + "/curl"}},
			{"Python", "HTTP/1.1", []string{"python3", "-c", `import urllib.request as u; print(u.urlopen("https://good.example/py").read().decode(), end="")`}},
			{"Python by a directory", "HTTP/1.1", []string{"python3", "-c", `
import os, ssl, urllib.request as u
print(u.urlopen("https://good.example/py", context=ssl.create_default_context(capath=os.environ["SSL_CERT_DIR"].split(":")[0])).read().decode(), end="")`}},
			{"Node", "HTTP/1.1", []string{"node", "-e", `require("https").get("https://good.example/node", r => r.on("data", d => process.stdout.write(d)))`}},
			{"Go", "HTTP/2.0", []string{filepath.Join(s.home, "client"), "https://good.example/go"}},
			// Process ids repeat across runs, and a JVM warns on standard output when another one has the file of its id in /tmp.
			{"Java", "HTTP/2.0", []string{"java", "-XX:-UsePerfData", filepath.Join(s.home, "Get.java"), "https://good.example/java"}},
		} {
			output, complaints, records := s.decrypted(t, true, client.command...)
			if !strings.HasSuffix(output, " by "+client.proto) {
				t.Errorf("%s printed %q\n%s", client.name, output, complaints)
			}
			path, _, _ := strings.Cut(output, " ")
			if len(records) != 1 || records[0].Path != path || records[0].Status != 200 || records[0].Failed || !records[0].Request {
				t.Errorf("%s: the records are %+v\n%s", client.name, records, complaints)
			}
		}
	})
}

// The server is verified as the command would: one that is not accepted is left to the command, and its connections pass.
func TestRunLeavesServersThatItDoesNotTrustToTheCommand(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		s := newSite(t, c)
		output, complaints, records := s.decrypted(t, false, "curl", "-sS", "https://good.example/")
		if output != "" || !strings.Contains(complaints, "certificate problem") || !strings.Contains(complaints, `pillion: connections to "good.example" are not decrypted: `) {
			t.Errorf("curl printed %q\n%s", output, complaints)
		}
		if len(records) != 1 || records[0].Protocol != "TLS" || records[0].SNI != "good.example" {
			t.Errorf("the records are %+v", records)
		}
		output, _, records = s.decrypted(t, false, "curl", "-sS", "-k", "https://good.example/accepted")
		if output != "/accepted by HTTP/2.0" || len(records) != 1 || records[0].Protocol != "TLS" {
			t.Errorf("curl -k printed %q, the records are %+v", output, records)
		}
		// Another name than the certificate's.
		output, complaints, _ = s.decrypted(t, true, "curl", "-sS", "--resolve", "evil.example:443:"+goodAddress, "https://evil.example/")
		if output != "" || !strings.Contains(complaints, `no alternative certificate subject name matches target host name 'evil.example'`) {
			t.Errorf("curl printed %q\n%s", output, complaints)
		}
	})
}

// A command that does not accept the authority of the run gets through the next time.
func TestRunPassesPinnedConnections(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		s := newSite(t, c)
		const twice = `curl -sS --cacert "$1" https://good.example/one; curl -sS --cacert "$1" https://good.example/two`
		output, complaints, records := s.decrypted(t, true, "sh", "-c", twice, "sh", s.roots)
		if output != "/two by HTTP/2.0" || strings.Count(complaints, `does not accept pillion's certificate for "good.example"`) != 1 {
			t.Errorf("curl printed %q\n%s", output, complaints)
		}
		if len(records) != 2 || records[0].Reason != "tls_failed" || records[0].SNI != "good.example" || records[1].Protocol != "TLS" {
			t.Errorf("the records are %+v", records)
		}
	})
}

// Other commands complete the handshake, and leave when they have seen the certificate.
func TestRunPassesCommandsThatLeaveAfterTheHandshake(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		s := newSite(t, c)
		for _, test := range []struct {
			name, flags, output string
			named               int
		}{
			{"pinned", ` --pinnedpubkey "$PIN"`, "/two by HTTP/1.1", 1},
			{"not pinned", "", "/one by HTTP/1.1/two by HTTP/1.1", 0},
		} {
			command := fmt.Sprintf("for path in one two; do curl -sS --http1.1%s https://good.example/$path; done; true", strings.ReplaceAll(test.flags, "$PIN", s.pin))
			output, complaints, records := s.decrypted(t, true, "sh", "-c", command)
			if output != test.output || strings.Count(complaints, `left its first connection to "good.example"`) != test.named {
				t.Errorf("%s: curl printed %q\n%s", test.name, output, complaints)
			}
			if len(records) != 2 || (records[1].Protocol == "TLS") != (test.named > 0) {
				t.Errorf("%s: the records are %+v", test.name, records)
			}
		}
	})
}

// A client that is slow in beginning its first request is judged like others: the server has sent its settings of HTTP/2 before.
func TestRunJudgesSlowClientsInsideTLS(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		s := newSite(t, c)
		const slow = `
import socket, ssl, sys, time
context = ssl.create_default_context()
context.set_alpn_protocols([sys.argv[1]])
s = context.wrap_socket(socket.create_connection(("good.example", 443)), server_hostname="good.example")
for part in sys.argv[2:]:
    s.sendall(bytes.fromhex(part))
    time.sleep(1.2)
s.settimeout(60)
s.recv(1000)`
		head := []byte{0x82, 0x87, 0x04, 8, '/', 'f', 'r', 'o', 'n', 't', 'e', 'd', 0x01, 11}
		head = append(head, "cdn.example"...)
		frames := append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"+string(rune(len(head)))+"\x01\x05\x00\x00\x00\x01"), head...)
		for protocol, parts := range map[string][]string{
			"http/1.1": {"G", "ET /fronted HTTP/1.1\r\nHost: cdn.example\r\n\r\n"},
			"h2":       {"", string(frames[:5]), string(frames[5:])},
		} {
			command := []string{"python3", "-c", slow, protocol}
			for _, part := range parts {
				command = append(command, hex.EncodeToString([]byte(part)))
			}
			_, complaints, records := s.decryptedBy(t, []string{"--default", "deny", "--allow", "good.example"}, true, command...)
			if len(records) != 1 || records[0].Reason != "denied" || records[0].Path != "/fronted" || records[0].Authority != "cdn.example" || records[0].Status != 403 {
				t.Errorf("%s: the records are %+v\n%s", protocol, records, complaints)
			}
		}
	})
}

// A policy judges what is inside.
func TestRunJudgesDecryptedRequests(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		s := newSite(t, c)
		for _, version := range []string{"--http1.1", "--http2"} {
			cmd := s.command("--decrypt", "--default", "deny", "--allow", "good.example", "--", "curl", "-sS", version,
				"https://good.example/fine", "--next", "-sS", version, "-w", " %{http_code}", "-H", "Host: cdn.example", "https://good.example/fronted")
			cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+s.roots, "TMPDIR="+s.home, "XDG_RUNTIME_DIR="+s.home)
			var out strings.Builder
			cmd.Stdout = &out
			var complaint strings.Builder
			cmd.Stderr = &complaint
			if _, err := s.net.Run(cmd); err != nil {
				t.Errorf("%v\n%s", err, complaint.String())
			}
			if text := out.String(); !strings.HasPrefix(text, "/fine by ") || !strings.HasSuffix(text, " 403") {
				t.Errorf("%s: curl printed %q\n%s", version, text, complaint.String())
			}
		}
	})
}

// The authority of the run is in the files that variables name, for each program that knows one of them, and its key is in none.
func TestRunGivesItsCommandNoKey(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		s := newSite(t, c)
		names := []string{"SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO", "AWS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"}
		script := `for name in ` + strings.Join(names, " ") + `; do eval "file=\$$name"; curl -sS --cacert "$file" "https://good.example/$name"; echo; done
echo; env; find "$XDG_RUNTIME_DIR" -type f -path "*pillion-run-*" -exec cat {} +`
		output, complaints, records := s.decrypted(t, true, "sh", "-c", script)
		used, files, _ := strings.Cut(output, "\n\n")
		for _, name := range names {
			if !strings.Contains(used, "/"+name+" by HTTP/2.0") {
				t.Errorf("curl with the file of %s printed %q\n%s", name, used, complaints)
			}
		}
		if len(records) != len(names) || strings.Count(files, "-----BEGIN CERTIFICATE-----") < 3 {
			t.Errorf("%d records, and the files are\n%q", len(records), files)
		}
		for _, secret := range []string{"PRIVATE", "\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x04\x6d"} { // PEM; PKCS #8
			if strings.Contains(files, secret) {
				t.Errorf("the command sees a key:\n%q", files)
			}
		}
	})
}
