// Command websocket is a WebSocket server and client: `websocket serve ADDRESS` echoes every message, and `websocket talk
// URL` sends messages and checks the echo. Its exit status is not 0 if a message is lost.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/coder/websocket"
)

const largest = 4 << 20

// goodbye is the close status that both sides send.
const goodbye websocket.StatusCode = 4711

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: websocket serve ADDRESS | websocket talk URL")
	}
	var err error
	switch verb, where := os.Args[1], os.Args[2]; verb {
	case "serve":
		err = http.ListenAndServe(where, http.HandlerFunc(echo))
	case "talk":
		err = talk(where)
	default:
		err = fmt.Errorf("unknown word %q", verb)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func echo(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{
		Subprotocols: []string{"echo"}, CompressionMode: websocket.CompressionContextTakeover,
	})
	if err != nil {
		log.Print(err)
		return
	}
	defer conn.CloseNow()
	conn.SetReadLimit(largest)
	for {
		kind, message, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		if err := conn.Write(r.Context(), kind, message); err != nil {
			return
		}
	}
}

func talk(url string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, _, err := websocket.Dial(ctx, url, &websocket.DialOptions{
		Subprotocols: []string{"echo"}, CompressionMode: websocket.CompressionContextTakeover,
	})
	if err != nil {
		return fmt.Errorf("opening: %w", err)
	}
	defer conn.CloseNow()
	conn.SetReadLimit(largest)
	if got := conn.Subprotocol(); got != "echo" {
		return fmt.Errorf("the subprotocol is %q, want echo", got)
	}
	for _, size := range []int{0, 1, 125, 126, 65535, 65536, largest - 1} {
		if err := exchange(ctx, conn, size); err != nil {
			return fmt.Errorf("a message of %d bytes: %w", size, err)
		}
	}
	for range 200 {
		if err := exchange(ctx, conn, 100); err != nil {
			return fmt.Errorf("many small messages: %w", err)
		}
	}
	return end(ctx, conn)
}

// exchange sends a message, in several frames when it is large, and waits for its echo.
func exchange(ctx context.Context, conn *websocket.Conn, size int) error {
	message := make([]byte, size)
	rand.Read(message)
	writer, err := conn.Writer(ctx, websocket.MessageBinary)
	if err != nil {
		return err
	}
	if _, err := io.Copy(writer, bytes.NewReader(message)); err != nil {
		return err
	}
	if err := writer.Close(); err != nil {
		return err
	}
	kind, back, err := conn.Read(ctx)
	if err == nil && (kind != websocket.MessageBinary || !bytes.Equal(back, message)) {
		err = fmt.Errorf("another message of %d bytes came back", len(back))
	}
	return err
}

// end pings once more, closes with a status of our own, and wants it back.
func end(ctx context.Context, conn *websocket.Conn) error {
	reading := make(chan error, 1)
	go func() {
		_, _, err := conn.Read(ctx) // which also takes the pong
		reading <- err
	}()
	if err := conn.Ping(ctx); err != nil {
		return fmt.Errorf("ping: %w", err)
	}
	if err := conn.Close(goodbye, "that is all"); err != nil {
		return fmt.Errorf("closing: %w", err)
	}
	var closed websocket.CloseError
	if err := <-reading; errors.As(err, &closed) && closed.Code != goodbye {
		return fmt.Errorf("closed with %v, want %d", closed, goodbye)
	}
	return nil
}
