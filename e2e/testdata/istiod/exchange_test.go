package istiod

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// likeEnvoy describes a workload in the messages of Istio's proxies, made by protobuf's own types.
func likeEnvoy(t *testing.T, name string) (preamble []byte, header, id string) {
	t.Helper()
	metadata, err := structpb.NewStruct(map[string]any{
		"NAME": name + "-1", "NAMESPACE": "default", "WORKLOAD_NAME": name, "CLUSTER_ID": "elsewhere", "OWNER": "kubernetes://apis/apps/v1/namespaces/default/deployments/" + name,
		"LABELS": map[string]any{"app": name, "version": "v7", "service.istio.io/canonical-name": name, "service.istio.io/canonical-revision": "v7"},
	})
	if err != nil {
		t.Fatal(err)
	}
	id = "sidecar~203.0.113.99~" + name + "-1.default~default.svc.cluster.local"
	whole := &structpb.Struct{Fields: map[string]*structpb.Value{"x-envoy-peer-metadata": structpb.NewStructValue(metadata), "x-envoy-peer-metadata-id": structpb.NewStringValue(id)}}
	message, err := anypb.New(whole)
	if err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	text, err := proto.MarshalOptions{Deterministic: true}.Marshal(metadata)
	if err != nil {
		t.Fatal(err)
	}
	preamble = binary.BigEndian.AppendUint32([]byte{0x3d, 0x23, 0x04, 0x67}, uint32(len(b)))
	return append(preamble, b...), base64.StdEncoding.EncodeToString(text), id
}

// readPreamble reads what the agent says of its workload.
func readPreamble(in io.Reader) (workload, id string, err error) {
	var head [8]byte
	if _, err := io.ReadFull(in, head[:]); err != nil || !bytes.Equal(head[:4], []byte{0x3d, 0x23, 0x04, 0x67}) {
		return "", "", fmt.Errorf("the stream begins with %x, %v", head, err)
	}
	b := make([]byte, binary.BigEndian.Uint32(head[4:]))
	if _, err := io.ReadFull(in, b); err != nil {
		return "", "", err
	}
	var message anypb.Any
	var whole structpb.Struct
	if err := errors.Join(proto.Unmarshal(b, &message), message.UnmarshalTo(&whole)); err != nil {
		return "", "", err
	}
	return named(whole.Fields["x-envoy-peer-metadata"].GetStructValue()), whole.Fields["x-envoy-peer-metadata-id"].GetStringValue(), nil
}

func named(metadata *structpb.Struct) string {
	labels := metadata.GetFields()["LABELS"].GetStructValue().GetFields()
	return metadata.GetFields()["NAMESPACE"].GetStringValue() + "/" + metadata.GetFields()["WORKLOAD_NAME"].GetStringValue() + "/" + labels["app"].GetStringValue()
}

