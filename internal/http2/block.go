package http2

import "golang.org/x/net/http2/hpack"

// Field is a field, or a pseudo-field, of a header block. Sensitive ones are never put into a table.
type Field = hpack.HeaderField

// fieldOverhead is what each field counts beyond its bytes (RFC 9113 §6.5.2).
const fieldOverhead = 32

// Decoder decodes the header blocks of one side of a connection. All of them have to be decoded, in their order, or the
// table would differ from the sender's. Make it with NewDecoder.
type Decoder struct {
	hpack     *hpack.Decoder
	maxBytes  int
	maxFields int

	fields []Field
	size   int
	over   bool
}

// NewDecoder makes a decoder that keeps no more than so many bytes, counted as MAX_HEADER_LIST_SIZE is, and so many
// fields of one block.
func NewDecoder(maxBytes, maxFields int) *Decoder {
	d := &Decoder{maxBytes: maxBytes, maxFields: maxFields}
	d.hpack = hpack.NewDecoder(FirstTable, d.add)
	return d
}

// SetTableSize says what the sender may raise its table to.
func (d *Decoder) SetTableSize(n uint32) { d.hpack.SetAllowedMaxDynamicTableSize(n) }

// Decode decodes a whole block. Its fields are valid until the next call. whole is false when the block is over a limit:
// then the fields are the first ones. An error is one of the connection.
func (d *Decoder) Decode(block []byte) (fields []Field, whole bool, err error) {
	clear(d.fields) // the strings may go
	d.fields, d.size, d.over = d.fields[:0], 0, false
	d.hpack.SetEmitEnabled(true)
	// Two changes of the table's size may stand at the beginning (RFC 7541 §4.2). Package hpack takes the second only of
	// a table that is empty, unless it begins a block.
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

// sizeUpdate is the length of the change of the table's size that block begins with (RFC 7541 §6.3), 0 for none.
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

// add takes a field from hpack. Once a limit is passed hpack is told to spare what only the fields need.
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
	hpack *hpack.Encoder
	dst   []byte
}

// NewEncoder makes an encoder.
func NewEncoder() *Encoder {
	e := new(Encoder)
	e.hpack = hpack.NewEncoder(e)
	return e
}

// SetTableSize says that the receiver's table has shrunk to smallest and is n now. No more than FirstTable is used: what
// repeats fits.
func (e *Encoder) SetTableSize(smallest, n uint32) {
	was := e.hpack.MaxDynamicTableSize()
	if smallest >= FirstTable && was == FirstTable {
		return // nothing changes
	}
	if min(smallest, was) < n {
		// There are decoders that take two changes at once only when the first empties the table.
		e.hpack.SetMaxDynamicTableSize(0)
	}
	e.hpack.SetMaxDynamicTableSize(n)
}

// AppendField appends one field of a block to dst.
func (e *Encoder) AppendField(dst []byte, f Field) []byte {
	e.dst = dst
	_ = e.hpack.WriteField(f) // fails only if Write does
	dst, e.dst = e.dst, nil
	return dst
}

// Write is for package hpack.
func (e *Encoder) Write(p []byte) (int, error) {
	e.dst = append(e.dst, p...)
	return len(p), nil
}

// AppendLiteral appends a field that will not come again, and so has no business in a table (RFC 7541 §6.2.2). It must
// not be the first of its block: a change of the table's size comes with AppendField.
func AppendLiteral(dst []byte, name string, value []byte) []byte {
	dst = append(dst, 0)
	dst = append(appendLength(dst, len(name)), name...)
	return append(appendLength(dst, len(value)), value...)
}

// appendLength appends an integer with a prefix of 7 bits (RFC 7541 §5.1), the length of a string that is not Huffman
// coded.
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

// AppendHeaders appends the frames that carry a header block, which stands in dst behind HeaderLength bytes of room:
// dst[start:] is the room and the block. No frame is larger than MinFrameSize, which every receiver takes.
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
