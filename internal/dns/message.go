package dns

import (
	"encoding/binary"
	"errors"
	"iter"
)

const (
	headerSize  = 12
	optSize     = 11 // an OPT record without options
	maxMessage  = 1<<16 - 1
	ednsSize    = 4096  // UDP payload that we accept from downstreams; they are on this host
	plainSize   = 512   // UDP payload that a downstream without EDNS accepts (RFC 1035 §4.2.1)
	maxPacket   = 65487 // UDP payload over IPv6 that loopback carries in one packet
	maxNameSize = 255
)

// Bits of the header's bytes 2 and 3 (RFC 1035 §4.1.1, RFC 4035 §3).
const (
	bitQR = 1 << 7
	bitAA = 1 << 2
	bitTC = 1 << 1
	bitRD = 1 << 0
	bitRA = 1 << 7
	bitCD = 1 << 4
)

// Sections of records, in wire order.
const (
	answerSection = iota
	authoritySection
	additionalSection
)

// message is one message whose record boundaries have been checked. The data of records is not examined: that is for
// downstream.
type message struct {
	raw      []byte
	question []byte // name, type and class, within raw; empty if there is no question
	opt      record // zero if there is no OPT
	extra    bool   // there are records other than the OPT
}

// record is the place of a record in the message.
type record struct {
	section           int
	start, fixed, end int // of its name, of its type, and after its data
	kind              uint16
}

var errMalformed = errors.New("malformed message")

// parse walks through raw. More than one question is an error. Bytes after the last record are not part of the message.
// If it fails, the returned message has the header and the question, as far as they could be parsed.
func parse(raw []byte) (message, error) {
	m := message{raw: raw}
	if len(raw) < headerSize || len(raw) > maxMessage {
		return m, errMalformed
	}
	offset := headerSize
	switch binary.BigEndian.Uint16(raw[4:]) {
	case 0:
	case 1:
		end, compressed := skipName(raw, offset)
		if end < 0 || compressed || end+4 > len(raw) {
			return m, errMalformed
		}
		offset = end + 4
		m.question = raw[headerSize:offset]
	default: // RFC 9619
		return m, errMalformed
	}
	for section := range 3 {
		for range m.count(section) {
			r, ok := recordAt(raw, offset, section)
			if !ok {
				return m, errMalformed
			}
			offset = r.end
			if r.kind != typeOPT || section != additionalSection {
				m.extra = true
				continue
			}
			// At most one, with the root as its name (RFC 6891 §6.1.1, §6.1.2).
			if m.opt.end != 0 || raw[r.start] != 0 {
				return m, errMalformed
			}
			m.opt = r
		}
	}
	m.raw = raw[:offset]
	return m, nil
}

// records walks through the records. After a successful parse it cannot fail.
func (m *message) records() iter.Seq[record] {
	return func(yield func(record) bool) {
		offset := headerSize + len(m.question)
		for section := range 3 {
			for range m.count(section) {
				r, _ := recordAt(m.raw, offset, section)
				if offset = r.end; !yield(r) {
					return
				}
			}
		}
	}
}

func recordAt(raw []byte, offset, section int) (record, bool) {
	fixed, _ := skipName(raw, offset)
	if fixed < 0 || fixed+10 > len(raw) {
		return record{}, false
	}
	end := fixed + 10 + int(binary.BigEndian.Uint16(raw[fixed+8:]))
	return record{section, offset, fixed, end, binary.BigEndian.Uint16(raw[fixed:])}, end <= len(raw)
}

// skipName returns the offset after the name at offset, or -1 if there is no valid name. A pointer must point to before the
// name, and not into the header.
func skipName(raw []byte, offset int) (end int, compressed bool) {
	for at := offset; at < len(raw) && at-offset < maxNameSize; {
		length := int(raw[at])
		switch {
		case length == 0:
			return at + 1, false
		case length < 64:
			at += 1 + length
		case length < 192 || at+2 > len(raw):
			return -1, false
		default:
			target := int(binary.BigEndian.Uint16(raw[at:]) & 0x3fff)
			if target < headerSize || target >= offset {
				return -1, false
			}
			return at + 2, true
		}
	}
	return -1, false
}

func (m *message) count(section int) int {
	return int(binary.BigEndian.Uint16(m.raw[6+2*section:]))
}

func (m *message) id() uint16      { return binary.BigEndian.Uint16(m.raw) }
func (m *message) response() bool  { return m.raw[2]&bitQR != 0 }
func (m *message) truncated() bool { return m.raw[2]&bitTC != 0 }
func (m *message) opcode() int     { return int(m.raw[2] >> 3 & 0xf) }
func (m *message) rcode() int      { return int(m.raw[3] & 0xf) }
func (m *message) edns() bool      { return m.opt.end != 0 }