// The agent exchanges metadata with clients and servers that speak as Envoy does: a preamble with the first write of each
// side, and header fields.
func TestMetadataIsExchangedWithProxiesLikeEnvoy(t *testing.T) {
	d := newPodOf(t, nginx())
	far := nettest.New(t, "far")
	nettest.Join(t, d.Namespace, far)
	d.MustRun(t, "ip", "address", "add", d.ip+"/32", "dev", "eth0")
	for _, address := range []string{"203.0.113.8", "198.51.100.210"} {
		far.AddAddress(t, "lo", netip.MustParsePrefix(address+"/32"))
		d.MustRun(t, "ip", "route", "add", address+"/32", "dev", "eth0", "src", d.ip)
	}
	far.MustRun(t, "ip", "route", "add", d.ip+"/32", "dev", "eth0", "src", "203.0.113.8")
	serveMutual(t, d)
	p := startPlaneOf(t, []*pod{d}, peerAuthentication("STRICT"), mutualServices)
	d.launch(t, p, "PILLION_ACCESS_LOG=/dev/stdout", "PILLION_ACCESS_LOG_FORMAT="+seenFormat, `ISTIO_METAJSON_LABELS={"LABELS":{"app":"nginx","version":"v1"}}`)
	d.awaitReady(t)
	d.awaitIdentity(t)
	own := issue(t, p, "client").config(t)
	preamble, header, id := likeEnvoy(t, "envoy")
	ours := "default/nginx-deployment/nginx"
	ourID := "sidecar~" + d.ip + "~" + sidecarPod + ".default~default.svc.cluster.local"

	// Clients of the pod: one that speaks first, and one that waits for the server as Envoy does.
	for port, first := range map[string]string{"8082": "\x00hello\n", "8083": ""} {
		conn := secureClient(t, far, d.ip+":"+port, own, "istio-peer-exchange", "istio")
		in := bufio.NewReader(conn)
		if first != "" {
			conn.Write(append(bytes.Clone(preamble), first...))
		}
		if workload, from, err := readPreamble(in); err != nil || workload != ours || from != ourID {
			t.Errorf("port %s: the agent describes itself as %q, %q, %v", port, workload, from, err)
		}
		if first == "" {
			if line, err := in.ReadString('\n'); err != nil || line != "220 welcome\r\n" {
				t.Errorf("port %s: the greeting is %q, %v", port, line, err)
			}
			first = "\x00hello\n"
			conn.Write(append(bytes.Clone(preamble), first...))
		}
		conn.CloseWrite()
		if rest, err := io.ReadAll(in); err != nil || string(rest) != first {
			t.Errorf("port %s: the echo is %q, %v", port, rest, err)
		}
		conn.Close()
	}
	conn := secureClient(t, far, d.ip+":8080", own, "istio-http/1.1", "istio", "http/1.1")
	fmt.Fprintf(conn, "GET /envoy HTTP/1.1\r\nHost: a\r\nx-envoy-peer-metadata: %s\r\nx-envoy-peer-metadata-id: %s\r\n\r\n", header, id)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	text, _ := base64.StdEncoding.DecodeString(response.Header.Get("X-Envoy-Peer-Metadata"))
	var metadata structpb.Struct
	if err := proto.Unmarshal(text, &metadata); err != nil || named(&metadata) != ours || response.Header.Get("X-Envoy-Peer-Metadata-Id") != ourID || response.StatusCode != http.StatusOK {
		t.Errorf("the response is %s with %v, %v", response.Status, response.Header, err)
	}
	conn.Close()

	// Servers that the pod connects to.
	offered := own.Clone()
	offered.NextProtos = []string{"istio-peer-exchange"}
	received := make(chan string, 1)
	listener := far.Listen(t, "tcp", "0.0.0.0:8082")
	served := make(chan struct{})
	go func() {
		defer close(served)
		raw, err := listener.Accept()
		if err != nil {
			return
		}
		raw.SetDeadline(time.Now().Add(patience))
		conn := tls.Server(raw, offered)
		in := bufio.NewReader(conn)
		workload, from, err := readPreamble(in)
		payload, _ := in.ReadString('\n')
		received <- fmt.Sprintf("%s %s %v %q", workload, from, err, payload)
		conn.Write(append(bytes.Clone(preamble), "answer\n"...))
		conn.Close()
	}()
	t.Cleanup(func() { listener.Close(); <-served })
	plain, err := d.Dial("tcp", "198.51.100.210:8082", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	io.WriteString(plain, "\x00hello\n")
	if got, err := io.ReadAll(plain); string(got) != "answer\n" {
		t.Errorf("the application receives %q, %v", got, err)
	}
	plain.Close()
	if got, want := <-received, fmt.Sprintf("%s %s <nil> %q", ours, ourID, "\x00hello\n"); got != want {
		t.Errorf("the server receives %s, want %s", got, want)
	}
	for _, want := range []string{
		"INBOUND HTTP/1.1 /envoy peer=spiffe://cluster.local/ns/default/sa/client- tls=TLSv1.3- workload=envoy- namespace=default- app=envoy- cluster=elsewhere-",
		"INBOUND - - peer=spiffe://cluster.local/ns/default/sa/client- tls=TLSv1.3- workload=envoy- namespace=default- app=envoy- cluster=elsewhere- port=8082 reason=closed",
		"INBOUND - - peer=spiffe://cluster.local/ns/default/sa/client- tls=TLSv1.3- workload=envoy- namespace=default- app=envoy- cluster=elsewhere- port=8083 reason=closed",
		"OUTBOUND - - peer=-spiffe://cluster.local/ns/default/sa/client tls=-TLSv1.3 workload=-envoy namespace=-default app=-envoy cluster=-elsewhere",
	} {
		await(t, func() error {
			if !strings.Contains(d.log.String(), "SEEN "+want) {
				return fmt.Errorf("the access log has no line with %q", want)
			}
			return nil
		})
	}
}

func secureClient(t *testing.T, from *nettest.Namespace, address string, own *tls.Config, alpn ...string) *tls.Conn {
	t.Helper()
	raw, err := from.Dial("tcp", address, patience)
	if err != nil {
		t.Fatal(err)
	}
	raw.SetDeadline(time.Now().Add(patience))
	config := own.Clone()
	config.NextProtos = alpn
	conn := tls.Client(raw, config)
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	return conn
}
