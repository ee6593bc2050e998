package httpforward

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// meet makes two speakers that have met through an engine.
func meet(t testing.TB, configure ...func(*Config)) (r *rig, client, server *speaker) {
	t.Helper()
	o := newOrigin(t)
	r = newRig(t, o.address, true, append([]func(*Config){plain}, configure...)...)
	client, server = meetOn(t, r, o)
	return r, client, server
}

// meetOn is meet on a rig.
func meetOn(t testing.TB, r *rig, o *origin) (client, server *speaker) {
	t.Helper()
	client = newSpeaker(t, r.dial(t))
	send(t, client.conn, http2.ClientPreface)
	client.sends("SETTINGS")
	server = newSpeaker(t, o.accept())
	expect(t, server.conn, http2.ClientPreface)
	server.next()
	server.sends("SETTINGS")
	client.next()
	client.sends("SETTINGS ack")
	server.reads("SETTINGS ack")
	server.sends("SETTINGS ack")
	client.reads("SETTINGS ack")
	return client, server
}

// quietly reads all frames sent to a side, so that the engine never waits for it, and returns the last GOAWAY.
func (s *speaker) quietly() (goodbye func() string) {
	last := make(chan string, 1)
	go func() {
		var text string
		for {
			frame, err := s.framer.ReadFrame()
			if err != nil {
				last <- text
				return
			}
			if f, ok := frame.(*http2.GoAwayFrame); ok {
				text = fmt.Sprintf("GOAWAY %s %s", f.ErrCode, f.DebugData())
			}
		}
	}()
	return func() string { return <-last }
}

func TestFloodsEndAConnection(t *testing.T) {
	raw := func(text string) []byte {
		s := &speaker{t: t}
		var b bytes.Buffer
		s.framer, s.encoder = http2.NewFramer(&b, nil), hpack.NewEncoder(&s.block)
		s.framer.AllowIllegalWrites = true
		for line := range strings.SplitSeq(text, "; ") {
			if err := s.write(strings.Fields(line)); err != nil {
				t.Fatal(err)
			}
		}
		return b.Bytes()
	}
	for _, c := range []struct{ name, before, frame string }{
		{"pings", "", "PING 12345678"},
		{"answers to no ping", "", "PING ack 12345678"},
		{"settings", "", "SETTINGS 4=1"},
		{"acknowledgements of no settings", "", "SETTINGS ack"},
		{"priorities", "", "PRIORITY 1"},
		{"credit", "", "WINDOW 0 1"},
		{"empty data", "POST 1", "DATA 1"},
		{"resets of closed streams", "POST 1; RST 1 CANCEL", "RST 1 CANCEL"},
		{"goodbyes", "", "GOAWAY 0 NO_ERROR"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r, client, server := meet(t)
			server.quietly()
			goodbye := client.quietly()
			if c.before != "" {
				client.conn.Write(raw(c.before))
			}
			flood := bytes.Repeat(raw(c.frame), 10*idleBurst)
			client.conn.Write(flood) // fails when the engine has had enough
			if got := goodbye(); !strings.HasPrefix(got, "GOAWAY ENHANCE_YOUR_CALM") {
				t.Errorf("the client received %q", got)
			}
			if got := r.records.await(t, strings.Count(c.before, "RST")); got.reason != flow.Overload || got.flags != "DPE" {
				t.Errorf("the record is %+v", got)
			}
		})
	}
	for _, c := range []struct{ name, frame string }{
		{"by upstream, of breaches on a closed stream", "WINDOW 1 0"},
		{"by upstream, of empty data on a closed stream", "DATA 1"},
		{"by upstream, of header blocks on a closed stream", "HEADERS 1 end :status=200"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, client, server := meet(t)
			client.sends("GET 1")
			server.reads("GET 1")
			server.sends("HEADERS 1 end :status=200")
			client.reads("HEADERS 1 end :status=200")
			client.quietly()
			goodbye := server.quietly()
			server.conn.Write(bytes.Repeat(raw(c.frame), 10*idleBurst))
			if got := goodbye(); !strings.HasPrefix(got, "GOAWAY ENHANCE_YOUR_CALM") {
				t.Errorf("upstream received %q", got)
			}
		})
	}
	for _, c := range []struct{ name, frame string }{
		{"empty data on a stream that was refused", "DATA 1"},
		{"header blocks on a stream that was refused", "HEADERS 1 end a=b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, client, server := meet(t)
			server.quietly()
			client.sends("HEADERS 1 :method=POST")
			client.reads("RST 1 PROTOCOL_ERROR")
			goodbye := client.quietly()
			client.conn.Write(bytes.Repeat(raw(c.frame), 10*idleBurst))
			if got := goodbye(); !strings.HasPrefix(got, "GOAWAY ENHANCE_YOUR_CALM") {
				t.Errorf("the client received %q", got)
			}
		})
	}
	t.Run("extensions", func(t *testing.T) {
		t.Parallel()
		_, client, server := meet(t)
		server.quietly()
		goodbye := client.quietly()
		client.conn.Write(bytes.Repeat([]byte{0, 0, 0, 0xfa, 0, 0, 0, 0, 0}, 10*idleBurst))
		if got := goodbye(); !strings.HasPrefix(got, "GOAWAY ENHANCE_YOUR_CALM") {
			t.Errorf("the client received %q", got)
		}
	})
}

