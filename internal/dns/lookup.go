package dns

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/miekg/dns"
)

// text is the name of a message's question, with its final dot.
func (m *message) text() string {
	text, _, _ := dns.UnpackDomainName(m.name(), 0)
	return text
}

// addressesOf returns the addresses in an answer, those of aliases and the hints of services included.
func addressesOf(raw []byte) (list []netip.Addr) {
	var m dns.Msg
	if m.Unpack(raw) != nil {
		return nil
	}
	add := func(ip []byte) {
		if address, ok := netip.AddrFromSlice(ip); ok {
			list = append(list, address.Unmap())
		}
	}
	addService := func(values []dns.SVCBKeyValue) {
		for _, value := range values {
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
			addService(r.Value)
		case *dns.SVCB:
			addService(r.Value)
		}
	}
	return list
}

// LookupNetIP returns the addresses of a host, as a workload's queries are answered, except that Config.Refuse does not
// apply. network is ip, ip4 or ip6. The error is that of ctx, or that there is no address.
func (s *Server) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	kinds := map[string][]uint16{"ip": {dns.TypeA, dns.TypeAAAA}, "ip4": {dns.TypeA}, "ip6": {dns.TypeAAAA}}[network]
	found := make(chan []netip.Addr, len(kinds))
	for _, kind := range kinds {
		raw, err := new(dns.Msg).SetQuestion(dns.Fqdn(host), kind).Pack()
		if err != nil {
			return nil, fmt.Errorf("looking up %.100q: %w", host, err)
		}
		s.open.Go(func() { found <- s.lookUp(raw) })
	}
	var all []netip.Addr
	for range kinds {
		select {
		case list := <-found:
			all = append(all, list...)
		case <-ctx.Done():
			return nil, fmt.Errorf("looking up %.100q: %w", host, ctx.Err())
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("looking up %.100q: no address", host)
	}
	return all, nil
}

// lookUp answers one query of LookupNetIP.
func (s *Server) lookUp(raw []byte) []netip.Addr {
	m, err := parse(raw)
	if err != nil {
		return nil
	}
	r, _, ok := s.known(&m)
	if !ok {
		r, _ = s.resolve(newQuery(m))
	}
	return addressesOf(r.raw)
}
