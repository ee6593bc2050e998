package ownport_test

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/ownport"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func TestIdleConnectionsDoNotKeepAProbeOut(t *testing.T) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := ownport.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- server.Serve(ownport.Bound(listener)) }()
	defer func() {
		server.Close()
		<-served
	}()
	var idle []net.Conn
	for range 300 { // they send nothing
		conn, err := net.Dial("tcp4", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		idle = append(idle, conn)
	}
	response, err := http.Get("http://" + listener.Addr().String())
	if err != nil {
		t.Fatalf("a probe behind 300 idle connections: %v", err)
	}
	response.Body.Close()
	idle[0].SetReadDeadline(time.Now().Add(3 * time.Second)) // before its own time limit
	if _, err := idle[0].Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the oldest idle connection is still open: %v", err)
	}
}
