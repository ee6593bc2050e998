package httpforward

import "github.com/pillion-proxy/pillion/internal/http2"

// wishes are the settings of one Settings frame. What a frame says twice counts as it is said last.
type wishes struct {
	said   uint16 // the settings that are there, as bits
	values [http2.EnableConnectProtocol + 1]uint32
}

func (w *wishes) set(id http2.SettingID, value uint32) {
	w.said |= 1 << id
	w.values[id] = value
}

func (w *wishes) has(id http2.SettingID) bool { return w.said>>id&1 != 0 }

// atMost lowers a setting, or makes it, so that it is no more than value.
func (w *wishes) atMost(id http2.SettingID, value uint32) {
	if !w.has(id) || w.values[id] > value {
		w.set(id, value)
	}
}

// tableSize is what a Settings frame says of the header table: how small it was, and how large it is in the end.
type tableSize struct {
	said          bool
	smallest, now uint32
}

func (t *tableSize) note(n uint32) {
	if !t.said || n < t.smallest {
		t.smallest = n
	}
	t.said, t.now = true, n
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
	var w wishes
	var table tableSize
	for len(payload) > 0 {
		var s http2.Setting
		s, payload = http2.NextSetting(payload)
		if err := s.Check(); err != nil {
			return err
		}
		if !s.ID.Known() {
			continue // an extension is between neighbours: what it allows would not get through
		}
		w.set(s.ID, s.Value)
		if s.ID == http2.HeaderTableSize {
			table.note(s.Value)
		}
	}
	if err := l.heed(&w); err != nil {
		return err
	}
	if l.m.lost != nil {
		l.settled = true
		l.other.insert(appendSettingsAck(l.other.scratch))
		return nil
	}
	l.unacked = append(l.unacked, table)
	l.say(w)
	return nil
}

// heed takes note of the settings that concern what we do.
func (l *lane) heed(w *wishes) error {
	if !l.fromDown() && w.has(http2.EnablePush) && w.values[http2.EnablePush] != 0 {
		return http2.ConnectionError(http2.ProtocolError, "a server cannot be pushed to")
	}
	if l.fromDown() && w.has(http2.InitialWindowSize) {
		l.m.window.stream = int64(w.values[http2.InitialWindowSize])
	}
	if w.has(http2.MaxFrameSizeSetting) {
		// A larger value counts for as long as the connection lasts: a smaller one may not have arrived.
		l.other.frameLimit = max(l.other.frameLimit, int(w.values[http2.MaxFrameSizeSetting]))
	}
	return nil
}

// say sends a Settings frame on, edited. The first one has what we have to say as well, whether src says it or not, and
// what was held goes behind it.
func (l *lane) say(w wishes) {
	first, down := !l.settled, l.fromDown()
	if w.has(http2.HeaderTableSize) {
		w.atMost(http2.HeaderTableSize, maxTable)
	}
	if down && (first || w.has(http2.EnablePush)) {
		w.set(http2.EnablePush, 0)
	}
	if !down && (first || w.has(http2.MaxConcurrentStreams)) {
		w.atMost(http2.MaxConcurrentStreams, maxStreams)
	}
	if first || w.has(http2.MaxHeaderListSize) {
		w.atMost(http2.MaxHeaderListSize, uint32(l.m.engine.config.MaxHeadBytes))
	}
	held := len(l.scratch)
	scratch := http2.Header{Type: http2.Settings}.Append(l.scratch)
	for id := range http2.SettingID(len(w.values)) {
		if w.has(id) {
			scratch = http2.Setting{ID: id, Value: w.values[id]}.Append(scratch)
		}
	}
	http2.Header{Length: len(scratch) - held - http2.HeaderLength, Type: http2.Settings}.Put(scratch[held:])
	l.settled = true
	l.insert(scratch)
	if first && !down {
		l.out.Append(scratch[:held])
	}
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