// A client that resets what it has just asked for costs upstream much and itself nothing (CVE-2023-44487).
func TestStreamsThatAreResetTooFastEndAConnection(t *testing.T) {
	for name, bad := range map[string]func(client *speaker, id uint32) error{
		"by downstream": func(client *speaker, id uint32) error {
			if err := client.headers(id, strings.Fields("end "+getFields)); err != nil {
				return err
			}
			return client.framer.WriteRSTStream(id, http2.ErrCodeCancel)
		},
		"by us, for breaches": func(client *speaker, id uint32) error {
			if err := client.headers(id, strings.Fields(postFields)); err != nil {
				return err
			}
			return client.framer.WriteWindowUpdate(id, 0)
		},
		"by us, for malformed requests": func(client *speaker, id uint32) error {
			return client.headers(id, []string{"end", ":method=GET"})
		},
		"by us, for large ones": func(client *speaker, id uint32) error {
			return client.headers(id, []string{"end", "a=" + strings.Repeat("b", 300)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, client, server := meet(t, func(c *Config) { c.MaxHeadBytes = 300 })
			server.quietly()
			goodbye := client.quietly()
			var err error
			sent := 0
			for ; sent < 20*resetBurst && err == nil; sent++ {
				err = bad(client, uint32(2*sent+1))
			}
			if got := goodbye(); !strings.HasPrefix(got, "GOAWAY ENHANCE_YOUR_CALM") {
				t.Errorf("after %d streams the client was told %q", sent, got)
			}
			if n := r.records.count(); n < resetBurst || n > 3*resetBurst {
				t.Errorf("%d requests were let through", n)
			}
		})
	}
}

func TestResponsesThatAreLeftInTheMiddleAreNoFlood(t *testing.T) {
	r, client, server := meet(t)
	for i := range 2 * resetBurst {
		id := 2*i + 1
		client.sends(fmt.Sprintf("GET %d", id))
		server.reads(fmt.Sprintf("GET %d", id))
		server.sends(fmt.Sprintf("HEADERS %d :status=200", id))
		client.reads(fmt.Sprintf("HEADERS %d :status=200", id))
		client.sends(fmt.Sprintf("RST %d CANCEL", id))
		server.reads(fmt.Sprintf("RST %d CANCEL", id))
	}
	r.records.await(t, 2*resetBurst-1)
}

func TestAHeadOverTheLimitIsRefusedAndTheConnectionLives(t *testing.T) {
	var many, large string
	for i := range 101 {
		many += fmt.Sprintf(" f%d=v", i)
		large += fmt.Sprintf(" f%d=%s", i, strings.Repeat("x", 60))
	}
	for _, c := range []struct{ name, fields string }{{"too many fields", many}, {"too many bytes", large}} {
		t.Run(c.name, func(t *testing.T) {
			r, client, server := meet(t, func(c *Config) { c.MaxHeadBytes = 8 << 10 })
			client.sends("HEADERS 1 " + postFields + c.fields)
			client.reads("HEADERS 1 end :status=431 server=pillion content-length=0")
			client.reads("RST 1 NO_ERROR")
			client.sends("DATA 1 end body")
			client.reads("WINDOW 0 4")
			// The rejected fields are in the table all the same.
			client.sends("HEADERS 3 end " + getFields + " f99=" + strings.TrimPrefix(strings.Fields(c.fields)[99], "f99="))
			server.reads("HEADERS 3 end " + getFields + " f99=" + strings.TrimPrefix(strings.Fields(c.fields)[99], "f99="))
			if got := r.records.await(t, 0); got.reason != flow.HeadTooLarge || got.status != 431 || got.flags != "DPE" {
				t.Errorf("the record is %+v", got)
			}
			server.sends("HEADERS 3 end :status=200" + c.fields)
			server.reads("RST 3 PROTOCOL_ERROR")
			client.reads("HEADERS 3 end :status=502 server=pillion content-length=0")
			client.sends("GET 5")
			server.reads("GET 5")
			client.sends("HEADERS 7 " + postFields)
			server.reads("HEADERS 7 " + postFields)
			client.sends("HEADERS 7 end" + c.fields)
			client.reads("RST 7 PROTOCOL_ERROR")
			server.reads("RST 7 CANCEL")
		})
	}
}

// frames is the bytes of frames: type, flags, stream, payload.
func rawFrame(kind, flags byte, stream uint32, payload string) string {
	n := len(payload)
	return string([]byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags, byte(stream >> 24), byte(stream >> 16), byte(stream >> 8), byte(stream)}) + payload
}

