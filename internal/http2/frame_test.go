package http2

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	peer "golang.org/x/net/http2"
)

func TestHeadersRoundTrip(t *testing.T) {
	for _, h := range []Header{
		{}, {Length: 1}, {MaxFrameSize, Continuation, 0xff, MaxStream}, {0x010203, Headers, EndStream | EndHeaders, 0x04050607},
	} {
		if got := ParseHeader(h.Append(nil)); got != h {
			t.Errorf("%+v comes back as %+v", h, got)
		}
	}
	if got := ParseHeader([]byte{0, 0, 0, 0, 0, 0x80, 0, 0, 1}); got.Stream != 1 {
		t.Errorf("the reserved bit is part of stream %d", got.Stream)
	}
}

func TestOurFramesAreReadByOthers(t *testing.T) {
	b := AppendResetStream(nil, 5, Cancel)
	b = AppendWindowUpdate(b, 7, MaxWindow)
	b = AppendGoAway(b, 9, EnhanceYourCalm, "text")
	settings := Setting{InitialWindowSize, 1}.Append(nil)
	b = Header{Length: len(settings), Type: Settings}.Append(b)
	b = append(b, settings...)
	framer := peer.NewFramer(io.Discard, bytes.NewReader(b))
	next := func() peer.Frame {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		return frame
	}
	if f, ok := next().(*peer.RSTStreamFrame); !ok || f.StreamID != 5 || f.ErrCode != peer.ErrCodeCancel {
		t.Errorf("the reset is read as %v", f)
	}
	if f, ok := next().(*peer.WindowUpdateFrame); !ok || f.StreamID != 7 || f.Increment != MaxWindow {
		t.Errorf("the credit is read as %v", f)
	}
	if f, ok := next().(*peer.GoAwayFrame); !ok || f.LastStreamID != 9 || f.ErrCode != peer.ErrCodeEnhanceYourCalm || string(f.DebugData()) != "text" {
		t.Errorf("the goodbye is read as %v", f)
	}
	if f, ok := next().(*peer.SettingsFrame); !ok || f.NumSettings() != 1 || f.Setting(0).Val != 1 {
		t.Errorf("the settings are read as %v", f)
	}
}

func TestHeadersAreJudged(t *testing.T) {
	for _, c := range []struct {
		h    Header
		code Code // NoError: good
	}{
		{Header{MinFrameSize, Data, 0, 1}, NoError},
		{Header{MinFrameSize + 1, Data, 0, 1}, FrameSizeError},
		{Header{0, Data, 0, 0}, ProtocolError},
		{Header{0, Headers, 0, 0}, ProtocolError},
		{Header{5, PriorityFrame, 0, 1}, NoError},
		{Header{5, PriorityFrame, 0, 0}, ProtocolError},
		{Header{4, PriorityFrame, 0, 1}, FrameSizeError},
		{Header{4, ResetStream, 0, 1}, NoError},
		{Header{4, ResetStream, 0, 0}, ProtocolError},
		{Header{5, ResetStream, 0, 1}, FrameSizeError},
		{Header{12, Settings, 0, 0}, NoError},
		{Header{0, Settings, Ack, 0}, NoError},
		{Header{6, Settings, Ack, 0}, FrameSizeError},
		{Header{7, Settings, 0, 0}, FrameSizeError},
		{Header{6, Settings, 0, 1}, ProtocolError},
		{Header{0, PushPromise, 0, 0}, ProtocolError},
		{Header{8, Ping, Ack, 0}, NoError},
		{Header{9, Ping, 0, 0}, FrameSizeError},
		{Header{8, Ping, 0, 1}, ProtocolError},
		{Header{8, GoAway, 0, 0}, NoError},
		{Header{7, GoAway, 0, 0}, FrameSizeError},
		{Header{8, GoAway, 0, 3}, ProtocolError},
		{Header{4, WindowUpdate, 0, 0}, NoError},
		{Header{3, WindowUpdate, 0, 0}, FrameSizeError},
		{Header{0, Continuation, 0, 0}, ProtocolError},
		{Header{100, 0xfa, 0xff, 0}, NoError}, // an extension
	} {
		err := c.h.Check(MinFrameSize)
		var breach *Error
		if c.code == NoError && err != nil || c.code != NoError && (!errors.As(err, &breach) || breach.Code != c.code || breach.Stream != 0) {
			t.Errorf("%+v: %v, want code %d", c.h, err, c.code)
		}
	}
}

