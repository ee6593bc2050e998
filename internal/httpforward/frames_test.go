package httpforward

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// speaker is one end of an HTTP/2 connection that sends and reads frames as text:
//
//	SETTINGS 4=100 6=1 · SETTINGS ack · PING 12345678 · PING ack 12345678 · WINDOW 0 10 · RST 1 CANCEL
//	GOAWAY 1 NO_ERROR · HEADERS 1 end :method=GET te=trailers · DATA 1 end text · PRIORITY 1 · RAW 00000a…
//
// A header block is one line, however many frames it has. A field with ! before its name is never indexed. In values and
// data _ stands for a blank. GET 1 stands for the head of a request that has no body, POST 1 of one with a body.
type speaker struct {
	t      testing.TB
	conn   *net.TCPConn
	framer *http2.Framer

	encoder *hpack.Encoder
	block   bytes.Buffer
	decoder *hpack.Decoder
}

const (
	getFields  = ":method=GET :scheme=http :path=/ :authority=a"
	postFields = ":method=POST :scheme=http :path=/ :authority=a"
)

func newSpeaker(t testing.TB, conn *net.TCPConn) *speaker {
	s := &speaker{t: t, conn: conn, framer: http2.NewFramer(conn, conn), decoder: hpack.NewDecoder(64<<10, nil)}
	s.framer.AllowIllegalWrites, s.framer.AllowIllegalReads = true, true
	s.framer.SetMaxReadFrameSize(1 << 20)
	s.encoder = hpack.NewEncoder(&s.block)
	return s
}

// sends sends a frame.
func (s *speaker) sends(line string) {
	s.t.Helper()
	if err := s.write(strings.Fields(line)); err != nil {
		s.t.Fatalf("sending %q: %v", line, err)
	}
}

func (s *speaker) write(words []string) error {
	number := func(i int) uint32 {
		n, err := strconv.ParseUint(words[i], 10, 32)
		if err != nil {
			s.t.Fatalf("%q: %v", words, err)
		}
		return uint32(n)
	}
	last := strings.ReplaceAll(words[len(words)-1], "_", " ")
	switch words[0] {
	case "GET":
		return s.headers(number(1), append([]string{"end"}, strings.Fields(getFields)...))
	case "POST":
		return s.headers(number(1), strings.Fields(postFields))
	case "HEADERS":
		return s.headers(number(1), words[2:])
	case "DATA":
		end := len(words) > 2 && words[2] == "end"
		if len(words) == 2 || len(words) == 3 && end {
			last = ""
		}
		return s.framer.WriteData(number(1), end, []byte(last))
	case "SETTINGS":
		if last == "ack" {
			return s.framer.WriteSettingsAck()
		}
		var settings []http2.Setting
		for _, word := range words[1:] {
			var set http2.Setting
			fmt.Sscanf(word, "%d=%d", &set.ID, &set.Val)
			settings = append(settings, set)
		}
		return s.framer.WriteSettings(settings...)
	case "PING":
		return s.framer.WritePing(words[1] == "ack", [8]byte([]byte(last)))
	case "WINDOW":
		return s.framer.WriteWindowUpdate(number(1), number(2))
	case "RST":
		return s.framer.WriteRSTStream(number(1), code(words[2]))
	case "GOAWAY":
		return s.framer.WriteGoAway(number(1), code(words[2]), nil)
	case "PRIORITY":
		return s.framer.WritePriority(number(1), http2.PriorityParam{StreamDep: 1<<31 - 1})
	case "RAW":
		raw, err := hex.DecodeString(strings.Join(words[1:], ""))
		if err != nil {
			return err
		}
		_, err = s.conn.Write(raw)
		return err
	}
	return fmt.Errorf("no frame is called %s", words[0])
}

func code(name string) http2.ErrCode {
	for c := range http2.ErrCode(14) {
		if c.String() == name {
			return c
		}
	}
	panic(name)
}