// Each violation ends the connection with the code of RFC 9113, and upstream receives no part of it.
func TestProtocolErrorsEndAConnection(t *testing.T) {
	const (
		data, headers, priority, rst, settings, push, ping, goaway, window, continuation = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9
		endStream, endHeaders, padded, ack                                               = 1, 4, 8, 1
	)
	get := "\x82\x86\x84\x41\x01a" // GET http / a
	for _, c := range []struct{ name, bytes, code string }{
		{"data on stream 0", rawFrame(data, 0, 0, "x"), "PROTOCOL_ERROR"},
		{"data on an idle stream", rawFrame(data, 0, 1, "x"), "PROTOCOL_ERROR"},
		{"data on a stream of the server's", rawFrame(data, 0, 2, "x"), "PROTOCOL_ERROR"},
		{"data with too much padding", rawFrame(headers, endHeaders, 1, get) + rawFrame(data, padded, 1, "\x02x"), "PROTOCOL_ERROR"},
		{"padded data without padding", rawFrame(headers, endHeaders, 1, get) + rawFrame(data, padded, 1, ""), "FRAME_SIZE_ERROR"},
		{"a frame too large", rawFrame(headers, endHeaders, 1, get) + rawFrame(data, 0, 1, strings.Repeat("x", 16385)), "FRAME_SIZE_ERROR"},
		{"headers on stream 0", rawFrame(headers, endHeaders, 0, get), "PROTOCOL_ERROR"},
		{"headers on a stream of the server's", rawFrame(headers, endHeaders, 2, get), "PROTOCOL_ERROR"},
		{"headers with too much padding", rawFrame(headers, endHeaders|padded, 1, "\x20"+get), "PROTOCOL_ERROR"},
		{"headers too short for their priority", rawFrame(headers, endHeaders|0x20, 1, "1234"), "FRAME_SIZE_ERROR"},
		{"a stream below another", rawFrame(headers, endHeaders, 5, get) + rawFrame(headers, endHeaders, 3, get), "STREAM_CLOSED"},
		{"headers on a closed stream", rawFrame(headers, endHeaders, 1, get) + rawFrame(rst, 0, 1, "\x00\x00\x00\x08") + rawFrame(headers, endHeaders, 1, get), "STREAM_CLOSED"},
		{"a header block that is interrupted", rawFrame(headers, 0, 1, get) + rawFrame(ping, 0, 0, "12345678"), "PROTOCOL_ERROR"},
		{"a header block that another continues", rawFrame(headers, 0, 1, get) + rawFrame(continuation, endHeaders, 3, ""), "PROTOCOL_ERROR"},
		{"a continuation of nothing", rawFrame(continuation, endHeaders, 1, get), "PROTOCOL_ERROR"},
		{"too many continuations", rawFrame(headers, 0, 1, get) + strings.Repeat(rawFrame(continuation, 0, 1, ""), 100), "ENHANCE_YOUR_CALM"},
		{"a header block that does not end", rawFrame(headers, 0, 1, get) + strings.Repeat(rawFrame(continuation, 0, 1, strings.Repeat("\x82", 16000)), 10), "ENHANCE_YOUR_CALM"},
		{"an index that is not in the table", rawFrame(headers, endHeaders, 1, "\xff\xff\x01"), "COMPRESSION_ERROR"},
		{"a header block that is cut off", rawFrame(headers, endHeaders, 1, get+"\x41\x05a"), "COMPRESSION_ERROR"},
		{"a table larger than allowed", rawFrame(headers, endHeaders, 1, "\x3f\xe1\xff\x03"+get), "COMPRESSION_ERROR"},
		{"a priority of a wrong size", rawFrame(priority, 0, 1, "1234"), "FRAME_SIZE_ERROR"},
		{"a reset of stream 0", rawFrame(rst, 0, 0, "1234"), "PROTOCOL_ERROR"},
		{"a reset of an idle stream", rawFrame(rst, 0, 1, "1234"), "PROTOCOL_ERROR"},
		{"a reset of a wrong size", rawFrame(headers, endHeaders, 1, get) + rawFrame(rst, 0, 1, "123"), "FRAME_SIZE_ERROR"},
		{"settings of a stream", rawFrame(settings, 0, 1, ""), "PROTOCOL_ERROR"},
		{"settings of a wrong size", rawFrame(settings, 0, 0, "12345"), "FRAME_SIZE_ERROR"},
		{"an acknowledgement with settings", rawFrame(settings, ack, 0, "123456"), "FRAME_SIZE_ERROR"},
		{"push that is neither on nor off", rawFrame(settings, 0, 0, "\x00\x02\x00\x00\x00\x02"), "PROTOCOL_ERROR"},
		{"a window too large at first", rawFrame(settings, 0, 0, "\x00\x04\x80\x00\x00\x00"), "FLOW_CONTROL_ERROR"},
		{"frames too small", rawFrame(settings, 0, 0, "\x00\x05\x00\x00\x3f\xff"), "PROTOCOL_ERROR"},
		{"frames too large", rawFrame(settings, 0, 0, "\x00\x05\x01\x00\x00\x00"), "PROTOCOL_ERROR"},
		{"a push from a client", rawFrame(headers, endHeaders, 1, get) + rawFrame(push, endHeaders, 1, "\x00\x00\x00\x02"+get), "PROTOCOL_ERROR"},
		{"a ping of a stream", rawFrame(ping, 0, 1, "12345678"), "PROTOCOL_ERROR"},
		{"a ping of a wrong size", rawFrame(ping, 0, 0, "1234567"), "FRAME_SIZE_ERROR"},
		{"a goodbye of a stream", rawFrame(goaway, 0, 1, "12345678"), "PROTOCOL_ERROR"},
		{"a goodbye too short", rawFrame(goaway, 0, 0, "1234567"), "FRAME_SIZE_ERROR"},
		{"no credit", rawFrame(window, 0, 0, "\x00\x00\x00\x00"), "PROTOCOL_ERROR"},
		{"credit of a wrong size", rawFrame(window, 0, 0, "\x00\x00\x01"), "FRAME_SIZE_ERROR"},
		{"credit for an idle stream", rawFrame(window, 0, 1, "\x00\x00\x00\x01"), "PROTOCOL_ERROR"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, client, server := meet(t)
			goodbye := client.quietly()
			server.quietly()
			io.WriteString(client.conn, c.bytes)
			got := goodbye()
			if !strings.HasPrefix(got, "GOAWAY "+c.code) {
				t.Errorf("received %q, want %s", got, c.code)
			}
		})
	}
	for _, c := range []struct{ name, bytes string }{
		{"something else than settings", rawFrame(ping, 0, 0, "12345678")},
		{"an acknowledgement", rawFrame(settings, ack, 0, "")},
	} {
		t.Run("the first frame is "+c.name, func(t *testing.T) {
			o := newOrigin(t)
			client := newSpeaker(t, newRig(t, o.address, true).dial(t))
			send(t, client.conn, http2.ClientPreface+c.bytes)
			client.reads("SETTINGS 3=4096 6=65536")
			client.reads("GOAWAY 0 PROTOCOL_ERROR")
			client.reads("the end")
		})
	}
}

