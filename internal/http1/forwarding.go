package http1

import "bytes"

// Options holds the connection options of a message.
type Options struct {
	Close     bool // Connection: close
	KeepAlive bool // only significant in HTTP/1.0
	Upgrade   bool // Connection: upgrade, and there is an Upgrade field
	Trailers  bool // TE: trailers
	Nominates bool // Connection names fields that are allowed in trailers otherwise: see Nominated

	// UpgradeValue is the value of the first Upgrade field. To forward an upgrade, clear Dropped of the Upgrade fields
	// and add a Connection field.
	UpgradeValue Span
}

// Hop-by-hop fields: dropped whether Connection names them or not (RFC 9110 §7.6.1, RFC 9113 §3.1). Transfer-Encoding
// is not among them, because chunks are forwarded byte for byte.
const hopByHop uint64 = 1<<Connection | 1<<KeepAlive | 1<<ProxyConnection | 1<<TE | 1<<Upgrade | 1<<HTTP2Settings

// maxNamed limits how many names in Connection are looked up among the fields. Ordinary messages name fewer; the limit
// keeps the work of a malicious one from becoming quadratic.
const maxNamed = 64

// maxNames limits their size in bytes, for the same reason.
const maxNames = 4 << 10

// DropHopByHop marks the fields that are not forwarded, and returns the connection options.
//
// Fields named by Connection are dropped as well, except those that framing, routing or identity depend on: naming
// X-Forwarded-For or Authorization is an attack that removes the field before it reaches a recipient that trusts it.
// The exceptions are all other known fields, and the families x-forwarded-, x-envoy- and x-b3-.
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

// dropNamed handles the value of a Connection field. named is the number of fields looked up so far.
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
		case len(option) > 0 && noTrailer&(1<<knownName(option)) == 0:
			o.Nominates = true
			if named < maxNamed && knownName(option) == Unknown && !protected(option) {
				h.dropName(b, option)
				named++
			}
		}
	}
	return named
}

// everyName is the list of a Connection that names more than maxNamed fields: it stands for every name. No field has it,
// because NUL is malformed in a name.
var everyName = []byte{0}

// Nominated returns a comma-separated list of the fields that Connection names, in memory of its own. They concern this
// connection only, in the trailers as well: see Body.Forbid. Call it if Options.Nominates is set; otherwise no field is
// named that would be allowed in trailers.
func (h *Head) Nominated(b []byte) (names []byte) {
	named := 0
	for i := range h.Fields {
		if h.Fields[i].Known != Connection {
			continue
		}
		for value := h.Fields[i].Value.In(b); len(value) > 0; {
			var option []byte
			option, value = element(value)
			if len(option) == 0 {
				continue
			}
			if named++; named > maxNamed || len(names)+len(option) > maxNames {
				return everyName
			}
			names = append(append(names, option...), ',')
		}
	}
	return names
}

// protected reports whether the name belongs to a family whose members are not dropped when Connection names them.
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

// element splits off the first element of a comma-separated list.
func element(list []byte) (first, rest []byte) {
	if i := bytes.IndexByte(list, ','); i >= 0 {
		first, rest = list[:i], list[i+1:]
	} else {
		first = list
	}
	from, to := trim(first, 0)
	return first[from:to], rest
}

// Lists reports whether a comma-separated list contains the word, ignoring case. The word must consist of lower-case
// letters, digits and hyphens.
func Lists(list []byte, word string) bool {
	for len(list) > 0 {
		var first []byte
		if first, list = element(list); same(first, word) {
			return true
		}
	}
	return false
}

// Value returns the value of the first field with the given lower-case name, dropped or not, or nil if there is no such
// field. b is the buffer that h was parsed from.
func (h *Head) Value(b []byte, name string) []byte {
	for i := range h.Fields {
		if f := &h.Fields[i]; same(f.Name.In(b), name) {
			return f.Value.In(b)
		}
	}
	return nil
}

// AppendLines appends the start line and the kept fields to dst. Each line keeps its bytes and ends with CRLF. The
// empty line is left to the caller, who may add fields. b is the buffer that h was parsed from.
func (h *Head) AppendLines(dst, b []byte) []byte {
	if h.edited {
		return h.appendEach(dst, b)
	}
	return h.appendKept(dst, b, h.Line.Start, h.Line.End+crlf)
}

// AppendFields is AppendLines without the start line.
func (h *Head) AppendFields(dst, b []byte) []byte {
	switch {
	case len(h.Fields) == 0:
		return dst
	case h.edited:
		return h.appendEachField(dst, b)
	}
	start := h.Fields[0].Line.Start
	return h.appendKept(dst, b, start, start)
}

const crlf = 2

// appendKept appends the lines between from and to, and the kept fields behind them.
func (h *Head) appendKept(dst, b []byte, from, to uint32) []byte { // the range of kept lines not yet copied
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

// appendEach is AppendLines for a head with edited lines.
func (h *Head) appendEach(dst, b []byte) []byte {
	return h.appendEachField(append(append(dst, h.Line.In(b)...), "\r\n"...), b)
}

func (h *Head) appendEachField(dst, b []byte) []byte {
	for i := range h.Fields {
		if f := &h.Fields[i]; !f.Dropped {
			dst = append(append(dst, f.Line.In(b)...), "\r\n"...)
		}
	}
	return dst
}