// name is the name of the question, in wire format.
func (m *message) name() []byte { return m.question[:len(m.question)-4] }

func (m *message) kind() uint16 { return binary.BigEndian.Uint16(m.question[len(m.question)-4:]) }

func (m *message) class() uint16 { return binary.BigEndian.Uint16(m.question[len(m.question)-2:]) }

func (m *message) ttl(r record) []byte  { return m.raw[r.fixed+4 : r.fixed+8] }
func (m *message) data(r record) []byte { return m.raw[r.fixed+10 : r.end] }

// udpSize is the UDP payload that the sender of m accepts. Less than 512 means 512 (RFC 6891 §6.2.3).
func (m *message) udpSize() int {
	if !m.edns() {
		return plainSize
	}
	return max(plainSize, int(binary.BigEndian.Uint16(m.raw[m.opt.fixed+2:])))
}

// appendOPT appends an OPT without options to a message.
func appendOPT(raw []byte, size uint16, ttl []byte) []byte {
	binary.BigEndian.PutUint16(raw[10:], binary.BigEndian.Uint16(raw[10:])+1)
	raw = append(raw, 0, 0, byte(typeOPT))
	raw = binary.BigEndian.AppendUint16(raw, size)
	raw = append(raw, ttl...)
	return append(raw, 0, 0)
}

// cutOPT returns m without its OPT, in the same memory. Records after the OPT are removed as well, because their names may
// be pointers that would become invalid. By custom the OPT is the last record, and additional records are optional.
func (m *message) cutOPT() []byte {
	before := 0
	for r := range m.records() {
		if r.section == additionalSection && r.start < m.opt.start {
			before++
		}
	}
	binary.BigEndian.PutUint16(m.raw[10:], uint16(before))
	return m.raw[:m.opt.start]
}

// fit returns a copy of m that is at most limit bytes long, after two bytes that are free for a prefix. If not all records
// fit, the first ones and the OPT stay, and TC is set. Names only point backwards, so the first records do not depend on
// later ones.
func (m *message) fit(limit int) (prefixed []byte, cut bool) {
	prefixed = make([]byte, 2, 2+min(len(m.raw), limit))
	if len(m.raw) <= limit {
		return append(prefixed, m.raw...), false
	}
	var opt []byte
	if m.edns() {
		opt = m.raw[m.opt.start:m.opt.end]
		if headerSize+len(m.question)+len(opt) > limit {
			// The options alone do not fit. The record itself must stay (RFC 6891 §7).
			opt = append(append([]byte(nil), opt[:optSize-2]...), 0, 0)
		}
	}
	end := headerSize + len(m.question)
	var counts [3]uint16
	for r := range m.records() {
		if r.start == m.opt.start {
			break // records after the OPT are optional
		}
		if r.end+len(opt) > limit {
			break
		}
		counts[r.section]++
		end = r.end
	}
	prefixed = append(append(prefixed, m.raw[:end]...), opt...)
	if opt != nil {
		counts[additionalSection]++
	}
	out := prefixed[2:]
	out[2] |= bitTC
	for section, n := range counts {
		binary.BigEndian.PutUint16(out[6+2*section:], n)
	}
	return prefixed, true
}

// failure returns an answer of our own to query, without records. It repeats the question if that could be parsed.
func failure(query *message, rcode int) []byte {
	return end(begin(query, rcode, optSize), query)
}

// begin returns the header and the question of an answer of our own to query. It has room for more bytes.
func begin(query *message, rcode, room int) []byte {
	raw := make([]byte, headerSize, headerSize+len(query.question)+room)
	copy(raw, query.raw[:2])
	raw[2] = bitQR | query.raw[2]&(0xf<<3|bitRD)
	raw[3] = bitRA | query.raw[3]&bitCD | byte(rcode)
	if len(query.question) > 0 {
		raw[5] = 1
		raw = append(raw, query.question...)
	}
	return raw
}

// end returns an answer with its OPT, if query has one.
func end(raw []byte, query *message) []byte {
	if query.edns() {
		raw = appendOPT(raw, ednsSize, []byte{0, 0, query.ttl(query.opt)[2] & 0x80, 0}) // DO as asked (RFC 3225 §3)
	}
	return raw
}

// sameName reports whether two names or questions are equal, ignoring case. Lengths of labels are less than any letter.
func sameName(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(b byte) byte {
	if 'A' <= b && b <= 'Z' {
		return b + 'a' - 'A'
	}
	return b
}