// A malformed message ends only its stream, and upstream does not receive it.
func TestMalformedRequestsAreReset(t *testing.T) {
	_, client, server := meet(t)
	id := uint32(1)
	for _, fields := range []string{
		"end",
		"end :method=GET :scheme=http :authority=a",
		"end :method=GET :path=/ :authority=a",
		"end :scheme=http :path=/ :authority=a",
		"end :method=GET :scheme=http :path= :authority=a",
		"end :method=GET :method=GET :scheme=http :path=/ :authority=a",
		"end :method=GET :scheme=http :path=/ :authority=a :authority=b",
		"end :method=GET :scheme=http :path=/ :authority=a :status=200",
		"end :method=GET :scheme=http :path=/ :authority=a :unknown=x",
		"end :method=GET :scheme=http a=b :path=/ :authority=a",
		"end :method=G_T :scheme=http :path=/ :authority=a",
		"end :method=GET :scheme=http :path=/_HTTP/1.1 :authority=a",
		"end :method=CONNECT :scheme=http :path=/ :authority=a",
		"end :method=CONNECT",
		"end :method=GET :protocol=websocket :scheme=http :path=/ :authority=a",
		"end " + getFields + " Upper=case",
		"end " + getFields + " a:b=c",
		"end " + getFields + " =novalue",
		"end " + getFields + " a=b\x00c",
		"end " + getFields + " a=b\rc",
		"end " + getFields + " connection=close",
		"end " + getFields + " keep-alive=1",
		"end " + getFields + " proxy-connection=1",
		"end " + getFields + " transfer-encoding=chunked",
		"end " + getFields + " upgrade=h2c",
		"end " + getFields + " te=gzip",
		"end " + getFields + " content-length=x",
		"end " + getFields + " content-length=1",
		getFields + " content-length=1 content-length=2",
		getFields + " content-length=-1",
	} {
		words := strings.Split(fields, " ")
		if err := client.headers(id, words); err != nil {
			t.Fatal(err)
		}
		if got, want := client.next(), fmt.Sprintf("RST %d PROTOCOL_ERROR", id); got != want {
			t.Fatalf("%q: read %q, want %q", fields, got, want)
		}
		id += 2
	}
	client.sends(fmt.Sprintf("GET %d", id))
	server.reads(fmt.Sprintf("GET %d", id))
	id += 2
	for _, body := range []string{"DATA %d 123456", "DATA %d end 1234", "HEADERS %d end a=b", "HEADERS %d a=b", "HEADERS %d end :path=/", "HEADERS %d end A=b", "WINDOW %d 0"} {
		client.sends(fmt.Sprintf("HEADERS %d %s content-length=5", id, postFields))
		server.reads(fmt.Sprintf("HEADERS %d %s content-length=5", id, postFields))
		client.sends(fmt.Sprintf(body, id))
		server.reads(fmt.Sprintf("RST %d CANCEL", id))
		got := client.next()
		if strings.HasPrefix(body, "DATA") {
			if !strings.HasPrefix(got, "RST") {
				t.Fatalf("%s: read %q", body, got)
			}
			got, _ = client.next(), got
			if !strings.HasPrefix(got, "WINDOW 0 ") {
				t.Fatalf("%s: read %q", body, got)
			}
		} else if got != fmt.Sprintf("RST %d PROTOCOL_ERROR", id) {
			t.Fatalf("%s: read %q", body, got)
		}
		id += 2
	}
	client.sends(fmt.Sprintf("GET %d", id))
	server.reads(fmt.Sprintf("GET %d", id))
	client.sends(fmt.Sprintf("DATA %d more", id))
	client.reads(fmt.Sprintf("RST %d STREAM_CLOSED", id))
	client.reads("WINDOW 0 4")
	server.reads(fmt.Sprintf("RST %d CANCEL", id))
}

