package grpcwire

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/envoy"
)

// serve starts a server of unencrypted HTTP/2, or of HTTP/1, and returns a client of it.
func serve(t *testing.T, http2 bool, handler http.HandlerFunc) *Client {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(http2)
	server.Config.Protocols.SetHTTP1(!http2)
	server.Start()
	t.Cleanup(server.Close)
	base, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(http2)
	transport.Protocols.SetHTTP1(!http2)
	t.Cleanup(transport.CloseIdleConnections)
	return &Client{Transport: transport, Base: *base, MaxMessage: 1 << 20}
}

// reply writes a gRPC response.
func reply(w http.ResponseWriter, body, code, text string) {
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Trailer", "Grpc-Status, Grpc-Message")
	w.WriteHeader(http.StatusOK)
	io.WriteString(w, body)
	if code != "" {
		w.Header().Set("Grpc-Status", code)
		w.Header().Set("Grpc-Message", text)
	}
}

func TestACallSendsOneMessageAndReturnsOne(t *testing.T) {
	var got *http.Request
	var sent []byte
	client := serve(t, true, func(w http.ResponseWriter, r *http.Request) {
		got = r
		sent, _ = io.ReadAll(r.Body)
		reply(w, "\x00\x00\x00\x00\x05world", "0", "")
	})
	client.Header = http.Header{"Clusterid": {"Kubernetes"}}
	tokens := []string{"first", "second", ""}
	client.Token = func() (string, error) {
		token := tokens[0]
		tokens = tokens[1:]
		return token, nil
	}
	for _, authorization := range []string{"Bearer first", "Bearer second", ""} {
		response, err := client.Call(t.Context(), "/package.Service/Method", []byte("hello"))
		if err != nil || string(response) != "world" {
			t.Fatalf("%q, error %v", response, err)
		}
		if string(sent) != "\x00\x00\x00\x00\x05hello" {
			t.Errorf("the server got %q", sent)
		}
		for field, want := range map[string]string{"Te": "trailers", "Content-Type": "application/grpc+proto", "Clusterid": "Kubernetes", "Authorization": authorization} {
			if value := got.Header.Get(field); value != want {
				t.Errorf("%s is %q, want %q", field, value, want)
			}
		}
		if got.Method != http.MethodPost || got.URL.Path != "/package.Service/Method" {
			t.Errorf("%s %s", got.Method, got.URL.Path)
		}
	}
	client.Token = func() (string, error) { return "", errors.New("no such file") }
	if _, err := client.Call(t.Context(), "/package.Service/Method", nil); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("error %v, want the token's", err)
	}
}

func TestACallFailsByName(t *testing.T) {
	for _, test := range []struct {
		name    string
		http1   bool
		handler http.HandlerFunc
		code    envoy.GRPCCode // of an *Error; GRPCOK: another error
		text    string
	}{
		{"status in trailers", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "", "16", "no%20token%") }, envoy.GRPCUnauthenticated, "no%20token%"},
		{"message after percent-decoding", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "", "7", "not %E2%9C%93") }, envoy.GRPCPermissionDenied, "not ✓"},
		{"status without a body", false, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", "12")
			w.Header().Set("Grpc-Message", "unknown method")
		}, envoy.GRPCUnimplemented, "unknown method"},
		{"status after a message", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "\x00\x00\x00\x00\x01x", "13", "late") }, envoy.GRPCInternal, "late"},
		{"no status", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "\x00\x00\x00\x00\x01x", "", "") }, envoy.GRPCUnknown, "without a status"},
		{"unknown status", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "", "99", "") }, envoy.GRPCUnknown, `"99"`},
		{"status of HTTP", false, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, envoy.GRPCUnavailable, "HTTP status 503"},
		{"no message", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "", "0", "") }, envoy.GRPCOK, "no message"},
		{"two messages", false, func(w http.ResponseWriter, _ *http.Request) {
			reply(w, "\x00\x00\x00\x00\x01x\x00\x00\x00\x00\x01y", "0", "")
		}, envoy.GRPCOK, "more than one"},
		{"truncated message", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "\x00\x00\x00\x00\x09x", "0", "") }, envoy.GRPCOK, "unexpected EOF"},
		{"truncated prefix", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "\x00\x00", "0", "") }, envoy.GRPCOK, "unexpected EOF"},
		{"compressed message", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "\x01\x00\x00\x00\x01x", "0", "") }, envoy.GRPCOK, "compressed"},
		{"message above the limit", false, func(w http.ResponseWriter, _ *http.Request) { reply(w, "\x00\x7f\x00\x00\x01x", "0", "") }, envoy.GRPCOK, "the limit of 1048576"},
		{"a web page", false, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }, envoy.GRPCOK, "text/html"},
		{"HTTP/1", true, func(w http.ResponseWriter, _ *http.Request) { reply(w, "", "0", "") }, envoy.GRPCOK, "HTTP/1.1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := serve(t, !test.http1, test.handler).Call(t.Context(), "/s/m", nil)
			if err == nil || !strings.Contains(err.Error(), test.text) {
				t.Fatalf("error %v, want one with %q", err, test.text)
			}
			var status *Error
			if errors.As(err, &status) != (test.code != envoy.GRPCOK) || status != nil && status.Code != test.code {
				t.Errorf("error %#v, want code %v", err, test.code)
			}
		})
	}
}

