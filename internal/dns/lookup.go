package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
)

// text is the name of a message's question, with its final dot and escapes (RFC 4343 §2.1).
func (m *message) text() string {
	var text strings.Builder
	text.Grow(len(m.question))
	name := m.name()
	for ; name[0] > 0; name = afterLabel(name) {
		for _, b := range name[1:][:name[0]] {
			appendEscaped(&text, b)
		}
		text.WriteByte('.')
	}
	if text.Len() == 0 {
		return "."
	}
	return text.String()
}

func appendEscaped(text *strings.Builder, b byte) {
	switch {
	case b < ' ' || b > '~':
		fmt.Fprintf(text, `\%03d`, b)
		return
	case strings.IndexByte(`"().;@\ '`, b) >= 0: // they mean something in master files (RFC 1035 §5.1)
		text.WriteByte('\\')
	}
	text.WriteByte(b)
}

// hosts returns the addresses in an answer, those of aliases and the hints of services included. Records of another length
// than their type has are passed over.
func (m *message) hosts() (list []netip.Addr) {
	for r := range m.records() {
		if r.section != answerSection {
			break
		}
		switch data := m.data(r); {
		case r.kind == typeA && len(data) == 4, r.kind == typeAAAA && len(data) == 16:
			list = addressesIn(list, data, len(data))
		case r.kind == typeSVCB, r.kind == typeHTTPS:
			list = hintsIn(list, data)
		}
	}
	return list
}

// hintsIn appends the addresses among the parameters of a service (RFC 9460 §2.2): a priority, a name that is not
// compressed, and pairs of key and value.
func hintsIn(list []netip.Addr, data []byte) []netip.Addr {
	end, compressed := skipName(data, 2)
	if end < 0 || compressed {
		return list
	}
	for data = data[end:]; len(data) >= 4; {
		key, size := binary.BigEndian.Uint16(data), int(binary.BigEndian.Uint16(data[2:]))
		if data = data[4:]; size > len(data) {
			break
		}
		switch key {
		case keyIPv4Hint:
			list = addressesIn(list, data[:size], 4)
		case keyIPv6Hint:
			list = addressesIn(list, data[:size], 16)
		}
		data = data[size:]
	}
	return list
}

// addressesIn appends the addresses in data, of size bytes each.
func addressesIn(list []netip.Addr, data []byte, size int) []netip.Addr {
	for ; len(data) >= size; data = data[size:] {
		address, _ := netip.AddrFromSlice(data[:size])
		list = append(list, address.Unmap())
	}
	return list
}

// LookupNetIP returns the addresses of a host, as a workload's queries are answered, except that Config.Refuse does not
// apply. network is ip, ip4 or ip6. The error is that of ctx, or that there is no address.
func (s *Server) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	kinds := map[string][]uint16{"ip": {typeA, typeAAAA}, "ip4": {typeA}, "ip6": {typeAAAA}}[network]
	found := make(chan []netip.Addr, len(kinds))
	for _, kind := range kinds {
		raw, err := newQuestion(strings.TrimSuffix(host, "."), kind)
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
	q, err := parse(raw)
	if err != nil {
		return nil
	}
	r, _, ok := s.known(&q)
	if !ok {
		r, _ = s.resolve(newQuery(q))
	}
	m, err := parse(r.raw)
	if err != nil {
		return nil
	}
	return m.hosts()
}
