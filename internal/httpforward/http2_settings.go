package httpforward

import "github.com/pillion-proxy/pillion/internal/http2"

// settingsFrame holds one SETTINGS frame; the last value of a repeated parameter wins (RFC 9113 §6.5.3).
type settingsFrame struct {
	present uint16 // the parameters present, as bits
	values  [http2.EnableConnectProtocol + 1]uint32
}

func (w *settingsFrame) set(id http2.SettingID, value uint32) {
	w.present |= 1 << id
	w.values[id] = value
}

func (w *settingsFrame) has(id http2.SettingID) bool { return w.present>>id&1 != 0 }

// atMost sets a parameter to value, unless it is already lower.
func (w *settingsFrame) atMost(id http2.SettingID, value uint32) {
	if !w.has(id) || w.values[id] > value {
		w.set(id, value)
	}
}

// tableSize holds the HEADER_TABLE_SIZE values of one SETTINGS frame: the smallest, and the last.
type tableSize struct {
	present       bool
	smallest, now uint32
}

func (t *tableSize) note(n uint32) {
	if !t.present || n < t.smallest {
		t.smallest = n
	}
	t.present, t.now = true, n
}

// readSettings calls take for each parameter of a SETTINGS frame, in order, and returns the changes of the table's size.
func readSettings(payload []byte, take func(http2.Setting) error) (table tableSize, err error) {
	for len(payload) > 0 {
		var s http2.Setting
		s, payload = http2.NextSetting(payload)
		if err := s.Check(); err != nil {
			return table, err
		}
		if s.ID == http2.HeaderTableSize {
			table.note(s.Value)
		}
		if err := take(s); err != nil {
			return table, err
		}
	}
	return table, nil
}

// permitPush checks a server's ENABLE_PUSH (RFC 9113 §6.5.2).
func permitPush(value uint32) error {
	if value != 0 {
		return http2.ConnectionError(http2.ProtocolError, "a server cannot be pushed to")
	}
	return nil
}

// settings forwards a SETTINGS frame, so that each side receives the other's parameters, except where they concern us.
func (l *lane) settings(h http2.Header, payload []byte) error {
	if h.Has(http2.Ack) {
		return l.ackReceived()
	}
	if l.settingsSent {
		if err := l.idleFrame(); err != nil {
			return err
		}
	}
	if len(l.unacked) == maxUnacked {
		return errManySettings
	}
	var w settingsFrame
	table, err := readSettings(payload, func(s http2.Setting) error {
		if s.ID.Known() { // an extension is hop-by-hop; its frames would not be forwarded
			w.set(s.ID, s.Value)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := l.apply(&w); err != nil {
		return err
	}
	if l.m.lost != nil {
		l.settingsSent = true
		l.other.insert(appendSettingsAck(l.other.scratch))
		return nil
	}
	l.unacked = append(l.unacked, table)
	l.sendSettings(w)
	return nil
}

// apply applies the parameters that affect this proxy.
func (l *lane) apply(w *settingsFrame) error {
	if !l.fromDown() && w.has(http2.EnablePush) {
		if err := permitPush(w.values[http2.EnablePush]); err != nil {
			return err
		}
	}
	if l.fromDown() && w.has(http2.InitialWindowSize) {
		l.m.window.stream = int64(w.values[http2.InitialWindowSize])
	}
	if w.has(http2.MaxFrameSizeSetting) {
		// Keep the largest value: frames sent before a lower one arrived may still exceed it.
		l.other.frameLimit = max(l.other.frameLimit, int(w.values[http2.MaxFrameSizeSetting]))
	}
	return nil
}

// sendSettings sends an edited SETTINGS frame. The first one always contains our own limits, and frames that were held
// follow it.
func (l *lane) sendSettings(w settingsFrame) {
	first, down := !l.settingsSent, l.fromDown()
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
		w.atMost(http2.MaxHeaderListSize, uint32(l.other.limits().MaxHeadBytes))
	}
	held := len(l.scratch)
	scratch := http2.Header{Type: http2.Settings}.Append(l.scratch)
	for id := range http2.SettingID(len(w.values)) {
		if w.has(id) {
			scratch = http2.Setting{ID: id, Value: w.values[id]}.Append(scratch)
		}
	}
	http2.Header{Length: len(scratch) - held - http2.HeaderLength, Type: http2.Settings}.Put(scratch[held:])
	l.settingsSent = true
	l.insert(scratch)
	if first && !down {
		l.out.Append(scratch[:held])
	}
}

// ackReceived forwards src's SETTINGS ACK. From here on header blocks in both directions may use the acknowledged table
// size: a later change would reject blocks of src that use the new size; an earlier one would send dst blocks for a
// size it does not allow yet.
func (l *lane) ackReceived() error {
	if len(l.other.unacked) == 0 {
		return l.idleFrame()
	}
	table := l.other.unacked[0]
	l.other.unacked = append(l.other.unacked[:0], l.other.unacked[1:]...)
	if table.present {
		l.decoder.SetTableSize(min(table.now, maxTable))
		l.tableHeld = tableFactor * int(min(table.now, maxTable)-min(table.now, http2.FirstTable))
		l.encoder.SetTableSize(table.smallest, table.now)
	}
	l.insert(appendSettingsAck(l.scratch))
	return nil
}

// appendSettings appends a SETTINGS frame.
func appendSettings(dst []byte, settings []http2.Setting) []byte {
	at := len(dst)
	dst = http2.Header{Type: http2.Settings}.Append(dst)
	for _, s := range settings {
		dst = s.Append(dst)
	}
	http2.Header{Length: len(dst) - at - http2.HeaderLength, Type: http2.Settings}.Put(dst[at:])
	return dst
}

func appendSettingsAck(dst []byte) []byte {
	return http2.Header{Type: http2.Settings, Flags: http2.Ack}.Append(dst)
}
