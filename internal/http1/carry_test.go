package http1

import (
	"fmt"

	"github.com/pillion-proxy/pillion/internal/http1/http1test"
)

// outcome is the result of parsing a message.
type outcome struct {
	want    string // as in http1test.Message
	framing Framing
	head    string // the head that goes on
	came    string // the head that came, without empty lines before it
	body    string // the body that goes on, with its chunk framing
	rest    string
}

// wire delivers a message in steps. At each step the earlier bytes move to other memory, and their old memory is
// overwritten: a parser that read a byte twice would find line ends there.
type wire struct {
	message string
	step    func() int // how many bytes come next, at least 1
	b       []byte     // what came so far
}

func (w *wire) more() bool {
	if len(w.b) == len(w.message) {
		return false
	}
	came := []byte(w.message[:min(len(w.b)+w.step(), len(w.message))])
	for i := range w.b {
		w.b[i] = '\n'
	}
	w.b = came
	return true
}

// carry lets a message go past, as a proxy does. skip chooses whether payload is skipped or scanned.
func carry(m http1test.Message, response bool, step func() int, skip func() bool) outcome {
	w := wire{message: m.Bytes, step: step}
	var h Head
	parse := h.ParseRequest
	if response {
		parse = h.ParseResponse
	}
	for done := false; !done; {
		var err error
		if done, err = parse(w.b, Limits{}); err != nil {
			return outcome{want: err.(Error).Name()}
		}
		if !done && !w.more() {
			return outcome{want: http1test.Incomplete}
		}
	}
	framing, err := h.RequestFraming(w.b)
	if response {
		framing, err = h.ResponseFraming(w.b, []byte(m.Method))
	}
	if err != nil {
		return outcome{want: err.(Error).Name()}
	}
	h.DropHopByHop(w.b)
	o := outcome{framing: framing, head: string(h.AppendLines(nil, w.b)) + "\r\n"}
	o.came = m.Bytes[h.Line.Start:h.Length]

	var x Body
	x.Start(framing, Limits{})
	x.Forbid(h.Nominated(w.b))
	at := h.Length
	for !x.Done() {
		if n := min(x.Payload(), int64(len(w.b)-at)); n > 0 && skip() {
			x.Skip(n)
			at += int(n)
			continue
		}
		n, err := x.Scan(w.b[at:])
		if at += n; err != nil {
			return outcome{want: err.(Error).Name()}
		}
		if !x.Done() && !w.more() {
			break
		}
	}
	if x.End() != nil {
		return outcome{want: http1test.Incomplete}
	}
	o.body, o.rest = m.Bytes[h.Length:at], m.Bytes[at:]
	switch framing.Kind {
	case NoBody:
		o.want = "no body"
	case Sized:
		o.want = fmt.Sprint("sized ", x.Bytes())
	case Chunked:
		o.want = fmt.Sprint("chunked ", x.Bytes())
	case UntilClose:
		o.want = fmt.Sprint("until close ", x.Bytes())
	case Tunnel:
		o.want = "tunnel"
	}
	return o
}

func always() bool { return true }
func never() bool  { return false }

// at returns a step that brings n bytes and then all others.
func at(n int) func() int {
	first := true
	return func() int {
		if first && n > 0 {
			first = false
			return n
		}
		return 1 << 30
	}
}

// by returns a step that brings n bytes each time.
func by(n int) func() int { return func() int { return n } }