func TestFragments(t *testing.T) {
	for _, c := range []struct {
		flags         Flags
		payload, want string
		code          Code
	}{
		{0, "block", "block", NoError},
		{0, "", "", NoError},
		{Padded, "\x02block..", "block", NoError},
		{Padded, "\x00block", "block", NoError},
		{Padded, "\x01.", "", NoError},
		{Padded, "\x02.", "", ProtocolError},
		{Padded, "", "", FrameSizeError},
		{Priority, "\x00\x00\x00\x01\x00block", "block", NoError},
		{Priority, "\x00\x00\x00\x01", "", FrameSizeError},
		{Priority, "\x80\x00\x00\x05\x00block", "block", ProtocolError},
		{Priority | Padded, "\x01\x00\x00\x00\x01\x00block.", "block", NoError},
		{Priority | Padded, "\x03\x00\x00\x00\x01...", "", FrameSizeError},
	} {
		h := Header{len(c.payload), Headers, c.flags, 5}
		got, err := h.Fragment([]byte(c.payload))
		var breach *Error
		if string(got) != c.want || c.code == NoError && err != nil || c.code != NoError && (!errors.As(err, &breach) || breach.Code != c.code) {
			t.Errorf("%q with flags %x: %q and %v, want %q and code %d", c.payload, c.flags, got, err, c.want, c.code)
		}
	}
}

func TestSettingsAreJudged(t *testing.T) {
	for _, c := range []struct {
		s    Setting
		code Code
	}{
		{Setting{HeaderTableSize, 1<<32 - 1}, NoError},
		{Setting{EnablePush, 1}, NoError},
		{Setting{EnablePush, 2}, ProtocolError},
		{Setting{InitialWindowSize, MaxWindow}, NoError},
		{Setting{InitialWindowSize, MaxWindow + 1}, FlowControlError},
		{Setting{MaxFrameSizeSetting, MinFrameSize}, NoError},
		{Setting{MaxFrameSizeSetting, MinFrameSize - 1}, ProtocolError},
		{Setting{MaxFrameSizeSetting, MaxFrameSize}, NoError},
		{Setting{MaxFrameSizeSetting, MaxFrameSize + 1}, ProtocolError},
		{Setting{EnableConnectProtocol, 2}, ProtocolError},
		{Setting{99, 1<<32 - 1}, NoError},
	} {
		err := c.s.Check()
		var breach *Error
		if c.code == NoError && err != nil || c.code != NoError && (!errors.As(err, &breach) || breach.Code != c.code) {
			t.Errorf("%+v: %v, want code %d", c.s, err, c.code)
		}
		if got, rest := NextSetting(c.s.Append(nil)); got != c.s || len(rest) > 0 {
			t.Errorf("%+v comes back as %+v", c.s, got)
		}
	}
	for id := range SettingID(12) {
		if want := id >= 1 && id <= 6 || id == 8; id.Known() != want {
			t.Errorf("setting %d is known: %t", id, id.Known())
		}
	}
}

// FuzzFrames compares our reading of frames with that of x/net/http2: both must read an accepted frame alike.
func FuzzFrames(f *testing.F) {
	for _, seed := range []string{
		"\x00\x00\x03\x00\x01\x00\x00\x00\x01abc", "\x00\x00\x04\x00\x08\x00\x00\x00\x01\x01ab.",
		"\x00\x00\x06\x01\x24\x00\x00\x00\x01\x00\x00\x00\x03\x00\x82", "\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00",
		"\x00\x00\x08\x06\x01\x00\x00\x00\x0012345678", "\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x01",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < HeaderLength {
			return
		}
		h := ParseHeader(b)
		whole := HeaderLength + h.Length
		if len(b) < whole || h.Type == PushPromise || h.Type > Continuation {
			return
		}
		err := h.Check(MinFrameSize)
		payload := b[HeaderLength:whole]
		var content []byte
		if err == nil && (h.Type == Headers || h.Type == Data) {
			var first byte
			if len(payload) > 0 {
				first = payload[0]
			}
			if h.Type == Headers {
				content, err = h.Fragment(payload)
			} else {
				var before, behind int
				if before, behind, err = h.Padding(first); err == nil {
					content = payload[before : len(payload)-behind]
				}
			}
		}
		framer := peer.NewFramer(io.Discard, bytes.NewReader(b[:whole]))
		framer.SetMaxReadFrameSize(MinFrameSize)
		framer.AllowIllegalReads = h.Type == Continuation // the order of frames is not what is compared
		theirs, theirErr := framer.ReadFrame()
		if err != nil {
			return // we may be stricter
		}
		if theirErr != nil {
			// These are judged where they are dealt with.
			if h.Type == WindowUpdate && Uint31(payload) == 0 || h.Type == Settings || strings.Contains(theirErr.Error(), "pad size larger") {
				return
			}
			t.Fatalf("%+v %q: they say %v, and we nothing", h, payload, theirErr)
		}
		switch theirs := theirs.(type) {
		case *peer.DataFrame:
			if !bytes.Equal(theirs.Data(), content) {
				t.Errorf("data %q, and %q for them", content, theirs.Data())
			}
		case *peer.HeadersFrame:
			if !bytes.Equal(theirs.HeaderBlockFragment(), content) {
				t.Errorf("fragment %q, and %q for them", content, theirs.HeaderBlockFragment())
			}
		case *peer.WindowUpdateFrame:
			if theirs.Increment != Uint31(payload) {
				t.Errorf("credit of %d, and %d for them", Uint31(payload), theirs.Increment)
			}
		}
	})
}
