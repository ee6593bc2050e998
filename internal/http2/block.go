package http2

import "golang.org/x/net/http2/hpack"

// Field is a field or pseudo-field of a header block. Sensitive fields are never added to a table.
type Field = hpack.HeaderField

// fieldOverhead is added to the size of each field (RFC 9113 §6.5.2).
const fieldOverhead = 32

// Decoder decodes the header blocks from one side of a connection. Every block must be decoded, in order, because each
// one changes the table. Make it with NewDecoder.
type Decoder struct {
	hpack     *hpack.Decoder
	maxBytes  int
	maxFields int

	fields []Field
	size   int
	over   bool
}

// NewDecoder returns a decoder that keeps at most maxBytes, counted as for MAX_HEADER_LIST_SIZE, and maxFields fields
// of a block.
func NewDecoder(maxBytes, maxFields int) *Decoder {
	d := &Decoder{maxBytes: maxBytes, maxFields: maxFields}
	d.hpack = hpack.NewDecoder(FirstTable, d.add)
	return d
}

// SetTableSize sets the limit up to which the sender may raise its table size.
func (d *Decoder) SetTableSize(n uint32) { d.hpack.SetAllowedMaxDynamicTableSize(n) }

// Decode decodes a complete block. The fields are valid until the next call of a method. If the block exceeds a limit,
// whole is false and fields holds the first ones. An error is a connection error.
func (d *Decoder) Decode(block []byte) (fields []Field, whole bool, err error) {
	d.Forget()
	d.size, d.over = 0, false
	d.hpack.SetEmitEnabled(true)
	// A block may begin with two changes of the table size (RFC 7541 §4.2). Package hpack accepts a change only at the
	// beginning of a block, or while the table is empty, so the first one is decoded as a block of its own.
	if n := sizeUpdate(block); n > 0 && sizeUpdate(block[n:]) > 0 {
		if err := d.write(block[:n]); err != nil {
			return nil, false, err
		}
		block = block[n:]
	}
	if err := d.write(block); err != nil {
		return nil, false, err
	}
	return d.fields, !d.over, nil
}

// Forget frees the memory of the fields.
func (d *Decoder) Forget() {
	clear(d.fields) // the strings
	if d.fields = d.fields[:0]; cap(d.fields) > keptFields {
		d.fields = nil
	}
}

// keptFields is how many fields an idle decoder keeps room for.
const keptFields = 64

func (d *Decoder) write(block []byte) error {
	_, err := d.hpack.Write(block)
	if err == nil {
		err = d.hpack.Close()
	}
	if err != nil {
		return connectionError(CompressionError, err.Error())
	}
	return nil
}

// sizeUpdate returns the length of the table size update at the beginning of block (RFC 7541 §6.3), or 0.
func sizeUpdate(block []byte) int {
	const prefix = 1<<5 - 1
	if len(block) == 0 || block[0]>>5 != 1 {
		return 0
	}
	if block[0]&prefix < prefix {
		return 1
	}
	for i, c := range block[1:] {
		if c < 1<<7 {
			return i + 2
		}
	}
	return 0
}

// add receives a field from hpack. Once a limit is exceeded, hpack only maintains its table.
func (d *Decoder) add(f Field) {
	d.size += len(f.Name) + len(f.Value) + fieldOverhead
	if d.size > d.maxBytes || len(d.fields) == d.maxFields {
		d.over = true
		d.hpack.SetEmitEnabled(false)
		return
	}
	d.fields = append(d.fields, f)
}

// Encoder encodes the header blocks for one side of a connection. Make it with NewEncoder.
type Encoder struct {
	hpack  *hpack.Encoder // nil: fields are collected
	dst    []byte
	fields []Field
}

// NewEncoder returns an encoder with a table of FirstTable bytes.
func NewEncoder() *Encoder {
	e := new(Encoder)
	e.hpack = hpack.NewEncoder(e)
	return e
}