func TestStreamsBeyondTheAnnouncedLimitAreRefused(t *testing.T) {
	r, client, server := meet(t)
	go io.Copy(io.Discard, server.conn)
	go func() {
		for i := range maxStreams + 1 {
			client.sends(fmt.Sprintf("GET %d", 2*i+1))
		}
	}()
	client.reads(fmt.Sprintf("RST %d REFUSED_STREAM", 2*maxStreams+1))
	if got := r.records.await(t, 0); got.reason != flow.Overload || got.flags != "UO" {
		t.Errorf("the record is %+v", got)
	}
}

func TestTablesFollowTheSettings(t *testing.T) {
	_, client, server := meet(t)
	exchange := func(id int, fields string) {
		t.Helper()
		client.sends(fmt.Sprintf("HEADERS %d end %s%s", id, getFields, fields))
		server.reads(fmt.Sprintf("HEADERS %d end %s%s", id, getFields, fields))
		server.sends(fmt.Sprintf("HEADERS %d end :status=200%s", id, fields))
		client.reads(fmt.Sprintf("HEADERS %d end :status=200%s", id, fields))
	}
	exchange(1, " a=b c=d")
	for i, size := range []uint32{0, 100, 1 << 20, 0, 4096, 50} {
		// Each side bounds the tables of what it is sent, and a sender follows with its acknowledgement.
		for _, s := range [][2]*speaker{{client, server}, {server, client}} {
			teller, told := s[0], s[1]
			teller.sends(fmt.Sprintf("SETTINGS 1=%d", size))
			told.reads(fmt.Sprintf("SETTINGS 1=%d", min(size, maxTable)))
			told.sends("SETTINGS ack")
			teller.reads("SETTINGS ack")
			told.encoder.SetMaxDynamicTableSizeLimit(min(size, maxTable))
			told.encoder.SetMaxDynamicTableSize(min(size, maxTable))
			teller.decoder.SetAllowedMaxDynamicTableSize(size)
		}
		for j := range 3 {
			exchange(100*(i+1)+2*j+1, fmt.Sprintf(" a=b c=%d", j))
		}
	}
}