func (s *speaker) headers(stream uint32, words []string) error {
	end := len(words) > 0 && words[0] == "end"
	if end {
		words = words[1:]
	}
	return s.framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: stream, EndStream: end, EndHeaders: true, BlockFragment: s.encode(words),
	})
}

// encode encodes fields as a header block. It is valid until the next call.
func (s *speaker) encode(words []string) []byte {
	s.block.Reset()
	for _, word := range words {
		name, sensitive := strings.CutPrefix(word, "!")
		pseudo := strings.HasPrefix(name, ":")
		name, value, _ := strings.Cut(strings.TrimPrefix(name, ":"), "=")
		if pseudo {
			name = ":" + name
		}
		s.encoder.WriteField(hpack.HeaderField{Name: name, Value: strings.ReplaceAll(value, "_", " "), Sensitive: sensitive})
	}
	return s.block.Bytes()
}

// reads reads a frame and compares it.
func (s *speaker) reads(want string) {
	s.t.Helper()
	switch words := strings.Fields(want); words[0] {
	case "GET":
		want = "HEADERS " + words[1] + " end " + getFields
	case "POST":
		want = "HEADERS " + words[1] + " " + postFields
	}
	if got := s.next(); got != want {
		s.t.Fatalf("read %q, want %q", got, want)
	}
}

// next reads a frame, as text.
func (s *speaker) next() string {
	s.t.Helper()
	frame, err := s.framer.ReadFrame()
	if errors.Is(err, io.EOF) {
		return "the end"
	}
	if err != nil {
		return err.Error()
	}
	return s.text(frame)
}

func (s *speaker) text(frame http2.Frame) string {
	h := frame.Header()
	end := ""
	if h.Flags.Has(http2.FlagDataEndStream) {
		end = " end"
	}
	switch f := frame.(type) {
	case *http2.HeadersFrame:
		block := bytes.Clone(f.HeaderBlockFragment())
		for done := f.HeadersEnded(); !done; {
			next, err := s.framer.ReadFrame()
			more, ok := next.(*http2.ContinuationFrame)
			if !ok {
				return fmt.Sprintf("%v and %v in the middle of a header block", next, err)
			}
			block = append(block, more.HeaderBlockFragment()...)
			done = more.HeadersEnded()
		}
		return fmt.Sprintf("HEADERS %d%s%s", h.StreamID, end, s.fields(block))
	case *http2.DataFrame:
		text := fmt.Sprintf("DATA %d%s", h.StreamID, end)
		if len(f.Data()) > 0 {
			text += " " + strings.ReplaceAll(string(f.Data()), " ", "_")
		}
		return text
	case *http2.SettingsFrame:
		if f.IsAck() {
			return "SETTINGS ack"
		}
		text := "SETTINGS"
		f.ForeachSetting(func(s http2.Setting) error {
			text += fmt.Sprintf(" %d=%d", s.ID, s.Val)
			return nil
		})
		return text
	case *http2.PingFrame:
		ack := ""
		if f.IsAck() {
			ack = "ack "
		}
		return "PING " + ack + string(f.Data[:])
	case *http2.WindowUpdateFrame:
		return fmt.Sprintf("WINDOW %d %d", h.StreamID, f.Increment)
	case *http2.RSTStreamFrame:
		return fmt.Sprintf("RST %d %s", h.StreamID, f.ErrCode)
	case *http2.GoAwayFrame:
		return fmt.Sprintf("GOAWAY %d %s", f.LastStreamID, f.ErrCode)
	}
	return fmt.Sprint(h)
}

func (s *speaker) fields(block []byte) string {
	fields, err := s.decoder.DecodeFull(block)
	if err != nil {
		return " " + err.Error()
	}
	text := ""
	for _, f := range fields {
		if f.Name == "date" {
			continue // of an answer of ours
		}
		text += " "
		if f.Sensitive {
			text += "!"
		}
		text += f.Name + "=" + strings.ReplaceAll(f.Value, " ", "_")
	}
	return text
}
