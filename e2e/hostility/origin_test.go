package hostility

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
)

// originAddress is where the workload serves, in the pod. The rules exclude the ports of directAddress and bystanderAddress, so
// that connections to them go past the agent: directAddress leads to the same process, bystanderAddress to another one of the
// same program. secondAddress leads through the agent to that one.
const (
	originAddress    = "198.51.100.2:8080"
	secondAddress    = "198.51.100.2:8083"
	directAddress    = "198.51.100.2:8082"
	bystanderAddress = "198.51.100.2:8081"
)

// piece is a part of the large response. All responses share it.
var piece [64 << 10]byte

// runOrigin serves on all addresses, over HTTP/1 and HTTP/2, until its standard input ends.
//
//	/        a short response
//	/never   no response, as long as the client is there
//	/large   a response of 64 MiB
//	/bodies  see serveBodies
//	/interim interim responses without end, over HTTP/1
func runOrigin(addresses []string) {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })
	mux.HandleFunc("/never", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	mux.HandleFunc("/large", func(w http.ResponseWriter, _ *http.Request) {
		for range 1 << 10 {
			if _, err := w.Write(piece[:]); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/bodies", serveBodies)
	mux.HandleFunc("/interim", func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		hints := []byte(strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n", 500))
		for {
			if _, err := conn.Write(hints); err != nil {
				return
			}
		}
	})
	server := &http.Server{Handler: mux, Protocols: new(http.Protocols), ErrorLog: log.New(io.Discard, "", 0), MaxHeaderBytes: 4 << 20}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	server.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 100_000}
	for _, address := range addresses {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		go server.Serve(listener)
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}