// If a receiver does not read, data stays with its sender: the engine holds one buffer of it.
func TestASideThatDoesNotReadStopsTheOther(t *testing.T) {
	for _, c := range []struct {
		name   string
		reader func(client, server *speaker) (from, to *net.TCPConn)
	}{
		{"downstream", func(client, server *speaker) (from, to *net.TCPConn) { return server.conn, client.conn }},
		{"upstream", func(client, server *speaker) (from, to *net.TCPConn) { return client.conn, server.conn }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, client, server := meet(t)
			client.sends("POST 1")
			server.reads("POST 1")
			server.sends("HEADERS 1 :status=200")
			client.reads("HEADERS 1 :status=200")
			from, to := c.reader(client, server)
			frame := []byte(rawFrame(0, 0, 1, strings.Repeat("x", 16384)))
			sent := 0
			for { // until the kernel's buffers are full
				from.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
				n, err := from.Write(frame[sent%len(frame):])
				sent += n
				if err != nil {
					break
				}
				if sent > 64<<20 {
					t.Fatal("it does not stop")
				}
			}
			from.SetWriteDeadline(time.Now().Add(nettest.Patience))
			rest := len(frame) - sent%len(frame)
			go from.Write(frame[len(frame)-rest:])
			want := (sent + rest) / len(frame) * 16384
			framer := http2.NewFramer(io.Discard, to)
			for got := 0; got < want; {
				f, err := framer.ReadFrame()
				if err != nil {
					t.Fatal(err)
				}
				got += int(f.Header().Length)
			}
		})
	}
}

// The engine itself sends the credit for discarded data. A peer that does not read it is not read from.
func TestAPeerThatDoesNotReadItsCreditIsNotReadFrom(t *testing.T) {
	_, client, server := meet(t)
	go io.Copy(io.Discard, server.conn)
	client.sends("POST 1")
	padded := []byte(rawFrame(0, 8, 1, "\x00x")) // of 11 bytes, for which we write 26
	flood := bytes.Repeat(padded, 10000)
	client.conn.SetReadBuffer(4096)
	sent := 0
	for {
		client.conn.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := client.conn.Write(flood)
		sent += n
		if err != nil {
			return
		}
		if sent > 64<<20 {
			t.Fatal("it does not stop")
		}
	}
}