// NewCollector returns an Encoder that keeps the fields in the place of encoding them, for a head that is sent in another form.
func NewCollector() *Encoder { return new(Encoder) }

// Collects reports whether the encoder is a collector.
func (e *Encoder) Collects() bool { return e.hpack == nil }

// Collected returns the fields that a collector has kept since Forget.
func (e *Encoder) Collected() []Field { return e.fields }

// Forget frees the fields of a collector.
func (e *Encoder) Forget() {
	clear(e.fields) // the strings
	if e.fields = e.fields[:0]; cap(e.fields) > keptFields {
		e.fields = nil
	}
}

// SetTableSize records that the receiver lowered its table size to smallest and then set it to n. The encoder uses at
// most FirstTable: that is enough for repeated fields.
func (e *Encoder) SetTableSize(smallest, n uint32) {
	was := e.hpack.MaxDynamicTableSize()
	if smallest >= FirstTable && was == FirstTable {
		return // the encoder's limit is unaffected
	}
	if min(smallest, was) < n {
		// Some decoders accept two changes in one block only if the first empties the table.
		e.hpack.SetMaxDynamicTableSize(0)
	}
	e.hpack.SetMaxDynamicTableSize(n)
}

// AppendField appends one field of a block to dst.
func (e *Encoder) AppendField(dst []byte, f Field) []byte {
	if e.Collects() {
		e.fields = append(e.fields, f)
		return dst
	}
	e.dst = dst
	_ = e.hpack.WriteField(f) // fails only if Write fails
	dst, e.dst = e.dst, nil
	return dst
}

// Write implements io.Writer for package hpack.
func (e *Encoder) Write(p []byte) (int, error) {
	e.dst = append(e.dst, p...)
	return len(p), nil
}

// AppendLiteral appends a field that will not repeat, without adding it to the table (RFC 7541 §6.2.2). It must not be
// the first field of a block, because only AppendField emits a pending table size update.
func (e *Encoder) AppendLiteral(dst []byte, name string, value []byte) []byte {
	if e.Collects() {
		e.fields = append(e.fields, Field{Name: name, Value: string(value)})
		return dst
	}
	return append(AppendLiteralName(dst, name, len(value)), value...)
}

// AppendLiteralName is AppendLiteral without the value, for a header block: the caller appends exactly length bytes.
func AppendLiteralName(dst []byte, name string, length int) []byte {
	dst = append(dst, 0)
	dst = append(appendLength(dst, len(name)), name...)
	return appendLength(dst, length)
}

// appendLength appends the length of a string without Huffman coding: an integer with a 7-bit prefix (RFC 7541 §5.1).
func appendLength(dst []byte, n int) []byte {
	const prefix = 1<<7 - 1
	if n < prefix {
		return append(dst, byte(n))
	}
	dst = append(dst, prefix)
	for n -= prefix; n >= 1<<7; n >>= 7 {
		dst = append(dst, byte(n)|1<<7)
	}
	return append(dst, byte(n))
}

// AppendHeaders turns a header block into frames. dst[start:] is HeaderLength bytes of room, followed by the block.
// Every receiver accepts the frames, because they are at most MinFrameSize long.
func AppendHeaders(dst []byte, start int, stream uint32, end bool) []byte {
	flags := Flags(0)
	if end {
		flags = EndStream
	}
	block := dst[start+HeaderLength:]
	if len(block) <= MinFrameSize {
		Header{len(block), Headers, flags | EndHeaders, stream}.Put(dst[start:])
		return dst
	}
	rest := append([]byte(nil), block[MinFrameSize:]...)
	Header{MinFrameSize, Headers, flags, stream}.Put(dst[start:])
	dst = dst[:start+HeaderLength+MinFrameSize]
	for len(rest) > 0 {
		n := min(len(rest), MinFrameSize)
		flags = 0
		if n == len(rest) {
			flags = EndHeaders
		}
		dst = Header{n, Continuation, flags, stream}.Append(dst)
		dst = append(dst, rest[:n]...)
		rest = rest[n:]
	}
	return dst
}
