package httpforward

import (
	"github.com/pillion-proxy/pillion/internal/http2"
)

// tableSize is what a Settings frame says of the header table: how small it was, and how large it is in the end.
type tableSize struct {
	said          bool
	smallest, now uint32
}

// settings passes a Settings frame on, so that each side hears the other's wishes, but for what concerns us.
func (l *lane) settings(h http2.Header, payload []byte) error {
	if h.Has(http2.Ack) {
		return l.acknowledged()
	}
	if l.settled {
		if err := l.idleFrame(); err != nil {
			return err
		}
	}
	if len(l.unacked) == maxUnacked {
		return http2.ConnectionError(http2.EnhanceYourCalm, "too many SETTINGS frames")
	}
	out := http2.Header{Type: http2.Settings}.Append(l.scratch)
	var table tableSize
	var said said
	for len(payload) > 0 {
		var s http2.Setting
		s, payload = http2.NextSetting(payload)
		if err := s.Check(); err != nil {
			return err
		}
		if s.ID == http2.HeaderTableSize {
			table.note(s.Value)
		}
		if l.edit(&s) {
			said |= 1 << s.ID
			out = s.Append(out)
		} else if s.ID == http2.EnablePush && !l.fromDown() && s.Value != 0 {
			return http2.ConnectionError(http2.ProtocolError, "a server cannot be pushed to")
		}
	}
	if l.m.lost != nil {
		l.settled = true
		l.other.insert(appendSettingsAck(l.other.scratch))
		return nil
	}
	l.unacked = append(l.unacked, table)
	l.say(out, said)
	return nil
}

// said is a set of settings, as bits.
type said uint16

// say sends a Settings frame on: scratch with the frame appended, whose length is not yet written. The first one has what
// we have to say as well, and what was held goes behind it.
func (l *lane) say(scratch []byte, said said) {
	start := len(l.scratch)
	first := !l.settled
	if first {
		for _, s := range l.own() {
			if said>>s.ID&1 == 0 {
				scratch = s.Append(scratch)
			}
		}
	}
	http2.Header{Length: len(scratch) - start - http2.HeaderLength, Type: http2.Settings}.Put(scratch[start:])
	l.settled = true
	l.insert(scratch)
	if first {
		l.out.Append(scratch[:start])
	}
}

func (t *tableSize) note(n uint32) {
	if !t.said || n < t.smallest {
		t.smallest = n
	}
	t.said, t.now = true, n
}

// edit changes a setting of src to what dst is to hear, and reports whether dst hears it at all. An extension is between
// neighbours: what it allows would not get through.
func (l *lane) edit(s *http2.Setting) bool {
	config := &l.m.engine.config
	switch s.ID {
	case http2.HeaderTableSize:
		s.Value = min(s.Value, maxTable)
	case http2.EnablePush:
		s.Value = 0
		return l.fromDown()
	case http2.MaxConcurrentStreams:
		if !l.fromDown() {
			s.Value = min(s.Value, maxStreams)
		}
	case http2.InitialWindowSize:
		if l.fromDown() {
			l.m.window.stream = int64(s.Value)
		}
	case http2.MaxFrameSizeSetting:
		// What was said is taken for as long as the connection lasts: the smaller value may not have arrived.
		l.other.frameLimit = max(l.other.frameLimit, int(s.Value))
	case http2.MaxHeaderListSize:
		s.Value = min(s.Value, uint32(config.MaxHeadBytes))
	case http2.EnableConnectProtocol:
	default:
		return false
	}
	return true
}

// own is what the first Settings frame to dst has to say, whether src says it or not.
func (l *lane) own() []http2.Setting {
	list := http2.Setting{ID: http2.MaxHeaderListSize, Value: uint32(l.m.engine.config.MaxHeadBytes)}
	if l.fromDown() {
		return []http2.Setting{{ID: http2.EnablePush, Value: 0}, list}
	}
	return []http2.Setting{{ID: http2.MaxConcurrentStreams, Value: maxStreams}, list}
}

// acknowledged passes on that src has heard a Settings frame of dst. From here on src's header blocks, and those for
// dst, follow it. Later, src might use a table that we do not allow yet; earlier, dst one of which it does not know that
// it may be used.
func (l *lane) acknowledged() error {
	if len(l.other.unacked) == 0 {
		return l.idleFrame()
	}
	table := l.other.unacked[0]
	l.other.unacked = append(l.other.unacked[:0], l.other.unacked[1:]...)
	if table.said {
		l.decoder.SetTableSize(min(table.now, maxTable))
		l.encoder.SetTableSize(table.smallest, table.now)
	}
	l.insert(appendSettingsAck(l.scratch))
	return nil
}

func appendSettingsAck(dst []byte) []byte {
	return http2.Header{Type: http2.Settings, Flags: http2.Ack}.Append(dst)
}
