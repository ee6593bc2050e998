package probe

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/http2"
)

// frame returns a frame of a server.
func frame(kind http2.FrameType, flags http2.Flags, stream uint32, payload string) string {
	return string(http2.Header{Length: len(payload), Type: kind, Flags: flags, Stream: stream}.Append(nil)) + payload
}

// block returns a header block of names and values.
func block(fields ...string) string {
	encoder, out := http2.NewEncoder(), []byte(nil)
	for i := 0; i < len(fields); i += 2 {
		out = encoder.AppendField(out, http2.Field{Name: fields[i], Value: fields[i+1]})
	}
	return string(out)
}

var (
	greeting  = frame(http2.Settings, 0, 0, "\x00\x04\x00\x00\x00\x00")
	head      = block(":status", "200", "content-type", "application/grpc")
	okHead    = frame(http2.Headers, http2.EndHeaders, 1, head)
	isServing = "\x00\x00\x00\x00\x02\x08\x01"
	okMessage = frame(http2.Data, 0, 1, isServing)
	okEnd     = frame(http2.Headers, http2.EndHeaders|http2.EndStream, 1, block("grpc-status", "0"))
)

// script is a server that sends fixed bytes and records what it receives.
type script struct {
	io.Reader
	received bytes.Buffer
}

func (s *script) Write(b []byte) (int, error) { return s.received.Write(b) }

func TestFramesOfAServer(t *testing.T) {
	const ping, settingsAck = "12345678", "\x00\x00\x00\x04\x01\x00\x00\x00\x00"
	probe := &grpcProbe{address: "127.0.0.1:80"}
	asked := string(probe.request(context.Background(), ""))
	for name, c := range map[string]struct {
		sent     string // by the server
		want     string // of the error; empty: no error
		received string // by the server, after the call
	}{
		"plain":                     {greeting + okHead + okMessage + okEnd, "", settingsAck},
		"settings again":            {greeting + greeting + okHead + okMessage + okEnd, "", settingsAck + settingsAck},
		"our settings acknowledged": {greeting + frame(http2.Settings, http2.Ack, 0, "") + okHead + okMessage + okEnd, "", settingsAck},
		"ping": {greeting + frame(http2.Ping, 0, 0, ping) + okHead + frame(http2.Ping, http2.Ack, 0, ping) + okMessage + okEnd, "",
			settingsAck + frame(http2.Ping, http2.Ack, 0, ping)},
		"windows": {greeting + frame(http2.WindowUpdate, 0, 0, "\x00\x00\x00\x01") + frame(http2.WindowUpdate, 0, 1, "\x00\x00\x00\x01") +
			okHead + okMessage + okEnd, "", settingsAck},
		"an extension":  {greeting + frame(0x77, 0xff, 9, "what?") + okHead + okMessage + okEnd, "", settingsAck},
		"interim":       {greeting + frame(http2.Headers, http2.EndHeaders, 1, block(":status", "103")) + okHead + okMessage + okEnd, "", settingsAck},
		"a head in two": {greeting + frame(http2.Headers, 0, 1, head[:1]) + frame(http2.Continuation, http2.EndHeaders, 1, head[1:]) + okMessage + okEnd, "", settingsAck},
		"padding": {greeting + frame(http2.Headers, http2.EndHeaders|http2.Padded|http2.Priority, 1, "\x02\x00\x00\x00\x00\x01"+head+"\x00\x00") +
			frame(http2.Data, http2.Padded, 1, "\x03"+isServing+"\x00\x00\x00") + okEnd, "", settingsAck},
		"a message in pieces": {greeting + okHead + frame(http2.Data, 0, 1, isServing[:2]) + frame(http2.Data, 0, 1, "") +
			frame(http2.Data, 0, 1, isServing[2:]) + okEnd, "", settingsAck},
		"GOAWAY with the largest stream": {greeting + frame(http2.GoAway, 0, 0, "\x7f\xff\xff\xff\x00\x00\x00\x00") + okHead + okMessage + okEnd, "", settingsAck},
		"GOAWAY before our stream":       {greeting + frame(http2.GoAway, 0, 0, "\x00\x00\x00\x00\x00\x00\x00\x00"), "ended the connection with code 0", settingsAck},
		"GOAWAY with an error":           {greeting + frame(http2.GoAway, 0, 0, "\x00\x00\x00\x01\x00\x00\x00\x0bcalm down"), `ended the connection with code 11: "calm down"`, settingsAck},
		"a reset":                        {greeting + frame(http2.ResetStream, 0, 1, "\x00\x00\x00\x07"), "reset the call with code 7", settingsAck},
		"a reset afterwards":             {greeting + okHead + okMessage + okEnd + frame(http2.ResetStream, 0, 1, "\x00\x00\x00\x00"), "", settingsAck},
		"no bytes":                       {"", "closed the connection", ""},
		"half a frame":                   {greeting[:10], "closed the connection", ""},
		"no end":                         {greeting + okHead + okMessage, "closed the connection", settingsAck},
		"no settings":                    {okHead + okMessage + okEnd, "does not speak HTTP/2", ""},
		"an acknowledgement":             {frame(http2.Settings, http2.Ack, 0, "") + okHead, "does not speak HTTP/2", ""},
		"a bad setting":                  {frame(http2.Settings, 0, 0, "\x00\x02\x00\x00\x00\x02"), "neither 0 nor 1", ""},
		"a push":                         {greeting + frame(http2.PushPromise, http2.EndHeaders, 1, "\x00\x00\x00\x02"), "push is disabled", settingsAck},
		"another stream":                 {greeting + frame(http2.Headers, http2.EndHeaders, 3, head), "does not exist", settingsAck},
		"a body first":                   {greeting + okMessage, "body before its head", settingsAck},
		"a frame in a block":             {greeting + frame(http2.Headers, 0, 1, head) + okMessage, "follow each other", settingsAck},
		"a block without a head":         {greeting + frame(http2.Continuation, http2.EndHeaders, 1, head), "follow each other", settingsAck},
		"a large frame":                  {greeting + frame(http2.Data, 0, 1, strings.Repeat("x", 1<<14+1)), "larger than MAX_FRAME_SIZE", settingsAck},
		"trailers and no end":            {greeting + okHead + frame(http2.Headers, http2.EndHeaders, 1, block("grpc-status", "0")), "do not end", settingsAck},
		"too many fields":                {greeting + frame(http2.Headers, http2.EndHeaders, 1, block(append(strings.Split(strings.Repeat("a,b,", 100), ",")[:200], "c", "d")...)), "100 fields", settingsAck},
		"a broken block":                 {greeting + frame(http2.Headers, http2.EndHeaders, 1, "\x80"), "code 9", settingsAck},
		"a broken head":                  {greeting + frame(http2.Headers, http2.EndHeaders, 1, block("content-type", "x")), "valid :status", settingsAck},
		"too much":                       {greeting + strings.Repeat(frame(0x77, 0, 0, strings.Repeat("x", 1000)), 60), "more than 49152 bytes", settingsAck},
	} {
		server := &script{Reader: strings.NewReader(c.sent)}
		err := probe.check(context.Background(), server, "")
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if received := server.received.String(); received != asked+c.received {
			t.Errorf("%s: after the call the server receives %q, want %q", name, strings.TrimPrefix(received, asked), c.received)
		}
	}
}

