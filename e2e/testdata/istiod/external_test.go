package istiod

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// byName is a service outside of the mesh whose endpoint is known by its name only.
const byName = `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: external, namespace: default}
spec:
  hosts: [external.test]
  ports: [{number: 9080, name: http, protocol: HTTP}]
  resolution: DNS
  location: MESH_EXTERNAL
  endpoints: [{address: backend.test, ports: {http: 8080}}]
`

// serveName answers queries for backend.test with an address of far that may change, for a second.
func serveName(t *testing.T, far *nettest.Namespace, at string) (address *atomic.Pointer[net.IP]) {
	t.Helper()
	address = new(atomic.Pointer[net.IP])
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, query *dns.Msg) {
		reply := new(dns.Msg).SetReply(query)
		if q := query.Question[0]; q.Name != "backend.test." {
			reply.Rcode = dns.RcodeNameError
		} else if q.Qtype == dns.TypeA {
			reply.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: *address.Load()}}
		}
		w.WriteMsg(reply)
	})
	var packets net.PacketConn
	if err := far.Try(func() (err error) {
		packets, err = net.ListenPacket("udp", at)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, server := range []*dns.Server{{Listener: far.Listen(t, "tcp", at), Handler: handler}, {PacketConn: packets, Handler: handler}} {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			server.ActivateAndServe()
		}()
		t.Cleanup(func() { server.Shutdown(); <-ended })
	}
	return address
}

// Requests for a service outside of the mesh go to the addresses that its name resolves to, also when they change. With
// REGISTRY_ONLY other hosts are answered 502, and known ones still served.
func TestServicesOutsideAreReachedByTheirNames(t *testing.T) {
	d := newPod(t)
	far := newFar(t, d)
	serveEcho(t, far, "0.0.0.0:8080")
	serveEcho(t, far, "198.51.100.200:9080")
	address := serveName(t, far, "203.0.113.6:53")
	lead := func(to string) {
		ip := net.ParseIP(to)
		address.Store(&ip)
	}
	lead("203.0.113.6")
	p := startPlaneIn(t, d, byName)
	d.launch(t, p, "PILLION_DNS_SERVERS=203.0.113.6", "PILLION_ACCESS_LOG=/dev/stdout", "PILLION_ACCESS_LOG_FORMAT="+happenedFormat)
	d.awaitReady(t)
	d.awaitConverged(t, p)

	conn, err := d.Dial("tcp", "198.51.100.200:9080", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in, sent := bufio.NewReader(conn), 0
	get := func(host string) (status, told string) {
		t.Helper()
		id, q := fmt.Sprint("external-", sent), question{"GET", "http://" + host + ":9080/", nil}
		status, _, err := q.send(conn, in, id)
		if sent++; err != nil {
			t.Fatal(err)
		}
		return status, strings.Join(d.happenings(t, "OUTBOUND", sent)[id], " ")
	}
	const cluster = "outbound|9080||external.test"
	for _, endpoint := range []string{"203.0.113.6", "203.0.113.7"} {
		lead(endpoint)
		await(t, func() error {
			if status, told := get("external.test"); status != "200" || told != "200 "+cluster+" default "+endpoint+":8080" {
				return fmt.Errorf("status %s; the log has %s, want the endpoint %s", status, told, endpoint)
			}
			return nil
		})
	}
	if status, told := get("other.test"); status != "200" || !strings.Contains(told, "PassthroughCluster") {
		t.Errorf("another host: status %s, the log has %s", status, told)
	}
	d.change(t, p, registryOnly)
	await(t, func() error {
		if status, told := get("other.test"); status != "502" || told != "502 - block_all -" {
			return fmt.Errorf("another host: status %s, the log has %s", status, told)
		}
		return nil
	})
	if status, told := get("external.test"); status != "200" || !strings.Contains(told, cluster) {
		t.Errorf("status %s, the log has %s", status, told)
	}
}