func TestHTTP2Limits(t *testing.T) {
	t.Run("a request waits too long for its response", func(t *testing.T) {
		r, client, server := meet(t, func(c *Config) { c.RequestTimeout = 50 * time.Millisecond })
		client.sends("GET 1")
		server.reads("GET 1")
		server.reads("RST 1 CANCEL")
		client.reads("HEADERS 1 end :status=504 server=pillion content-length=0")
		if got := r.records.await(t, 0); got.reason != flow.RequestTimeout || got.flags != "UT" || got.status != 504 {
			t.Errorf("the record is %+v", got)
		}
		client.sends("POST 3") // a request that is not complete has time
		server.reads("POST 3")
		client.sends("DATA 3 end x")
		server.reads("DATA 3 end x")
		server.reads("RST 3 CANCEL")
		client.reads("HEADERS 3 end :status=504 server=pillion content-length=0")
	})
	t.Run("a header block takes too long", func(t *testing.T) {
		r, client, _ := meet(t, func(c *Config) { c.HeadTimeout = 50 * time.Millisecond })
		client.sends("RAW 000010 01 04 00000001 8286")
		client.reads("GOAWAY 0 ENHANCE_YOUR_CALM")
		client.reads("the end")
		if got := r.records.await(t, 0); got.reason != flow.HeadTimeout || got.details != "request_header_timeout" || got.method != "" {
			t.Errorf("the record of what was no request yet is %+v", got)
		}
	})
	t.Run("nothing moves", func(t *testing.T) {
		nettest.UnderLimit(t, 50*time.Millisecond, func(t testing.TB, limit time.Duration) {
			r, client, server := meet(t, func(c *Config) { c.IdleTimeout = limit })
			client.sends("GET 1")
			server.reads("GET 1")
			client.reads("GOAWAY 1 NO_ERROR")
			client.reads("the end")
			readsReset(t, server.conn, "upstream")
			if got := r.records.await(t, 0); got.reason != flow.IdleTimeout {
				t.Errorf("the record is %+v", got)
			}
		})
	})
	t.Run("nothing moves after downstream has closed its half", func(t *testing.T) {
		r, client, server := meet(t, func(c *Config) { c.HalfCloseTimeout = 50 * time.Millisecond })
		client.sends("GET 1")
		server.reads("GET 1")
		client.conn.CloseWrite()
		server.reads("the end")
		client.reads("GOAWAY 1 NO_ERROR")
		if got := r.records.await(t, 0); got.reason != flow.HalfCloseTimeout {
			t.Errorf("the record is %+v", got)
		}
	})
}

// stuff sends large requests until upstream, whose peer does not read, accepts no more. It returns the unsent bytes and
// the last stream.
func stuff(client *speaker, patience time.Duration) (rest []byte, last uint32) {
	client.t.Helper()
	var requests bytes.Buffer
	framer := http2.NewFramer(&requests, nil)
	for last = 3; last < 2*maxStreams-2; last += 2 {
		block := client.encode([]string{":method=GET", ":scheme=http", ":path=/", ":authority=a", "large=" + fmt.Sprint(last, strings.Repeat("~", 8000))})
		framer.WriteHeaders(http2.HeadersFrameParam{StreamID: last, BlockFragment: block, EndStream: true, EndHeaders: true})
	}
	client.conn.SetWriteDeadline(time.Now().Add(patience))
	n, err := client.conn.Write(requests.Bytes())
	if err == nil {
		client.t.Fatalf("upstream is not full of %d bytes", n)
	}
	client.conn.SetWriteDeadline(time.Now().Add(nettest.Patience))
	return requests.Bytes()[n:], last - 2
}

// An upstream may write all of a response before it reads the next request. Requests that wait for it must not keep us
// from taking the response.
func TestRequestsThatWaitDoNotHoldBackResponses(t *testing.T) {
	const answer = 16 << 20
	_, client, server := meet(t)
	client.sends("GET 1")
	server.reads("GET 1")
	stuff(client, time.Second)
	answered := make(chan error, 1)
	go func() {
		err := server.headers(1, []string{":status=200"})
		for sent := 0; sent < answer && err == nil; sent += 16 << 10 {
			err = server.framer.WriteData(1, false, make([]byte, 16<<10))
		}
		answered <- err
	}()
	client.reads("HEADERS 1 :status=200")
	for got := 0; got < answer; {
		frame, err := client.framer.ReadFrame()
		if err != nil {
			t.Fatalf("after %d bytes of %d: %v", got, answer, err)
		}
		got += int(frame.Header().Length)
	}
	if err := <-answered; err != nil {
		t.Error(err)
	}
}