// For any bytes of a server, the probe ends with an error or a result, and reads and writes a bounded number of bytes.
func FuzzGRPCReply(f *testing.F) {
	f.Add([]byte(greeting + okHead + okMessage + okEnd))
	f.Add([]byte(greeting + frame(http2.Headers, 0, 1, head[:1]) + frame(http2.Continuation, http2.EndHeaders, 1, head[1:]) + okMessage + okEnd))
	f.Add([]byte(greeting + frame(http2.Ping, 0, 0, "12345678") + frame(http2.GoAway, 0, 0, "\x00\x00\x00\x01\x00\x00\x00\x0bcalm down")))
	f.Fuzz(func(t *testing.T, sent []byte) {
		// An endless stream follows, so that only the bounds end the call.
		server := &script{Reader: io.MultiReader(bytes.NewReader(sent), endless{})}
		probe := &grpcProbe{address: "127.0.0.1:80"}
		asked := len(probe.request(context.Background(), ""))
		_ = probe.check(context.Background(), server, "")
		if more := server.received.Len() - asked; more > maxReply {
			t.Errorf("%d bytes are sent to the server after the call", more)
		}
	})
}

// endless sends empty SETTINGS frames forever.
type endless struct{}

func (endless) Read(b []byte) (int, error) {
	return copy(b, frame(http2.Settings, 0, 0, "")), nil
}

func FuzzHealthStatus(f *testing.F) {
	f.Add([]byte("\x12\x02hi\x08\x01\x1d1234"))
	f.Add([]byte("\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	f.Fuzz(func(t *testing.T, message []byte) {
		status, err := healthStatus(message)
		again, errAgain := healthStatus(append(message[:len(message):len(message)], "\x12\x00"...)) // an unknown field changes nothing
		if err == nil && (errAgain != nil || status != again) {
			t.Errorf("%x: %d, and with one more field %d and %v", message, status, again, errAgain)
		}
	})
}

func TestAServerThatDoesNotReadDoesNotBlockAProbe(t *testing.T) {
	ours, theirs := net.Pipe() // a write waits for its reader
	defer theirs.Close()
	ctx, cancel := context.WithCancel(context.Background())
	probe := &grpcProbe{address: "a:1", dial: func(context.Context, string, string) (net.Conn, error) {
		cancel()
		return ours, nil
	}}
	if _, err := probe.run(ctx, httptest.NewRequest("GET", "/", nil)); err == nil {
		t.Error("no error")
	}
}
