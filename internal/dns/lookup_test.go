package dns

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"testing"

	"github.com/miekg/dns"
)

func TestTypesAndCodesHaveTheirNames(t *testing.T) {
	for kind := range 1 << 16 {
		if got, want := typeName(uint16(kind)), dns.Type(kind).String(); got != want {
			t.Errorf("type %d: %s, want %s", kind, got, want)
		}
	}
	for rcode := range 1 << 4 {
		if got, want := rcodeName(rcode), cmp.Or(dns.RcodeToString[rcode], "RCODE"+strconv.Itoa(rcode)); got != want {
			t.Errorf("code %d: %s, want %s", rcode, got, want)
		}
	}
}

// peersHosts are the addresses of an answer that miekg/dns has decoded.
func peersHosts(m *dns.Msg) (list []netip.Addr) {
	add := func(addresses ...[]byte) {
		for _, address := range addresses {
			if ip, ok := netip.AddrFromSlice(address); ok {
				list = append(list, ip.Unmap())
			}
		}
	}
	service := func(r *dns.SVCB) {
		for _, value := range r.Value {
			switch hint := value.(type) {
			case *dns.SVCBIPv4Hint:
				for _, ip := range hint.Hint {
					add(ip)
				}
			case *dns.SVCBIPv6Hint:
				for _, ip := range hint.Hint {
					add(ip)
				}
			}
		}
	}
	for _, record := range m.Answer {
		switch r := record.(type) {
		case *dns.A:
			add(r.A)
		case *dns.AAAA:
			add(r.AAAA)
		case *dns.HTTPS:
			service(&r.SVCB)
		case *dns.SVCB:
			service(r)
		}
	}
	return list
}

// FuzzHosts reads the question and the addresses of answers as miekg/dns does.
func FuzzHosts(f *testing.F) {
	q := question("example.", dns.TypeHTTPS)
	for _, m := range []*dns.Msg{
		answered(q, "example. 60 A 192.0.2.1", "example. 60 AAAA 2001:db8::1", "example. 60 AAAA ::ffff:192.0.2.2"),
		answered(q, "example. 5 CNAME www.example.", "www.example. 60 A 192.0.2.3", `example. 9 TXT "192.0.2.4"`, "example. 9 NULL"),
		answered(q, `example. 60 HTTPS 1 . alpn="h2,h3" port=8443 ipv4hint=192.0.2.5,192.0.2.6 ech=AAAA ipv6hint=2001:db8::5,2001:db8::6`),
		answered(q, "example. 60 SVCB 1 svc.example.net. ipv6hint=2001:db8::7 key65001=abc", "example. 60 HTTPS 0 other.example."),
		answered(question(`\000\200\"\(\)\.\;\@\\\'\ $%~x.example.`, dns.TypeA)),
		answered(question(".", dns.TypeNS)),
	} {
		m.Ns = answered(q, "example. 60 A 192.0.2.7").Answer
		m.Extra = answered(q, "example. 60 A 192.0.2.8").Answer
		raw := pack(f, m)
		f.Add(raw)
		f.Add(raw[:len(raw)-1])
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := parse(raw)
		var peer dns.Msg
		if err != nil || len(m.question) == 0 || peer.Unpack(raw) != nil {
			return
		}
		if got := m.text(); got != peer.Question[0].Name {
			t.Errorf("the name is %q, want %q", got, peer.Question[0].Name)
		}
		if got, want := m.hosts(), peersHosts(&peer); !slices.Equal(got, want) && !compressedService(&m) {
			t.Errorf("the hosts are %v, want %v", got, want)
		}
	})
}

// compressedService reports whether the name in a service's record is compressed. RFC 9460 §2.2 forbids it, and miekg/dns
// accepts it.
func compressedService(m *message) bool {
	for r := range m.records() {
		if r.kind != dns.TypeSVCB && r.kind != dns.TypeHTTPS {
			continue
		}
		if end, _ := skipName(m.data(r), 2); end < 0 || m.data(r)[end-1] != 0 {
			return true
		}
	}
	return false
}

func TestMalformedRecordsHaveNoHosts(t *testing.T) {
	m := answered(question("example.", dns.TypeA))
	for kind, data := range map[uint16]string{
		dns.TypeA: "c0000201c0000202", dns.TypeAAAA: "c0000201",
		dns.TypeHTTPS: "000100" + "00040008c0000201", dns.TypeSVCB: "0001c00c" + "00040004c0000201",
	} {
		m.Answer = append(m.Answer, &dns.RFC3597{Hdr: dns.RR_Header{Name: "example.", Rrtype: kind, Class: dns.ClassINET}, Rdata: data})
	}
	answer, err := parse(pack(t, m))
	if got := answer.hosts(); err != nil || len(got) > 0 {
		t.Errorf("%v, %v", got, err)
	}
}
