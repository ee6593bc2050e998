package http2

import "encoding/binary"

// SettingID identifies a setting.
type SettingID uint16

// The settings of RFC 9113 §6.5.2, and that of RFC 8441. Others are extensions.
const (
	HeaderTableSize       SettingID = 0x1
	EnablePush            SettingID = 0x2
	MaxConcurrentStreams  SettingID = 0x3
	InitialWindowSize     SettingID = 0x4
	MaxFrameSizeSetting   SettingID = 0x5
	MaxHeaderListSize     SettingID = 0x6
	EnableConnectProtocol SettingID = 0x8
)

// Known reports whether the setting is one of the above rather than an extension.
func (id SettingID) Known() bool {
	return HeaderTableSize <= id && id <= MaxHeaderListSize || id == EnableConnectProtocol
}

// settingLength is the length of one setting in the payload of a Settings frame.
const settingLength = 6

// Setting is one setting.
type Setting struct {
	ID    SettingID
	Value uint32
}

// NextSetting parses the setting at the beginning of payload, and returns the rest. The payload must not be empty, and
// its length must be a multiple of settingLength; Header.Check ensures that.
func NextSetting(payload []byte) (Setting, []byte) {
	s := Setting{SettingID(binary.BigEndian.Uint16(payload)), binary.BigEndian.Uint32(payload[2:])}
	return s, payload[settingLength:]
}

// Append appends the setting to the payload of a Settings frame.
func (s Setting) Append(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(s.ID))
	return binary.BigEndian.AppendUint32(dst, s.Value)
}

// Check validates the value.
func (s Setting) Check() error {
	switch {
	case s.ID == EnablePush && s.Value > 1, s.ID == EnableConnectProtocol && s.Value > 1:
		return connectionError(ProtocolError, "setting is neither 0 nor 1")
	case s.ID == InitialWindowSize && s.Value > MaxWindow:
		return connectionError(FlowControlError, "INITIAL_WINDOW_SIZE too large")
	case s.ID == MaxFrameSizeSetting && (s.Value < MinFrameSize || s.Value > MaxFrameSize):
		return connectionError(ProtocolError, "MAX_FRAME_SIZE out of range")
	}
	return nil
}

// BeginsLikeServer reports whether b is, or may become, the header of a SETTINGS frame without ACK. A server sends it
// before any other frame (RFC 9113 §3.4), possibly before its client has sent anything.
func BeginsLikeServer(b []byte) bool {
	want := [HeaderLength]byte{3: byte(Settings)}
	for i, c := range b[:min(len(b), len(want))] {
		if c != want[i] && i != 1 && i != 2 || i == 1 && c > MinFrameSize>>8 {
			return false
		}
	}
	return true
}
