package http1

import "bytes"

// Options is what a message says about the connection that it came on.
type Options struct {
	Close     bool // Connection: close
	KeepAlive bool // Connection: keep-alive, which means something in HTTP/1.0
	Upgrade   bool // Connection: upgrade, and there is an Upgrade field
	Trailers  bool // TE: trailers

	// UpgradeValue is the first Upgrade field's value. To forward an upgrade, make the fields of kind Upgrade kept again
	// and add a Connection field of your own.
	UpgradeValue Span
}

// For one connection: these are dropped, whether Connection names them or not (RFC 9110 §7.6.1, RFC 9113 §3.1).
// Transfer-Encoding is not among them, as chunks are forwarded byte for byte.
const hopByHop uint64 = 1<<Connection | 1<<KeepAlive | 1<<ProxyConnection | 1<<TE | 1<<Upgrade | 1<<HTTP2Settings

// maxNamed is how many names in Connection are looked up among the fields. No honest message has more, and a dishonest
// one shall not make that work quadratic.
const maxNamed = 64

// DropHopByHop marks the fields that are not forwarded, and returns what they said.
//
// Those that Connection names are dropped, too, but for the fields that framing, routing or identity depend on: an
// attacker names those to have X-Forwarded-For or Authorization vanish on the way to who trusts it. They are all the
// other known fields and the families x-forwarded-, x-envoy- and x-b3-.
func (h *Head) DropHopByHop(b []byte) Options {
	var o Options
	if h.known&hopByHop == 0 {
		return o
	}
	named := 0
	for i := range h.Fields {
		f := &h.Fields[i]
		if hopByHop&(1<<f.Known) == 0 {
			continue
		}
		f.Dropped = true
		switch value := f.Value.In(b); f.Known {
		case Connection:
			named = h.dropNamed(b, value, named, &o)
		case TE:
			o.Trailers = o.Trailers || Lists(value, "trailers")
		case Upgrade:
			if o.UpgradeValue.Empty() {
				o.UpgradeValue = f.Value
			}
		}
	}
	o.Upgrade = o.Upgrade && !o.UpgradeValue.Empty()
	return o
}

// dropNamed goes through the value of a Connection field. named is how many fields were looked up so far.
func (h *Head) dropNamed(b, value []byte, named int, o *Options) int {
	for len(value) > 0 {
		var option []byte
		option, value = element(value)
		switch {
		case same(option, "close"):
			o.Close = true
		case same(option, "keep-alive"):
			o.KeepAlive = true
		case same(option, "upgrade"):
			o.Upgrade = true
		case len(option) > 0 && named < maxNamed && knownName(option) == Unknown && !protected(option):
			h.dropName(b, option)
			named++
		}
	}
	return named
}

// protected reports whether the name belongs to a family of which no member is dropped for being named.
func protected(name []byte) bool {
	for _, family := range [...]string{"x-forwarded-", "x-envoy-", "x-b3-"} {
		if len(name) >= len(family) && same(name[:len(family)], family) {
			return true
		}
	}
	return false
}

func (h *Head) dropName(b, name []byte) {
	for i := range h.Fields {
		if f := &h.Fields[i]; bytes.EqualFold(f.Name.In(b), name) {
			f.Dropped = true
		}
	}
}

// element cuts the first element off a comma-separated list.
func element(list []byte) (first, rest []byte) {
	if i := bytes.IndexByte(list, ','); i >= 0 {
		first, rest = list[:i], list[i+1:]
	} else {
		first = list
	}
	from, to := trim(first, 0)
	return first[from:to], rest
}

// Lists reports whether a comma-separated list has the word, in any case. The word has nothing but small letters, digits
// and hyphens.
func Lists(list []byte, word string) bool {
	for len(list) > 0 {
		var first []byte
		if first, list = element(list); same(first, word) {
			return true
		}
	}
	return false
}

// Value returns the value of the first field of the given name, which is in lower case, dropped or not; nil when there is
// none. b is what h was parsed from.
func (h *Head) Value(b []byte, name string) []byte {
	for i := range h.Fields {
		if f := &h.Fields[i]; same(f.Name.In(b), name) {
			return f.Value.In(b)
		}
	}
	return nil
}

// AppendLines appends the start line and the kept fields to dst and returns it. Each line has its own bytes and ends with
// CRLF. The empty line is left to the caller, who may have fields to add. b is what h was parsed from.
func (h *Head) AppendLines(dst, b []byte) []byte {
	if h.bareLF {
		return h.appendEach(dst, b)
	}
	const crlf = 2
	from, to := h.Line.Start, h.Line.End+crlf // the lines from here to there are kept and not yet copied
	for i := range h.Fields {
		f := &h.Fields[i]
		if f.Dropped {
			dst = append(dst, b[from:to]...)
			from = f.Line.End + crlf
		}
		to = f.Line.End + crlf
	}
	return append(dst, b[from:to]...)
}

// appendEach is AppendLines for lines that do not all end with CRLF.
func (h *Head) appendEach(dst, b []byte) []byte {
	dst = append(append(dst, h.Line.In(b)...), "\r\n"...)
	for i := range h.Fields {
		if f := &h.Fields[i]; !f.Dropped {
			dst = append(append(dst, f.Line.In(b)...), "\r\n"...)
		}
	}
	return dst
}