// The header timeout does not run while upstream does not accept earlier frames.
func TestAHeadThatWaitsForUpstreamIsNotLate(t *testing.T) {
	nettest.UnderLimit(t, 100*time.Millisecond, func(t testing.TB, limit time.Duration) {
		_, client, server := meet(t, func(c *Config) { c.HeadTimeout = limit })
		rest, last := stuff(client, max(time.Second, 4*limit))
		sent := make(chan error, 1)
		go func() {
			_, err := client.conn.Write(rest)
			sent <- err
		}()
		for heard := uint32(0); heard < last; {
			frame, err := server.framer.ReadFrame()
			if err != nil {
				t.Fatalf("after request %d of %d: %v", heard, last, err)
			}
			heard = frame.Header().StreamID
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
	})
}

// A peer that floods is not read from any more: its flood fills the kernel's buffers, and then it has to wait.
func TestAFloodIsNotReadToItsEnd(t *testing.T) {
	_, client, server := meet(t)
	server.quietly()
	goodbye := client.quietly()
	flood := bytes.Repeat([]byte(rawFrame(6, 0, 0, "12345678")), 4096)
	sent := 0
	for err := error(nil); err == nil; {
		var n int
		n, err = client.conn.Write(flood)
		if sent += n; sent > 64<<20 {
			t.Fatal("the flood is read")
		}
	}
	if got := goodbye(); !strings.HasPrefix(got, "GOAWAY ENHANCE_YOUR_CALM") {
		t.Errorf("after %d bytes, the client received %q", sent, got)
	}
}

// One buffer can hold more frames than a goroutine may handle while others wait.
func TestATurnOfALaneEndsAmongSmallFrames(t *testing.T) {
	const turns, frames = 3, laneTurn / frameCost
	m := &multiplex{settings: &Settings{MaxHeadBytes: 64 << 10, MaxHeadFields: 1000}}
	m.toUp.init(m, &m.toDown)
	m.toDown.init(m, &m.toUp)
	l := &m.toUp
	l.settingsSent = true
	l.idleFrames.left = turns * frames
	l.in = tcp.TakeBuffer()
	defer l.release()
	ping := rawFrame(6, 0, 0, "12345678")
	l.in.Append([]byte(strings.Repeat(ping, turns*frames)))
	for turn := range turns {
		m.newTurn()
		l.parse()
		if l.parsed != (turn+1)*frames*len(ping) || !l.turnOver() {
			t.Fatalf("after turn %d, %d frames are handled; turnOver = %t", turn, l.parsed/len(ping), l.turnOver())
		}
	}
	if m.newTurn(); !l.pending {
		t.Error("the turn ended with the last frame, and not before the next")
	}
	if l.parse(); l.pending || l.turnOver() {
		t.Errorf("pending = %t, turnOver = %t without frames", l.pending, l.turnOver())
	}
}

// An upload that always has a next byte, as beside goroutines that keep the processors busy, does not outlive the drain.
func TestTheEndOfADrainStopsABusyUpload(t *testing.T) {
	r, client, server := meet(t)
	crowd(t, r)
	const window = 1<<31 - 1 - 1<<16
	server.sends(fmt.Sprintf("WINDOW 0 %d", window))
	client.sends("POST 1")
	server.reads("POST 1")
	server.sends(fmt.Sprintf("WINDOW 1 %d", window))
	var uploaded atomic.Int64
	go func() {
		b := make([]byte, 1<<20)
		for n, err := 0, error(nil); err == nil; uploaded.Add(int64(n)) {
			n, err = server.conn.Read(b)
		}
	}()
	ended := make(chan error, 1)
	go func() {
		upload := bytes.Repeat([]byte(rawFrame(0, 0, 1, "a little data")), 4096)
		for err := error(nil); ; {
			if _, err = client.conn.Write(upload); err != nil {
				ended <- err
				return
			}
		}
	}()
	nettest.Eventually(t, "the upload to flow", func() bool { return uploaded.Load() > 1<<20 })
	r.cancel()
	if err := <-ended; errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes were uploaded, and the upload goes on", uploaded.Load())
	}
}

// crowd runs goroutines that always have work until the test ends.
func crowd(t *testing.T, r *rig) {
	o, work := newOrigin(t), make([]byte, 64<<10)
	ctx, cancel := context.WithCancel(t.Context())
	var crowd sync.WaitGroup
	for range 20 {
		w := tcp.NewWaiter(ctx)
		conn, _, err := r.engine.config.Dialer.Dial(w, upstream.Target{Address: o.address})
		if err != nil {
			t.Fatal(err)
		}
		crowd.Go(func() {
			defer w.Close()
			defer conn.Close()
			for !w.Canceled() {
				sha256.Sum256(work) // a turn
				w.Yield(conn)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		crowd.Wait()
	})
}