func TestAStreamCarriesMessagesBothWaysAtOnce(t *testing.T) {
	client := serve(t, true, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		buffer := make([]byte, 64)
		for {
			n, err := io.ReadFull(r.Body, buffer[:6])
			if err != nil {
				break
			}
			w.Write(buffer[:n])
			w.(http.Flusher).Flush()
		}
		w.Header().Set("Grpc-Status", "0")
	})
	stream, err := client.Stream(t.Context(), "/s/m")
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var got []string
	for _, message := range []string{"a", "b", "c"} {
		if err := stream.Send([]byte(message)); err != nil {
			t.Fatal(err)
		}
		message, err := stream.Receive()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(message))
	}
	if !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("got %q", got)
	}
	stream.CloseSend()
	if _, err := stream.Receive(); err != io.EOF {
		t.Errorf("error %v, want io.EOF after the last message", err)
	}
}

func TestClosingAStreamEndsItsCalls(t *testing.T) {
	client := serve(t, true, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	stream, err := client.Stream(t.Context(), "/s/m")
	if err != nil {
		t.Fatal(err)
	}
	received := make(chan error)
	go func() {
		_, err := stream.Receive()
		received <- err
	}()
	stream.Close()
	if err := <-received; !errors.Is(err, context.Canceled) {
		t.Errorf("Receive returned %v", err)
	}
	if err := stream.Send([]byte("late")); err == nil {
		t.Error("Send returned no error")
	}
	stream.Close()
}

func TestAStreamWhoseServerIsAwayFailsInBothDirections(t *testing.T) {
	client := serve(t, true, nil)
	client.Base.Host = "127.0.0.1:1"
	stream, err := client.Stream(t.Context(), "/s/m")
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if _, err := stream.Receive(); err == nil {
		t.Error("Receive returned no error")
	}
	if err := stream.Send(nil); err == nil {
		t.Error("Send returned no error")
	}
}

func TestTheTextOfAStatusIsBounded(t *testing.T) {
	client := serve(t, true, func(w http.ResponseWriter, _ *http.Request) { reply(w, "", "13", strings.Repeat("x", 10*maxText)) })
	_, err := client.Call(t.Context(), "/s/m", nil)
	var status *Error
	if !errors.As(err, &status) || len(status.Text) != maxText {
		t.Errorf("error %.100v with %d bytes, want %d", err, len(status.Text), maxText)
	}
}

// Messages arrive whole, in parts or not. A large one has no copy while it is sent.
func TestLargeMessagesAreNotCopied(t *testing.T) {
	large := bytes.Repeat([]byte("0123456789"), 100<<10)
	if parts := frame(large[:5], large); len(parts) != 3 || &parts[2][0] != &large[0] {
		t.Error("a large message is copied")
	}
	for _, parts := range [][][]byte{{large}, {large[:9], large}, {[]byte("head"), []byte("rest")}, {nil, []byte("rest")}, {nil}} {
		want := bytes.Join(parts, nil)
		var got [][]byte
		client := serve(t, true, func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			got = append(got, b)
			reply(w, "\x00\x00\x00\x00\x00", "0", "")
		})
		if _, err := client.Call(t.Context(), "/s/m", want); err != nil {
			t.Fatal(err)
		}
		stream, err := client.Stream(t.Context(), "/s/m")
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.SendParts(parts...); err != nil {
			t.Fatal(err)
		}
		stream.CloseSend()
		if _, err := stream.Receive(); err != nil {
			t.Fatal(err)
		}
		stream.Close()
		want = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(want))), want...)
		if len(got) != 2 || !bytes.Equal(got[0], want) || !bytes.Equal(got[1], want) {
			t.Errorf("%d parts: the server gets another message", len(parts))
		}
	}
}
