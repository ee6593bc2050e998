package export

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// streamTo starts a server of gRPC, and returns a sender of streams to it.
func streamTo(t *testing.T, handler http.HandlerFunc) *StreamSender {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	t.Cleanup(server.Close)
	base, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	return &StreamSender{GRPCSender: *NewGRPCSender(transport, *base, nil, "/s/m", 4*nettest.Patience), refusal: nettest.Patience}
}

// A batch is not sent again to a receiver that refuses the stream for good.
func TestARefusedStreamIsNotTriedAgain(t *testing.T) {
	for code, again := range map[string]bool{"7": false, "12": false, "16": false, "4": true, "14": true} {
		s := streamTo(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", code)
		})
		_, err := s.Send(t.Context(), []byte("batch"))
		var temporary *Temporary
		if err == nil || errors.As(err, &temporary) != again {
			t.Errorf("status %s: error %#v, want a temporary one: %v", code, err, again)
		}
		s.Close(t.Context())
	}
}

// The status of a stream that has taken batches does not refuse the next batch: a new stream may take it.
func TestABatchIsSentAgainAfterTheEndOfAStream(t *testing.T) {
	s := streamTo(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		w.(http.Flusher).Flush()
		io.ReadFull(r.Body, make([]byte, len("batch")))
		w.Header().Set("Grpc-Status", "16")
	})
	if _, err := s.Send(t.Context(), []byte("batch")); err != nil {
		t.Fatal(err)
	}
	var temporary *Temporary
	nettest.Eventually(t, "a temporary error", func() bool { // a batch may be taken while the stream ends
		_, err := s.Send(t.Context(), []byte("batch"))
		if err != nil && !errors.As(err, &temporary) {
			t.Fatalf("error %v is not temporary", err)
		}
		return err != nil
	})
	s.Close(t.Context())
}
